"""What a compiled program tells about itself: the text that XLA prints."""

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
  """Arrays that devices exchange.

  Attributes:
    kind: one of `KINDS`.
    group: how many devices exchange them with each other; a permutation is one
      of pairs.
    count: how many operations a step has.
    bytes: of the whole arrays that are reduced, gathered or scattered, as one
      device has them before or after, all operations together.
  """

  kind: str
  group: int
  count: int
  bytes: int


def collectives(text: str, num_devices: int) -> list[Collective]:
  """The collectives of a compiled program, on one device.

  On TPUs a reduce-scatter is a fusion named all-reduce-scatter, with an
  all-reduce inside: that is counted as what it does. What is in a loop counts
  as often as the loop runs.

  Args:
    text: `compiled.as_text()`.
    num_devices: that it is for.
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
        kind = 'reduce-scatter'  # of which several may share a channel
      elif channel:
        # One that is asynchronous is printed in each of its parts.
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
  """Name -> lines, and the name of the one that begins."""
  found = COMPUTATION.findall(text)
  bodies = {name: body.splitlines() for _, name, body in found}
  return bodies, next(name for entry, name, _ in found if entry)


def _times(bodies, entry) -> Counter:
  """How often each computation runs in a step."""
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
  """Of what an operation gives; where it only starts, of what it will give."""
  arrays = [
    math.prod(int(size) for size in sizes.split(',') if size)
    * (1 if name == 'pred' else -(-int(bits) // 8))
    for name, bits, sizes in ARRAY.findall(shapes)
  ]
  if f'{kind}-start(' in line and kind != 'all-reduce':
    # What goes in stands first, and a permutation has two counters at the end.
    half = 1 if kind == 'collective-permute' else len(arrays) // 2
    arrays = arrays[half : 2 * half]
  return sum(arrays)


def _group(line, num_devices) -> int:
  """Devices in a group, as XLA writes it.

  {{0,1},{2,3}}, [2,2]<=[4], mesh['a'=2,'b'=2] {'a'}, with parts of an axis as
  {'a':(1)2}, and {} for all of them.
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
