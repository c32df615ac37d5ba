"""How samples are drawn: all that they depend on beside the weights."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_jax import samplers
from diffusion_jax.process import schedules
from diffusion_jax.process.schedules import Schedule
from diffusion_jax.samplers import grid as grids
from diffusion_jax.system.errors import UserError


class Plan(NamedTuple):
  """A sampler with its options, its literal grid, and the seed.

  Attributes:
    sampler: a key of SAMPLERS.
    options: all of the sampler's options, defaults included.
    grid: falling times, the last one -1; of a sampler that chooses its own
      steps their ends, T-1, 0 and -1.
    clip: whether x0 is clipped to [-1, 1] in every step.
    seed: of the samples, see `draw.sample_keys`.
  """

  sampler: str
  options: dict
  grid: list
  clip: bool
  seed: int

  @property
  def num_steps(self) -> int:
    return len(self.grid) - 1

  @property
  def adaptive(self) -> bool:
    """Whether the sampler chooses its own steps."""
    return self.sampler in samplers.ADAPTIVE

  @property
  def evaluations(self) -> int:
    """Of the network, for a sample; where it is adaptive, the most."""
    return self.create().evaluations(self.grid)

  @property
  def adds_noise(self) -> bool:
    """Whether a sample depends on more noise than that which it begins as."""
    when = samplers.ABOUT[self.sampler].noise  # 'yes', 'no', or 'eta > 0'
    return when == 'yes' or bool(self.options.get(when.split()[0]))

  def create(self) -> samplers.Sampler:
    return samplers.create(self.sampler, **self.options)

  def protocol(self) -> dict:
    """As it stands beside samples and on metric cards."""
    return {
      'sampler': self.sampler,
      **self.options,
      'clip': self.clip,
      'seed': self.seed,
      **({} if self.adaptive else {'grid': self.grid}),
    }

  def cost(self) -> str:
    """Steps and evaluations, for people."""
    steps, evaluations = self.num_steps, self.evaluations
    if self.adaptive:
      return f'at most {evaluations} evaluations'
    if steps == evaluations:
      return f'{steps} steps'
    return f'{steps} steps, {evaluations} evaluations'


def is_calibrated(sampler: str, grid: str) -> bool:
  """Whether such a plan is made from the network's calibration."""
  return sampler in samplers.CALIBRATED or grid == 'optimal'


def create(
  schedule: Schedule,
  *,
  sampler: str = 'ancestral',
  num_steps: int | None = None,
  grid: str | Sequence[float] = 'uniform',
  clip: bool = True,
  seed: int = 0,
  calibration: Callable | None = None,
  **options,
) -> Plan:
  """A plan, checked.

  Args:
    schedule: the noise schedule.
    sampler: a key of SAMPLERS.
    num_steps: sampling steps; None for all T, or for a literal grid's.
    grid: a name, see `grid`, or literal times: '999,500,100', or a list.
    clip: whether x0 is clipped to [-1, 1] in every step.
    seed: in [0, 2**32).
    calibration: () -> Calibration, of the network; called where
      `is_calibrated`.
    **options: the sampler's own, such as `eta`; None takes its default.

  Raises:
    UserError: an unknown name, an option that is not the sampler's, or a
      number out of range.
  """
  if sampler in samplers.ADAPTIVE:
    if num_steps is not None or grid != 'uniform':
      raise UserError(
        f'sampler={sampler} chooses its own steps: leave num_steps and grid out'
      )
    grid = f'{schedule.num_timesteps - 1},0'
  asked = schedule.num_timesteps if num_steps is None else num_steps
  mse_fn = (lambda: calibration().of(clip)) if calibration else None
  times = grids.create(grid, schedule, asked, mse_fn)
  calibrates = sampler in samplers.CALIBRATED and mse_fn
  if calibrates and options.get('x0_variance') is None:
    table = mse_fn()
    at_steps = np.interp(times[:-1], np.arange(len(table)), table)
    options['x0_variance'] = at_steps.tolist()
  chosen = samplers.options(sampler, **options)
  samplers.create(sampler, **chosen)  # finds values out of range
  # The grids of DDIM's code have numbers of entries of their own.
  named = isinstance(grid, str) and grid in grids.NAMES
  if not named and num_steps not in (None, len(times) - 1):
    raise UserError(
      f'num_steps={num_steps}: the literal grid has {len(times) - 1} steps, '
      'leave it out'
    )
  order = options.get('order')
  if order is not None and order > len(times) - 1:
    raise UserError(
      f'order={order}: the grid has {len(times) - 1} steps; an order takes as '
      'many at least'
    )
  if not 0 <= seed < 2**32:
    raise UserError(f'seed={seed}: at least 0 and below 2**32')
  return Plan(sampler, chosen, times, clip, seed)


def for_run(config: dict, *, sampler: str = 'ancestral', **given) -> Plan:
  """A plan for a run's network; by default as the run's paper samples.

  Args:
    config: the run's.
    sampler: a key of SAMPLERS.
    **given: as of `create`; variance and clip are by default the config's.

  Raises:
    UserError: as `create`.
  """
  if given.get('variance') is None and 'variance' in samplers.takes(sampler):
    given['variance'] = config['sample'].get('variance')
  if given.get('clip') is None:
    given['clip'] = config['sample'].get('clip', True)
  schedule = schedules.create(**config['process'])
  return create(schedule, sampler=sampler, **given)
