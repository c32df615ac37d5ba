"""Predictions: time at published rates, and the batch that memory holds."""

from collections.abc import Callable
from typing import NamedTuple

from diffusion_jax.planning.chips import Chip, Slice
from diffusion_jax.planning.compiled import Compiled


def predict(where: Slice, program: Compiled) -> dict[str, float]:
  """The time of a step at published rates, which no program reaches.

  Chips compute while they read memory, but not while they exchange. A group of
  all chips uses all links; a smaller one lies along one axis. An axis that is
  not closed to a ring has half the rate.

  Args:
    where: the slice.
    program: one whose FLOPs and bytes XLA tells.

  Returns:
    'compute_seconds' of the FLOPs, 'memory_seconds' of the bytes that move
    between chip and memory, 'exchange_seconds' of what chips exchange;
    'seconds', the longer one of the first two and the third after it;
    'efficiency', the share of it that is not exchange.
  """
  chip = where.chip
  compute = program.flops / chip.flops
  memory = program.bytes_accessed / chip.memory_rate
  exchange = sum(
    _traffic(one.kind, one.group) * one.bytes / _rate(where, one.group)
    for one in program.collectives
  )
  work = max(compute, memory)
  return {
    'compute_seconds': compute,
    'memory_seconds': memory,
    'exchange_seconds': exchange,
    'seconds': work + exchange,
    'efficiency': work / (work + exchange),
  }


def _traffic(kind: str, group: int) -> float:
  """What a chip sends of each byte, by the algorithms that send least."""
  if kind == 'collective-permute':
    return 1.0
  rounds = 2 if kind == 'all-reduce' else 1
  return rounds * (group - 1) / group


def _rate(where: Slice, group: int) -> float:
  chip: Chip = where.chip
  closed = all(size % chip.closed == 0 for size in where.shape)
  axes = 1.0 if group == where.size else 1 / chip.axes
  return chip.link_rate * axes * (1.0 if closed else 0.5)


LEAP = 16  # how much larger the next batch is at most


class Tried(NamedTuple):
  """A batch that was compiled: in units, bytes on a device, and of how many."""

  count: int
  used: int
  limit: int


def largest(
  used: Callable[[int], tuple[int, int]], first: int, accuracy: float = 1 / 32
) -> tuple[Tried, Tried]:
  """Bisects for the largest count that fits.

  Memory is nearly a line in the batch, so that the next try is where the line
  meets the limit.

  Args:
    used: count -> (bytes that it takes, bytes that there are).
    first: where to begin.
    accuracy: how far apart the two may be, as a share.

  Returns:
    (the largest that fits, the smallest that does not); the first has count 0
    where even 1 does not fit.
  """
  fits, does_not = Tried(0, 0, 0), None
  count = first
  while True:
    tried = Tried(count, *used(count))
    earlier = fits if fits.count else does_not
    if tried.used <= tried.limit:
      fits = tried
    else:
      does_not = tried
    if does_not and does_not.count - fits.count <= max(
      1, accuracy * fits.count
    ):
      return fits, does_not
    count = _next(fits, does_not, tried, earlier, accuracy)


def _next(fits, does_not, tried, earlier, accuracy):
  """Where the line through two tries meets the limit, inside the bracket."""
  if earlier and earlier.count != tried.count:
    slope = (tried.used - earlier.used) / (tried.count - earlier.count)
  else:
    slope = 0.0
  if slope <= 0:
    slope = tried.used / tried.count
  guess = tried.count + (tried.limit - tried.used) / max(slope, 1e-9)
  # Two small ones tell little; near the limit XLA begins to save memory.
  leap = LEAP if tried.used < tried.limit / 4 else 2
  guess = min(guess, leap * tried.count)
  # A little to the side that is not known yet, so that both ends move.
  step = accuracy / 3 * guess
  guess = int(guess + step if tried.used <= tried.limit else guess - step)
  low = fits.count + 1
  high = does_not.count - 1 if does_not else max(guess, 2 * fits.count)
  return min(max(guess, low), high)
