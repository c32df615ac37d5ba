"""Runs the binaries as `python -m` does, each in a process of its own.

The processes are forked from one that has imported what the binaries import
and started nothing, which takes tenths of a second in place of seconds.
"""

import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from jax._src import compiler

from diffusion_jax.cli import command

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context('forkserver')
# All but what defines flags, which not every binary has.
CONTEXT.set_forkserver_preload(
  [
    'diffusion_jax.cli.command',
    'diffusion_jax.evaluation.follow',
    'diffusion_jax.evaluation.inception',
    'diffusion_jax.evaluation.measure',
    'diffusion_jax.evaluation.sweep',
    'diffusion_jax.reporting.page',
    'diffusion_jax.reproduction.results',
    'diffusion_jax.runs.finetune',
    'diffusion_jax.runs.programs',
    'diffusion_jax.runs.store',
    'diffusion_jax.runs.validation',
    'diffusion_jax.training.loop',
    'diffusion_jax.weights.official',
    'diffusion_jax.weights.unets',
    'pytest',
    'sklearn.datasets',
    'tensorboardX',
  ]
)
# Of the compiler: JAX reads it where it is imported, which is the server.
OPTIONS = 'JAX_DISABLE_MOST_OPTIMIZATIONS'


# Seconds after which a test gives up. On a crowded machine, what takes seconds
# may take minutes.
LIMIT = 1200


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


class Running(NamedTuple):
  """A binary at work, in a process of its own."""

  process: multiprocessing.process.BaseProcess
  folder: tempfile.TemporaryDirectory

  def send(self, number: int) -> None:
    assert self.process.is_alive(), self.end()
    os.kill(self.process.pid, number)

  def kill(self) -> None:
    self.process.kill()
    self.process.join()

  def end(self, limit: int = LIMIT) -> Result:
    """Waits for it."""
    self.process.join(limit)
    if self.process.exitcode is None:
      self.kill()
      pytest.fail(f'no end in {limit} s: {self.end()}')
    out, err = (Path(self.folder.name, n).read_text() for n in ('out', 'err'))
    return Result(self.process.exitcode, out, err)

  def wait_until(self, holds, limit: int = LIMIT) -> None:
    """Until holds() is true, which the binary must live to see."""
    deadline = time.monotonic() + limit
    while not holds():
      assert self.process.is_alive(), self.end()
      assert time.monotonic() < deadline
      time.sleep(0.002)


def start(binary: str, *arguments, devices: int = 1, **environment) -> Running:
  folder = tempfile.TemporaryDirectory()
  environment = {OPTIONS: os.environ[OPTIONS], **environment}
  process = CONTEXT.Process(
    target=_child,
    args=(
      binary, list(map(str, arguments)), devices, folder.name, environment,
    ),
  )  # fmt: skip
  process.start()
  return Running(process, folder)


def free_port() -> int:
  with socket.create_server(('localhost', 0)) as server:
    return server.getsockname()[1]


def start_several(
  binary: str, *arguments, count: int = 2, devices: int = 1, **environment
) -> list[Running]:
  """A binary in several processes, which are one run."""
  several = [f'--coordinator=localhost:{free_port()}',
             f'--num_processes={count}']  # fmt: skip
  return [
    start(
      binary, *arguments, *several, f'--process_id={i}', devices=devices,
      **environment,
    )
    for i in range(count)
  ]  # fmt: skip


def run_several(binary: str, *arguments, **how) -> list[Result]:
  return [one.end() for one in start_several(binary, *arguments, **how)]


def run(
  binary: str, *arguments, devices: int = 1, limit: int = LIMIT, **environment
) -> Result:
  return start(binary, *arguments, devices=devices, **environment).end(limit)


def here(binary: str, *arguments) -> None:
  """Runs a binary in this process, which then forgets the binary's flags.

  Another binary may have flags of the same names.
  """
  for name in (
    *('again', 'drawing', 'judging', 'likelihoods', 'run_data'),
    *('agreeing', 'retrieval', 'sharpening'),
  ):
    importlib.import_module(f'diffusion_jax.cli.{name}')  # they keep theirs
  known = flags.FLAGS._flags()
  before = dict(known)
  for flag in before.values():
    flag.allow_override = True
  module, argv = importlib.import_module(f'diffusion_jax.{binary}'), sys.argv
  try:
    with flagsaver.flagsaver():
      given = command._last([binary, *map(str, arguments)])
      sys.argv = command._resolve_config(given)  # where --config.KEY is sought
      flags.FLAGS(sys.argv)
      module.main()
  finally:
    sys.argv = argv
    known.clear()
    known.update(before)
    for flag in before.values():
      flag.allow_override = False
    sys.modules.pop(module.__name__, None)


def _child(binary, arguments, devices, folder, environment):
  # A suite that runs in the background inherits that Ctrl-C is ignored.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  gc.disable()  # as in conftest
  os.chdir(ROOT)
  os.environ.update(environment)
  os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={devices}'
  jax.config.update(OPTIONS.lower(), os.environ[OPTIONS] == 'True')
  if 'JAX_PLATFORMS' in environment:
    jax.config.update('jax_platforms', environment['JAX_PLATFORMS'])
  for stream, name in ((1, 'out'), (2, 'err')):
    path = os.path.join(folder, name)
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
  import dense_network  # noqa: F401, which adds it

  _keep_programs()
  sys.argv = [binary, *arguments]
  own = (ROOT / 'tests' / f'{binary}.py').exists()  # one of the tests' own
  module = binary if own else f'diffusion_jax.{binary}'
  runpy.run_module(module, run_name='__main__', alter_sys=True)


def _keep_programs():
  """Has JAX keep the programs of all processes of a run, as of process 0.

  Those of the others have keys of their own, and were compiled every time.
  """
  compiler.distributed = types.SimpleNamespace(
    global_state=types.SimpleNamespace(client=None, process_id=0)
  )
