"""A cloud in a folder, in place of `gcloud`, for the tests of tpu_pod.sh.

Run as a program it answers the commands that the script gives, notes them in
FOLDER/calls, and runs what it is told to run on the workers: in the homes of
two workers, which are folders too.
"""

import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORKERS = 2


def create(folder, preempt_when: str, python: str) -> dict:
  """Makes the cloud.

  Args:
    folder: a new one.
    preempt_when: the first slice is taken away once a file fits this pattern.
    python: a shell script, what `.venv/bin/python` is on a worker; WORKER is
      its number.

  Returns:
    the environment in which there is that cloud.
  """
  tools = folder / 'bin'
  tools.mkdir(parents=True)
  write(tools / 'gcloud', f'exec {sys.executable} {__file__} "$@"')
  # Of the tree as it is, committed or not.
  write(
    tools / 'git',
    'for word; do case $word in --output=*) output=${word#*=}; esac; done\n'
    f'tar -czf "$output" -C {ROOT} diffusion_jax configs launch setup.py',
  )
  write(
    tools / 'uv',
    f'[ "$1" != venv ] || install -D {folder}/python .venv/bin/python',
  )
  write(folder / 'python', python)
  return {
    **os.environ,
    'PATH': f'{tools}:{os.environ["PATH"]}',
    'TMPDIR': str(folder),
    'CLOUD': str(folder),
    'PREEMPT_WHEN': preempt_when,
  }


def write(path, script: str) -> None:
  path.write_text(f'#!/usr/bin/env bash\nset -euo pipefail\n{script}\n')
  path.chmod(0o755)


def calls(folder) -> list[list[str]]:
  """The words of each command so far, without `gcloud compute tpus`."""
  lines = (folder / 'calls').read_text().splitlines()
  return [json.loads(line) for line in lines]


def homes(folder) -> list[Path]:
  return [folder / f'worker{i}' for i in range(WORKERS)]


def main(words: list[str]) -> int:
  folder = Path(os.environ['CLOUD'])
  state = folder / 'state'
  assert words[:2] == ['compute', 'tpus'], words
  with (folder / 'calls').open('a') as file:
    file.write(json.dumps(words[2:]) + '\n')
  resource, verb, *rest = words[2:]
  now = state.read_text() if state.exists() else None
  if verb == 'create':
    assert now is None, 'ALREADY_EXISTS'
    state.write_text('CREATING')
    for home in homes(folder):
      home.mkdir()
  elif verb == 'delete':
    assert '--quiet' in rest
    state.unlink()
  elif now is None:
    print("ERROR: (gcloud.x) NOT_FOUND: Resource 'x' was not found.",
          file=sys.stderr)  # fmt: skip
    return 1
  elif verb == 'describe':
    print('WARNING: there is a newer version', file=sys.stderr)
    making = now == 'CREATING'
    if resource == 'queued-resources':
      now = 'WAITING_FOR_RESOURCES' if making else 'ACTIVE'
    print(now)
    if making:
      state.write_text('READY')
  elif verb == 'scp':
    assert now == 'READY'
    for home in homes(folder):
      shutil.copy(rest[0], home)
  elif verb == 'ssh':
    assert now == 'READY'
    options = dict(word.split('=', 1) for word in rest if word[:2] == '--')
    if options['--command'].endswith(' follow') and preempt(folder):
      return 255
    chosen = homes(folder)
    if options['--worker'] != 'all':
      chosen = [chosen[int(options['--worker'])]]
    return max([execute(home, options['--command']) for home in chosen])
  else:
    raise AssertionError(words)
  return 0


def execute(home, command):
  environment = {**os.environ, 'HOME': str(home), 'WORKER': home.name[-1]}
  return subprocess.run(
    ['bash', '-c', command], cwd=home, env=environment, check=False
  ).returncode


def preempt(folder):
  """Takes the first slice away, once what was waited for is there."""
  if (folder / 'preempted').exists():
    return False
  while not glob.glob(os.environ['PREEMPT_WHEN']):
    time.sleep(0.05)
  for home in homes(folder):
    pid = int((home / '.diffusion_jax' / '.worker' / 'pid').read_text())
    os.killpg(pid, signal.SIGKILL)
    shutil.rmtree(home)
  (folder / 'preempted').touch()
  (folder / 'state').write_text('PREEMPTED')
  return True


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
