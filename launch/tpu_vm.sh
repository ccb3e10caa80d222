#!/usr/bin/env bash
# Installs this project on every worker of a TPU VM slice and starts the same psa-jax command on each.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/tpu_vm.sh --name=TPU --zone=ZONE [options] -- COMMAND [ARGUMENT...]

Copies the project to ~/psa_jax of every worker, installs it there with pip install '.[tpu]' and the constraints
of its Python, and runs psa-jax COMMAND ARGUMENT... in that folder. Data and --workdir must be where every worker finds
them.

  --name=TPU        name of the TPU VM
  --zone=ZONE       zone of the TPU VM
  --project=ID      project of the TPU VM (default: that of gcloud)
  --python=PYTHON   Python 3.11 or newer on the workers (default: python3.11)
  --detach          return at once; the command keeps running and writes to ~/psa_jax/run.log
  --no-install      only start the command, where the project is installed already
  --dry-run         only print the commands

example:
  launch/tpu_vm.sh --name=pod --zone=us-east5-a --detach -- train --config=configs/sd15.py --workdir=/mnt/share/run \
      --config.model=/mnt/share/sd15 --config.data.shards=/mnt/share/shards \
      --config.data.table=/mnt/share/table.safetensors
TEXT
}

fail() {
  echo "tpu_vm.sh: error: $1" >&2
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

name='' zone='' project='' python=python3.11 detach=no install=yes dry_run=no
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --detach) detach=yes ;;
    --no-install) install=no ;;
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
[[ -n $zone ]] || fail 'no zone; give --zone=ZONE'
(($#)) || fail 'no command; give one after --, such as -- train --config=configs/sd15.py --workdir=DIR'
[[ $dry_run == yes ]] || command -v gcloud >/dev/null || fail 'gcloud not found; install the Google Cloud CLI' 1

# The environment of a TPU VM names no coordinator; with auto, JAX asks the VM.
[[ $1 != train ]] || set -- "$@" --coordinator=auto

tpu=(gcloud compute tpus tpu-vm)
where=("--zone=$zone" --worker=all)
[[ -z $project ]] || where+=("--project=$project")

on_all() {
  run "${tpu[@]}" ssh "$name" "${where[@]}" "--command=$1"
}

if [[ $install == yes ]]; then
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  if [[ $dry_run == yes ]]; then
    folder=${TMPDIR:-/tmp}/psa_jax.XXXXXX
  else
    folder=$(mktemp -d "${TMPDIR:-/tmp}/psa_jax.XXXXXX")
    trap 'rm -rf "$folder"' EXIT
  fi
  run tar -czf "$folder/psa_jax.tar.gz" --exclude=__pycache__ -C "$root" \
    psa_jax configs setup.py pyproject.toml README.md constraints.txt constraints-py312.txt
  run "${tpu[@]}" scp "$folder/psa_jax.tar.gz" "$name:psa_jax.tar.gz" "${where[@]}"
  on_all "set -eu
mkdir -p psa_jax
tar -xzf psa_jax.tar.gz -C psa_jax
cd psa_jax
$(quoted "$python") -m venv .venv
constraints=constraints-py312.txt
test ! -d .venv/lib/python3.11 || constraints=constraints.txt
.venv/bin/python -m pip install --quiet --constraint \$constraints '.[tpu]'"
fi

start="cd psa_jax && exec .venv/bin/psa-jax $(quoted "$@")"
if [[ $detach == yes ]]; then
  start="cd psa_jax && exec setsid nohup .venv/bin/psa-jax $(quoted "$@") >run.log 2>&1 </dev/null &"
fi
on_all "$start"
