"""The guidance of a sampling plan: its options, checked, and its cost.

A guided denoiser is D = u + w (c - u), see `diffusion_jax.guidance`. A plan
holds the options that differ from the defaults, as JSON.
"""

import math
from collections.abc import Mapping

import numpy as np

from diffusion_jax.process.schedules import Schedule
from diffusion_jax.samplers import levels
from diffusion_jax.samplers.solve import (
  Sampler,
  count_evaluations,
  evaluation_times,
  starts_at_noise,
)
from diffusion_jax.system.errors import UserError

# The guide and the classifier are other networks, named by their facts.
OPTIONS = (
  *('guidance', 'guidance_interval', 'guidance_rescale'),
  'classifier_scale',
)

WEIGHT = (
  'the weight w in D = u + w (c - u), where c is the conditional and u the '
  'unconditional model: 1 is c alone, 0 is u alone. Others count from 0: their '
  'weight plus 1'
)


def parse_interval(given) -> list[float]:
  """(LO, HI) in log-SNR, from a pair or from text: 'LO,HI' or 'LO/HI'.

  Raises:
    UserError: it is something else, or empty.
  """
  parts = given
  if isinstance(given, str):
    parts = given.replace('/', ',').split(',')
  try:
    low, high = map(float, parts)
  except (TypeError, ValueError):
    low = high = math.nan
  if not -math.inf < low < high < math.inf:
    raise UserError(
      f'guidance_interval={given}: give LO,HI in log-SNR with LO below HI, '
      'such as -3,3; log-SNR is 2 log(alpha / sigma)'
    )
  return [low, high]


def chosen(
  conditioning: Mapping,
  guide: Mapping,
  default: float,
  classifier: Mapping | None = None,
  **given,
) -> dict:
  """The guidance of a run's plan, without options that have no effect.

  Args:
    conditioning: the run's config of it: 'name' and 'drop'.
    guide: facts about another network that gives u, such as 'guide' and
      'guide_sha256'; {} for the run's own unconditional model.
    default: the weight of a conditional run if none is given.
    classifier: facts about a classifier, in the same way.
    **given: OPTIONS; None if not given.

  Returns:
    {} for the conditional model alone, or a run without a condition.

  Raises:
    UserError: an option is out of range, or the run cannot be guided so.
  """
  found = _of_classifier(classifier or {}, given.pop('classifier_scale', None))
  is_conditional = conditioning['name'] != 'none'
  weight, interval, rescale = (given.get(name) for name in OPTIONS[:3])
  if weight is None:
    weight = default if is_conditional or guide else 1.0
  if not math.isfinite(weight):
    raise UserError(f'guidance={weight}: a finite number')
  if weight == 1:
    for name, value in (*given.items(), *list(guide.items())[:1]):
      if name != 'guidance' and value is not None:
        raise UserError(
          f'{name}={value} has no effect with guidance=1: give another '
          'guidance, such as 2, or leave it out'
        )
    return found
  if not (is_conditional or guide):
    raise UserError(
      f'guidance={weight}: the run has no condition, so it has no pair of '
      "models to guide with: train with conditioning.name='label' or 'text', "
      'or give another run as the guide'
    )
  if not guide and not conditioning['drop']:
    raise UserError(
      f'guidance={weight}: the run was trained with conditioning.drop=0 and '
      'has no unconditional model: train with conditioning.drop=0.1, or give '
      'give another run as the guide'
    )
  if rescale is not None and not 0 <= rescale <= 1:
    raise UserError(f'guidance_rescale={rescale}: from 0 (off) to 1')
  return {
    'guidance': float(weight),
    **({'guidance_interval': parse_interval(interval)} if interval else {}),
    **({'guidance_rescale': float(rescale)} if rescale else {}),
    **guide,
    **found,
  }


def _of_classifier(classifier, scale) -> dict:
  if not classifier:
    if scale is not None:
      raise UserError(
        f'classifier_scale={scale} has no effect without a classifier: give '
        'the run of one, or leave it out'
      )
    return {}
  scale = 1.0 if scale is None else scale
  if not math.isfinite(scale):
    raise UserError(f'classifier_scale={scale}: a finite number')
  return {'classifier_scale': float(scale), **classifier}


def is_other_alone(guidance: Mapping) -> bool:
  """Whether the run's own u is the result, so that c need not be computed."""
  needs_c = {'guidance_interval', 'guidance_rescale', 'guide'}
  return guidance.get('guidance') == 0 and not needs_c & guidance.keys()


def times_of(schedule: Schedule, guidance: Mapping) -> tuple | None:
  """(above, to): guided are times t with above < t <= to; None for all times.

  The interval is LO <= log-SNR < HI, as the intervals (lo, hi] of sigma in
  arXiv 2404.07724. In terms of times, because whole times are exact.
  """
  if 'guidance_interval' not in guidance:
    return None
  low, high = guidance['guidance_interval']
  above, to = schedule.host_t_of_logsnr([high, low])
  return float(above), float(to)


def rows(schedule: Schedule, sampler: Sampler, grid, guidance: Mapping) -> int:
  """Rows of the network per sample, over all evaluations.

  An evaluation outside the interval, of w = 1 or of w = 0 takes one row, any
  other two.

  Args:
    schedule: the noise schedule.
    sampler: the sampler.
    grid: its times.
    guidance: a result of `chosen`.

  Returns:
    the number; at most that many for samplers that choose their own steps.

  Raises:
    UserError: no evaluation is inside the interval.
  """
  evaluations = count_evaluations(
    sampler, grid, starts_at_noise(schedule, grid)
  )
  if 'guidance' not in guidance or is_other_alone(guidance):
    return evaluations
  limits = times_of(schedule, guidance)
  if limits is None or sampler.init is None:
    return 2 * evaluations
  at = evaluation_times(sampler, schedule, grid)
  above, to = limits
  times = np.float32(at)  # as the sampler has them
  guided = (times > np.float32(above)) & (times <= np.float32(to))
  if not guided.any():
    low, high = guidance['guidance_interval']
    ends = (f'{2 * x:.3g}' for x in levels.of(schedule, at[[0, -1]]).lam)
    raise UserError(
      f'guidance_interval={low:g},{high:g}: no evaluation of this grid is '
      f'inside; they are at log-SNR {" to ".join(ends)}'
    )
  return evaluations + int(guided.sum())
