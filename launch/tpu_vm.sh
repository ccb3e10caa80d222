#!/usr/bin/env bash
# TPU VMs of v5e, v5p and v6e as queued resources: the older way, which has no newer chip; see launch/gke.py.
set -euo pipefail

UV=0.13.9 # brings a Python of its own: that of a TPU VM may be too old

usage() {
  cat <<'TEXT'
usage: launch/tpu_vm.sh ACTION --name=NAME --zone=ZONE [OPTIONS] [-- psa-jax COMMAND [ARGUMENT...]]

TPU VMs of v5e, v5p and v6e as queued resources. The provider only maintains this way and offers newer chips on GKE
alone: launch/gke.py.

actions:
  create   asks for a TPU VM that goes on with its job when it is started again
  run      copies the project to ~/psa_jax of every worker, installs it there and starts the command on each
  status   says what state it is in; deletes what has failed or was taken away, since that counts against the quota
  logs     shows what the command wrote
  stop     lets the command save and end
  delete   deletes the TPU VM

Exit code 75 of the command and a reboot start it again on its worker; any other exit code ends it. Data and --workdir
must be where every worker finds them. A TPU VM that was taken away is gone with its disks: status and create --wait
then end with exit code 75; create it and run the command again, and it goes on from its last checkpoint.

  --name=NAME       name of the queued resource, and of the TPU VM
  --zone=ZONE       its zone
  --project=ID      its project (default: that of gcloud)
  --slices=N        number of slices (default: 1)
  --dry-run         only print the commands
create:
  --type=TYPE       v5litepod-CHIPS, v5p-CORES or v6e-CHIPS, such as v6e-16
  --spot, --guaranteed, --reserved
                    how it is paid for
  --valid-until=D   gives up the wait for free TPUs after this time, such as 6h
  --tries=N         most attempts where the quota is used up (default: 5)
  --pause=S         seconds between attempts and between looks (default: 60)
  --wait            wait until it can be used
run:
  --python=VERSION  3.11, 3.12 or 3.13 (default: 3.12)
  --attach          run the command once over this connection, and end with its exit code
  --no-install      only start the command, where the project is installed already
logs:
  --worker=N        of this worker (default: 0), or all
  --follow          go on showing

example:
  launch/tpu_vm.sh create --name=pod --zone=us-east5-a --type=v6e-16 --spot --wait
  launch/tpu_vm.sh run --name=pod --zone=us-east5-a -- psa-jax train --config=configs/sd15.py \
      --workdir=/mnt/share/run --config.model=/mnt/share/sd15 --config.data.shards=/mnt/share/shards \
      --config.data.table=/mnt/share/table.safetensors
TEXT
}

say() {
  echo "tpu_vm.sh: $1" >&2
}

fail() {
  say "error: $1"
  exit "${2:-2}"
}

# Quotes words for a POSIX shell, as one line.
quoted() {
  local word line=''
  for word in "$@"; do
    line+=" '${word//\'/\'\\\'\'}'"
  done
  printf '%s' "${line# }"
}

