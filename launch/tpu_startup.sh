#!/usr/bin/env bash
# Startup script of a TPU VM, which runs it as root at every boot: jobs that had not ended go on.
set -euo pipefail

for job in "${PSA_JAX_HOMES:-/home}"/*/psa_jax/launch/tpu_job.sh; do
  [[ -x $job ]] || continue # also the pattern itself, where no home has the project
  owner=$(stat --format=%U "$job")
  if [[ $owner == "$(id -un)" ]]; then
    "$job" again
  else
    runuser --user "$owner" -- "$job" again
  fi
done
