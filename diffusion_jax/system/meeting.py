"""How the processes of a run meet before JAX is initialized.

If one were missing, JAX would abort with pages of C++ output; the meeting names
it. Process 0 listens and the others connect; when all have connected, process 0
tells them to proceed.
"""

import contextlib
import errno
import socket
import time

from diffusion_jax.system import farewell
from diffusion_jax.system.errors import UserError

HELLO = 'diffusion_jax'
NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)  # it is turned off


def meet(
  address: str,
  num_processes: int,
  index: int,
  seconds: float,
  started: str | None = None,
) -> list[socket.socket]:
  """Returns once all processes have joined.

  Args:
    address: HOST:PORT of process 0.
    num_processes: the number of processes.
    index: the index of this process.
    seconds: how long to wait.
    started: how the others are started, for errors; by default 'with
      --num_processes=N'.

  Returns:
    In process 0, a connection to each of the others, in order; in the others, a
    connection to process 0.

  Raises:
    UserError: a process did not join, two have the same index, or they disagree
      about the number of processes.
  """
  if num_processes == 1:
    return []
  started = started or f'with --num_processes={num_processes}'
  if index:
    return _knock(address, num_processes, index, seconds, started)
  return _listen(address, num_processes, seconds, started)


def _listen(address, num_processes, seconds, started):
  deadline = time.monotonic() + seconds
  guests, greeted, problem = {}, [], None
  with _server(address) as server, contextlib.ExitStack() as stack:
    while len(guests) < num_processes - 1 and not problem:
      server.settimeout(max(deadline - time.monotonic(), 0.001))
      try:
        guest, _ = server.accept()
      except TimeoutError:
        lacking = sorted(set(range(1, num_processes)) - guests.keys())
        problem = (
          f'{_listed(lacking)} of {num_processes} did not join within '
          f'{seconds:g} s: check that it was started {started} and can reach '
          f'{address}'
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
    return [guests[i].dup() for i in sorted(guests)]  # these stay open


def _server(address: str) -> socket.socket:
  """Listens on a port, where possible for IPv4 and IPv6."""
  port = int(address.rpartition(':')[2])
  try:
    if socket.has_dualstack_ipv6():
      try:
        return socket.create_server(
          ('', port), family=socket.AF_INET6, dualstack_ipv6=True
        )
      except OSError as e:
        if e.errno not in NO_IPV6:
          raise
    return socket.create_server(('', port))
  except OSError as e:
    raise UserError(
      f'--coordinator={address}: port {port} cannot be used ({e.strerror}): '
      'give another port'
    ) from e


def _gone(guest):
  """Whether it closed the connection, as when killed and restarted."""
  guest.setblocking(False)
  try:
    return farewell.is_closed(guest)
  finally:
    guest.settimeout(5)


def _knock(address, num_processes, index, seconds, started):
  deadline = time.monotonic() + seconds
  host, _, port = address.rpartition(':')
  failed = None
  while time.monotonic() < deadline:
    try:
      there = host.strip('[]'), int(port)
      with socket.create_connection(there, timeout=5) as server:
        server.sendall(f'{HELLO} {index} {num_processes}\n'.encode())
        # On timeout the coordinator answers first.
        server.settimeout(max(deadline - time.monotonic(), 0) + 5)
        answer = server.makefile().readline().strip()
        if answer == 'go':
          return [server.dup()]
        if answer:
          raise UserError(answer)
    except (OSError, UnicodeError) as e:  # a name that is no host's
      failed = e
      time.sleep(0.2)
  if isinstance(failed, socket.gaierror | UnicodeError):
    raise UserError(
      f'process 0 was not found at {address}: this host does not know the name '
      f'{host} ({getattr(failed, "strerror", failed)}); give an address in '
      '--coordinator=HOST:PORT'
    )
  raise UserError(
    f'process 0 was not found at {address} within {seconds:g} s: check that it '
    f'was started {started} and that the port is open to this host'
  )


def _listed(numbers):
  shown = ', '.join(map(str, numbers[:10]))
  more = f' and {len(numbers) - 10} more' if len(numbers) > 10 else ''
  return f'process {shown}{more}'
