#!/usr/bin/env bash
# The commands of one worker. tpu_pod.sh calls it on every worker of a slice;
# in the containers of gke_jobset.yaml it is the entry point.
#
#   bash launch/worker.sh install [gs://BUCKET/tensorflow_datasets]
#   bash launch/worker.sh start BINARY FLAGS    unless training is running here
#   bash launch/worker.sh status   prints running, done, stopped (by hand),
#                                  refused (exit code 2), interrupted, failed
#                                  or none
#   bash launch/worker.sh follow   shows the log until training ends
#   bash launch/worker.sh stop     lets training save, and waits for its end
#   bash launch/worker.sh hold COMMAND    runs it in the foreground; exits with
#                                         code 75 after a SIGTERM
set -euo pipefail
cd "$(dirname "$0")/.."

state=.worker  # pid, ended (the exit code), log, and the locks

fail() {
  echo "error: $HOSTNAME: $1" >&2
  exit 2
}

# The trainer itself holds the lock, so neither a kill nor a reboot leaves a
# stale one.
running() { ! flock --nonblock --shared "$locks/lock" true; }

# The folder of the locks: a local one where the file system of $state has none
# (NFS, Lustre, FUSE), since it is this host that trains.
locks_of() {
  local code=0
  command -v flock >/dev/null || fail 'flock is missing: install util-linux'
  flock --nonblock --shared "$state/lock" true 2>/dev/null || code=$?
  if [ "$code" -le 1 ]; then  # 1: it is taken
    echo "$state"
    return
  fi
  local there
  there=${TMPDIR:-/tmp}/diffusion_jax.$UID.$(pwd -P | cksum | cut -d' ' -f1)
  mkdir -p "$there"
  echo "$there"
}

install() {
  ! running || fail 'training is running here: stop it first'
  # The Python of Ubuntu 22.04 is 3.10, which is too old; uv brings its own.
  export PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  uv venv --quiet --clear --python '>=3.11' .venv
  uv pip install --quiet --python .venv/bin/python '.[tpu,gcs]'
  if [ -n "${1:-}" ]; then
    mkdir -p ~/tensorflow_datasets
    gcloud storage rsync --recursive "$1" ~/tensorflow_datasets
  fi
}

start() {
  exec 8>"$locks/starting"
  flock 8  # one after the other
  if running; then
    echo "$HOSTNAME: training is already running here"
    return
  fi
  rm -f "$state/ended"
  setsid bash launch/worker.sh hold .venv/bin/python -m "diffusion_jax.$1" \
    "${@:2}" >>"$state/log" 2>&1 </dev/null 8>&- &
  until running || [ -e "$state/ended" ]; do sleep 0.1; done
}

hold() {
  local child='' told='' code=0
  exec 9>"$locks/lock"  # which the child inherits
  flock --timeout 1 9 || fail 'training is already running here'
  rm -f "$state/ended"
  echo $$ >"$state/pid"
  # After SIGTERM, training exits with code 0. Whoever restarts it must know
  # that it was not done.
  trap 'told=yes; [ -z "$child" ] || kill "$child" 2>/dev/null || true' TERM
  "$@" &
  child=$!
  [ -z "$told" ] || kill "$child" 2>/dev/null || true
  while code=0; wait "$child" || code=$?; kill -0 "$child" 2>/dev/null; do
    :  # it was the trap that ended the wait
  done
  [ -z "$told" ] || code=75
  echo "$code" >"$state/ended"
  exit "$code"
}

status() {
  local ended=none
  if running; then
    ended=running
  elif [ -e "$state/ended" ]; then
    ended=$(cat "$state/ended")
  fi
  case $ended in
    0) echo 'done' ;;
    2) echo refused ;;
    75) echo interrupted ;;
    [1-9]*) echo "failed $ended" ;;
    *) echo "$ended" ;;
  esac
}

follow() {
  running || exec tail -n 20 "$state/log"
  exec tail -n 20 -F --pid="$(cat "$state/pid")" "$state/log"
}

stop() {
  running || return 0
  kill "$(cat "$state/pid")" 2>/dev/null || true
  for _ in {1..1200}; do
    running || break
    sleep 0.1
  done
  ! running || kill -KILL -- "-$(cat "$state/pid")" || true
  echo stopped >"$state/ended"
}

case ${1:-} in
  install | start | hold | status | follow | stop) ;;
  -h | --help) sed -n '2,13s/^# \{0,1\}//p' launch/worker.sh; exit 0 ;;
  *) fail "'${1:-}' is not a command; see --help" ;;
esac
mkdir -p "$state"
locks=$(locks_of)
"$@"
