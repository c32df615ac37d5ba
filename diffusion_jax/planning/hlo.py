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
  r'^(ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}(?!\})', re.M | re.S
)
# An instruction; attributes of kernels continue in lines without its indent.
LINES = re.compile(r'\n(?=  )')
# Fusions and `async-start` have calls, a while loop has body and condition.
CALL = re.compile(
  r'(?:calls|body|condition|called_computations|branch_computations|'
  r'true_computation|false_computation)=(?:\{([^}]*)\}|%?([\w.-]+))'
)
# Other operations apply a computation to scalars.
APPLIED = re.compile(r' call\(.*to_apply=%?([\w.-]+)')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
OP = re.compile(rf'= (.*?) ({"|".join(KINDS)})(?:-start)?\(')
FUSION = re.compile(r' fusion\(.*calls=%?([\w.-]+)')
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
  bodies, entry = computations(text)
  # On TPUs an asynchronous operation is printed again in fusions, with the
  # channel it has outside, or with one of their own.
  fused = {
    name
    for lines in bodies.values()
    for name in FUSION.findall('\n'.join(lines))
  }
  counts, sizes, seen = Counter(), Counter(), set()
  every = _times(bodies, entry)
  for name in sorted(every, key=fused.__contains__):
    for line in bodies[name]:
      match = OP.search(line)
      if not match:
        continue
      kind, group = match[2], _group(line, num_devices)
      channel = re.search(r'channel_id=(\d+)', line)
      if 'all-reduce-scatter' in name:
        kind = 'reduce-scatter'  # several may share a channel
      elif channel:
        if name in fused and (kind, channel[1]) in seen:
          continue
        seen.add((kind, channel[1]))
      size = _result_bytes(kind, line, match[1])
      if match[2] == 'reduce-scatter':
        size *= group
      counts[kind, group] += every[name]
      sizes[kind, group] += every[name] * size
  return [
    Collective(kind, group, counts[kind, group], sizes[kind, group])
    for kind, group in sorted(sizes, key=sizes.get, reverse=True)
  ]


def computations(text: str) -> tuple[dict[str, list[str]], str]:
  """{name: instructions} of a program's computations, and the entry's name."""
  found = COMPUTATION.findall(text)
  bodies = {name: LINES.split(body.rstrip()) for _, name, body in found}
  return bodies, next(name for entry, name, _ in found if entry)


def called(line: str) -> list[str]:
  """Names of the computations that an instruction runs, but not of scalars."""
  names = APPLIED.findall(line)
  for several, one in CALL.findall(line):
    names += (several or one).replace('%', '').split(', ')
  return names


def trips(line: str) -> int | None:
  """How often a loop runs; None if XLA does not know it, or for other lines."""
  found = TRIPS.search(line)
  return int(found[1]) if found else None


def _times(bodies, entry) -> Counter:
  """How often each computation runs per step."""
  times = Counter()

  def visit(name, count):
    times[name] += count
    for line in bodies[name]:
      for inner in called(line):
        if inner in bodies:
          visit(inner, count * (trips(line) or 1))

  visit(entry, 1)
  return times


def array_bytes(shapes: str) -> list[int]:
  """Bytes of each array in the text of a shape: '(f32[8,2]{1,0}, s4[])'."""
  return [
    math.prod(int(size) for size in sizes.split(',') if size)
    * (1 if name == 'pred' else -(-int(bits) // 8))
    for name, bits, sizes in ARRAY.findall(shapes)
  ]


def _result_bytes(kind, line, shapes) -> int:
  """Bytes of an operation's result; for a start operation, its final result."""
  arrays = array_bytes(shapes)
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
