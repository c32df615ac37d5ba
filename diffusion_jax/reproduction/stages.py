"""A stage: one of this project's binaries in its own process.

The waiting process initialises no devices, so only one process uses them at a
time. A stage's stderr passes through; its result, JSON on stdout, is returned.
A stage ends when its parent does.
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
from typing import Any

from diffusion_jax.system import terminal
from diffusion_jax.system.errors import UserError

GRACE = 40.0  # seconds for a stage to save after it is told to stop

# On Linux a process can request a signal for when its parent dies; the request
# survives exec. Arguments: the parent's id, then the command.
_TIED = (
  'import ctypes, os, signal, sys\n'
  'ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n'
  'if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])'
)


class Failed(UserError):
  """A stage failed; `told` is the error line that it printed, or ''."""

  def __init__(self, message: str, told: str = ''):
    super().__init__(message)
    self.told = told


def run(
  command: Sequence[str],
  *,
  stop: int = signal.SIGINT,
  deadline: float = math.inf,
  watch: Callable[[], None] = lambda: None,
  every: float = 20.0,
  grace: float = GRACE,
  parse: Callable[[str], Any] = json.loads,
) -> Any:
  """Runs a stage until it ends or its deadline; an exception also stops it.

  Args:
    command: arguments for Python.
    stop: the signal that stops it.
    deadline: in terms of time.monotonic().
    watch: called repeatedly while the stage runs.
    every: seconds between these calls.
    grace: seconds from the signal to the kill.
    parse: what it printed -> the result; JSON by default.

  Returns:
    its result; None if it was stopped.

  Raises:
    Failed: it ended with an error.
  """
  whole = [sys.executable, *command]
  if sys.platform == 'linux':
    whole = [sys.executable, '-c', _TIED, str(os.getpid()), *whole]
  with tempfile.TemporaryFile() as out, tempfile.NamedTemporaryFile() as error:
    # In its own session: Ctrl-C reaches this process, which stops the stage.
    process = subprocess.Popen(
      whole, stdout=out, start_new_session=True,
      env={**os.environ, terminal.ERROR_FILE: error.name},
    )  # fmt: skip
    try:
      while process.poll() is None and (now := time.monotonic()) < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
          process.wait(min(every, deadline - now))
        watch()
    finally:
      if cut := process.poll() is None:
        _end(process, stop, grace)
    out.seek(0)
    printed = out.read().decode(errors='replace')
    said = error.read().decode(errors='replace')
  code = process.returncode
  # Training stopped by a signal saves, exits with 0 and prints no result.
  if code == 0 and printed.strip():
    try:
      return parse(printed)
    except ValueError as e:
      raise Failed(f'{name(command)} printed no JSON') from e
  if cut or code == 0:
    return None
  how = f'exit code {code}' if code > 0 else signal.Signals(-code).name
  if -code == signal.SIGKILL:
    how += ', perhaps because memory ran out'
  raise Failed(
    f'{name(command)} ended with {how}; run the same command again to resume',
    said if code == 2 else '',
  )


def _end(process, stop: int, grace: float) -> None:
  """Stops a stage and lets it save; kills it on a second signal here."""
  process.send_signal(stop)
  try:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(grace)
  finally:
    process.kill()
    process.wait()


def name(command: Sequence[str]) -> str:
  """The name of a command's binary."""
  return command[1].rpartition('.')[2] if command[0] == '-m' else command[0]
