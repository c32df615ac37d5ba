"""What an objective cannot be combined with: one table, a line each."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from diffusion_jax.objectives import laws, weights
from diffusion_jax.process import gaussian, schedules
from diffusion_jax.system.errors import UserError


class Rule(NamedTuple):
  """A combination that does not work.

  Attributes:
    clashes: (the config's loss, its sample, the schedule) -> whether it is
      there.
    message: what is given, why it does not work and what to use, with keys of
      the loss in braces.
  """

  clashes: Callable[[Mapping, Mapping, schedules.Schedule], bool]
  message: str


def _undefined_at_noise(loss, sample, schedule) -> bool:
  how = gaussian.PARAMETRISATIONS.get(loss['prediction'])
  return schedule.ends_in_noise and how is not None and not how.noise_only


def _learns(loss) -> bool:
  return loss['variance'] == gaussian.LEARNED


RULES = (
  Rule(
    _undefined_at_noise,
    'loss.prediction={prediction} is not defined for pure noise, in which the '
    'schedule ends: use loss.prediction=v, x0 or flow; or '
    'process.zero_snr=False with another process.schedule',
  ),
  Rule(
    lambda loss, sample, schedule: (
      loss['weight'] == weights.BOUND and loss['law'] not in laws.WHOLE
    ),
    'loss.weight=bound is a sum over whole times, which loss.law={law} does '
    'not draw: use loss.law=uniform, stratified or importance',
  ),
  Rule(
    lambda loss, sample, schedule: (
      _learns(loss) and loss['law'] not in laws.WHOLE
    ),
    'loss.variance=learned is trained by the bound, a sum over whole times, '
    'which loss.law={law} does not draw: use loss.law=uniform, stratified or '
    'importance',
  ),
  Rule(
    lambda loss, sample, schedule: (
      loss['weight'] == weights.BOUND and loss['huber'] > 0
    ),
    'loss.huber={huber} has no effect on loss.weight=bound, which is of '
    'Gaussians: set loss.huber=0, or use loss.weight=simple',
  ),
  Rule(
    lambda loss, sample, schedule: loss['law_mean'] and not loss['law_std'],
    'loss.law_mean={law_mean} has no effect with loss.law_std=0, which is for '
    'the published numbers: set loss.law_std too, such as 1.0',
  ),
  Rule(
    lambda loss, sample, schedule: (
      sample.get('variance') == gaussian.LEARNED and not _learns(loss)
    ),
    'sample.variance=learned needs a network that learns it: set '
    'loss.variance=learned, or use sample.variance=fixedlarge',
  ),
)


def check(config: Mapping, schedule: schedules.Schedule) -> None:
  """Raises UserError if the objective of a config cannot be computed.

  Args:
    config: the run's config.
    schedule: its noise schedule.
  """
  for rule in RULES:
    if rule.clashes(config['loss'], config['sample'], schedule):
      raise UserError(rule.message.format(**config['loss']))
