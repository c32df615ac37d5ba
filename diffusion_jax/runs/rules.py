"""What an objective cannot be combined with: one table, a line each."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from diffusion_jax.process import gaussian, schedules
from diffusion_jax.system.errors import UserError


class Rule(NamedTuple):
  """A combination that does not work.

  Attributes:
    clashes: (loss config, schedule) -> whether it is there.
    message: what is given, why it does not work and what to use, with keys of
      the loss config in braces.
  """

  clashes: Callable[[Mapping, schedules.Schedule], bool]
  message: str


def _undefined_at_noise(loss, schedule) -> bool:
  how = gaussian.PARAMETRISATIONS.get(loss['prediction'])
  return schedule.ends_in_noise and how is not None and not how.noise_only


RULES = (
  Rule(
    _undefined_at_noise,
    'loss.prediction={prediction} is not defined for pure noise, in which the '
    'schedule ends: use loss.prediction=v, x0 or flow; or '
    'process.zero_snr=False with another process.schedule',
  ),
)


def check(loss: Mapping, schedule: schedules.Schedule) -> None:
  """Raises UserError if the objective cannot be computed.

  Args:
    loss: the config of the loss.
    schedule: the noise schedule.
  """
  for rule in RULES:
    if rule.clashes(loss, schedule):
      raise UserError(rule.message.format(**loss))
