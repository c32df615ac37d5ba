"""Preemption: on SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C, a run saves and exits.

Clusters send SIGTERM some time before they kill a job. Slurm sends SIGUSR1
before a job's time limit if requested (`sbatch --signal=USR1@300`); the job is
then requeued. A terminal that is closed sends SIGHUP, which `nohup` ignores.
The first Ctrl-C saves, too; the second ends the process at once.
"""

import contextlib
import functools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.system import interrupts

# If several signals arrive, the later one of this list counts.
NAMES = ('', 'SIGTERM', 'SIGHUP', 'SIGINT', 'SIGUSR1')
# Seconds in which all processes learn that one of them stops. JAX looks once a
# second whether there was a signal.
AGREE = 8.0
AGAIN = b'\nstopping after this step, which is saved; Ctrl-C again aborts\n'


class Signals:
  """Records signals from now on, and Ctrl-C from the first step on.

  Until the first step there is nothing to save, so Ctrl-C ends the process.
  Python runs signal handlers between bytecode instructions, so a compilation or
  a step finishes first. In a multi-process run the processes must have joined
  already: JAX then handles SIGTERM, notifies all processes and agrees on a step
  that none of them has passed yet.

  A step may also never end, where it waits for a host that is gone. After a
  signal a thread waits for its end, and gives up in the end.

  Args:
    stop_secs: how long the step may take from the signal on, unless steps take
      a third of that anyway.
    give_up: called in that thread with the name of the signal and the seconds
      waited; ends the process.

  Attributes:
    name: the signal received, one of NAMES. Once `reached` has returned True,
      it is the same in every process.
    error: the error that `warn` was called with, or None.
  """

  def __init__(
    self,
    stop_secs: float = 30.0,
    give_up: Callable[[str, float], None] = lambda name, seconds: None,
  ):
    self._stop_secs, self._give_up = stop_secs, give_up
    self._began, self._longest, self._times = None, 0.0, 1
    self._saving, self._waiting = threading.Event(), threading.Lock()
    self.name, self.error = '', None
    self._several = jax.process_count() > 1
    if not self._several:
      signal.signal(signal.SIGTERM, self._note)
    noted = [signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
      noted.append(signal.SIGHUP)
    for number in noted:
      signal.signal(number, self._note)
    for number in (signal.SIGTERM, *noted):
      self._watch(number)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
      self._watch(signal.SIGINT)

  def rest(self) -> None:
    """Call when no more steps are to come: a signal then waits for the end."""
    self._saving.set()

  def warn(self, error: Exception) -> None:
    """Stops a multi-process run before an error that only this one will raise.

    Returns once the others have had time to learn of it. They wait for this
    process meanwhile, and so all stop after one of the next steps, which this
    process must still be able to do.

    Args:
      error: of a batch after these steps.
    """
    self.error = error
    os.kill(os.getpid(), signal.SIGTERM)  # JAX notifies the other processes
    self.patiently(time.sleep)(AGREE)

  def _watch(self, number):
    interrupts.watch(number, functools.partial(self._wait, number))

  def patiently(self, fn: Callable) -> Callable:
    """The function, during which a signal waits ten times as long."""

    def called(*args):
      self._times = 10
      try:
        return fn(*args)
      finally:
        self._times = 1

    return called

  def _wait(self, number) -> None:
    """Waits for the end of the step, and gives up if it takes too long."""
    start = time.monotonic()
    with self._waiting:  # one thread is enough
      while True:
        most = max(self._stop_secs * self._times, 3 * self._longest)
        waited = time.monotonic() - max(start, self._began or start)
        if waited >= most:
          break
        if self._saving.wait(min(most - waited, 1.0)):
          return
      name = max(self.name, signal.Signals(number).name, key=NAMES.index)
      self._give_up(name, waited)

  def _note(self, number, _):
    self.name = max(self.name, signal.Signals(number).name, key=NAMES.index)
    if number == signal.SIGINT:
      # The next one ends the process even inside XLA, where Python's handlers
      # wait. print() cannot be called while another print() is interrupted.
      signal.signal(signal.SIGINT, signal.SIG_DFL)
      with contextlib.suppress(OSError):
        os.write(2, AGAIN)
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)  # JAX notifies the other processes

  def reached(self, step: int) -> bool:
    """Whether to save and exit after this step; call after every step.

    Args:
      step: the step, the same in every process, as is the result.
    """
    # A shell may have told a background job to ignore it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
      signal.signal(signal.SIGINT, self._note)
      self._watch(signal.SIGINT)
    now = time.monotonic()
    if self._began:  # the first step also compiles
      self._longest = max(self._longest, now - self._began)
    self._began = now
    if not self._several:
      if self.name:
        self.rest()
      return bool(self.name)
    if not multihost_utils.reached_preemption_sync_point(step):
      return False
    self.rest()
    here = np.int32(NAMES.index(self.name or 'SIGTERM'))
    self.name = NAMES[multihost_utils.process_allgather(here).max()]
    return True


def requeue(job: str) -> str:
  """Puts a Slurm job back into the queue.

  Args:
    job: the job's number, SLURM_JOB_ID.

  Returns:
    '' on success, otherwise the reason in one line.
  """
  command = ['scontrol', 'requeue', job]
  try:
    subprocess.run(
      command, check=True, capture_output=True, text=True, timeout=60
    )
  except subprocess.CalledProcessError as e:
    return ' '.join(e.stderr.split()) or f'it ended with {e.returncode}'
  except (OSError, subprocess.TimeoutExpired) as e:
    return str(e)
  return ''
