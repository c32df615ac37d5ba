"""Multi-process runs.

Each host of a pod or a cluster runs the same command. The processes find each
other through the variables of their launcher (see cluster.py), through the
platform on TPU pods, and otherwise through flags:

  python -m diffusion_jax.train ... --coordinator=host0:8476 \
    --num_processes=2 --process_id=0    (and --process_id=1 on the other host)
"""

import contextlib
import importlib.util
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from diffusion_jax.system import (
  cluster,
  farewell,
  interrupts,
  meeting,
  numerics,
)
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string(
  'coordinator', None,
  'Multi-process: HOST:PORT of process 0. Not needed with Slurm, mpiexec and '
  'torchrun, and on TPU pods.',
)  # fmt: skip
flags.DEFINE_integer(
  'num_processes', None,
  'Multi-process: their number; 1 = alone, whatever a launcher says.',
)  # fmt: skip
flags.DEFINE_integer('process_id', None, 'Multi-process: index, from 0.')
flags.DEFINE_integer(
  'join_secs', 300, 'Multi-process: seconds to wait for all to join.'
)
flags.DEFINE_integer(
  'heartbeat_secs', 60,
  'Multi-process: seconds of silence after which the others exit.',
  lower_bound=1,
)  # fmt: skip

# The connections to the other processes; None if this process has met none.
_bond: farewell.Bond | None = None
_leaving = threading.RLock()


def initialize() -> None:
  """Joins the other processes, if any. Call first in a binary.

  Raises:
    UserError: the flags are inconsistent, a process is missing, or the
      processes have unlike versions or settings that numbers depend on.
  """
  place = _place()
  if place:
    devices = cluster.devices(place)
    _join(*place[1:4], FLAGS.join_secs, _started(place))
    how = {
      'coordinator_address': place.coordinator,
      'num_processes': place.count,
      'process_id': place.index,
      'local_device_ids': devices,
      'cluster_detection_method': 'deactivate',
    }
  elif _on_tpu():
    how = {}
  else:
    return
  # Collectives print their peers to fd 1: reserve stdout for results.
  sys.stdout.flush()
  sys.stdout = os.fdopen(
    os.dup(1), 'w', encoding=sys.stdout.encoding, errors=sys.stdout.errors
  )
  os.dup2(2, 1)
  # The processes talk directly: gRPC would ask the proxy of the environment.
  os.environ.update(grpc_proxy='')
  jax.config.update('jax_check_proxy_envs', False)
  jax.distributed.initialize(
    **how,
    initialization_timeout=FLAGS.join_secs,
    heartbeat_timeout_seconds=FLAGS.heartbeat_secs,
    shutdown_timeout_seconds=FLAGS.heartbeat_secs,
  )
  # JAX now handles SIGTERM, which only training asks it about.
  interrupts.watch(signal.SIGTERM, _stop)
  if not place and _is_several():
    _join_in_pod()
  numerics.check_alike(gather(numerics.describe()))


def _stop():
  """Ends this process on SIGTERM, wherever its main thread is."""
  begin_to_leave()
  with contextlib.suppress(OSError):
    print(
      'stopped by SIGTERM; run the same command again to resume',
      file=sys.stderr,
      flush=True,
    )
  leave(128 + signal.SIGTERM, alone=True)


def _join(num_processes, index, address, seconds, started=None):
  """Meets the other processes, and keeps the connections until the end."""
  global _bond
  connections = meeting.meet(address, num_processes, index, seconds, started)
  if connections:
    _bond = farewell.bind(connections, index, _follow)


def _follow(other, code):
  """Exits because another process does."""
  begin_to_leave()
  with contextlib.suppress(OSError):
    print(
      f'process {other} exited with code {code}; this process exits, too',
      file=sys.stderr,
      flush=True,
    )
  leave(code, alone=True)


def _join_in_pod():
  """Meets the processes JAX has found; on failure, the end does not wait."""
  address = gather('' if index() else farewell.own_address())[0]
  with contextlib.suppress(UserError):
    _join(jax.process_count(), index(), address, farewell.PATIENCE)


def is_first() -> bool:
  """Whether this is process 0, which writes files and terminal output."""
  return index() == 0


def on_first(fn: Callable[[], Any]) -> Any:
  """Calls a function in process 0; all processes wait and get its result.

  Args:
    fn: the function; its result must be JSON-serializable.

  Raises:
    UserError: in all processes, if `fn` raised one in process 0.
  """
  if not _is_several():
    return fn()
  return gather(everywhere(lambda: fn() if is_first() else None))[0]


def everywhere(fn: Callable[[], Any]) -> Any:
  """Calls a function in all processes; each gets its own result.

  Args:
    fn: the function; it must not synchronize processes.

  Raises:
    UserError: in all processes, if `fn` raised one in any of them.
  """
  result = error = None
  try:
    result = fn()
  except UserError as e:
    error = str(e)
  for told in gather(error):
    if told:
      raise UserError(told)
  return result


