"""A watchdog: which host is missing, stands still, or is slow, and where.

All processes of a run wait for the slowest in every step, so that from outside
they look alike. Each has a thread that beats: every few seconds it notes how
many steps its process is through with, the share of the time that it has waited
for data, and the stack of its main thread; where there are several, in the
workdir's heartbeats/. The thread of process 0 reads them all, and names in the
log who is behind. Nothing is ended here: JAX does that, when a process is gone.
"""

import collections
import contextlib
import json
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError

FOLDER = 'heartbeats'
MUCH = 0.3  # the share of waiting for data from which a host is called slow
OVER = 6  # beats that the share is of
DEPTH = 12  # innermost lines of a stack


class Beat(NamedTuple):
  """What a process notes of itself.

  Attributes:
    process: its number.
    host: where it runs, with its process id.
    count: of its beats, so that one that stays the same is seen to.
    steps: how many it is through with, since it was started.
    still: seconds since the last.
    waited: the share of the last beats' time that it waited for data.
    stack: of its main thread, innermost last.
  """

  process: int
  host: str
  count: int
  steps: int
  still: float
  waited: float
  stack: list[str]


class Watchdog:
  """Watches this process, and in process 0 all; a context.

  Args:
    workdir: of the run, which all processes share.
    index: of this process.
    count: of processes.
    still_secs: a step that takes longer than this is told; ten times as long
      for the first one, which compiles.
    silent_secs: so is a process that does not beat for so long.
    every_secs: between beats.
    tell: takes lines for the log.
  """

  def __init__(
    self,
    workdir,
    index: int,
    count: int,
    *,
    still_secs: float,
    silent_secs: float,
    every_secs: float,
    tell: Callable[[str], None],
  ):
    self._folder = files.at(workdir) / FOLDER
    self._index, self._count = index, count
    self._still_secs, self._silent_secs = still_secs, silent_secs
    self._every, self._tell = every_secs, tell
    self._main = threading.main_thread().ident
    self._steps, self._waited, self._beats = 0, 0.0, 0
    self._since = time.monotonic()
    # (when, how long it had waited) at the last beats
    self._past = collections.deque([(self._since, 0.0)], OVER)
    # process -> count of its newest beat, when it came
    self._seen = dict.fromkeys(range(count), (0, self._since))
    self._told: set[tuple[int, str]] = set()
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self):
    if self._count > 1 and self._index == 0:
      with contextlib.suppress(OSError, UserError):  # which the thread tells
        files.make(self._folder)
        for path in self._folder.iterdir():  # of an earlier start
          path.unlink()
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._done.set()
    self._thread.join()

  def step(self) -> None:
    """To be called when this process is through with a step."""
    self._since = time.monotonic()
    self._steps += 1

  def waiting(self, batches: Iterator) -> Iterator[Any]:
    """The same batches; the time that each takes to come is counted."""
    start = time.monotonic()
    for batch in batches:
      self._waited += time.monotonic() - start
      yield batch
      start = time.monotonic()

  def _watch(self) -> None:
    while not self._done.wait(self._every):
      try:
        beat = self._beat()
        beats = [beat] if self._count == 1 else self._exchange(beat)
        if self._index == 0:
          self._look(beats)
      except Exception as e:  # of disks and buckets, and of damaged beats
        self._tell_once(self._index, 'disk', f'no heartbeat can be kept: {e}')

  def _beat(self) -> Beat:
    now, waited = time.monotonic(), self._waited
    then, before = self._past[0]
    self._past.append((now, waited))
    self._beats += 1
    frame = sys._current_frames()[self._main]
    stack = [line.rstrip() for line in traceback.format_stack(frame)[-DEPTH:]]
    return Beat(
      self._index, f'{socket.gethostname()}, pid {os.getpid()}', self._beats,
      self._steps, now - self._since, (waited - before) / (now - then), stack,
    )  # fmt: skip

  def _exchange(self, beat: Beat) -> list[Beat]:
    files.make(self._folder)
    with files.replacing(self._folder / f'{self._index}.json') as file:
      file.write(json.dumps(beat).encode())
    if self._index:
      return []
    paths = (self._folder / f'{i}.json' for i in range(self._count))
    return [Beat(*json.loads(p.read_text())) for p in paths if p.exists()]

  def _look(self, beats: list[Beat]) -> None:
    now = time.monotonic()
    for beat in beats:
      if self._seen[beat.process][0] != beat.count:
        self._seen[beat.process] = beat.count, now
    silent = {i: now - when for i, (_, when) in self._seen.items()}
    first = 10 if self._steps < 2 else 1
    found = judge(beats, silent, first * self._still_secs, self._silent_secs)
    for (process, kind), line in found.items():
      self._tell_once(process, kind, line)
    self._told &= found.keys()  # who has recovered may be told of again

  def _tell_once(self, process, kind, line):
    if (process, kind) not in self._told:
      self._told.add((process, kind))
      self._tell(line)


def judge(
  beats: list[Beat],
  silent: dict[int, float],
  still_secs: float,
  silent_secs: float,
) -> dict[tuple[int, str], str]:
  """Who is missing, stands still, or is slow.

  Args:
    beats: the newest of each process that ever beat.
    silent: process -> seconds since it came, or since the start.
    still_secs: from when a step takes too long.
    silent_secs: from when a process is missing.

  Returns:
    (process, what) -> lines for the log: the process, its host, its stack.
  """
  found, newest = {}, {beat.process: beat for beat in beats}
  missing = [i for i, seconds in silent.items() if seconds > silent_secs]
  for process in missing:
    how = f'is missing: silent for {silent[process]:.0f} s'
    found[process, 'missing'] = (
      _told(newest[process], f'{how}, last seen')
      if process in newest
      else f'watchdog: process {process} {how}; is the workdir shared?'
    )
  still = [beat for beat in beats if beat.still > still_secs]
  if still and not missing:
    least = min(beat.steps for beat in beats)
    behind = [beat for beat in beats if beat.steps == least]
    others = ', and the others wait for it;' if len(beats) > 1 else ';'
    how = 'stands still for {:.0f} s' + others
    if len(behind) == len(beats) > 1:
      behind = behind[:1]
      how = f'and all {len(beats)} stand still for {{:.0f}} s: devices, or the '
      how += 'network between them;'
    for beat in behind:
      found[beat.process, 'still'] = _told(beat, how.format(beat.still))
  for beat in beats:
    others = [other.waited for other in beats if other is not beat]
    usual = statistics.median(others) if others else 0.0
    if not still and beat.waited > MUCH and beat.waited > 2 * usual:
      found[beat.process, 'slow'] = _told(
        beat,
        f'is slow: it waits for data {beat.waited:.0%} of the time'
        + f', the others {usual:.0%};' * bool(others),
      )
  return found


def _told(beat: Beat, how: str) -> str:
  head = f'watchdog: process {beat.process} ({beat.host}) {how}'
  steps = f'after {beat.steps} steps since its start, in'
  return '\n'.join([f'{head} {steps}', *beat.stack])
