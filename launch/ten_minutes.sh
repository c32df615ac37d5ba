#!/usr/bin/env bash
# Ten minutes of one GPU, in two calls that need no network: a benchmark of the
# training step, and a short training of the paper's network on CIFAR-10.
#
#   bash launch/ten_minutes.sh pack DATA.npz INCEPTION FILES [FLAGS]
#   bash launch/ten_minutes.sh a FILES OUTPUT [FLAGS]
#   bash launch/ten_minutes.sh b FILES OUTPUT [FLAGS]
#
#   pack    anywhere, beforehand: writes the files that the calls need to the
#           folder FILES: images as lossless sheets (--images=N: only the first
#           N), Inception in float16, and with --statistics the statistics of
#           the training and the held-out images
#   a       at most 4 minutes: the table of benchmarks/train_step.py at batch
#           256 in bfloat16: this project, beside compiled PyTorch, a profile,
#           without the measures of docs/speed.md, without single ones
#   b       at most 7 minutes: trains by the clock, draws 10,000 samples with
#           each of two samplers, and measures their 768-d distance and that of
#           held-out images to the training images
#   DATA    train_images, test_images: uint8 [N, 32, 32, 3]
#   FILES   may also hold wheels/*.whl, packages that the machine lacks, and
#           compiled.tar.gz, the programs of an earlier call
#   OUTPUT  a new folder, or that of the other call; each call leaves at most 8
#           files of at most 16 MiB there
#   FLAGS   --minutes=N, --config.KEY=VALUE; --rehearse allows a CPU, and takes
#           a narrow network and few samples. All of them:
#           python benchmarks/ten_minutes.py --help
#   PYTHON  by default python, or python3
#
# Every part ends by the clock, and what it has done is kept. A part that fails
# does not stop the next one: its error stands in the summary, a.txt or
# b.txt, and the exit code is 1. A mistake, such as a machine whose JAX sees
# no GPU, is one line before anything starts, and the exit code is 2.
set -euo pipefail

started=$(date +%s)
case "${1:-} ${2:-}" in
  '-h '* | '--help '*) sed -n '2,32s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac
names=()
case ${1:-} in
  pack) names=(data inception files) ;;
  a | b) names=(files output) ;;
  --*) ;;
  *) echo "error: '${1:-}' is not pack, a or b; see --help" >&2; exit 2 ;;
esac
flags=("--started=$started")
if [ ${#names[@]} -gt 0 ]; then
  flags+=("--call=$1")
  shift
  for name in "${names[@]}"; do
    if [ $# -eq 0 ] || [[ $1 == -* ]]; then
      name=$(printf %s "$name" | tr '[:lower:]' '[:upper:]')
      echo "error: $name is missing; see --help" >&2
      exit 2
    fi
    flags+=("--$name=$1")
    shift
  done
fi

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$(command -v python || echo python3)}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
for flag in "${flags[@]}"; do
  case $flag in --files=*) wheels=${flag#*=}/wheels ;; esac
done
if compgen -G "${wheels:-}/*.whl" > /dev/null; then
  packages=$(mktemp -d)
  "$python" -m pip install --quiet --no-index --no-deps --no-compile \
    --target "$packages" "$wheels"/*.whl
  export PYTHONPATH=$packages:$PYTHONPATH
fi
# A package that the machine lacks is one line, too.
if ! told=$("$python" -c 'import tensorboardX, diffusion_jax.train' 2>&1); then
  echo "error: $python: ${told##*$'\n'}: install this project with pip, name" \
    "another Python as PYTHON=..., or put the wheel into FILES/wheels" >&2
  exit 2
fi
exec "$python" "$root/benchmarks/ten_minutes.py" "${flags[@]}" "$@"
