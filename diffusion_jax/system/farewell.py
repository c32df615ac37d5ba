"""Shutdown of a multi-process run: all end together, and process 0 last.

Process 0 runs JAX's coordination service, and JAX aborts every process that is
still alive when the service stops. So each of the others keeps a connection to
process 0 open for its whole life. The kernel closes it when that process exits,
for whatever reason, and process 0 waits for that.

A process that has to exit alone, because of a mistake or a signal, first says
so: process 0 exits with the same code, and takes the others along. Otherwise
they would wait for it in a collective, and end in pages of C++ output.
"""

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

# Seconds that a process waits for the others.
PATIENCE = 10.0
# Seconds that a process has to exit by itself once another has announced its
# exit: it may be in a collective that never finishes.
GRACE = 5.0


class Bond(NamedTuple):
  """What binds a process to the others.

  Attributes:
    index: its index.
    others: in process 0, the connections to the others, by index from 1; in
      these, the connection to process 0.
    heard: set once another process has announced its exit, or process 0 is
      gone.
  """

  index: int
  others: Sequence[socket.socket]
  heard: threading.Event


def bind(
  others: Sequence[socket.socket],
  index: int,
  end: Callable[[int, int], None],
  seconds: float = GRACE,
) -> Bond:
  """Ends this process some time after another one announces that it fails.

  Returns at once; a thread waits. If a process dies without announcing it, the
  thread does nothing: JAX then ends the others.

  Args:
    others: the connections, see Bond.
    index: the index of this process.
    end: ends this process; takes the index and the exit code of the other one.
    seconds: how long this process may still take to exit by itself.
  """
  heard = threading.Event()

  def wait():
    with selectors.DefaultSelector() as selector:
      for number, other in enumerate(others, start=0 if index else 1):
        selector.register(other, selectors.EVENT_READ, number)
      while selector.get_map():
        for key, _ in selector.select():
          told = _received(key.fileobj)
          if told is None:
            selector.unregister(key.fileobj)
          elif code := int(told.strip() or 0):
            heard.set()
            time.sleep(seconds)
            end(key.data, code)
            return
    heard.set()

  for other in others:
    other.setblocking(False)
  threading.Thread(target=wait, daemon=True).start()
  return Bond(index, others, heard)


def part(bond: Bond, code: int, seconds: float = PATIENCE) -> None:
  """Announces that this process exits, and waits for the others.

  Process 0 waits until they have exited; the others wait for its answer if they
  exit with an error. Until then, collectives wait for this process and do not
  fail.

  Args:
    bond: the connections.
    code: the exit code of this process.
    seconds: how long to wait at most.
  """
  for other in bond.others:
    with contextlib.suppress(OSError):  # it has exited already
      other.send(f'{code}\n'.encode())
  if bond.index:
    if code:
      bond.heard.wait(seconds)
    return
  deadline = time.monotonic() + seconds
  with selectors.DefaultSelector() as selector:
    for other in bond.others:
      selector.register(other, selectors.EVENT_READ)
    while selector.get_map() and time.monotonic() < deadline:
      for key, _ in selector.select(max(deadline - time.monotonic(), 0)):
        if is_closed(key.fileobj):
          selector.unregister(key.fileobj)


def own_address() -> str:
  """A free port of this host, as the HOST:PORT other hosts reach it by."""
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
      probe.connect(('10.255.255.255', 9))  # chooses a route, sends nothing
      host = probe.getsockname()[0]
    except OSError:
      host = socket.gethostname()
  with socket.create_server(('', 0)) as server:
    return f'{host}:{server.getsockname()[1]}'


def is_closed(connection: socket.socket) -> bool:
  """Whether the other end has closed a non-blocking connection."""
  return _received(connection) is None


def _received(connection) -> bytes | None:
  """What has been received on a non-blocking connection; None if closed."""
  try:
    return connection.recv(64) or None
  except BlockingIOError:
    return b''
  except OSError:
    return None
