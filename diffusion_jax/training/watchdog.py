"""A watchdog: reports which host is missing, stuck or slow, and where.

In every step all processes of a run wait for the slowest, so from outside they
all look the same. In each process a thread records a heartbeat every few
seconds: the number of steps done, the share of time spent waiting for data, and
the stack of the main thread. Multi-process runs write them to the workdir's
heartbeats/. The thread of process 0 reads them all and logs which process is
behind. The watchdog ends nothing: JAX does that when a process is gone.
"""

import collections
import contextlib
import dataclasses
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
MUCH = 0.3  # share of time waiting for data above which a host is slow
OVER = 6  # heartbeats that the share is measured over
DEPTH = 12  # innermost lines of a stack to show


class Beat(NamedTuple):
  """A heartbeat of a process.

  Attributes:
    process: its index.
    host: its host name and process id.
    count: the number of its heartbeats so far; a count that stays the same
      shows that the process is silent.
    steps: the number of steps done since it was started.
    still: seconds since the last step.
    waited: the share of the last heartbeats' time spent waiting for data.
    stack: the stack of its main thread, innermost last.
  """

  process: int
  host: str
  count: int
  steps: int
  still: float
  waited: float
  stack: list[str]


@dataclasses.dataclass
class Watchdog:
  """Watches this process, and in process 0 all processes; a context manager.

  Args:
    workdir: the run's folder, shared by all processes.
    index: the index of this process.
    count: the number of processes.
    still_secs: warn about a step that takes longer than this; ten times as long
      for the first step, which compiles.
    silent_secs: warn about a process without a heartbeat for this long.
    every_secs: seconds between heartbeats.
    tell: receives the lines to log.
  """

  workdir: Any
  index: int
  count: int
  _: dataclasses.KW_ONLY
  still_secs: float
  silent_secs: float
  every_secs: float
  tell: Callable[[str], None]

  def __post_init__(self):
    self._folder = files.at(self.workdir) / FOLDER
    self._main = threading.main_thread().ident
    self._steps, self._waited, self._beats = 0, 0.0, 0
    self._since = time.monotonic()
    # (time, seconds waited for data so far) at the last heartbeats
    self._past = collections.deque([(self._since, 0.0)], OVER)
    # process -> (count of its newest heartbeat, when it was first seen)
    self._seen = dict.fromkeys(range(self.count), (0, self._since))
    self._told: set[tuple[int, str]] = set()
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self):
    if self.count > 1 and self.index == 0:
      with contextlib.suppress(OSError, UserError):  # the thread reports it
        files.make(self._folder)
        for path in self._folder.iterdir():  # from an earlier start
          path.unlink()
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._done.set()
    self._thread.join()

  def step(self) -> None:
    """Call after each step of this process."""
    self._since = time.monotonic()
    self._steps += 1

  def waiting(self, batches: Iterator) -> Iterator[Any]:
    """Yields the batches and measures the time spent waiting for them."""
    start = time.monotonic()
    for batch in batches:
      self._waited += time.monotonic() - start
      yield batch
      start = time.monotonic()

  def _watch(self) -> None:
    while not self._done.wait(self.every_secs):
      try:
        beat = self._beat()
        beats = [beat] if self.count == 1 else self._exchange(beat)
        if self.index == 0:
          self._look(beats)
      except Exception as e:  # disks, buckets, and damaged heartbeats
        self._tell_once(self.index, 'disk', f'heartbeats failed: {e}')

  def _beat(self) -> Beat:
    now, waited = time.monotonic(), self._waited
    then, before = self._past[0]
    self._past.append((now, waited))
    self._beats += 1
    frame = sys._current_frames()[self._main]
    stack = [line.rstrip() for line in traceback.format_stack(frame)[-DEPTH:]]
    return Beat(
      self.index, f'{socket.gethostname()}, pid {os.getpid()}', self._beats,
      self._steps, now - self._since, (waited - before) / (now - then), stack,
    )  # fmt: skip

  def _exchange(self, beat: Beat) -> list[Beat]:
    files.make(self._folder)
    with files.replacing(self._folder / f'{self.index}.json') as file:
      file.write(json.dumps(beat).encode())
    if self.index:
      return []
    paths = (self._folder / f'{i}.json' for i in range(self.count))
    return [Beat(*json.loads(p.read_text())) for p in paths if p.exists()]

  def _look(self, beats: list[Beat]) -> None:
    now = time.monotonic()
    for beat in beats:
      if self._seen[beat.process][0] != beat.count:
        self._seen[beat.process] = beat.count, now
    silent = {i: now - when for i, (_, when) in self._seen.items()}
    first = 10 if self._steps < 2 else 1
    found = judge(beats, silent, first * self.still_secs, self.silent_secs)
    for (process, kind), line in found.items():
      self._tell_once(process, kind, line)
    self._told &= found.keys()  # warn again if it recovers and fails again

  def _tell_once(self, process, kind, line):
    if (process, kind) not in self._told:
      self._told.add((process, kind))
      self.tell(line)


def judge(
  beats: list[Beat],
  silent: dict[int, float],
  still_secs: float,
  silent_secs: float,
) -> dict[tuple[int, str], str]:
  """Finds processes that are missing, stuck or slow.

  Args:
    beats: the newest heartbeat of each process that has sent any.
    silent: process -> seconds since its newest heartbeat, or since the start.
    still_secs: a step that takes longer is stuck.
    silent_secs: a process that is silent for longer is missing.

  Returns:
    (process, problem) -> lines for the log: the process, its host, its stack.
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
