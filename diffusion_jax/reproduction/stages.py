"""A stage: one of our binaries at work in a process of its own.

The process that waits for it starts no devices, so that there is never more
than one on them. What a stage prints on stderr passes through; its result, JSON
on stdout, is kept. None outlives who started it.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from diffusion_jax.system import terminal
from diffusion_jax.system.errors import UserError

GRACE = 40.0  # seconds to save in, once it was told to stop
TICK = 0.1

# On Linux a process can ask for a signal when its parent is gone, however that
# went; the asking outlives exec. Arguments: the parent, then the command.
_TIED = (
  'import ctypes, os, signal, sys\n'
  'ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n'
  'if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])'
)


class Failed(UserError):
  """A stage failed; `told` is the line in which it has said why, or ''."""

  def __init__(self, message: str, told: str = ''):
    super().__init__(message)
    self.told = told


class Signals:
  """SIGINT and SIGTERM, noted while it is entered; `run` passes them on.

  Attributes:
    name: of the first that came; '' for none.
    count: how many came. A second one kills the stage.
  """

  def __init__(self):
    self.name, self.count = '', 0

  def _note(self, number, _):
    self.name = self.name or signal.Signals(number).name
    self.count += 1

  def __enter__(self):
    self._before = {
      number: signal.signal(number, self._note)
      for number in (signal.SIGINT, signal.SIGTERM)
    }
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)


def run(
  command: Sequence[str],
  signals: Signals,
  *,
  stop: int = signal.SIGINT,
  deadline: float = math.inf,
  watch: Callable[[], None] = lambda: None,
  every: float = 20.0,
  grace: float = GRACE,
) -> dict | None:
  """Runs a stage to its end, to its deadline, or until a signal comes.

  Args:
    command: arguments of Python.
    signals: entered.
    stop: the signal that stops it.
    deadline: of time.monotonic().
    watch: called now and then meanwhile.
    every: seconds between these calls.
    grace: seconds from the signal to the kill.

  Returns:
    what it printed as JSON; None where it was cut.

  Raises:
    Failed: it ended by itself, and not well.
  """
  whole = [sys.executable, *command]
  if sys.platform == 'linux':
    whole = [sys.executable, '-c', _TIED, str(os.getpid()), *whole]
  watched, kill_at = time.monotonic(), None
  with (
    tempfile.TemporaryFile() as out,
    tempfile.NamedTemporaryFile() as error,
  ):
    # A session of its own: Ctrl-C comes here first, and from here to it.
    process = subprocess.Popen(
      whole, stdout=out, start_new_session=True,
      env={**os.environ, terminal.ERROR_FILE: error.name},
    )  # fmt: skip
    try:
      while process.poll() is None:
        now = time.monotonic()
        if kill_at is None and (now >= deadline or signals.name):
          process.send_signal(stop)
          kill_at = now + grace
        elif kill_at and (now > kill_at or signals.count > 1):
          process.kill()
        if now - watched >= every:
          watch()
          watched = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
          process.wait(TICK)
    finally:
      if process.poll() is None:  # watch() raised
        _end(process, stop, grace)
    out.seek(0)
    printed = out.read().decode(errors='replace')
    said = error.read().decode(errors='replace')
  code = process.returncode
  # Training that is stopped by a signal saves, ends with 0 and prints nothing.
  if code == 0 and printed.strip():
    try:
      return json.loads(printed)
    except ValueError as e:
      raise Failed(f'{name(command)} printed no JSON') from e
  if kill_at or code == 0:
    return None
  how = f'exit code {code}' if code > 0 else signal.Signals(-code).name
  if -code == signal.SIGKILL:
    how += ', as where memory does not suffice'
  raise Failed(
    f'{name(command)} ended with {how}; the same command goes on from what is '
    'kept',
    said if code == 2 else '',
  )


def _end(process, stop: int, grace: float) -> None:
  """Lets it keep what it has, as at a deadline."""
  process.send_signal(stop)
  try:
    process.wait(grace)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()


def name(command: Sequence[str]) -> str:
  """What people call a command: the binary."""
  return command[1].rpartition('.')[2] if command[0] == '-m' else command[0]
