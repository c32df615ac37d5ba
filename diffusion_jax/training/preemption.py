"""Preemption: a run that is told to go saves first, and then goes.

SIGTERM is what clusters send some time before they kill. SIGUSR1 is what Slurm
sends ahead of a job's time limit when it is asked to (`sbatch
--signal=USR1@300`), and there the job is put back into the queue.
"""

import os
import signal
import subprocess

import jax
import numpy as np
from jax.experimental import multihost_utils


class Signals:
  """SIGTERM and SIGUSR1, noted from now on to the end of the process.

  Python runs a handler between two of its own instructions, so that a
  compilation or a step ends first. Several processes must have joined already:
  JAX then holds SIGTERM, tells it to all of them and agrees with them on a step
  that none has passed yet.

  Attributes:
    name: 'SIGTERM' or 'SIGUSR1', whichever came; '' where none did. Once
      `reached` is true it is the same on every process.
  """

  def __init__(self):
    self.name = ''
    self._several = jax.process_count() > 1
    if not self._several:
      signal.signal(signal.SIGTERM, self._note)
    signal.signal(signal.SIGUSR1, self._note)

  def _note(self, number, _):
    # SIGUSR1 asks for more than SIGTERM, which may follow it.
    if self.name != 'SIGUSR1':
      self.name = signal.Signals(number).name
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)  # JAX's, which tells the others

  def reached(self, step: int) -> bool:
    """Whether to save and go after this step; to be asked after every one.

    Args:
      step: the same on every process, and so is the answer.
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
    job: its number, SLURM_JOB_ID.

  Returns:
    '', or in one line why it could not.
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
