"""Multi-process runs.

Each host of a pod or a cluster runs the same command. The processes find each
other through SLURM's variables, through the platform on TPU pods, and otherwise
through flags:

  python -m diffusion_jax.train ... --coordinator=host0:8476 \
    --num_processes=2 --process_id=0    (and --process_id=1 on the other host)

Before JAX is initialized, the processes meet at the coordinator's port. If one
is missing, JAX would abort with pages of C++ output; the meeting names it.
"""

import contextlib
import importlib.util
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from diffusion_jax.system import farewell
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string(
  'coordinator', None,
  'Multi-process: HOST:PORT of process 0. Not needed on SLURM and TPU pods.',
)  # fmt: skip
flags.DEFINE_integer('num_processes', None, 'Multi-process: their number.')
flags.DEFINE_integer('process_id', None, 'Multi-process: index, from 0.')
flags.DEFINE_integer(
  'join_secs', 300, 'Multi-process: seconds to wait for all to join.'
)
flags.DEFINE_integer(
  'heartbeat_secs', 60,
  'Multi-process: seconds of silence after which the others exit.',
  lower_bound=1,
)  # fmt: skip

HELLO = 'diffusion_jax'

# In process 0, the connections to the other processes, which it waits for at
# the end. [] in the other processes; None if this process has met no other.
_others: list[socket.socket] | None = None


def initialize() -> None:
  """Joins the other processes, if any. Call first in a binary.

  Raises:
    UserError: the flags are inconsistent, or a process is missing.
  """
  found = _by_flags() or _by_slurm() or ()
  if found:
    _join(*found, FLAGS.join_secs)
  elif not _on_tpu():
    return
  # Collectives print their peers to fd 1: reserve stdout for results.
  sys.stdout.flush()
  sys.stdout = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  jax.distributed.initialize(
    *found,
    initialization_timeout=FLAGS.join_secs,
    heartbeat_timeout_seconds=FLAGS.heartbeat_secs,
    shutdown_timeout_seconds=FLAGS.heartbeat_secs,
  )
  if not found and _is_several():
    _join_in_pod()


def _join(address, num_processes, index, seconds):
  """Meets the other processes, and keeps the connections until the end."""
  global _others
  connections = meet(address, num_processes, index, seconds)
  if connections:
    _others = [] if index else connections
  if index:
    farewell.follow(connections[0], lambda code: leave(code, alone=True))


def _join_in_pod():
  """Meets the processes JAX has found; on failure, the end does not wait."""
  address = gather('' if index() else farewell.own_address())[0]
  with contextlib.suppress(UserError):
    _join(address, jax.process_count(), index(), farewell.PATIENCE)


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


def leave(code: int, alone: bool = False) -> None:
  """Exits at once in a multi-process run; otherwise returns.

  JAX's shutdown waits until all processes reach it, which never happens if one
  of them has failed. Process 0 briefly waits for the others to exit first.

  Args:
    code: the exit code.
    alone: whether to exit in a single-process run, too.
  """
  if alone or _others is not None or _is_several():
    try:
      with contextlib.suppress(OSError):
        sys.stderr.flush()
        sys.stdout.flush()
      farewell.see_off(_others or [], code)
    finally:
      os._exit(code)  # even if interrupted, for example by another Ctrl-C


def finish(code: int = 0) -> None:
  """Exits with this code once all processes have got here.

  Returns if this process has met no others. JAX's shutdown is not safe on a
  busy machine: it may abort a process that still uses process 0's service.
  """
  if _others is not None:
    gather(None)
    leave(code)


def _is_several():
  # Asking for the count initializes JAX's devices, which a report never needs.
  return jax.distributed.is_initialized() and jax.process_count() > 1


# --- discovery ---------------------------------------------------------------


def _by_flags():
  names = ('coordinator', 'num_processes', 'process_id')
  given = [name for name in names if FLAGS[name].value is not None]
  if not given:
    return None
  if len(given) < 3:
    lacking = ', '.join(f'--{name}' for name in names if name not in given)
    raise UserError(
      f'--{given[0]} is given without {lacking}: give all three, or none'
    )
  num_processes, index = FLAGS.num_processes, FLAGS.process_id
  if not 0 <= index < num_processes:
    raise UserError(
      f'--process_id={index}: must be from 0 to --num_processes - 1 = '
      f'{num_processes - 1}'
    )
  host, _, port = FLAGS.coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise UserError(
      f'--coordinator={FLAGS.coordinator}: give HOST:PORT, such as host0:8476'
    )
  return FLAGS.coordinator, num_processes, index


