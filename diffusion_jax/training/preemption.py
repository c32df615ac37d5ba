"""Preemption: on SIGTERM, SIGUSR1 or Ctrl-C, a run saves and exits.

Clusters send SIGTERM some time before they kill a job. Slurm sends SIGUSR1
before a job's time limit if requested (`sbatch --signal=USR1@300`); the job is
then requeued. The first Ctrl-C saves, too; the second ends the process at once.
"""

import contextlib
import os
import signal
import subprocess

import jax
import numpy as np
from jax.experimental import multihost_utils

# If several signals arrive, the later one of this list counts.
NAMES = ('', 'SIGTERM', 'SIGINT', 'SIGUSR1')
AGAIN = b'\nstopping after this step, which is saved; Ctrl-C again aborts\n'


class Signals:
  """Records SIGTERM and SIGUSR1 from now on, and Ctrl-C from the first step on.

  Until the first step there is nothing to save, so Ctrl-C ends the process.
  Python runs signal handlers between bytecode instructions, so a compilation or
  a step finishes first. In a multi-process run the processes must have joined
  already: JAX then handles SIGTERM, notifies all processes and agrees on a step
  that none of them has passed yet.

  Attributes:
    name: the signal received, one of NAMES. Once `reached` has returned True,
      it is the same in every process.
  """

  def __init__(self):
    self.name = ''
    self._several = jax.process_count() > 1
    if not self._several:
      signal.signal(signal.SIGTERM, self._note)
    signal.signal(signal.SIGUSR1, self._note)

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
    if not self._several:
      return bool(self.name)
    if not multihost_utils.reached_preemption_sync_point(step):
      return False
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
