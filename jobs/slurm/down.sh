#!/usr/bin/env bash
# Ends what up.sh began; the folder stays: jobs/slurm/down.sh [FOLDER]
set -euo pipefail

folder=$(realpath -m "${1:-/tmp/dare-slurm}")
[ -f "$folder/slurm.conf" ] || { echo "slurm: nothing in $folder" >&2; exit 1; }
export SLURM_CONF=$folder/slurm.conf

pids() { cat "$folder"/run/{slurmd-*,slurmctld,slurmdbd,munged,mysql}.pid 2>/dev/null || true; }
timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
for _ in $(seq 400); do
  [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] || break
  sleep 0.1
done
ending=$(pids)
for pid in $ending; do kill "$pid" 2>/dev/null || true; done
for pid in $ending; do
  for _ in $(seq 100); do
    kill -0 "$pid" 2>/dev/null || continue 2
    sleep 0.1
  done
  kill -9 "$pid" 2>/dev/null || true
done
