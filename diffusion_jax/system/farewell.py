"""The end of several processes: process 0 is the last to go.

Process 0 holds JAX's coordination service, and JAX aborts each process that is
still there when the service goes. So the others keep a connection to process 0
for as long as they live. The kernel closes it when they end, however they end,
and process 0 waits for that.
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
# Seconds that another has, once process 0 wants to end, to end in its own way:
# it may be in a collective that no longer comes to an end.
GRACE = 5.0


def see_off(
  others: Sequence[socket.socket], code: int, seconds: float = PATIENCE
) -> None:
  """Tells the others that process 0 ends, and waits until they have ended.

  Args:
    others: process 0's connections to them.
    code: the exit code of process 0.
    seconds: how long it waits at most.
  """
  deadline = time.monotonic() + seconds
  with selectors.DefaultSelector() as selector:
    for other in others:
      other.setblocking(False)
      with contextlib.suppress(OSError):  # it has ended already
        other.send(f'{code}\n'.encode())
      selector.register(other, selectors.EVENT_READ)
    while selector.get_map() and time.monotonic() < deadline:
      for key, _ in selector.select(max(deadline - time.monotonic(), 0)):
        if _closed(key.fileobj):
          selector.unregister(key.fileobj)


def follow(
  first: socket.socket, end: Callable[[int], None], seconds: float = GRACE
) -> None:
  """Ends this process some time after process 0 has said that it ends.

  Returns at once; a thread waits. A process 0 that dies says nothing, and the
  thread does nothing: JAX ends this process then.

  Args:
    first: the connection to process 0.
    end: ends this process; takes the exit code of process 0.
    seconds: how long this process may still take to end by itself.
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
        f'process 0 has ended with exit code {int(told)}, and so does this one',
        file=sys.stderr,
        flush=True,
      )
    end(int(told))

  first.settimeout(None)
  threading.Thread(target=wait, daemon=True).start()


def own_address() -> str:
  """HOST:PORT that is free here, as other hosts reach it."""
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
      probe.connect(('10.255.255.255', 9))  # chooses a route, sends nothing
      host = probe.getsockname()[0]
    except OSError:
      host = socket.gethostname()
  with socket.create_server(('', 0)) as server:
    return f'{host}:{server.getsockname()[1]}'


def _closed(connection):
  try:
    return connection.recv(64) == b''
  except BlockingIOError:
    return False
  except OSError:
    return True