def gather(value: Any) -> list:
  """Returns the values of all processes, in process order, on each of them.

  Args:
    value: this process's value, JSON-serializable.
  """
  if not _is_several():
    return [json.loads(json.dumps(value))]
  text = json.dumps(value).encode()
  longest = multihost_utils.process_allgather(np.int32(len(text))).max()
  padded = np.frombuffer(text.ljust(longest), np.uint8)  # JSON ignores spaces
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(row.astype(np.uint8).tobytes()) for row in rows]


def index() -> int:
  """The index of this process."""
  return jax.process_index() if _is_several() else 0


def begin_to_leave() -> None:
  """Lets no other thread end the process; waits for the end if one does.

  The first thread decides what is printed and the exit code. Another may fail
  only because processes are leaving.
  """
  _leaving.acquire()  # for good


def leave(code: int, alone: bool = False) -> None:
  """Exits at once in a multi-process run; otherwise returns.

  JAX's shutdown waits until all processes reach it, which never happens if one
  of them has failed. The others are told, and exit with the same code.

  Args:
    code: the exit code.
    alone: whether to exit in a single-process run, too.
  """
  if alone or _bond or _is_several():
    try:
      begin_to_leave()
      with contextlib.suppress(OSError):
        sys.stderr.flush()
        sys.stdout.flush()
      if _bond:
        farewell.part(_bond, code)
    finally:
      os._exit(code)  # even if interrupted, for example by another Ctrl-C


def finish(code: int = 0) -> None:
  """Exits with this code once all processes have got here.

  Returns if this process has met no others. JAX's shutdown is not safe on a
  busy machine: it may abort a process that still uses process 0's service.
  """
  if _bond:
    gather(None)
    leave(code)


def _is_several():
  # Asking for the count initializes JAX's devices, which a report never needs.
  return jax.distributed.is_initialized() and jax.process_count() > 1


# --- discovery ---------------------------------------------------------------


def _place() -> cluster.Place | None:
  """The place of this process, from the flags or else from a launcher."""
  names = ('coordinator', 'num_processes', 'process_id')
  given = [name for name in names if FLAGS[name].value is not None]
  num_processes, index = FLAGS.num_processes, FLAGS.process_id
  if num_processes == 1 and not index:
    return None  # whatever a launcher's variables say
  place = cluster.find()
  if place and given == ['coordinator']:
    return place._replace(coordinator=_address(FLAGS.coordinator))
  if place and not given and place.coordinator is None:
    raise UserError(
      f'{place.launcher} started {place.count} processes, but its variables do '
      'not name the host of process 0: give --coordinator=HOST:PORT, or '
      '--num_processes=1 to run this process alone'
    )
  if not given:
    return place
  if len(given) < 3:
    lacking = ', '.join(f'--{name}' for name in names if name not in given)
    raise UserError(
      f'--{given[0]} is given without {lacking}: give all three, or none'
    )
  if not 0 <= index < num_processes:
    raise UserError(
      f'--process_id={index}: must be from 0 to --num_processes - 1 = '
      f'{num_processes - 1}'
    )
  # A launcher also knows the other processes of this host.
  local = place[4:] if place else ()
  coordinator = _address(FLAGS.coordinator)
  return cluster.Place('', num_processes, index, coordinator, *local)


def _address(coordinator: str) -> str:
  """Checks HOST:PORT."""
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise UserError(
      f'--coordinator={coordinator}: give HOST:PORT, such as host0:8476'
    )
  if ':' in host and host[0] != '[':
    raise UserError(
      f'--coordinator={coordinator}: put an IPv6 address in brackets, '
      f'[{host}]:{port}'
    )
  return coordinator


def _started(place) -> str | None:
  """How processes are started, for the message about a missing one."""
  return place.launcher and (
    f'by {place.launcher}, whose variables name {place.count} processes '
    '(--num_processes=1 runs this one alone),'
  )


def _on_tpu():
  """Whether JAX will find TPUs here, and through them the other hosts."""
  wanted = os.environ.get('JAX_PLATFORMS', 'tpu').split(',')
  return (
    'tpu' in wanted
    and _has_chips()
    and bool(importlib.util.find_spec('libtpu'))
  )


def _has_chips():
  return any(Path('/dev').glob('accel*')) or any(
    Path('/dev/vfio').glob('[0-9]*')
  )


def skip_libtpu() -> None:
  """Leaves libtpu out where it is installed but there are no TPUs.

  It would print pages of errors at the start of every command. With a plugin
  for GPUs JAX must choose for itself.
  """
  if (
    importlib.util.find_spec('libtpu')
    and not importlib.util.find_spec('jax_plugins')
    and not os.environ.get('JAX_PLATFORMS')
    and not _has_chips()
  ):
    jax.config.update('jax_platforms', 'cpu')
