"""Shutdown of a multi-process run: process 0 exits last.

Process 0 runs JAX's coordination service, and JAX aborts every process that is
still alive when the service stops. So each of the others keeps a connection to
process 0 open for its whole life. The kernel closes it when that process exits,
for whatever reason, and process 0 waits for that.
"""

import contextlib
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence

# Seconds that process 0 waits for the others.
PATIENCE = 10.0
# Seconds that the others have to exit by themselves once process 0 wants to
# exit: they may be in a collective that never finishes.
GRACE = 5.0


def see_off(
  others: Sequence[socket.socket], code: int, seconds: float = PATIENCE
) -> None:
  """Tells the other processes that process 0 exits, and waits for them to exit.

  Args:
    others: process 0's connections to them.
    code: the exit code of process 0.
    seconds: how long to wait at most.
  """
  deadline = time.monotonic() + seconds
  with selectors.DefaultSelector() as selector:
    for other in others:
      other.setblocking(False)
      with contextlib.suppress(OSError):  # it has exited already
        other.send(f'{code}\n'.encode())
      selector.register(other, selectors.EVENT_READ)
    while selector.get_map() and time.monotonic() < deadline:
      for key, _ in selector.select(max(deadline - time.monotonic(), 0)):
        if is_closed(key.fileobj):
          selector.unregister(key.fileobj)


def follow(
  first: socket.socket, end: Callable[[int], None], seconds: float = GRACE
) -> None:
  """Ends this process some time after process 0 announces its exit.

  Returns at once; a thread waits. If process 0 dies without announcing it, the
  thread does nothing: JAX then ends this process.

  Args:
    first: the connection to process 0.
    end: ends this process; takes the exit code of process 0.
    seconds: how long this process may still take to exit by itself.
  """

  def wait():
    told = ''
    with contextlib.suppress(OSError):
      told = first.makefile().readline()
    if not told:
      return
    time.sleep(seconds)
    with contextlib.suppress(OSError):
      print(
        f'process 0 exited with code {int(told)}; this process exits, too',
        file=sys.stderr,
        flush=True,
      )
    end(int(told))

  first.settimeout(None)
  threading.Thread(target=wait, daemon=True).start()


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
  try:
    return connection.recv(64) == b''
  except BlockingIOError:
    return False
  except OSError:
    return True
