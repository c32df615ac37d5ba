"""What the benchmarks share: rounds, the clock, summaries, the machine."""

import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from diffusion_jax.system import environment, files, terminal
from diffusion_jax.system.errors import UserError

PAUSE = 0.05  # seconds until idle threads of the other side stop spinning


class Clock:
  """The minutes that a benchmark may take.

  Args:
    minutes: from now on; None or 0 = any time.
  """

  def __init__(self, minutes: float | None = None):
    self._end = time.monotonic() + 60 * minutes if minutes else math.inf

  @property
  def left(self) -> float:
    """The seconds that are left."""
    return self._end - time.monotonic()

  def fits(self, seconds: float) -> bool:
    """Whether what takes so long would end in time."""
    return seconds <= self.left


def alternating(
  calls: Mapping[str, Callable], rounds: int, clock: Clock | None = None
) -> dict[str, np.ndarray]:
  """Times calls alternately, so that other load affects all of them.

  Every second round is reversed, so that no call always follows the same one.

  Args:
    calls: name -> function without arguments that returns when its work is
      done.
    rounds: the number of calls of each.
    clock: ends the rounds early, after at least one of them.

  Returns:
    {name: seconds of each round [rounds]}.
  """
  seconds = {name: [] for name in calls}
  begin = time.monotonic()
  for i in range(rounds):
    each = (time.monotonic() - begin) / max(i, 1)
    if i and clock and not clock.fits(each):
      break
    for name in list(calls)[:: -1 if i % 2 else 1]:
      time.sleep(PAUSE)
      start = time.perf_counter()
      calls[name]()
      seconds[name].append(time.perf_counter() - start)
  return {name: np.array(times) for name, times in seconds.items()}


def quartiles(values) -> dict[str, float]:
  """The median and the quartiles of values."""
  q1, median, q3 = np.quantile(values, (0.25, 0.5, 0.75))
  return {'median': float(median), 'q1': float(q1), 'q3': float(q3)}


def spread(found: Mapping[str, float], scale: float = 1) -> str:
  """A median with its quartiles, or with the minimum and maximum, as text."""
  shown = [figures(scale * value) for value in found.values()]
  return '{} ({} to {})'.format(*shown)


def figures(value: float) -> str:
  """A number with four figures, or all of those before the point."""
  return f'{value:,.0f}' if value >= 1000 else f'{value:#.4g}'.rstrip('.')


def machine(*packages: str) -> dict:
  """The machine, its load, and the versions of our packages and of others.

  Args:
    packages: names of other packages.
  """
  info = Path('/proc/cpuinfo')
  text = info.read_text() if info.exists() else ''
  names = re.findall('^model name.*: (.*)', text, re.M)
  here = environment.describe()
  here['versions'] |= {
    name: importlib.metadata.version(name) for name in packages
  }
  return {
    'date': time.strftime('%Y-%m-%d'),
    'cpu': names[0] if names else platform.processor(),
    'cpu_cores': os.cpu_count(),
    'load_before': round(os.getloadavg()[0], 2),
    **here,
  }


def warn_if_busy(found: Mapping) -> None:
  """Warns about the load of a machine, see `machine`."""
  load, cores = found['load_before'], found['cpu_cores']
  if load > cores / 2:
    terminal.say(
      f'warning: the load is {load} on {cores} cores: figures from a busy '
      'machine are meaningless'
    )


def described(found: Mapping, *packages: str) -> str:
  """The machine in one line, see `machine`."""
  versions = (
    f'{name} {found["versions"][name]}' for name in ('jax', *packages)
  )
  return (
    f'{found["device"]}; {found["cpu"]}, {found["cpu_cores"]} cores, load '
    f'{found["load_before"]} before; {", ".join(versions)}; {found["date"]}'
  )


def need(*packages: str, extra: str = 'parity') -> None:
  """Raises UserError unless these packages, of an extra, are installed."""
  for name in packages:
    if not importlib.util.find_spec(name):
      raise UserError(f"{name} is not installed: pip install '.[{extra}]'")


def numbers(flag: str, given: Sequence[str]) -> list[int]:
  """A list of sizes from a flag.

  Raises:
    UserError: they are not whole numbers from 1 on.
  """
  if not given or not all(x.isdecimal() and int(x) for x in given):
    raise UserError(
      f'--{flag}={",".join(given)}: whole numbers from 1 on, as 1,16'
    )
  return [int(x) for x in given]


def words(flag: str, given: Sequence[str], known: Sequence[str]) -> list[str]:
  """A list of names from a flag.

  Raises:
    UserError: one of them is not known.
  """
  unknown = [name for name in given if name not in known]
  if unknown or not given:
    raise UserError(
      f'--{flag}={",".join(given)}: one or more of {", ".join(known)}'
    )
  return list(given)


class Table:
  """A table that is printed and kept in a JSON file row by row.

  What was done before a benchmark is cut off is therefore not lost.

  Args:
    heads: the column heads.
    widths: the columns' widths; the first column is left-aligned.
    path: the JSON file, or None.
    head: what the file holds beside 'rows'.
  """

  def __init__(
    self, heads: Sequence[str], widths: Sequence[int], path, head: Mapping
  ):
    self._widths, self._path = widths, path
    self.result = {**head, 'rows': []}
    terminal.write(self._line(heads))

  def add(self, row: Mapping, lines: Sequence[Sequence[str]]) -> None:
    """Adds a row: to the file, and as lines of cells to the table."""
    self.result['rows'].append(row)
    self.write()
    for cells in lines:
      terminal.write(self._line(cells))

  def write(self) -> None:
    """Writes the file."""
    if self._path:
      files.write_json(self._path, self.result)

  def _line(self, cells) -> str:
    return '  '.join(self._aligned(cells)).rstrip()

  def _aligned(self, cells) -> Iterator[str]:
    for i, (cell, width) in enumerate(zip(cells, self._widths, strict=True)):
      yield cell.rjust(width) if i else cell.ljust(width)
