"""Sampling plans: everything that samples depend on apart from the weights."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_jax import codecs, samplers
from diffusion_jax.process import gaussian, schedules
from diffusion_jax.samplers import grid as grids
from diffusion_jax.samplers import guided
from diffusion_jax.samplers.solve import count_evaluations, starts_at_noise
from diffusion_jax.system.errors import UserError


class Plan(NamedTuple):
  """A sampler with its options, its literal grid, and the seed.

  Attributes:
    sampler: a key of SAMPLERS.
    options: all of the sampler's options, including defaults.
    grid: decreasing times, the last one -1, or 0, see `grid`; for a sampler
      that chooses its own steps T-1, 0 and -1.
    clip: whether x0 is clipped to [-1, 1] in every step.
    seed: the seed of the samples, see `draw.sample_keys`.
    condition: of conditional samples, {'label': [labels, in turn by index]} or
      {'label': 'data', 'label_counts': [K]}: by chance, in proportion to these
      numbers of images; {'prompts': [texts, in turn by index]} and perhaps
      'negative_prompt'.
    guidance: see `guided.chosen`; {} for none.
    network_rows: rows of the network per sample, over all evaluations.
    from_noise: whether the grid starts at pure noise, see `solve`.
    image_size: (height, width) of the images; None for the run's own.
  """

  sampler: str
  options: dict
  grid: list
  clip: bool
  seed: int
  condition: dict = {}  # noqa: RUF012
  guidance: dict = {}  # noqa: RUF012
  network_rows: int | None = None
  from_noise: bool = False
  image_size: tuple[int, int] | None = None

  @property
  def num_steps(self) -> int:
    return len(self.grid) - 1

  @property
  def adaptive(self) -> bool:
    """Whether the sampler chooses its own steps."""
    return self.sampler in samplers.ADAPTIVE

  @property
  def evaluations(self) -> int:
    """Network evaluations per sample; the largest number if adaptive."""
    return count_evaluations(self.create(), self.grid, self.from_noise)

  @property
  def rows(self) -> int:
    """Rows of the network per sample; a guided evaluation takes two."""
    return self.network_rows or self.evaluations

  @property
  def adds_noise(self) -> bool:
    """Whether a sample depends on more than its initial noise."""
    when = samplers.ABOUT[self.sampler].noise  # 'yes', 'no', or 'eta > 0'
    return when == 'yes' or bool(self.options.get(when.split()[0]))

  def create(self) -> samplers.Sampler:
    return samplers.create(self.sampler, **self.options)

  def protocol(self) -> dict:
    """The plan as saved with samples and on metric cards."""
    return {
      'sampler': self.sampler,
      **self.options,
      'clip': self.clip,
      'seed': self.seed,
      **({} if self.adaptive else {'grid': grids.literal(self.grid)}),
      **self.condition,
      **self.guidance,
    }

  def cost(self) -> str:
    """Steps and evaluations, as text."""
    steps, evaluations = self.num_steps, self.evaluations
    told = [f'{steps} steps'] if not self.adaptive else []
    if self.adaptive:
      told.append(f'at most {evaluations} evaluations')
    elif steps != evaluations:
      told.append(f'{evaluations} evaluations')
    if self.rows != evaluations:
      told.append(f'{self.rows} rows of the network')
    return ', '.join(told)


def is_calibrated(sampler: str, grid: str) -> bool:
  """Whether such a plan needs the network's calibration."""
  return sampler in samplers.CALIBRATED or grid == 'optimal'