def _by_slurm():
  names = ('JOB_ID', 'STEP_NODELIST', 'NTASKS', 'PROCID')
  values = [os.environ.get(f'SLURM_{name}') for name in names]
  if None in values or int(values[2]) < 2:
    return None
  job, nodes, num_processes, index = values
  # 'a1', 'a1,b2', 'a[01-15],b2', 'a[01,07-15]': the first host.
  head, _, ranges = nodes.partition('[')
  host = head.split(',')[0]
  if ranges and ',' not in head:
    host += ranges.replace(']', ',').replace('-', ',').split(',')[0]
  port = 61440 + int(job) % 4096  # jobs on one host get different ones
  return f'{host}:{port}', int(num_processes), int(index)


def _on_tpu():
  """Whether JAX will find TPUs here, and through them the other hosts."""
  wanted = os.environ.get('JAX_PLATFORMS', 'tpu').split(',')
  chips = [*Path('/dev').glob('accel*'), *Path('/dev/vfio').glob('[0-9]*')]
  return (
    'tpu' in wanted and bool(chips) and bool(importlib.util.find_spec('libtpu'))
  )


# --- meeting -----------------------------------------------------------------


def meet(
  address: str, num_processes: int, index: int, seconds: float
) -> list[socket.socket]:
  """Returns once all processes have joined.

  Process 0 listens and the others connect; when all have connected, process 0
  tells them to proceed.

  Args:
    address: HOST:PORT of process 0.
    num_processes: the number of processes.
    index: the index of this process.
    seconds: how long to wait.

  Returns:
    In process 0, a connection to each of the others; in the others, a
    connection to process 0.

  Raises:
    UserError: a process did not join, two have the same index, or they disagree
      about the number of processes.
  """
  if num_processes == 1:
    return []
  if index:
    return _knock(address, num_processes, index, seconds)
  return _listen(address, num_processes, seconds)


def _listen(address, num_processes, seconds):
  deadline = time.monotonic() + seconds
  port = int(address.rpartition(':')[2])
  try:
    server = socket.create_server(('', port))
  except OSError as e:
    raise UserError(
      f'--coordinator={address}: port {port} cannot be used ({e.strerror}): '
      'give another port'
    ) from e
  guests, greeted, problem = {}, [], None
  with server, contextlib.ExitStack() as stack:
    while len(guests) < num_processes - 1 and not problem:
      server.settimeout(max(deadline - time.monotonic(), 0.001))
      try:
        guest, _ = server.accept()
      except TimeoutError:
        lacking = sorted(set(range(1, num_processes)) - guests.keys())
        problem = (
          f'{_listed(lacking)} of {num_processes} did not join within '
          f'{seconds:g} s: check that it was started with --num_processes='
          f'{num_processes} and can reach {address}'
        )
        break
      stack.enter_context(guest)
      guest.settimeout(5)
      # A process killed in the meantime may reconnect, or is still awaited.
      guests = {i: there for i, there in guests.items() if not _gone(there)}
      with contextlib.suppress(OSError, ValueError):
        name, *numbers = guest.makefile().readline().split()
        theirs, total = map(int, numbers)
        if name != HELLO or not 0 < theirs < max(total, num_processes):
          continue
        if total != num_processes:
          problem = (
            f'process {theirs} was started with --num_processes={total}, '
            f'process 0 with {num_processes}: give all the same'
          )
        elif theirs in guests:
          problem = (
            f'two processes have --process_id={theirs}: give each its own'
          )
        guests[theirs] = guest
        greeted.append(guest)
    for guest in greeted:
      with contextlib.suppress(OSError):
        guest.sendall(f'{problem or "go"}\n'.encode())
        if problem:
          guest.recv(1)  # they close first, so that the port is free at once
    if problem:
      raise UserError(problem)
    return [guest.dup() for guest in guests.values()]  # these stay open


def _gone(guest):
  """Whether it closed the connection, as when killed and restarted."""
  guest.setblocking(False)
  try:
    return farewell.is_closed(guest)
  finally:
    guest.settimeout(5)


def _knock(address, num_processes, index, seconds):
  deadline = time.monotonic() + seconds
  host, _, port = address.rpartition(':')
  while time.monotonic() < deadline:
    try:
      with socket.create_connection((host, int(port)), timeout=5) as server:
        server.sendall(f'{HELLO} {index} {num_processes}\n'.encode())
        # On timeout the coordinator answers first.
        server.settimeout(max(deadline - time.monotonic(), 0) + 5)
        answer = server.makefile().readline().strip()
        if answer == 'go':
          return [server.dup()]
        if answer:
          raise UserError(answer)
    except OSError:
      time.sleep(0.2)
  raise UserError(
    f'process 0 was not found at {address} within {seconds:g} s: check that it '
    'was started and that the port is open to this host'
  )


def _listed(numbers):
  shown = ', '.join(map(str, numbers[:10]))
  more = f' and {len(numbers) - 10} more' if len(numbers) > 10 else ''
  return f'process {shown}{more}'
