"""Predicts the time per step at published rates, and the largest batch."""

from collections.abc import Callable
from typing import NamedTuple

from diffusion_jax.planning.compiled import Compiled
from diffusion_jax.planning.slices import Slice


def predict(where: Slice, program: Compiled) -> dict[str, float]:
  """The time per step at published rates, which no program reaches.

  It assumes that computation overlaps with memory traffic but not with
  communication. Of TPUs, a group of all chips uses all links and a smaller one
  those along one axis, and an axis that is not a ring has half the rate. Of
  GPUs, a group that fits into a host is in one, and a larger one uses the
  network adapters of all its GPUs.

  Args:
    where: the slice.
    program: a program.

  Returns:
    'compute_seconds' for the FLOPs, 'memory_seconds' for the memory traffic,
    'exchange_seconds' for the communication; 'seconds', the larger of the first
    two plus the third; 'efficiency', the share of it without communication.
  """
  chip = where.chip
  compute = program.work(where.size) / chip.flops
  memory = program.traffic / chip.memory_rate
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
  """Bytes sent per chip for each byte, with bandwidth-optimal algorithms."""
  if kind == 'collective-permute':
    return 1.0
  rounds = 2 if kind == 'all-reduce' else 1
  return rounds * (group - 1) / group


def _rate(where: Slice, group: int) -> float:
  """Bytes per second that a chip of a group sends."""
  chip = where.chip
  if chip.card and group > where.shape[-1]:
    each = group * where.shape[-1] / where.size  # GPUs of a host in the group
    return min(chip.link_rate, each * chip.card.network_rate)
  closed = all(size % chip.closed == 0 for size in where.shape)
  axes = 1.0 if group == where.size else 1 / chip.axes
  return chip.link_rate * axes * (1.0 if closed else 0.5)


LEAP = 16  # largest factor from one batch to the next


class Tried(NamedTuple):
  """A compiled batch: its size in units, bytes per device, and their limit."""

  count: int
  used: int
  limit: int


def largest(
  used: Callable[[int], tuple[int, int]], first: int, accuracy: float = 1 / 32
) -> tuple[Tried, Tried]:
  """Bisects for the largest count that fits.

  Memory is nearly linear in the batch size, so the next try is where the line
  crosses the limit.

  Args:
    used: count -> (bytes needed, bytes available).
    first: the count to start with.
    accuracy: allowed gap between the two results, as a share.

  Returns:
    (the largest that fits, the smallest that does not); the first has count 0
    if even 1 does not fit.
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
    gap = max(1, accuracy * fits.count)
    if does_not and does_not.count - fits.count <= gap:
      return fits, does_not
    count = _next(fits, does_not, tried, earlier, accuracy)


def _next(fits, does_not, tried, earlier, accuracy):
  """Where the line through two tries crosses the limit, inside the bracket."""
  slope = 0.0
  if earlier and earlier.count != tried.count:
    slope = (tried.used - earlier.used) / (tried.count - earlier.count)
  if slope <= 0:
    slope = tried.used / tried.count
  guess = tried.count + (tried.limit - tried.used) / max(slope, 1e-9)
  # Small batches predict little; near the limit XLA starts to save memory.
  leap = LEAP if tried.used < tried.limit / 4 else 2
  guess = min(guess, leap * tried.count)
  # A little beyond the guess, so that both ends of the bracket move.
  step = accuracy / 3 * guess
  guess = int(guess + step if tried.used <= tried.limit else guess - step)
  low = fits.count + 1
  high = does_not.count - 1 if does_not else max(guess, 2 * fits.count)
  return min(max(guess, low), high)
