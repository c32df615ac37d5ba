#!/usr/bin/env bash
# Downloads and prepares a TensorFlow data set (TFDS), once. Training reads it
# without TensorFlow. A set that is already prepared is left unchanged.
#
#   bash launch/prepare_data.sh NAME [DATA_DIR]
#
#   NAME       the name in TFDS: cifar10, lsun/church_outdoor, ...; or
#              PATH/my_set.py, a file with a builder class of your own
#   DATA_DIR   by default ~/tensorflow_datasets
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }
case ${1:-} in
  -h | --help) usage; exit 0 ;;
  '') usage >&2; exit 2 ;;
  -*) echo "error: $1 is unknown; see --help" >&2; exit 2 ;;
esac
if [ $# -gt 2 ]; then
  echo "error: $# arguments; see --help" >&2
  exit 2
fi
name=$1
data_dir=${2:-${TFDS_DATA_DIR:-$HOME/tensorflow_datasets}}
case $data_dir in
  /* | *://*) ;;
  *) data_dir=$PWD/$data_dir ;;
esac

case $name in
  *.py)
    [ -f "$name" ] || { echo "error: $name is not a file" >&2; exit 2; }
    name=$(cd "$(dirname "$name")" && pwd)/$(basename "$name")
    ;;
esac

cd "$(dirname "$0")/.."
. launch/environment.sh
install_package '.[prepare]'
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}
python launch/prepare_data.py "$name" "$data_dir"