run() {
  if [[ $dry_run == yes ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# Runs a line of shell on a worker of the first slice, or on all of all.
on_workers() {
  local slice=("${every_slice[@]/all/0}")
  [[ $1 != all ]] || slice=("${every_slice[@]}")
  run "${reached[@]}" ssh "$name" "${where[@]}" "${slice[@]}" "--worker=$1" "--command=$2"
}

delete() {
  run "${queued[@]}" delete "$name" "${where[@]}" --force --quiet
}

# Says the state, which is then in $state, and deletes what will never be of use. Exit code 75: create it again.
look() {
  if [[ $dry_run == yes ]]; then
    run "${queued[@]}" describe "$name" "${where[@]}" '--format=value(state.state)'
    ((slices > 1)) || run "${vm[@]}" describe "$name" "${where[@]}" '--format=value(state)'
    echo '# if it has failed or was taken away:'
    delete
    return
  fi
  state=$("${queued[@]}" describe "$name" "${where[@]}" '--format=value(state.state)') || fail "$name: no state" 1
  if [[ $state == ACTIVE && $slices == 1 ]]; then
    state=$("${vm[@]}" describe "$name" "${where[@]}" '--format=value(state)') || fail "$name: no state" 1
    [[ $state != READY ]] || state=ACTIVE
  fi
  echo "$name: $state"
  case $state in
    FAILED)
      "${queued[@]}" describe "$name" "${where[@]}" '--format=value(state.failedData.error.message)' >&2
      delete
      fail "$name has failed and was deleted; change what you ask for and create it again" 1
      ;;
    SUSPENDED | PREEMPTED | TERMINATED)
      delete
      say "$name was taken away, and is deleted since it counted against the quota; create it and run again"
      exit 75
      ;;
  esac
}

create() {
  local attempt command message runtime waits=$pause
  case $type in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    '') fail 'no type; give --type=TYPE, such as v6e-16' ;;
    *) fail "--type=$type: only v5litepod-, v5p- and v6e- are there; newer chips are on GKE: launch/gke.py" ;;
  esac
  [[ $type =~ ^[a-z0-9]+-[1-9][0-9]*$ ]] || fail "--type=$type: give a number after the dash, such as v6e-16"
  command=("${queued[@]}" create "$name" "${where[@]}" "--accelerator-type=$type" "--runtime-version=$runtime")
  if ((slices == 1)); then
    command+=("--node-id=$name")
  else
    command+=("--node-count=$slices" "--node-prefix=$name")
  fi
  command+=("${paid[@]}")
  [[ -z $valid_until ]] || command+=("--valid-until-duration=$valid_until")
  command+=("--metadata-from-file=startup-script=$root/launch/tpu_startup.sh")
  if [[ $dry_run == yes ]]; then
    run "${command[@]}"
    [[ $wait == no ]] || look
    return
  fi
  for ((attempt = 1; ; attempt++)); do
    if message=$("${command[@]}" 2>&1); then
      echo "$message"
      break
    fi
    echo "$message" >&2
    [[ $message =~ RESOURCE_EXHAUSTED|[Qq]uota ]] || fail "$name was not created" 1
    ((attempt < tries)) || fail "the quota is still used up after $tries attempts; $name was not created" 1
    say "the quota is used up; attempt $((attempt + 1)) of $tries in $waits s"
    sleep "$waits"
    waits=$((waits * 2))
  done
  [[ $wait == no ]] || look
  while [[ $wait == yes && $state != ACTIVE ]]; do
    sleep "$pause"
    look
  done
}

install() {
  local constraints=constraints-py312.txt
  [[ $python != 3.11 ]] || constraints=constraints.txt
  if [[ $dry_run == yes ]]; then
    folder=${TMPDIR:-/tmp}/psa_jax.XXXXXX
  else
    folder=$(mktemp -d "${TMPDIR:-/tmp}/psa_jax.XXXXXX") # not local: the trap outlives this function
    trap 'rm -rf "$folder"' EXIT
  fi
  run tar -czf "$folder/psa_jax.tar.gz" --exclude=__pycache__ -C "$root" \
    psa_jax configs launch setup.py pyproject.toml README.md constraints.txt constraints-py312.txt
  run "${reached[@]}" scp "$folder/psa_jax.tar.gz" "$name:psa_jax.tar.gz" "${where[@]}" \
    "${every_slice[@]}" --worker=all
  on_workers all "set -eu
mkdir -p psa_jax
tar -xzf psa_jax.tar.gz -C psa_jax
cd psa_jax
test -x .uv/bin/uv || python3 -m pip install --quiet --target=.uv uv==$UV
.uv/bin/uv python install --quiet $python
.uv/bin/uv venv --quiet --allow-existing --python=$python .venv
.uv/bin/uv pip install --quiet --python=.venv/bin/python --constraints=$constraints '.[tpu]'"
}

