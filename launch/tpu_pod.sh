#!/usr/bin/env bash
# Trains on a slice of Cloud TPUs: creates the slice, installs the committed
# tree on its workers, starts training on all of them, and restarts it after a
# preemption.
#
#   bash launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- FLAGS]
#
# COMMAND is one of
#   run       create, install, start and follow, until training is done; repeats
#             them after a preemption; Ctrl-C ends only the watching
#   create    creates the slice, unless it exists
#   install   installs the code and copies --data, on all workers
#   start     starts training
#   follow    shows the log of worker 0
#   status    prints the state of training
#   stop      saves and ends training
#   delete    deletes the slice, which costs money until then
# OPTIONS
#   --project=            by default gcloud's
#   --accelerator_type=   v5litepod-16, v6e-16, v5p-32, v4-32, ...
#   --version=            TPU software; by default what JAX needs on that type
#   --spot                a preemptible slice, which costs less
#   --queued              request the slice through the queue
#   --config= --workdir=  as for training; the workdir is in a bucket, gs://...
#   --binary=             train (default), sample or evaluate (no --config)
#   --data=gs://...       prepared sets; copied to ~/tensorflow_datasets
#   --poll_secs=          seconds between checks of the slice; default 60
#   --dry_run             print the commands of a run without errors
# FLAGS are passed to the binary unchanged.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "error: $1" >&2
  exit 2
}
say() { echo "$name: $1" >&2; }

quoted() {
  local word line=
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*)
        word=\'$(printf %s "$word" | sed "s/'/'\\\\''/g")\'
        ;;
    esac
    line+="$word "
  done
  echo "${line% }"
}

# Every command goes through here. A dry run assumes that they succeed.
call() {
  if [ -n "$dry_run" ]; then quoted "$@" >&3; else "$@"; fi
}
pause() { [ -n "$dry_run" ] || sleep "$poll_secs"; }

# --- the slice ---------------------------------------------------------------

# state: READY, CREATING, PREEMPTED, ... or ABSENT; fails if gcloud does.
state() {
  local found
  if [ -n "$queued" ]; then
    found=$(describe queued-resources 'value(state.state)' ACTIVE) || return
    [ "$found" = ACTIVE ] || { echo "$found"; return; }
  fi
  found=$(describe tpu-vm 'value(state)' READY) || return
  # Delete a request that has outlived its slice, too.
  [ "$queued$found" != yesABSENT ] || found=SUSPENDED
  echo "$found"
}

describe() {
  local told
  if told=$(call gcloud compute tpus "$1" describe "$name" "${place[@]}" \
    --format="$2" 2>&1); then
    [ -z "$dry_run" ] || told=${made:+$3}
    grep -xE '[A-Z_]+' <<<"${told:-ABSENT}"
  elif [[ $told == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo "$told" >&2
    return 1
  fi
}

create() {
  local software=version request=(tpu-vm create "$name")
  if [ -n "$queued" ]; then
    software=runtime-version
    request=(queued-resources create "$name" --node-id="$name")
  fi
  call gcloud compute tpus "${request[@]}" "${place[@]}" \
    --accelerator-type="$accelerator_type" "--$software=$version" \
    ${spot:+--spot} || return
  made=yes
}

delete() {
  if [ -n "$queued" ]; then
    call gcloud compute tpus queued-resources delete "$name" "${place[@]}" \
      --force --quiet
  else
    call gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
  fi
}

# --- its workers -------------------------------------------------------------

on() {  # on WORKER COMMAND
  call gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" \
    --ssh-flag=-oServerAliveInterval=30 --command="$2"
}

install() {
  local archive=${TMPDIR:-/var/tmp}/$name.tar.gz
  call git -C "$PWD" archive --format=tar.gz --output="$archive" HEAD &&
    call gcloud compute tpus tpu-vm scp "$archive" "$name:" "${place[@]}" \
      --worker=all &&
    on all "cp $there/.worker/log $there.log 2>/dev/null;\
 rm -rf $there && mkdir $there &&\
 tar -xzf $name.tar.gz -C $there &&\
 bash $there/launch/worker.sh install $(quoted "$data")"
}

start() {
  on all "bash $there/launch/worker.sh start $(quoted "$binary" \
    ${config:+"--config=$config"} "--workdir=$workdir" \
    ${flags[@]+"${flags[@]}"})" || return
  supposed=running
}

follow() {
  on 0 "bash $there/launch/worker.sh follow"
  supposed='done'
}

stop() { on all "bash $there/launch/worker.sh stop"; }

# status: the combined status of all workers, as worker.sh prints it.
status() {
  local all word
  all=$(
    on all "bash $there/launch/worker.sh status 2>/dev/null || echo none"
  ) || return
  [ -z "$dry_run" ] || all=$supposed
  for word in running refused failed stopped interrupted none 'done'; do
    [[ $all != *$word* ]] || { echo "$word"; return; }
  done
  return 1
}

# --- the run ---------------------------------------------------------------

run() {
  local is was='' how known='' began='' tries=0
  while true; do
    is=$(state) || { [ -n "$known" ] || return; pause; continue; }
    [ "$is" = "$was" ] || say "$is"
    was=$is
    case $is in
      READY) known=yes ;;
      ABSENT)
        # The first failure may be a mistake; later ones mean no free TPUs.
        create || { [ -n "$known" ] || return; pause; }
        known=yes
        continue
        ;;
      PREEMPTED | TERMINATED | FAILED | SUSPENDED)
        delete || true
        known=yes began='' tries=0
        pause
        continue
        ;;
      *) known=yes; pause; continue ;;
    esac

    how=$(status) || { pause; continue; }
    say "$how"
    case $began:$how in
      *:running)
        began=yes
        follow || true
        pause
        ;;
      yes:done) return ;;
      yes:refused) fail "$name: a user error; see the last line of its log" ;;
      yes:stopped) fail "$name: stopped by hand; run resumes it" ;;
      yes:interrupted) began=''; pause ;;  # it may be preempted by then
      *)
        [ $((tries += 1)) -le 5 ] || fail "$name: it failed five times"
        if install && start; then
          began=yes
          follow || true
        else
          pause
        fi
        ;;
    esac
  done
}

