#!/usr/bin/env bash
# Half an hour of one GPU: trains the full CIFAR-10 network in bfloat16, draws
# 10,000 samples with 50 steps of DDIM, and measures their 768-d distance and
# that of held-out images, at five checkpoints. Each call ends within nine
# minutes, saving included; the same command resumes, and says when all is done.
# Curves, samples, cards and timings are in WORKDIR/reproduction, below 30 MB.
#
#   bash launch/half_hour.sh DATA.npz INCEPTION [WORKDIR] [FLAGS]
#
#   DATA.npz    train_images, test_images: uint8 [N, 32, 32, 3]
#   INCEPTION   the Inception weights, at least up to mixed_7 (docs/fid.md)
#   WORKDIR     by default runs/half_hour; needs 15 GB of disk
#   FLAGS       of diffusion_jax.reproduce; they override those below
#   PYTHON      by default python; it needs '.[cuda]'
set -euo pipefail

absolute() { case $1 in /* | *://*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

case ${1:-} in -h | --help) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
if [ $# -lt 2 ] || [[ $1 == -* || $2 == -* ]]; then
  echo 'error: DATA.npz and INCEPTION are missing; see --help' >&2
  exit 2
fi
data=$(absolute "$1")
inception=$(absolute "$2")
shift 2
workdir=$PWD/runs/half_hour
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
  workdir=$(absolute "$1")
  shift
fi
for argument in "$@"; do
  case $argument in
    --workdir=*) workdir=${argument#*=} ;;
    --*) ;;
    *) echo "error: $argument is not a flag; see --help" >&2; exit 2 ;;
  esac
done

defaults=(
  --config=cifar10
  --config.data.name=arrays "--config.data.path=$data"
  --config.model.dtype=bfloat16
  # Training ends by the clock, after tens of thousands of steps instead of
  # 800,000: about 40,000 at the rate estimated for an H200. So the averages
  # cover 1,000 steps instead of 10,000, and the warm-up takes 1,000 instead of
  # 5,000: both have forgotten the start at the first kept checkpoint, 5,000.
  --config.ema.decay=0.999
  --config.optim.warmup_steps=1000
  --config.keep_every=5000  # 0.6 GB each; four of them are judged, too
  --config.sample_every=0  # samples are drawn at the end
  "--workdir=$workdir" "--features=$inception" --taps=768
  --num_samples=10000 --sampler=ddim --num_steps=50 --curve=4 --nobits
  --minutes=9 --train_minutes=16
)
flags=()
for flag in "${defaults[@]}"; do
  given=
  for argument in "$@"; do
    [ "${argument%%=*}" != "${flag%%=*}" ] || given=yes
  done
  [ -n "$given" ] || flags+=("$flag")
done

# The checkout's own, from wherever it is called.
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# A program that was compiled in one call is not compiled again in the next.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$workdir.compiled}
exec "${PYTHON:-python}" -m diffusion_jax.reproduce "${flags[@]}" "$@"
