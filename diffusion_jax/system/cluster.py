"""Finds a process's place among those of a job, from the launcher's variables.

Slurm's srun, Open MPI's and MPICH's mpiexec, and torchrun (or what sets its
variables, such as Kubeflow) start the same command several times and tell each
process its index; most of them also tell where process 0 is.
"""

import os
import re
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from diffusion_jax.system.errors import UserError

# Launcher -> the variables of the number of processes and the index, in the
# job and on the host. The first one that is set counts: mpiexec and torchrun
# may themselves be started by srun, one per node.
LAUNCHERS = {
  'Open MPI': (
    *('OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK'),
    *('OMPI_COMM_WORLD_LOCAL_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
  ),
  'torchrun': ('WORLD_SIZE', 'RANK', 'LOCAL_WORLD_SIZE', 'LOCAL_RANK'),
  'Slurm': ('SLURM_STEP_NUM_TASKS', 'SLURM_PROCID', '', 'SLURM_LOCALID'),
  'MPICH': ('PMI_SIZE', 'PMI_RANK', 'MPI_LOCALNRANKS', 'MPI_LOCALRANKID'),
}
# Torchrun's variables for the host and port of process 0.
ADDRESS = ('MASTER_ADDR', 'MASTER_PORT')

# The ports of jobs on one host should differ: 4096 from here on.
PORT = 61440


class Place(NamedTuple):
  """The place of this process in a job of several processes.

  Attributes:
    launcher: the launcher, a key of LAUNCHERS.
    count: the number of processes.
    index: the index of this one, from 0.
    coordinator: HOST:PORT for process 0; None if it is not known.
    local_count: the number of processes on this host; None if not known.
    local_index: the index among those; None if not known.
  """

  launcher: str
  count: int
  index: int
  coordinator: str | None = None
  local_count: int | None = None
  local_index: int | None = None


def find(environment: Mapping[str, str] = os.environ) -> Place | None:
  """The place of this process; None if it runs alone or was not launched.

  Args:
    environment: the variables of the process.
  """
  for launcher in LAUNCHERS:
    of = _of_slurm if launcher == 'Slurm' else _of_variables
    place = of(launcher, environment)
    if place and place.index < place.count > 1:
      return place
  return None


def devices(
  place: Place | None, environment: Mapping[str, str] = os.environ
) -> list[int] | None:
  """The GPUs for a process, as indices among those that it can see.

  The processes of a host divide its GPUs evenly, unless the launcher has given
  each its own.

  Args:
    place: the place of the process, or None.
    environment: the variables of the process.

  Returns:
    the indices, or None for all.

  Raises:
    UserError: the processes of this host are more than its GPUs.
  """
  platforms = environment.get('JAX_PLATFORMS', '')
  chosen = environment.get('JAX_LOCAL_DEVICE_IDS')  # JAX reads it
  if not place or place.local_index is None or place.local_count == 1 or chosen:
    return None
  visible = environment.get('CUDA_VISIBLE_DEVICES')  # '' hides all
  on_node = _number(environment.get('SLURM_GPUS_ON_NODE'))
  own = _number(environment.get('SLURM_GPUS_PER_TASK'))
  seen = on_node if visible is None else len(visible.split(',')) * bool(visible)
  if seen is None:
    return [place.local_index]
  if seen <= 1 or seen == own or (on_node and seen < on_node):
    return None
  count = place.local_count or seen
  share = seen // count
  if not share:
    if platforms and not {'cuda', 'gpu'} & {*platforms.split(',')}:
      return None
    raise UserError(
      f'{count} processes on this host see {seen} GPUs'
      f'{f" (CUDA_VISIBLE_DEVICES={visible})" if visible else ""}: start at '
      'most one process per GPU'
    )
  first = place.local_index % count * share
  return list(range(first, first + share))


def _number(text: str | None) -> int | None:
  return int(text) if text and text.isdecimal() else None


def _of_variables(launcher, environment) -> Place | None:
  """The place that a launcher other than Slurm tells."""
  numbers = [_number(environment.get(name)) for name in LAUNCHERS[launcher]]
  count, index, *local = numbers
  if None in (count, index):
    return None
  # RANK and WORLD_SIZE alone may be anyone's.
  if launcher == 'torchrun' and not all(map(environment.get, ADDRESS)):
    return None
  place = Place(launcher, count, index, None, *local)
  return place._replace(coordinator=_coordinator(place, environment))


def _of_slurm(launcher, environment) -> Place | None:
  """The place in a step that srun started."""

  def get(name):
    return environment.get(f'SLURM_{name}', '')

  nodes, job = get('STEP_NODELIST'), _number(get('JOB_ID'))
  if not nodes or job is None:
    return None  # started in a batch script or in salloc's shell, by no srun
  # SLURM_NTASKS may be that of the allocation, of which an interactive step,
  # `srun --pty bash`, runs one task.
  count = _number(get('STEP_NUM_TASKS') or get('NTASKS'))
  index = _number(get('PROCID'))
  if count is None or index is None:
    return None
  step = _number(get('STEP_ID')) or 0
  port = PORT + (job + 97 * step) % 4096  # a job may run several steps
  return Place(
    launcher, count, index, f'{_first_host(nodes)}:{port}',
    _tasks_here(environment), _number(get('LOCALID')),
  )  # fmt: skip


def _first_host(nodes: str) -> str:
  """'a1,b2' -> 'a1'; 'a[07,09-15]' -> 'a07'; 'r[1-2]n[3,4].x' -> 'r1n3.x'."""
  first = re.match(r'([^,\[]|\[[^\]]*\])*', nodes)[0]
  return re.sub(r'\[(\w+)[^\]]*\]', r'\1', first)


def _tasks_here(environment) -> int | None:
  """This node's number in '2(x3),1', the tasks per node."""
  text = environment.get('SLURM_STEP_TASKS_PER_NODE', '')
  counts = []
  for number, times in re.findall(r'(\d+)(?:\(x(\d+)\))?', text):
    counts += [int(number)] * int(times or 1)
  node = _number(environment.get('SLURM_NODEID')) or 0
  return counts[node] if node < len(counts) else None


def _coordinator(place, environment) -> str | None:
  """HOST:PORT for process 0 of a launcher other than Slurm."""
  host, port = map(environment.get, ADDRESS)
  if host and (number := _number(port)):
    # torchrun's agent listens there itself.
    taken = 'TORCHELASTIC_RUN_ID' in environment
    return f'{_bracketed(host)}:{number + taken}'
  job = environment.get('SLURM_JOB_ID')
  nodes = environment.get('SLURM_JOB_NODELIST')
  uri = environment.get('OMPI_MCA_orte_hnp_uri', '')
  started_from = re.search(r'tcp://([\d.]+)', uri)
  if place.local_count == place.count:
    host = 'localhost'
  elif nodes:
    host = _first_host(nodes)
  elif started_from:
    host = started_from[1]
  else:
    return None
  name = job or environment.get('PMIX_NAMESPACE') or uri
  return f'{host}:{PORT + zlib.crc32(name.encode()) % 4096}'


def _bracketed(host: str) -> str:
  return f'[{host}]' if ':' in host and host[0] != '[' else host
