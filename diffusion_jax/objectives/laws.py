"""Laws of the time that training draws, as quantile functions.

A law maps a uniform number to a time. In training the number comes from the
example's key; for the held-out loss the numbers are spread evenly. A law of the
log SNR is one of t, as t is a function of the log SNR.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.process.schedules import Schedule

GOLDEN = 2654435769  # 2**32 divided by the golden ratio
STRATUM = 'stratum'  # of an example in its batch, see `Objective.whole`
LEAST = 'least'  # the least time of an example, among its rows; of 'uniform'
# Published mean and deviation of log(sigma / alpha): EDM (arXiv 2206.00364,
# table 1) and Stable Diffusion 3 (arXiv 2403.03206, eq. 19), where the logit of
# a flow's time u is log(u / (1 - u)), which is log(sigma / alpha).
NORMALS = {'lognormal': (-1.2, 1.2), 'logitnormal': (0.0, 1.0)}
# Laws in which all whole times have their share.
WHOLE = ('uniform', 'stratified', 'importance')
LEVELS = 'levels'  # between the whole times, with the same shares
LAWS = (*WHOLE, LEVELS, *NORMALS)

MOST_BINS = 100
UNIFORM = 0.01  # share of the uniform law in 'importance'
DECAY = 0.99  # of the moments in 'importance', per step


class Law(NamedTuple):
  """A law of times.

  Attributes:
    draw: (keys [B], extras, rows) -> (t [B], factor [B] or None). The factor
      makes a mean over this law one over the uniform law.
    spread: index [B] -> t [B], evenly spread over any set of examples.
    extras: the law's state at the start of training.
    sums: (t, values [B]) -> what `update` needs, summed over rows.
    update: (extras, sums) -> extras.
    whole: see `Objective`.
  """

  draw: Callable
  spread: Callable
  extras: dict = {}  # noqa: RUF012, never written to
  sums: Callable = lambda t, values: {}
  update: Callable = lambda extras, sums: extras
  whole: Callable | None = None


def create(
  law: str, schedule: Schedule, mean: float = 0.0, std: float = 0.0,
  whole_times: bool = False,
) -> Law:  # fmt: skip
  """A law by name.

  Args:
    law: one of LAWS.
    schedule: the noise schedule.
    mean: of log(sigma / alpha), for NORMALS.
    std: its deviation; 0 for the published mean and deviation.
    whole_times: whether the objective is defined for whole times only.
  """
  count = schedule.num_timesteps
  if law == 'uniform':
    return Law(
      lambda keys, extras, rows: (
        uniform_times(keys, count, rows.get(LEAST)), None
      ),
      lambda index: spread_times(index, count),
    )  # fmt: skip
  if law == 'stratified':
    return Law(
      lambda keys, extras, rows: (_floor(rows[STRATUM], count), None),
      lambda index: spread_times(index, count),
      whole=_strata,
    )
  if law == 'importance':
    return _importance(count, whole_times)
  if law == LEVELS:
    return _of_quantiles(_between(schedule))
  if not std:
    mean, std = NORMALS[law]
  return _normal(schedule, mean, std)


def uniform_times(
  keys: jax.Array, num_timesteps: int, least: jax.Array | None = None
) -> jax.Array:
  """[B] keys -> t int32 [B], uniform in least .. num_timesteps - 1.

  Args:
    keys: [B] random keys.
    num_timesteps: the number of times.
    least: int32 [B]; None for 0.
  """

  def draw(key, least=0):
    return jax.random.randint(key, (), least, num_timesteps)

  return jax.vmap(draw)(keys, *(() if least is None else (least,)))


def spread_times(index: jax.Array, num_timesteps: int) -> jax.Array:
  """Whole times, evenly spread by golden-ratio steps.

  That compares checkpoints without the variance of random times. In integers,
  because float32 has no digits left for the fraction of a large index.
  """
  return (_spread(index) * (num_timesteps / 2**24)).astype(jnp.int32)


def _spread(index):
  """24 bits for each index, evenly spread."""
  return (index.astype(jnp.uint32) * np.uint32(GOLDEN)) >> 8


def _floor(share, count):
  """A share in [0, 1) of the times, as a whole time."""
  t = (share * count).astype(jnp.int32)
  return jnp.minimum(t, count - 1)  # a share may be rounded to 1


def _uniform(keys):
  return jax.vmap(lambda key: jax.random.uniform(key))(keys)


def _strata(keys):
  """One uniform number in each of B equal parts of [0, 1)."""
  return {STRATUM: (jnp.arange(len(keys)) + _uniform(keys)) / len(keys)}


def _normal(schedule, mean, std) -> Law:
  """log(sigma / alpha) is normal, clipped to the schedule's ends."""

  def quantile(u):
    logsnr = -2 * (mean + std * jax.scipy.special.ndtri(u))
    t = schedule.t_of_logsnr(logsnr)
    return jnp.clip(t, 0, schedule.num_timesteps - 1)

  return _of_quantiles(quantile)


