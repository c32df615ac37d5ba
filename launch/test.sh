#!/usr/bin/env bash
# Installs the test extra and runs the suite.
#
#   bash launch/test.sh             the default suite
#   bash launch/test.sh --slow      the checks that take minutes
#   bash launch/test.sh --parity    against torch and diffusers (installs them)
#   bash launch/test.sh --prepare   launch/prepare_data.sh, with TensorFlow
#   bash launch/test.sh PYTEST_ARGUMENTS
set -euo pipefail
cd "$(dirname "$0")/.."

extra='test'
arguments=()
for argument in "$@"; do
  case $argument in
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --slow) extra=test,gcs; arguments+=(-m slow) ;;
    --parity) extra=test,parity; arguments+=(-m parity) ;;
    --prepare) extra=test,prepare; arguments+=(-m prepare) ;;
    *) arguments+=("$argument") ;;
  esac
done

. launch/environment.sh
install_package ".[$extra]"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# One worker per core. Each starts with consecutive tests, which share fixtures,
# and takes over tests of another worker when it has none left.
python -m pytest -q -n auto --dist worksteal ${arguments[@]+"${arguments[@]}"}