start() {
  local line
  [[ $install == no ]] || install
  line="cd psa_jax && launch/tpu_job.sh start $(quoted "$@")"
  [[ $attach == no ]] || line="cd psa_jax && exec .venv/bin/psa-jax $(quoted "$@")"
  on_workers all "$line"
}

action='' name='' zone='' project='' slices=1 dry_run=no
type='' paid=() valid_until='' tries=5 pause=60 wait=no
python=3.12 attach=no install=yes worker=0 follow='' old=no
case ${1-} in
  create | run | status | logs | stop | delete)
    action=$1
    shift
    ;;
  --help | -h) ;;
  --*)
    say 'no action: this is taken as run --attach; the next release will want the action, and psa-jax after --'
    action=run attach=yes old=yes
    ;;
  *) fail "${1:-nothing} is no action; --help lists them" ;;
esac
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --spot | --guaranteed | --reserved) paid+=("$1") ;;
    --valid-until=*) valid_until=${1#*=} ;;
    --tries=*) tries=${1#*=} ;;
    --pause=*) pause=${1#*=} ;;
    --wait) wait=yes ;;
    --python=*) python=${1#*=} ;;
    --attach) attach=yes ;;
    --detach) attach=no ;;
    --no-install) install=no ;;
    --worker=*) worker=${1#*=} ;;
    --follow) follow='-f ' ;;
    --dry-run) dry_run=yes ;;
    --help | -h)
      usage
      exit 0
      ;;
    --)
      shift
      break
      ;;
    *) fail "unknown option $1; --help lists them, and the command comes after --" ;;
  esac
  shift
done
[[ -n $name ]] || fail 'no TPU; give --name=TPU'
[[ $name =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] || fail "--name=$name: give small letters, digits and -, a letter first"
[[ -n $zone ]] || fail 'no zone; give --zone=ZONE'
for number in "--slices=$slices" "--tries=$tries" "--pause=$pause"; do
  [[ $number =~ =(0|[1-9][0-9]{0,5})$ ]] || fail "$number: give a number"
done
((slices > 0 && tries > 0)) || fail '--slices and --tries must be at least 1'
[[ $python =~ ^3\.1[123]$ ]] || fail "--python=$python: give 3.11, 3.12 or 3.13"
[[ $worker =~ ^([0-9]+|all)$ ]] || fail "--worker=$worker: give a number or all"
((${#paid[@]} < 2)) || fail "${paid[*]}: give one of them"
if [[ $action == run ]]; then
  (($#)) || fail 'no command; give one after --: -- psa-jax train --config=configs/sd15.py --workdir=DIR'
  if [[ ${1##*/} == psa-jax ]]; then
    shift
    (($#)) || fail 'psa-jax alone does nothing; give its command: -- psa-jax train …'
  elif [[ $old == no ]]; then
    fail "$1 is not psa-jax; give its command after --: -- psa-jax train …"
  fi
  # The environment of a TPU VM names no coordinator; with auto, JAX asks the VM.
  [[ $1 != train || " $* " == *' --coordinator='* ]] || set -- "$@" --coordinator=auto
elif (($#)); then
  fail "a command is for run, not for $action"
fi
[[ $dry_run == yes ]] || command -v gcloud >/dev/null || fail 'gcloud not found; install the Google Cloud CLI' 1

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
vm=(gcloud compute tpus tpu-vm)
queued=(gcloud compute tpus queued-resources)
reached=("${vm[@]}") every_slice=()
if ((slices > 1)); then
  reached=("${queued[@]}") every_slice=(--node=all)
fi
where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")

case $action in
  create) create ;;
  run) start "$@" ;;
  status) look ;;
  logs) on_workers "$worker" "tail ${follow}-n 100 psa_jax/run.log" ;;
  stop) on_workers all 'psa_jax/launch/tpu_job.sh stop' ;;
  delete) delete ;;
esac
