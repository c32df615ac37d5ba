"""What people see of a binary: its one-line mistakes, progress, tables."""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from diffusion_jax.system import distributed

# Who started a binary may name a file there, to read its one line again: stderr
# is the user's, whose terminal shows bars only where nothing is in between.
ERROR_FILE = 'DIFFUSION_JAX_ERROR_FILE'


def fail(message: str) -> None:
  """One line on stderr, exit code 2, at once.

  Python's own exit waits for all threads, and those of a save that has failed
  wait for minutes.
  """
  print(f'error: {message}', file=sys.stderr, flush=True)
  if path := os.environ.get(ERROR_FILE):
    with contextlib.suppress(OSError):
      Path(path).write_text(message)
  distributed.leave(2, alone=True)


class Progress:
  """A bar on a terminal, a line now and then elsewhere; on stderr.

  Args:
    title: what is counted.
    total: how many there will be.
    done: how many there are already.
    unit: of the count.
    seconds: between lines where there is no terminal.
  """

  def __init__(self, title, total, done=0, unit='steps', seconds=20.0):
    self._terminal = sys.stderr.isatty() and distributed.is_first()
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
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._bar.close()

  def update(self, count: int = 1, note: str = '') -> None:
    """Counts on; a note ('loss 0.03') stays until the next one."""
    self._done += count
    self._bar.update(count)
    if note:
      self._note = note
      self._bar.set_postfix_str(note, refresh=False)
    now = time.monotonic()
    if self._start is None:
      # The first takes the compilation, and would spoil the rate.
      self._start, self._first = now, self._done
    elif (
      not self._terminal
      and distributed.is_first()
      and (now - self._last > self._seconds or self._done == self._total)
    ):
      self._last = now
      rate = (self._done - self._first) / (now - self._start)
      left = tqdm.format_interval((self._total - self._done) / rate)
      print(
        f'{self._title}: {self._done}/{self._total} {self._unit}, '
        f'{rate:.3g} {self._unit}/s, {left} left'
        + (f', {self._note}' if self._note else ''),
        file=sys.stderr,
        flush=True,
      )


@contextlib.contextmanager
def waiting(title: str, seconds: float = 20.0) -> Iterator[None]:
  """Shows that something long is under way, whose end is not known; on stderr.

  Args:
    title: what is.
    seconds: between lines where there is no terminal.
  """
  terminal = sys.stderr.isatty()
  start, done = time.monotonic(), threading.Event()

  def told():
    return f'{title}: {time.monotonic() - start:.0f} s'

  def tell():
    while not done.wait(1.0 if terminal else seconds):
      print(told(), file=sys.stderr, end='\r' if terminal else '\n', flush=True)

  if not distributed.is_first():
    yield
    return
  say(title)
  thread = threading.Thread(target=tell, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
    if terminal:
      print('\r' + ' ' * len(told()), file=sys.stderr, end='\r', flush=True)


def say(text: str) -> None:
  """A line for people, on stderr: what runs, not what came of it."""
  if distributed.is_first():
    print(text, file=sys.stderr, flush=True)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of aligned text: the first column to the left, numbers right."""
  widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

  def line(cells):
    first, *others = (
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return '  '.join([first, *others]).rstrip()

  return [line(cells) for cells in (heads, *rows)]


def report(result: dict, text: str, as_json: bool) -> None:
  """A binary's last word on stdout: a line for people, or JSON."""
  if distributed.is_first():
    write(json.dumps(result, indent=2) if as_json else text)


def write(text: str) -> None:
  """A text on stdout, whoever reads along or has gone."""
  try:
    print(text, flush=True)
  except BrokenPipeError:
    # Who read along has gone; Python's own flush at the end would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except OSError as e:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    fail(f'standard output cannot be written ({e.strerror})')
