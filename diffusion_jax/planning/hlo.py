"""Parses the text of a compiled XLA program."""

import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = (
  'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all',
  'collective-permute',
)  # fmt: skip
COMPUTATION = re.compile(
  r'^(ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}', re.M | re.S
)
CALL = re.compile(
  r'(?:calls|body|condition|called_computations|branch_computations)='
  r'(?:\{([^}]*)\}|%?([\w.-]+))'
)
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
OP = re.compile(rf'= (.*?) ({"|".join(KINDS)})(?:-start)?\(')
ARRAY = re.compile(r'\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]')


class Collective(NamedTuple):
  """Collective operations of one kind and group size.

  Attributes:
    kind: one of `KINDS`.
    group: number of devices in a group; 2 for a permutation.
    count: number of operations per step.
    bytes: total bytes of all operations, counting each array whole, as one
      device has it before or after the operation.
  """

  kind: str
  group: int
  count: int
  bytes: int


def collectives(text: str, num_devices: int) -> list[Collective]:
  """The collectives of a compiled program, on one device.

  On TPUs a reduce-scatter is a fusion named all-reduce-scatter that contains an
  all-reduce; it is counted as a reduce-scatter. Operations in a loop count once
  per iteration.

  Args:
    text: `compiled.as_text()`.
    num_devices: number of devices of the program.
  """
  bodies, entry = _computations(text)
  counts, sizes, seen = Counter(), Counter(), set()
  for name, times in _times(bodies, entry).items():
    for line in bodies[name]:
      match = OP.search(line)
      if not match:
        continue
      kind, group = match[2], _group(line, num_devices)
      channel = re.search(r'channel_id=(\d+)', line)
      if 'all-reduce-scatter' in name:
        kind = 'reduce-scatter'  # several may share a channel
      elif channel:
        # Each part of an asynchronous operation is printed.
        if (kind, channel[1]) in seen:
          continue
        seen.add((kind, channel[1]))
      size = _result_bytes(kind, line, match[1])
      if match[2] == 'reduce-scatter':
        size *= group
      counts[kind, group] += times
      sizes[kind, group] += times * size
  return [
    Collective(kind, group, counts[kind, group], sizes[kind, group])
    for kind, group in sorted(sizes, key=sizes.get, reverse=True)
  ]


def _computations(text):
  """{name: lines} of the computations, and the name of the entry."""
  found = COMPUTATION.findall(text)
  bodies = {name: body.splitlines() for _, name, body in found}
  return bodies, next(name for entry, name, _ in found if entry)


def _times(bodies, entry) -> Counter:
  """How often each computation runs per step."""
  times = Counter()

  def visit(name, count):
    times[name] += count
    for line in bodies[name]:
      loops = TRIPS.search(line)
      for several, one in CALL.findall(line):
        for called in (several or one).replace('%', '').split(', '):
          if called in bodies:
            visit(called, count * (int(loops[1]) if loops else 1))

  visit(entry, 1)
  return times


def _result_bytes(kind, line, shapes) -> int:
  """Bytes of an operation's result; for a start operation, its final result."""
  arrays = [
    math.prod(int(size) for size in sizes.split(',') if size)
    * (1 if name == 'pred' else -(-int(bits) // 8))
    for name, bits, sizes in ARRAY.findall(shapes)
  ]
  if f'{kind}-start(' in line and kind != 'all-reduce':
    # Inputs come first, and a permutation ends with two counters.
    half = 1 if kind == 'collective-permute' else len(arrays) // 2
    arrays = arrays[half : 2 * half]
  return sum(arrays)


def _group(line, num_devices) -> int:
  """Number of devices in a group, in any of XLA's notations.

  They are {{0,1},{2,3}}, [2,2]<=[4], mesh['a'=2,'b'=2] {'a'}, with parts of an
  axis as {'a':(1)2}, and {} for all devices.
  """
  if 'source_target_pairs' in line:
    return 2
  if match := re.search(r'replica_groups=\{\{([\d,]+)\}', line):
    return match[1].count(',') + 1
  if match := re.search(r'replica_groups=\[\d+,(\d+)\]', line):
    return int(match[1])
  if match := re.search(r'replica_groups=mesh\[(.*?)\].*?\{(.*?)\}', line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    over = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
    return math.prod(int(part or sizes[axis]) for axis, part in over)
  return num_devices
