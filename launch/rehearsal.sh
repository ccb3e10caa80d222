#!/usr/bin/env bash
# A rehearsal of a pod on one machine: processes on CPUs stand for hosts, SAGE-mini for the data.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/rehearsal.sh [OPTIONS] FOLDER

Goes once through what a pod does, on this machine and without a TPU:

  1  N hosts encode shards, a part each
  2  they train on one mesh; one host is killed, and the group comes back by itself
  3  all get SIGTERM, save, and end with exit code 75; half as many hosts go on
  4  the adapter leaves as a file, pictures are drawn with it, and its curves are a page
  5  a sweep of learning rates with two seeds each, two trainings at a time, and its report

  --hosts=N          even (default: 4)
  --steps=N          of training, from 12 (default: 24)
  --config=NAME      of the training (default: tiny)
  --model=MODEL      its base model (default: tiny, the embedded one)
  --users=N          of SAGE-mini's training split (default: 100)
  --psa-jax=COMMAND  (default: psa-jax)
  --rates=A,B,...    learning rates of the sweep (default: 1e-3,3e-3,1e-2,3e-2)
  --no-sweep         without the last part

FOLDER is new; run.log in it has what the hosts said. The last line is JSON.
TEXT
}

fail() {
  echo "rehearsal.sh: error: $1" >&2
  exit "${2:-2}"
}

number='[0-9]+(\.[0-9]+)?(e-?[0-9]+)?'
hosts=4 steps=24 config=tiny model=tiny users=100 rates=1e-3,3e-3,1e-2,3e-2 sweep=yes psa_jax=psa-jax folder=
while (($#)); do
  case $1 in
    --hosts=*) hosts=${1#*=} ;;
    --steps=*) steps=${1#*=} ;;
    --config=*) config=${1#*=} ;;
    --model=*) model=${1#*=} ;;
    --users=*) users=${1#*=} ;;
    --rates=*) rates=${1#*=} ;;
    --no-sweep) sweep=no ;;
    --psa-jax=*) psa_jax=${1#*=} ;;
    --help | -h)
      usage
      exit 0
      ;;
    -*) fail "unknown option $1; --help lists them" ;;
    *) folder=$1 ;;
  esac
  shift
done
[[ -n $folder ]] || fail 'no folder; give a new one for everything that is written'
[[ ! -e $folder ]] || fail "$folder is there already; give a new folder"
[[ $hosts =~ ^([1-9]?[02468])$ && $hosts != 0 ]] || fail "--hosts=$hosts: give an even number"
[[ $steps =~ ^[1-9][0-9]+$ && $steps != 1[01] ]] || fail "--steps=$steps: give 12 or more"
[[ $users =~ ^[1-9][0-9]*$ ]] || fail "--users=$users: give a number"
[[ $rates =~ ^$number(,$number)*$ ]] || fail "--rates=$rates: give numbers such as 1e-3,3e-3"
command -v "$psa_jax" >/dev/null || fail "$psa_jax not found; install psa_jax, or give --psa-jax"
psa_jax=$(command -v "$psa_jax")
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
log=$folder/run.log
started=$SECONDS
# Hosts of a pod share what was compiled, and so do those that are started again.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$folder/compiled} JAX_PLATFORMS=cpu

# Runs psa-jax; what it prints goes to the log.
quietly() {
  "$psa_jax" "$@" >>"$log" 2>&1 || fail "psa-jax $1 ended with an error; see $log" 1
}

say() {
  echo "rehearsal.sh: $((SECONDS - started)) s: $1" | tee -a "$log" >&2
}

# Ends whatever still runs when the rehearsal ends, however it does.
group=
trap '[[ -z $group ]] || kill -TERM "$group" 2>/dev/null || true' EXIT

steps_done() {
  [[ -s $folder/run/metrics.jsonl ]] || { echo 0; return; }
  tail -n 1 "$folder/run/metrics.jsonl" | sed -E 's/.*"step": ([0-9]+).*/\1/'
}

# Waits until the run has made a step, or its group has ended.
wait_for_step() {
  while (($(steps_done) < $1)); do
    kill -0 "$group" 2>/dev/null || fail "the group ended before step $1; see $log" 1
    sleep 0.2
  done
}

