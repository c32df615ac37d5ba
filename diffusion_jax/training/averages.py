"""Further averages of the parameters, kept during training.

With constant decay, the weight of old parameters falls exponentially. With a
power-function profile (arXiv 2312.02696, section 3.1), the weight of the
parameters of step s at step t is proportional to s^gamma, so that the width of
the average grows with the run. A profile is named by its relative width, the
standard deviation of its weights over t.

Two or more profiles, kept in checkpoints, span others: a linear combination of
the kept averages is the average with any profile, up to an error that is known
(section 3.2). All of it is in closed form.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.system.errors import UserError

WIDEST = 0.28  # a little below the uniform average, 1 / sqrt(12)
DECAY, PROFILE = 'decay', 'profile'


class Average(NamedTuple):
  """Which average.

  Attributes:
    kind: DECAY or PROFILE.
    number: the decay, or the relative width.
  """

  kind: str
  number: float

  @property
  def name(self) -> str:
    """Its name in `TrainState.averages`, in file names and checkpoints."""
    return f'{self.kind}{self.number!r}'

  @property
  def text(self) -> str:
    """What users call it, see `parse`."""
    return (
      f'{self.number!r}' if self.kind == PROFILE else f'decay:{self.number!r}'
    )


def parse(text: str) -> Average:
  """The average that `--ema_profile` names: WIDTH or decay:DECAY.

  Raises:
    UserError: the text names none.
  """
  kind, _, number = text.rpartition(':')
  try:
    found = Average(kind or PROFILE, float(number))
  except ValueError:
    found = Average('', math.nan)
  top = {DECAY: 1, PROFILE: math.nextafter(WIDEST, 1)}.get(found.kind, 0)
  if not 0 < found.number < top:
    raise UserError(
      f'--ema_profile={text}: give a relative width above 0 and at most '
      f'{WIDEST}, such as 0.1, or a kept average, such as decay:0.999'
    )
  return found


def kept(ema: Mapping) -> list[Average]:
  """The averages that a run keeps besides its first.

  Args:
    ema: the config's group `ema`.
  """
  decays = [Average(DECAY, float(x)) for x in ema.get('decays', ())]
  profiles = [Average(PROFILE, float(x)) for x in ema.get('profiles', ())]
  return decays + profiles


def gamma_of(width: float) -> float:
  """The exponent of the profile of a relative width (arXiv 2312.02696, eq. 7).

  With u = gamma + 2, width^2 u^2 (u + 1) = u - 1, of which the largest root is
  wanted. Shifted by 1/3 it is a cubic without its square term, whose three real
  roots are cosines.

  Args:
    width: above 0 and at most 1 / sqrt(12), the uniform average.
  """
  inverse = width**-2
  p, q = -inverse - 1 / 3, 2 / 27 + 4 * inverse / 3
  radius = 2 * math.sqrt(-p / 3)
  cosine = max(min(3 * q / (p * radius), 1.0), -1.0)
  return radius * math.cos(math.acos(cosine) / 3) - 1 / 3 - 2


def width_of(gamma: float) -> float:
  """The relative width of the profile t^gamma."""
  return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def updates(ema: Mapping) -> dict[str, Callable]:
  """Name -> (step, average, new parameters) -> average, for each kept average.

  Args:
    ema: the config's group `ema`.
  """
  return {
    one.name: constant(one.number)
    if one.kind == DECAY
    else power(gamma_of(one.number))
    for one in kept(ema)
  }


def updated(
  state, params, decay: float, updates: Mapping[str, Callable]
) -> tuple[Any, dict[str, Any]]:
  """The state's `ema_params` and `averages` after an update.

  Args:
    state: the `TrainState` before it.
    params: the parameters after it.
    decay: that of the first average, unused if the state has none.
    updates: those of the further averages, see `updates`.
  """

  def apply(update, average):
    return jax.tree.map(partial(update, state.step), average, params)

  return state.ema_params and apply(constant(decay), state.ema_params), {
    name: apply(update, state.averages[name])
    for name, update in updates.items()
  }


def constant(decay: float) -> Callable:
  """An update with constant decay, as that of the first average."""

  def update(step, average, new):
    del step
    return decay * average + (1.0 - decay) * new

  return update


def power(gamma: float) -> Callable:
  """An update with decay (1 - 1/t)^(gamma + 1) at step t = 1, 2, ...

  The weights are then exactly those of the profile, integrated over each step,
  from the first step on (arXiv 2312.02696, eq. 4); the parameters of step 0
  have none.
  """

  def update(step, average, new):
    # The complement of the decay, which is close to 1, has all its digits.
    log_decay = (gamma + 1) * jnp.log1p(-1 / (step + 1).astype(jnp.float32))
    return average - jnp.expm1(log_decay) * (new - average)

  return update


class Fit(NamedTuple):
  """A profile as a combination of others.

  Attributes:
    weights: float64 [N], the factors of the averages.
    error: the norm of the difference of the two profiles, relative to that of
      the wanted one.
  """

  weights: np.ndarray
  error: float


def inner(one: tuple, other: tuple) -> np.ndarray:
  """Inner products of profiles, the integral of their product over time.

  Args:
    one: (gammas [N], steps [N]): weights (gamma + 1) s^gamma / t^(gamma + 1)
      of s in [0, t].
    other: (gammas [M], steps [M]).

  Returns:
    float64 [N, M].
  """
  (a, s), (b, t) = (np.asarray(x, np.float64) for x in (one, other))
  a, s = a[:, None], s[:, None]
  # The exponent is that of the profile that reaches further.
  ratio = np.where(s < t, s / t, t / s) ** np.where(s < t, b, a)
  return (a + 1) * (b + 1) / (a + b + 1) * ratio / np.maximum(s, t)


def fit(width: float, step: int, widths: Sequence, steps: Sequence) -> Fit:
  """Combines kept averages to another one (arXiv 2312.02696, section 3.2).

  Least squares between profiles, with weights that add up to 1: parameters that
  do not move are then exact.

  Args:
    width: the wanted relative width.
    step: the step at which it is wanted.
    widths: [N] relative widths of the kept averages.
    steps: [N] steps at which they were kept, at most `step`.
  """
  basis = [gamma_of(x) for x in widths], steps
  wanted = [gamma_of(width)], [step]
  products = inner(basis, basis)
  norms = np.sqrt(np.diag(products))
  target = inner(basis, wanted)[:, 0] / norms
  # Averages that others already give would have large, opposite weights, which
  # multiply the rounding of the parameters.
  scaled = products / np.outer(norms, norms)
  right = np.stack([target, 1 / norms], axis=1)
  free, ones = np.linalg.lstsq(scaled, right, rcond=1e-10)[0].T
  sums = right[:, 1] @ np.stack([free, ones], axis=1)
  found = free + ones * (1 - sums[0]) / sums[1]
  whole = inner(wanted, wanted)[0, 0]
  rest = whole - 2 * found @ target + found @ scaled @ found
  return Fit(found / norms, math.sqrt(max(rest / whole, 0.0)))
