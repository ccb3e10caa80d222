#!/usr/bin/env bash
# On a worker of a TPU VM: starts a psa-jax command again for as long as it ends with exit code 75.
#
#   tpu_job.sh start COMMAND [ARGUMENT...]   starts it in the background
#   tpu_job.sh again                         after a reboot: starts what had not ended
#   tpu_job.sh stop                          lets it save and end, and does not start it again
#
# Of the job, the folder of the project has: job.words, its words with a zero byte after each; job.exit, the exit code of
# a job that has ended; run.log, all output. Any exit code but 75 ends a job.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PAUSE=${PSA_JAX_PAUSE:-10} # seconds between two starts
STARTS=1000                # of a job between two reboots: one worker may fail for good while the others wait for it

say() {
  echo "tpu_job.sh: $1" | tee -a run.log >&2
}

runs() {
  ! flock --nonblock job.lock true
}

loop() {
  local words=() child='' code=0 told=no start
  exec 9>>job.lock
  flock --nonblock 9 || exit 1
  mapfile -d '' -t words <job.words
  # Of a reboot every process hears by itself; psa-jax takes a second signal as a wish to end without saving.
  trap 'told=yes' TERM INT
  for ((start = 1; start <= STARTS; start++)); do
    .venv/bin/psa-jax "${words[@]}" 9>&- &
    child=$!
    echo "$child" >job.pid
    while :; do
      code=0
      wait "$child" || code=$?
      kill -0 "$child" 2>/dev/null || break # else it was the wait that a signal ended
    done
    rm -f job.pid
    [[ $told == no ]] || exit 0 # no job.exit: it goes on after the reboot
    [[ ! -e job.exit ]] || exit 0
    ((code == 75)) || break
    echo "tpu_job.sh: exit code 75 of start $start; again in $PAUSE s"
    sleep "$PAUSE" & # in the background: a signal must not wait for its end
    wait $! || true
    [[ $told == no && ! -e job.exit ]] || exit 0
  done
  echo "tpu_job.sh: ended with exit code $code after start $((start > STARTS ? STARTS : start))"
  echo "$code" >job.exit # last: who sees it finds the line above in the log
}

background() {
  setsid nohup "$PWD/launch/tpu_job.sh" loop >>run.log 2>&1 </dev/null &
}

case ${1-} in
  start)
    shift
    if runs; then
      say 'error: a job runs here already; stop it first'
      exit 1
    fi
    printf '%s\0' "$@" >job.words
    rm -f job.exit
    background
    ;;
  again)
    [[ -e job.words && ! -e job.exit ]] || exit 0
    say 'the machine has started; the job goes on'
    background
    ;;
  stop)
    echo stopped >job.exit
    [[ ! -e job.pid ]] || kill -TERM "$(<job.pid)"
    say 'told to stop'
    ;;
  loop) loop ;;
  *)
    echo 'tpu_job.sh: error: give start COMMAND, again or stop' >&2
    exit 2
    ;;
esac
