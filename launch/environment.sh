# shellcheck shell=bash
# Sourced by the scripts of this folder, in the project's root. Creates and
# activates .venv, unless a virtual environment is active already.
if [ -z "${VIRTUAL_ENV:-}" ]; then
  if [ ! -x .venv/bin/pip ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo 'error: python3 is older than 3.11' >&2
      exit 2
    }
    echo 'creating .venv'
    python3 -m venv .venv
  fi
  . .venv/bin/activate
fi

# install_package '.[test]': installs the checkout, once per setup.py.
install_package() {
  local stamp
  stamp=$VIRTUAL_ENV/.installed-$( (pwd; cat setup.py) | cksum | cut -d' ' -f1)-$(
    printf %s "$1" | tr -dc '[:alnum:]'
  )
  [ ! -f "$stamp" ] || return 0
  echo "installing $1 into $VIRTUAL_ENV"
  python -m pip install --quiet --disable-pip-version-check --editable "$1"
  touch "$stamp"
}

# keep_memory: on a CPU, glibc returns XLA's buffers to the system after every
# step, and gets them back in pages of 4 KB. These settings make it keep them, in
# pages of 2 MB where the system has them (docs/speed.md).
keep_memory() {
  local m=glibc.malloc
  local settings=$m.hugetlb=1:$m.mmap_max=0:$m.arena_max=1
  settings+=:$m.trim_threshold=4000000000
  export GLIBC_TUNABLES=${GLIBC_TUNABLES-$settings}
}
