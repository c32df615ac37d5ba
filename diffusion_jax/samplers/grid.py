"""Time grids: explicit, printable lists.

A grid descends from the first time a sampler looks at to -1, clean data:
[999, 749, 499, 249, -1] is four steps and, for a sampler that asks the network
once a step, four evaluations.
"""

import itertools

import numpy as np

from diffusion_jax.errors import UserError


def uniform(num_timesteps: int, num_steps: int) -> list[int]:
  """Evenly spaced from T-1, with 0 as the last of two or more.

  The grid of improved DDPM (arXiv 2102.09672); with num_steps = T it is every
  time.
  """
  times = np.linspace(num_timesteps - 1, 0, num_steps)
  return [*np.rint(times).astype(int).tolist(), -1]


def leading(num_timesteps: int, num_steps: int) -> list[int]:
  """Multiples of T / num_steps from 0 on: DDIM's own, short of T-1.

  Where num_steps does not divide T, the published codes disagree, and a grid of
  equal strides from 0 would end far from the noise: that is refused.
  """
  if num_timesteps % num_steps:
    raise UserError(
      f'grid=leading takes a number of steps that divides {num_timesteps}, '
      f'not {num_steps}: choose another, or grid=uniform'
    )
  stride = num_timesteps // num_steps
  return [*range((num_steps - 1) * stride, -1, -stride), -1]


def trailing(num_timesteps: int, num_steps: int) -> list[int]:
  """Equal strides down from T-1 (arXiv 2305.08891, table 2)."""
  times = np.arange(num_timesteps, 0, -num_timesteps / num_steps)[:num_steps]
  return [*(np.rint(times).astype(int) - 1).tolist(), -1]


def quadratic(num_timesteps: int, num_steps: int) -> list[float]:
  """Squares of evenly spaced numbers: dense near the data.

  From T-1, in the manner of arXiv 2010.02502, appendix D.2. Times are
  fractional, so that none repeats however dense they lie.
  """
  roots = np.linspace(1.0, 0.0, num_steps)
  return [*((num_timesteps - 1) * np.square(roots)).tolist(), -1]


GRIDS = {
  'uniform': uniform,
  'leading': leading,
  'trailing': trailing,
  'quadratic': quadratic,
}


def create(grid: str, num_timesteps: int, num_steps: int) -> list:
  """A grid by name, or the literal one: 'uniform', or '999,500,100'.

  Args:
    grid: times separated by commas, the -1 at the end may be left out; or one
      of
      'uniform'    evenly spaced from T-1 to 0;
      'leading'    multiples of T / num_steps: DDIM's own, short of T-1;
      'trailing'   equal strides down from T-1;
      'quadratic'  dense near the data; times are fractional.
    num_timesteps: T of the schedule.
    num_steps: 1 .. T; a literal grid has its own.

  Raises:
    UserError: the name is not known, or the times do not descend in [0, T-1].
  """
  if grid in GRIDS:
    if not 1 <= num_steps <= num_timesteps:
      raise UserError(
        f'num_steps={num_steps}: a sampler takes 1 to {num_timesteps} steps '
        'of this model'
      )
    return GRIDS[grid](num_timesteps, num_steps)
  try:
    times = [float(part) for part in grid.split(',')]
  except ValueError:
    raise UserError(
      f'grid={grid}: use one of {", ".join(GRIDS)}, or times separated by '
      f'commas, falling from at most {num_timesteps - 1}'
    ) from None
  times = [int(time) if time.is_integer() else time for time in times]
  if times[-1] != -1:
    times.append(-1)
  check(times, num_timesteps)
  return times


def check(grid, num_timesteps: int) -> None:
  """Raises UserError unless the grid falls strictly from <= T-1 to -1."""
  falls = all(s < t for t, s in itertools.pairwise(grid))
  inside = all(0 <= t <= num_timesteps - 1 for t in grid[:-1])
  if len(grid) < 2 or not falls or not inside or grid[-1] != -1:
    raise UserError(
      f'grid={",".join(map(str, grid))}: times must fall strictly, between '
      f'{num_timesteps - 1} and 0, and end at -1'
    )