def _of_quantiles(quantile: Callable) -> Law:
  return Law(
    lambda keys, extras, rows: (quantile(_uniform(keys)), None),
    lambda index: quantile(_spread(index).astype(jnp.float32) / 2**24),
  )


def _between(schedule) -> Callable:
  """sqrt(alpha_bar) is uniform between a whole time and the one before it.

  The whole time is uniform (SR3, arXiv 2104.07636, section 2.3); before t = 0
  are clean data.

  Returns:
    uniform numbers in [0, 1) -> times in (-1, T-1].
  """
  count = schedule.num_timesteps
  falls = np.diff(np.concatenate([[0.0], 0.5 * schedule.log_alpha_bar]))

  def quantile(u):
    t = _floor(u, count)
    # Above 0, also where rounded: clean data have no noise to predict.
    down = 1 - jnp.clip(u * count - t, 0, 1 - 2**-20)
    fall = jnp.asarray(falls, u.dtype)[t]
    finite = jnp.isfinite(fall)
    fall = jnp.where(finite, fall, -1)
    # Of the logarithm, which a schedule interpolates but in a step to noise.
    part = jnp.log1p(down * jnp.expm1(fall)) / fall
    return t - 1 + jnp.where(finite, part, down)

  return quantile


def _importance(count, whole_times) -> Law:
  """In proportion to the root of the loss's second moment.

  Section 3.3 of arXiv 2102.09672, with moments of bins of times that decay by
  step. A time is drawn by the interpolated inverse distribution function, so
  that a rounding of the moments moves t by a rounding; only whole times, which
  a bound needs, can flip. Until each bin was seen, the law is uniform.
  """
  bins = next((k for k in range(MOST_BINS, 9, -1) if count % k == 0), count)
  edges = jnp.linspace(0.0, 1.0, bins + 1)

  def bin_of(t):
    # The middle of a whole time is not on an edge.
    share = (t + 0.5) / count if whole_times else t / (count - 1)
    return jnp.minimum((share * bins).astype(jnp.int32), bins - 1)

  def probabilities(extras):
    seen = extras['count'] > 0
    mean = extras['square'] / jnp.where(seen, extras['count'], 1)
    root = jnp.where(seen.all(), jnp.sqrt(mean), 1)
    tiny = jnp.finfo(root.dtype).tiny
    share = (root + tiny) / jnp.sum(root + tiny)
    return UNIFORM / bins + (1 - UNIFORM) * share

  def draw(keys, extras, rows):
    p = probabilities(extras)
    cdf = jnp.concatenate([jnp.zeros(1), jnp.cumsum(p)])
    share = jnp.interp(_uniform(keys) * cdf[-1], cdf, edges)
    t = _floor(share, count) if whole_times else share * (count - 1)
    return t, 1 / (bins * p[bin_of(t)])

  def sums(t, values):
    where = jax.nn.one_hot(bin_of(t), bins)
    return {
      'square': jnp.square(values) @ where,
      'count': where.sum(0),
    }

  zeros = {'square': jnp.zeros(bins), 'count': jnp.zeros(bins)}
  return Law(
    draw,
    lambda index: spread_times(index, count),
    zeros,
    sums,
    lambda extras, sums: jax.tree.map(
      lambda old, new: DECAY * old + new, extras, sums
    ),
  )