train() { # N hosts; the rest are words of local.py
  local count=$1
  shift
  python3 "$launch/local.py" "--processes=$count" "$@" -- "$psa_jax" train "--config=$config" "--config.model=$model" \
    "--workdir=$folder/run" "--config.steps=$steps" --config.batch_size="$hosts" --config.mesh.data="$count" \
    --config.log_every=1 --config.checkpoint_every=$((steps / 6)) --config.optimizer.warmup_steps=2 \
    "--config.data.shards=$folder/shards" "--config.data.table=$folder/table.safetensors" \
    --config.data.mini.users=0 >>"$log" 2>&1 &
  group=$!
}

say "data: profiles, pictures, embeddings"
quietly mini "--out=$folder/sage" "--users=$users" --seed=1
quietly population --n=1000 --seed=2025 "--out=$folder/users.csv"
quietly encode "$folder/users.csv" "--out=$folder/table.safetensors"

say "$hosts hosts encode shards"
parts=()
for ((host = 0; host < hosts; host++)); do
  quietly build "$folder/sage" "--model=$model" "--out=$folder/shards" "--host=$host" "--hosts=$hosts" &
  parts+=($!)
done
for part in "${parts[@]}"; do
  wait "$part" || fail "a host that encodes ended with an error; see $log" 1
done
quietly build "$folder/sage" "--model=$model" "--out=$folder/shards"

say "$hosts hosts train"
train "$hosts" --restarts=3
wait_for_step 6
victim=$(pgrep -P "$group" | tail -n 1)
kill -KILL "$victim"
say "one host was killed after step $(steps_done)"
# Rows after the last checkpoint are written again: the file is shorter for a while.
while ! grep -q 'restart 1 of' "$log"; do
  kill -0 "$group" 2>/dev/null || fail "the group did not come back; see $log" 1
  sleep 0.2
done
killed=$(steps_done)
say 'the group starts again by itself'
wait_for_step "$((killed + 2))"
kill -TERM "$group"
since=$SECONDS
code=0
wait "$group" || code=$?
group=
((code == 75)) || fail "after SIGTERM the group ended with exit code $code, not 75; see $log" 1
say "SIGTERM to all: exit code 75 after $((SECONDS - since)) s, at step $(steps_done)"
saved=$((SECONDS - since))

train "$((hosts / 2))"
code=0
wait "$group" || code=$?
group=
((code == 0)) || fail "half of the hosts ended with exit code $code; see $log" 1
(($(steps_done) == steps)) || fail "the run ended after step $(steps_done) of $steps; see $log" 1
say "$((hosts / 2)) hosts went on to step $steps"

quietly curves "$folder/run"
quietly export "$folder/run" "--out=$folder/adapter.safetensors"
quietly generate "--model=$model" "--adapter=$folder/adapter.safetensors" '--profile={"age": 9, "gender": "female"}' \
  '--prompt=crossed blades and a house in the snow' --steps=4 --guidance=4 "--out=$folder/pictures"
say 'exported, drawn'

if [[ $sweep == yes ]]; then
  cat >"$folder/points.py" <<PYTHON
from psa_jax.tools.configs import read_config


def get_config():
    return read_config("tiny:dpo-smoke")


def sweep_rate():
    for rate in "$rates".split(","):
        yield {"optimizer.learning_rate": float(rate)}


def sweep_two():
    for seed in (0, 1):
        yield {"seed": seed}
PYTHON
  quietly sweep "--config=$folder/points.py" --sweep=rate,two --jobs=2 "--workdir=$folder/sweep" \
    "--config.model=$model" "--config.data.shards=$folder/shards" "--config.data.table=$folder/table.safetensors"
  quietly sweep report "$folder/sweep" --metric=loss
  commas=${rates//[^,]/}
  say "a sweep of $((2 * (${#commas} + 1))) points: $folder/sweep/sweep.html"
fi
echo "{\"adapter\": \"$folder/adapter.safetensors\", \"steps\": $steps, \"seconds_to_save\": $saved, \"seconds\": $((SECONDS - started))}"