need() {
  local option
  for option in "$@"; do
    [ -n "${!option}" ] || fail "--$option= is missing; see --help"
  done
}

there=.diffusion_jax  # in the home of each worker
name='' zone='' project='' accelerator_type='' version='' spot='' queued=''
config='' workdir='' binary=train data='' poll_secs=60 dry_run=''
flags=() made='' supposed=none

case ${1:-} in
  run | create | install | start | follow | status | stop | delete) ;;
  -h | --help) sed -n '2,29s/^# \{0,1\}//p' launch/tpu_pod.sh; exit 0 ;;
  *) fail "'${1:-}' is not a command; see --help" ;;
esac
command=$1
shift
while [ $# -gt 0 ]; do
  case $1 in
    --) shift; flags=("$@"); break ;;
    --spot | --queued | --dry_run) printf -v "${1#--}" yes ;;
    --name=* | --zone=* | --project=* | --accelerator_type=* | --version=* | \
      --config=* | --workdir=* | --binary=* | --data=* | --poll_secs=*)
      option=${1%%=*}
      printf -v "${option#--}" %s "${1#*=}"
      ;;
    *) fail "unknown option $1; see --help" ;;
  esac
  shift
done

need name zone
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] ||
  fail "--name=$name: lower-case letters, digits and hyphens"
[[ $poll_secs =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--poll_secs=$poll_secs: a number"
case $binary in
  train | sample | evaluate) ;;
  *) fail "--binary=$binary: train, sample or evaluate" ;;
esac
place=(--zone="$zone" ${project:+"--project=$project"})
case $command in run | create) need accelerator_type ;; esac
case $command in
  run | start)
    need workdir
    [ "$binary" != train ] || need config
    case $workdir in
      gs://*/* | /*) ;;
      *) fail "--workdir=$workdir: a folder in a bucket, gs://BUCKET/RUN" ;;
    esac
    ;;
esac
case $version:$accelerator_type in
  :v6e-*) version=v2-alpha-tpuv6e ;;
  :v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  :v5p-*) version=v2-alpha-tpuv5 ;;
  :v[234]-*) version=tpu-ubuntu2204-base ;;
  :?*) fail "--version= is missing: no default is known for $accelerator_type" ;;
esac
exec 3>&1
[ -n "$dry_run" ] || command -v gcloud >/dev/null ||
  fail 'gcloud was not found: install the Google Cloud CLI, or use --dry_run'

case $command in
  create)
    is=$(state)
    if [ "$is" = ABSENT ]; then create; else say "$is already"; fi
    ;;
  install | start | status)
    made=yes
    is=$(state)
    [ "$is" != READY ] || is=$(status)
    case $command:$is in
      status:*) [ -n "$dry_run" ] || echo "$is" ;;
      *:[A-Z]*) fail "$name is $is" ;;
      *:running) fail "$name: training is running there; stop it first" ;;
      *) "$command" ;;
    esac
    ;;
  *) "$command" ;;
esac
