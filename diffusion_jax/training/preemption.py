"""Preemption: on SIGTERM or SIGUSR1, a run saves a checkpoint and exits.

Clusters send SIGTERM some time before they kill a job. Slurm sends SIGUSR1
before a job's time limit if requested (`sbatch --signal=USR1@300`); the job is
then requeued.
"""

import os
import signal
import subprocess

import jax
import numpy as np
from jax.experimental import multihost_utils


class Signals:
  """Records SIGTERM and SIGUSR1 from now until the process ends.

  Python runs signal handlers between bytecode instructions, so a compilation or
  a step finishes first. In a multi-process run the processes must have joined
  already: JAX then handles SIGTERM, notifies all processes and agrees on a step
  that none of them has passed yet.

  Attributes:
    name: the signal received, 'SIGTERM' or 'SIGUSR1', or ''. Once `reached` has
      returned True, it is the same in every process.
  """

  def __init__(self):
    self.name = ''
    self._several = jax.process_count() > 1
    if not self._several:
      signal.signal(signal.SIGTERM, self._note)
    signal.signal(signal.SIGUSR1, self._note)

  def _note(self, number, _):
    # SIGUSR1 also requeues the job, so a SIGTERM after it changes nothing.
    if self.name != 'SIGUSR1':
      self.name = signal.Signals(number).name
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)  # JAX notifies the other processes

  def reached(self, step: int) -> bool:
    """Whether to save and exit after this step; call after every step.

    Args:
      step: the step, the same in every process, as is the result.
    """
    if not self._several:
      return bool(self.name)
    if not multihost_utils.reached_preemption_sync_point(step):
      return False
    asked = multihost_utils.process_allgather(np.array(self.name == 'SIGUSR1'))
    self.name = 'SIGUSR1' if asked.any() else 'SIGTERM'
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
