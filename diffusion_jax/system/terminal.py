"""Terminal output of the binaries: one-line errors, progress and tables."""

import contextlib
import functools
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from diffusion_jax.system import distributed

# Names a file that receives a copy of the error line. A program that starts a
# binary cannot read it from stderr: progress bars need stderr to be a terminal.
ERROR_FILE = 'DIFFUSION_JAX_ERROR_FILE'


class _Unheard(io.FileIO):
  """A file whose write errors are ignored."""

  def write(self, data) -> int:
    try:
      return super().write(data)
    except OSError:  # no reader, a full disk, a terminal that is gone
      return len(data)


def prepare() -> None:
  """Makes stdout and stderr usable, whatever the shell made of them.

  What is closed leads nowhere, characters that an encoding lacks are escaped,
  and status lines that cannot be written do not end the work. Call it first.
  """
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:  # or the next file to be opened would receive all output
      os.open(os.devnull, os.O_RDWR)
  if sys.stdout is None:
    sys.stdout = io.TextIOWrapper(io.FileIO(1, 'w'))
  if hasattr(sys.stdout, 'reconfigure'):
    sys.stdout.reconfigure(errors='backslashreplace')
  sys.stderr = io.TextIOWrapper(
    _Unheard(2, 'w', closefd=False),
    encoding=getattr(sys.stderr, 'encoding', None),
    errors='backslashreplace',
    write_through=True,
  )


def _is_terminal() -> bool:
  """Whether stderr is a terminal that can draw a line again."""
  return sys.stderr.isatty() and os.environ.get('TERM') != 'dumb'


def fail(message: str) -> None:
  """Prints one line on stderr and exits with code 2 at once.

  Python's normal exit waits for all threads, and the threads of a failed save
  can take minutes.
  """
  distributed.begin_to_leave()
  print(f'error: {message}', file=sys.stderr, flush=True)
  if path := os.environ.get(ERROR_FILE):
    with contextlib.suppress(OSError):
      Path(path).write_bytes(message.encode(errors='backslashreplace'))
  distributed.leave(2, alone=True)


class Progress:
  """Progress on stderr: a bar on a terminal, otherwise occasional lines.

  Args:
    title: what is counted.
    total: the final count.
    done: the initial count.
    unit: the unit of the count.
    seconds: the time between lines without a terminal.
    begin: shown in place of the count until the first update.
    kept: count -> what is kept of it and where, told after Ctrl-C; or None.
  """

  def __init__(
    self, title, total, done=0, unit='steps', seconds=20.0, begin='', kept=None
  ):
    self._before, self._kept = contextlib.ExitStack(), kept
    if begin:
      self._before.enter_context(waiting(begin, seconds))
    self._terminal = _is_terminal() and distributed.is_first()
    self._title, self._unit, self._seconds = title, unit, seconds
    self._done, self._first, self._total = done, done, total
    self._note, self._start, self._last = '', None, time.monotonic()
    self._bar = tqdm(
      total=total,
      initial=done,
      desc=title,
      unit=f' {unit}',
      disable=not self._terminal,
      dynamic_ncols=True,
      delay=1e-9 if begin else 0,  # shows nothing before the first update
    )

  def __enter__(self):
    return self

  def __exit__(self, _, raised, __):
    if self._kept and isinstance(raised, KeyboardInterrupt):
      raised.add_note(self._kept(self._done))
    self._before.close()
    self._bar.close()

  def reach(self, done: int, note: str = '') -> None:
    """Sets the count."""
    self.update(done - self._done, note)

  def update(self, count: int = 1, note: str = '') -> None:
    """Adds to the count; a note ('loss 0.03') is shown until the next one."""
    self._before.close()
    self._done += count
    self._bar.update(count)
    if note:
      self._note = note
      self._bar.set_postfix_str(note, refresh=False)
    now = time.monotonic()
    if self._start is None:
      # The first update includes compilation and would distort the rate.
      self._start, self._first = now, self._done
    elif (
      not self._terminal
      and self._done > self._first
      and (now - self._last > self._seconds or self._done == self._total)
    ):
      self._last = now
      rate = (self._done - self._first) / (now - self._start)
      left = tqdm.format_interval((self._total - self._done) / rate)
      note = f', {self._note}' if self._note else ''
      say(
        f'{self._title}: {self._done}/{self._total} {self._unit}, '
        f'{rate:.3g} {self._unit}/s, {left} left{note}'
      )


@contextlib.contextmanager
def waiting(title: str, seconds: float = 20.0) -> Iterator[None]:
  """Shows on stderr that a task of unknown duration is running.

  Args:
    title: the task.
    seconds: the time between lines without a terminal.
  """
  terminal, start = _is_terminal(), time.monotonic()

  def told():
    return f'{title}: {time.monotonic() - start:.0f} s'

  def tell():
    print(told(), file=sys.stderr, end='\r' if terminal else '\n', flush=True)

  say(title)
  try:
    with repeating(tell, 1.0 if terminal else seconds):
      yield
  finally:
    if terminal and distributed.is_first():
      print('\r' + ' ' * len(told()), file=sys.stderr, end='\r', flush=True)


@contextlib.contextmanager
def repeating(fn: Callable[[], None], seconds: float) -> Iterator[None]:
  """Calls a function again and again in a thread of process 0.

  Args:
    fn: the function.
    seconds: the time before each call.
  """
  done = threading.Event()

  def repeat():
    while not done.wait(seconds):
      fn()

  thread = threading.Thread(target=repeat, daemon=True)
  if distributed.is_first():
    thread.start()
  try:
    yield
  finally:
    done.set()
    if thread.is_alive():
      thread.join()


def say(text: str) -> None:
  """Prints a status line on stderr; results go to stdout."""
  if distributed.is_first():
    print(text, file=sys.stderr, flush=True)


@functools.cache
def say_once(text: str) -> None:
  """Prints a status line the first time that it is given."""
  say(text)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of aligned text: the first column left-aligned, the others right."""
  first, *others = zip(heads, *rows, strict=True)
  aligned = [_padded(first, str.ljust)]
  aligned += [_padded(column, str.rjust) for column in others]
  return ['  '.join(line).rstrip() for line in zip(*aligned, strict=True)]


def words(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """The lines of a table of words: all columns are left-aligned."""
  widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
  return [
    '  '.join(map(str.ljust, row, widths)).rstrip() for row in (heads, *rows)
  ]


def _padded(column, pad):
  width = max(map(len, column))
  return [pad(cell, width) for cell in column]


def report(result: dict, text: str, as_json: bool) -> None:
  """Prints a binary's result on stdout: as text, or as JSON."""
  if distributed.is_first():
    write(json.dumps(result, indent=2) if as_json else text)


def write(text: str) -> None:
  """Prints text on stdout, even if its reader has closed the pipe."""
  try:
    print(text, flush=True)
  except OSError as e:
    # Python's flush at exit would raise again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(e, BrokenPipeError):  # its reader is gone
      fail(f'standard output cannot be written ({e.strerror})')
