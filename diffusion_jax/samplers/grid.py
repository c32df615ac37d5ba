"""Time grids: explicit, printable lists.

A grid decreases from the first time at which a sampler evaluates the network to
-1, clean data: [999, 749, 499, 249, -1] is four steps and, for a sampler with
one evaluation per step, four evaluations. The network was trained at whole
times; fractional times are interpolated, see `schedules`.

A grid may also end at 0, as Stable Diffusion's does: its last x still has the
little noise of that time. It is written with END: 981,961,...,21,1,0,end.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from diffusion_jax.process.schedules import Schedule
from diffusion_jax.samplers import levels
from diffusion_jax.system.errors import UserError

END = 'end'  # in place of the final -1


def uniform(schedule: Schedule, num_steps: int) -> list[int]:
  """Evenly spaced from T-1, with 0 as the last of two or more.

  The grid of improved DDPM (arXiv 2102.09672); with num_steps = T it is every
  time.
  """
  times = np.linspace(schedule.num_timesteps - 1, 0, num_steps)
  return [*np.rint(times).astype(int).tolist(), -1]


def leading(schedule: Schedule, num_steps: int) -> list[int]:
  """Multiples of T / num_steps from 0: DDIM's grid, which ends before T-1.

  num_steps must divide T. Otherwise published implementations disagree, and a
  grid of equal strides from 0 would end far from the noise. `ddim_uniform`
  follows DDIM's code in that case.

  Raises:
    UserError: num_steps does not divide T.
  """
  num_timesteps = schedule.num_timesteps
  if num_timesteps % num_steps:
    raise UserError(
      f'grid=leading needs a number of steps that divides {num_timesteps}, '
      f'not {num_steps}: choose another, or grid=uniform'
    )
  stride = num_timesteps // num_steps
  return [*range((num_steps - 1) * stride, -1, -stride), -1]


def trailing(schedule: Schedule, num_steps: int) -> list[int]:
  """Equal strides down from T-1 (arXiv 2305.08891, table 2)."""
  num_timesteps = schedule.num_timesteps
  times = np.arange(num_timesteps, 0, -num_timesteps / num_steps)[:num_steps]
  return [*(np.rint(times).astype(int) - 1).tolist(), -1]


def quadratic(schedule: Schedule, num_steps: int) -> list[float]:
  """Squares of evenly spaced numbers from T-1: dense near the data.

  As in arXiv 2010.02502, appendix D.2, but with fractional times, so that none
  repeats however dense they are.
  """
  roots = np.linspace(1.0, 0.0, num_steps)
  return [*((schedule.num_timesteps - 1) * np.square(roots)).tolist(), -1]


def logsnr(schedule: Schedule, num_steps: int) -> list[float]:
  """Evenly spaced in log SNR from T-1 to 0, then clean data.

  DPM-Solver's choice for small images (arXiv 2206.00927); times are fractional.
  """
  lam = levels.of(schedule, [schedule.last, 0]).lam
  return _at_levels(
    schedule, num_steps, lambda count: np.exp(-np.linspace(*lam, count))
  )


def karras(schedule: Schedule, num_steps: int, rho: float = 7.0) -> list[float]:
  """EDM's grid (arXiv 2206.00364, eq. 5).

  Evenly spaced in the rho-th root of sigma / alpha, from the level of T-1 to
  that of 0, then clean data; times are fractional.
  """
  lam = levels.of(schedule, [schedule.last, 0]).lam
  ends = np.exp(-lam / rho)
  return _at_levels(
    schedule, num_steps, lambda count: np.linspace(*ends, count) ** rho
  )


def _at_levels(schedule, num_steps, levels_of):
  """The times of decreasing sigma / alpha; the first and last are whole.

  Pure noise has an infinite level and is a time of its own, in front.
  """
  noise = [schedule.num_timesteps - 1] * schedule.ends_in_noise
  if num_steps == len(noise):
    return [*noise, -1]
  level = levels_of(num_steps - len(noise))
  times = schedule.host_t_of_logsnr(-2 * np.log(level)).tolist()
  ends = [schedule.last, 0]
  return [*noise, ends[0], *times[1:-1], *ends[1 : len(times)], -1]


def stable_diffusion(schedule: Schedule, num_steps: int) -> list[int]:
  """Stable Diffusion's grid: 1 + multiples of T // num_steps, then 0.

  That is diffusers' 'leading' with steps_offset 1 and set_alpha_to_one False,
  for PNDM and DDIM: 50 steps are 981, 961, ..., 21, 1, 0.

  Raises:
    UserError: num_steps is T: the first time would be T.
  """
  return [*_offset(schedule, num_steps, 'stable_diffusion'), 0]


def sdxl(schedule: Schedule, num_steps: int) -> list[int]:
  """SDXL's grid: as `stable_diffusion`, but for clean data at the end."""
  return [*_offset(schedule, num_steps, 'sdxl'), -1]


def _offset(schedule, num_steps, name):
  num_timesteps = schedule.num_timesteps
  stride = num_timesteps // num_steps
  if num_steps >= num_timesteps:
    raise UserError(
      f'grid={name} has at most {num_timesteps - 1} steps, not {num_steps}: '
      'its times start at 1; choose fewer, or grid=uniform'
    )
  return [1 + stride * i for i in reversed(range(num_steps))]