def create(
  schedule: schedules.Schedule,
  *,
  sampler: str = 'ancestral',
  num_steps: int | None = None,
  grid: str | Sequence[float] = 'uniform',
  clip: bool = True,
  seed: int = 0,
  calibration: Callable | None = None,
  condition: dict | None = None,
  guidance: dict | None = None,
  image_size: tuple[int, int] | None = None,
  **options,
) -> Plan:
  """Makes a plan and validates it.

  Args:
    schedule: the noise schedule.
    sampler: a key of SAMPLERS.
    num_steps: sampling steps; None for all T, or those of a literal grid.
    grid: a name, see `grid`, or literal times: '999,500,100', or a list.
    clip: whether to clip x0 to [-1, 1] in every step.
    seed: in [0, 2**32).
    calibration: () -> the network's Calibration; called if `is_calibrated`.
    condition: see `Plan`.
    guidance: a result of `guided.chosen`.
    image_size: see `Plan`.
    **options: the sampler's options, such as `eta`; None for the default.

  Raises:
    UserError: an unknown name, an option that the sampler does not have, or a
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
  made = samplers.create(sampler, **chosen)  # raises for values out of range
  # The grids of DDIM's code may have another number of entries.
  named = isinstance(grid, str) and grid in grids.NAMES
  if not named and num_steps not in (None, len(times) - 1):
    raise UserError(
      f'num_steps={num_steps}: the literal grid has {len(times) - 1} steps, '
      'leave it out'
    )
  order = options.get('order')
  if order is not None and order > len(times) - 1:
    raise UserError(
      f'order={order}: the grid has {len(times) - 1} steps; use at least as '
      'many steps as the order'
    )
  if not 0 <= seed < 2**32:
    raise UserError(f'seed={seed}: at least 0 and below 2**32')
  rows = guided.rows(schedule, made, times, guidance or {})
  return Plan(
    sampler,
    chosen,
    times,
    clip,
    seed,
    condition or {},
    guidance or {},
    rows,
    starts_at_noise(schedule, times),
    image_size,
  )


CLASSIFIES = (
  'the run is a classifier, which draws no samples: give it as --classifier of '
  'another run'
)


COMPARES = (
  'the run trains a pair of encoders, which draws no samples: evaluate it, or '
  'give it as --text_judge of another run'
)


RECONSTRUCTS = (
  'the run trains an autoencoder, which draws no samples: evaluate it, or '
  'train a network in its latents'
)


def check_variance(variance: str | None, config: dict) -> None:
  """Raises UserError if a run's network has no variance that is asked for."""
  fixed = config['loss'].get('variance', 'fixed') != gaussian.LEARNED
  if variance == gaussian.LEARNED and fixed:
    raise UserError(
      'variance=learned needs a network that was trained with '
      'loss.variance=learned: use variance=fixedlarge or fixedsmall'
    )


def ignores_variance(plan: Plan, config: dict) -> bool:
  """Whether a plan leaves a learned variance unused."""
  learned = config['loss'].get('variance') == gaussian.LEARNED
  return learned and plan.options.get('variance') != gaussian.LEARNED


def for_run(
  config: dict,
  *,
  sampler: str = 'ancestral',
  guide: dict | None = None,
  classifier: dict | None = None,
  **given,
) -> Plan:
  """Makes a plan for a run's network, by default with its paper's settings.

  Args:
    config: the run's config.
    sampler: a key of SAMPLERS.
    guide: facts about a network that guides this one, see `guided.chosen`.
    classifier: facts about a classifier that does.
    **given: see `create`; variance, clip and guidance default to the config's.
      In place of a dict, guidance is given by `guided.OPTIONS`.

  Raises:
    UserError: as for `create`.
  """
  if config['loss'].get('name') == 'classification':
    raise UserError(CLASSIFIES)
  if config['loss'].get('name') == 'contrastive':
    raise UserError(COMPARES)
  if codecs.reconstructs(config):
    raise UserError(RECONSTRUCTS)
  if given.get('variance') is None and 'variance' in samplers.takes(sampler):
    given['variance'] = config['sample'].get('variance')
  check_variance(given.get('variance'), config)
  if given.get('clip') is None:
    given['clip'] = config['sample'].get('clip', True)
  if given['clip'] and codecs.is_in_latents(config):
    raise UserError(
      'clip=True: the run diffuses in latents, which have no bound to clip to: '
      'leave it out'
    )
  given['guidance'] = guided.chosen(
    config['conditioning'],
    guide or {},
    config['sample'].get('guidance', 1.0),
    classifier,
    **{name: given.pop(name, None) for name in guided.OPTIONS},
  )
  _check_negative(given.get('condition') or {}, given['guidance'])
  schedule = schedules.create(**config['process'])
  return create(schedule, sampler=sampler, **given)


def _check_negative(condition: dict, guidance: dict) -> None:
  """Raises UserError for a negative prompt that nothing is compared with."""
  if 'negative_prompt' not in condition:
    return
  given = f'negative_prompt={condition["negative_prompt"]!r:.60}'
  if 'guidance' not in guidance:
    raise UserError(
      f'{given} has no effect with guidance=1: give another guidance, such as '
      '7.5, or leave it out'
    )
  if 'guide' in guidance:
    raise UserError(
      f'{given} has no effect with a guide, which gives u: leave one of them '
      'out'
    )
