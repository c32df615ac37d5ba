#!/usr/bin/env bash
# Installs, trains on the embedded digits, draws samples, evaluates them and
# writes WORKDIR/report.html: the complete workflow, on a laptop, in minutes and
# without a download. Run it again to resume from the newest checkpoint.
#
#   bash launch/local.sh [--fresh] [WORKDIR] [--config.num_steps=5000 ...]
#
#   --fresh    start over: remove WORKDIR first
#   WORKDIR    runs/digits by default
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."

fresh=
workdir=runs/digits
overrides=()
for argument in "$@"; do
  case $argument in
    --fresh) fresh=yes ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --config.*) overrides+=("$argument") ;;
    -*) echo "error: $argument is unknown; see --help" >&2; exit 2 ;;
    /*) workdir=$argument ;;
    *) workdir=$here/$argument ;;
  esac
done

if [ -n "$fresh" ] && [ -e "$workdir" ]; then
  # Removes only files that a run has written, and only from a run.
  grep -qs '"num_timesteps"' "$workdir/config.json" || {
    echo "error: $workdir is not a run, so --fresh leaves it alone" >&2
    exit 2
  }
  for part in config.json starts.jsonl checkpoints held.json metrics.jsonl \
    samples evaluations calibration inversions heartbeats report.html \
    init_from.json .lock; do
    rm -rf "${workdir:?}/$part"
  done
  rm -f "$workdir"/events.out.tfevents.*
fi

. launch/environment.sh
install_package .
keep_memory

python -m diffusion_jax.train --config=configs/digits.py \
  --workdir="$workdir" ${overrides[@]+"${overrides[@]}"}
python -m diffusion_jax.sample --workdir="$workdir" --num_samples=100 \
  --sampler=ddim --num_steps=50 --trajectory=8
python -m diffusion_jax.evaluate --workdir="$workdir" --num_samples=2000 \
  --sampler=ddim --num_steps=50