def ddim_uniform(schedule: Schedule, num_steps: int) -> list[int]:
  """The 'uniform' grid of DDIM's code: range(0, T, T // num_steps).

  It ends before T-1 for all num_steps < T that divide T. If num_steps does not
  divide T, it has more entries than requested: 16 for 15, 334 for 300, for
  T = 1000.
  """
  num_timesteps = schedule.num_timesteps
  times = range(0, num_timesteps, num_timesteps // num_steps)
  return [*times[::-1], -1]


def ddim_quadratic(schedule: Schedule, num_steps: int) -> list[int]:
  """The 'quad' grid of DDIM's code: squares up to 0.8 T, truncated to integers.

  It starts at 0.8 T and repeats times near the data: for T = 1000, one entry of
  50, 4 of 100 and 312 of 1000 are repetitions.
  """
  roots = np.linspace(0, np.sqrt(0.8 * schedule.num_timesteps), num_steps)
  return [*np.square(roots).astype(int)[::-1].tolist(), -1]


def optimal(schedule: Schedule, num_steps: int, mse) -> list[int]:
  """The whole times from T-1 to 0 that minimise the variational bound.

  With the optimal variance (arXiv 2201.06503) a step t -> s adds, in nats per
  dimension,

      log(1 + (SNR(s) - SNR(t)) mse(t)) / 2,   SNR = alpha^2 / sigma^2,

  to the bound: with v the variance of q(xs | xt, x0) and c0 its coefficient of
  x0, the KL divergence of the two Gaussians is log(1 + c0^2 mse / v) / 2, and
  c0^2 / v is the difference of the SNRs. As this is a sum over steps, dynamic
  programming finds the best of all grids (arXiv 2106.03802), in num_steps T^2
  operations.

  Args:
    schedule: the noise schedule.
    num_steps: 1 .. T.
    mse: [T], the squared error of the estimate of x0 per dimension, see
      `calibration`.
  """
  last = schedule.num_timesteps - 1
  if num_steps == 1:
    return [last, -1]
  log_alpha_bar, sigma2 = schedule.host(np.arange(last + 1))
  snr = np.exp(log_alpha_bar) / sigma2
  gain = (snr[None, :] - snr[:, None]) * np.asarray(mse)[:, None]
  # cost[t, s] of a step t -> s; infinite unless s < t.
  falls = np.tril(np.ones((last + 1, last + 1), bool), -1)
  cost = np.where(falls, 0.5 * np.log1p(np.where(falls, gain, 0)), np.inf)
  best, before = cost[last], []
  for _ in range(num_steps - 2):
    ways = best[:, None] + cost
    before.append(ways.argmin(axis=0))
    best = ways.min(axis=0)
  times = [0]
  for choice in reversed(before):
    times.append(int(choice[times[-1]]))
  return [last, *times[::-1], -1]


_PUBLISHED = (ddim_uniform, ddim_quadratic, stable_diffusion, sdxl)
_ALL = (uniform, leading, trailing, quadratic, logsnr, karras, *_PUBLISHED)
GRIDS = {grid.__name__: grid for grid in _ALL}
NAMES = (*GRIDS, 'optimal')


def create(
  grid: str | Sequence[float],
  schedule: Schedule,
  num_steps: int,
  mse_fn: Callable | None = None,
) -> list:
  """A grid by name, such as 'uniform', or from literal times, '999,500,100'.

  Repeated times of published grids are dropped: a step of length zero leaves x
  unchanged and adds no noise.

  Args:
    grid: times, or a string of them separated by commas, where the final -1 may
      be left out, or be END, see above; or one of
      'uniform'         evenly spaced from T-1 to 0;
      'leading'         multiples of T / num_steps, ending before T-1;
      'trailing'        equal strides down from T-1;
      'quadratic'       dense near the data; times are fractional;
      'logsnr'          evenly spaced in log SNR; times are fractional;
      'karras'          EDM's grid; times are fractional;
      'ddim_uniform'    as in DDIM's code: may have more entries;
      'ddim_quadratic'  as in DDIM's code: from 0.8 T, with repeated entries;
      'stable_diffusion', 'sdxl'  those of their pipelines, see there;
      'optimal'         minimises the variational bound, see `optimal`.
    schedule: the noise schedule.
    num_steps: 1 .. T; ignored for a literal grid.
    mse_fn: () -> [T], for 'optimal', see there.

  Raises:
    UserError: the name is not known, or the times do not decrease in [0, T-1].
  """
  num_timesteps = schedule.num_timesteps
  if not isinstance(grid, str):
    grid = ','.join(map(str, grid))
  if grid in NAMES:
    if not 1 <= num_steps <= num_timesteps:
      raise UserError(
        f'num_steps={num_steps}: a sampler takes 1 to {num_timesteps} steps '
        'with this model'
      )
    if grid != 'optimal':
      return list(dict.fromkeys(GRIDS[grid](schedule, num_steps)))
    if mse_fn is None:
      raise UserError(
        'grid=optimal is for samples of a calibrated run: use another grid here'
      )
    return optimal(schedule, num_steps, mse_fn())
  *parts, last = grid.split(',')
  noised = last.strip() == END
  try:
    times = [float(part) for part in (parts if noised else [*parts, last])]
  except ValueError:
    raise UserError(
      f'grid={grid}: use one of {", ".join(NAMES)}, or times separated by '
      f'commas, decreasing from at most {num_timesteps - 1}'
    ) from None
  times = [int(time) if time.is_integer() else time for time in times]
  if times[-1:] != [-1] and not noised:
    times.append(-1)
  falls = all(s < t for t, s in itertools.pairwise(times))
  early = times if noised else times[:-1]
  inside = all(0 <= t <= num_timesteps - 1 for t in early)
  if len(times) < 2 or not falls or not inside:
    raise UserError(
      f'grid={",".join(map(str, times))}: times must strictly decrease, '
      f'between {num_timesteps - 1} and 0, and end at -1 (or with {END})'
    )
  return times


def literal(times: Sequence[float]) -> list:
  """Times of a grid as they can be given back to `create`."""
  return list(times) if times[-1] == -1 else [*times, END]
