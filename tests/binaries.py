"""Runs the binaries as `python -m` does, each in a process of its own.

The processes are forked from one that has imported what the binaries import
and started nothing, which takes tenths of a second in place of seconds.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['diffusion_jax.cli', 'diffusion_jax.data'])


class Result(NamedTuple):
  code: int
  out: str
  err: str

  @property
  def message(self) -> str:
    """The answer to a mistake; fails unless it is one line, and no more."""
    assert self.code == 2, self
    lines = self.err.strip().splitlines()
    assert len(lines) == 1, self.err
    assert lines[0].startswith('error: '), self.err
    assert not self.out, self.out
    return lines[0]


def run(binary: str, *arguments, devices: int = 1, limit: int = 300) -> Result:
  with tempfile.TemporaryDirectory() as folder:
    out, err = Path(folder, 'out'), Path(folder, 'err')
    process = CONTEXT.Process(
      target=_child, args=(binary, list(map(str, arguments)), devices, out, err)
    )
    process.start()
    process.join(limit)
    assert process.exitcode is not None, f'no end in {limit} s'
    return Result(process.exitcode, out.read_text(), err.read_text())


def start(binary: str, *arguments) -> subprocess.Popen:
  """Starts a binary on one device, to be killed."""
  return subprocess.Popen(
    [sys.executable, '-m', f'diffusion_jax.{binary}', *map(str, arguments)],
    cwd=ROOT,
    env={
      **os.environ,
      'PYTHONPATH': str(ROOT),
      'XLA_FLAGS': '--xla_force_host_platform_device_count=1',
    },
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )


def _child(binary, arguments, devices, out, err):
  os.chdir(ROOT)
  os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={devices}'
  for stream, path in ((1, out), (2, err)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
  sys.argv = [binary, *arguments]
  runpy.run_module(f'diffusion_jax.{binary}', run_name='__main__',
                   alter_sys=True)  # fmt: skip
