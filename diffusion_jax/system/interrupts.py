"""Signals that end a process even while its main thread is blocked.

Python runs its signal handlers in the main thread, between two instructions.
A main thread that waits for other hosts inside XLA may never get there.
"""

import faulthandler
import os
import signal
import threading
from collections.abc import Callable


def watch(number: int, call: Callable[[], None]) -> None:
  """Calls a function in a thread whenever a signal arrives.

  The signal's handler runs as well. A later call for the same signal replaces
  an earlier one.

  Args:
    number: the signal; its handler must have been set before. Call this in
      the main thread.
    call: takes nothing.
  """
  # Of a handler written in C, such as JAX's, Python knows None or an older one.
  handler = signal.getsignal(number)
  if faulthandler.unregister(number) and callable(handler):
    signal.signal(number, handler)  # unregistering restores an older one
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  # Its handler is written in C and only writes stacks to a file, here a pipe.
  faulthandler.register(number, writer, all_threads=True, chain=True)

  def wait():
    while os.read(reader, 2**16):
      call()

  threading.Thread(target=wait, daemon=True).start()
