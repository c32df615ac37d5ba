r"""The variational bound of DDPM, in bits per dimension: all of it, or quickly.

A model that goes down a grid of times t -> s, the last s being -1, bounds the
code length of an image x0 by (arXiv 2006.11239, eq. 5)

    KL(q(x_T-1 | x0) || N(0, I))                    the prior
  + sum of KL(q(xs | xt, x0) || p(xs | xt))         the terms of steps t -> s
  - log p(x0 | xt)                                  the last step's: the decoder

with xt ~ q(xt | x0). p(xs | xt) is Gaussian; its mean is that of q(xs | xt, x0)
at the denoiser's estimate of x0, so the two means differ by c0 (x0 - estimate),
and a term is an affine function of the estimate's squared error:

  log(v / vq) / 2 + (vq / v - 1) / 2 + c0^2 / (2 v) |x0 - estimate|^2

in nats per dimension, vq the variance of q and v that of p. The numbers are
made once in float64 (`prepare`), and nothing cancels in float32. The decoder is
a Gaussian in 256 bins for images, and a density for continuous data.

What is given the denoiser decides: to score what a sampler with clipping draws
from, wrap it in `guidance.clip_x0`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from diffusion_jax.process import gaussian
from diffusion_jax.process.gaussian import Denoiser, per_example
from diffusion_jax.process.schedules import Schedule
from diffusion_jax.system.errors import UserError


class Steps(NamedTuple):
  """The steps of a grid as numbers; float64 arrays [K], see `prepare`.

  Attributes:
    t: the times at which the network is asked.
    alpha: alpha(t).
    sigma: sigma(t).
    constant: what a term is, in nats per dimension, where the estimate is x0.
    weight: of the squared error in it.
    log_scale: log of the standard deviation of p(xs | xt).
  """

  t: np.ndarray
  alpha: np.ndarray
  sigma: np.ndarray
  constant: np.ndarray
  weight: np.ndarray
  log_scale: np.ndarray


class Scored(NamedTuple):
  """What some steps cost, and what was known of the images before them.

  Attributes:
    bits: [k, B] (of one step [B]), bits per dimension.
    mse: the same shape, the squared error of the estimate of x0, a mean over
      dimensions, in units of x0.
  """

  bits: jax.Array
  mse: jax.Array


class Table(NamedTuple):
  """The bound, part by part, in the order of the grid.

  Attributes:
    prior: [B] bits per dimension.
    bits: [K, B] bits per dimension; the last row is the decoder's.
    mse: [K, B], see `Scored`.
  """

  prior: jax.Array
  bits: jax.Array
  mse: jax.Array

  @property
  def total(self) -> jax.Array:
    """[B], the bound in bits per dimension."""
    return self.prior + self.bits.sum(axis=0)


class Estimated(NamedTuple):
  """An estimate of the mean bound, in bits per dimension.

  Attributes:
    mean: over the images.
    low: lower end of the 95% interval.
    high: its upper end.
    evaluations: rows that were given to the denoiser.
  """

  mean: float
  low: float
  high: float
  evaluations: int


def _mean(values):
  return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def check_discrete(x0) -> None:
  """Refuses, for the decoder in 256 bins, what are not 8-bit images.

  Args:
    x0: concrete array; for 8-bit images every value is k / 127.5 - 1 with a
      whole k in 0 .. 255, to 0.001 of a level.

  Raises:
    UserError: a value is not.
  """
  level = (np.asarray(x0, np.float64).ravel() + 1) * 127.5
  near = np.clip(np.rint(level), 0, 255)
  wrong = ~(np.abs(level - near) <= 1e-3)  # NaN is wrong too
  if wrong.any():
    raise UserError(
      f'x0 has the value {level[wrong][0] / 127.5 - 1:.6g}: the discrete '
      'decoder takes 8-bit images, k / 127.5 - 1 with k = 0 .. 255; score '
      'continuous data with discrete=False'
    )


def discretised_log_likelihood(x, mean, log_scale) -> jax.Array:
  """Log-probability of 8-bit values under a Gaussian in 256 bins.

  Equation 13 of arXiv 2006.11239, with what its code puts for the normal
  distribution function, (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2, and
  with no probability below 1e-12. As (1 + tanh y) / 2 = sigmoid(2 y), a bin has

    sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)),

  which is exact to rounding far out in the tails, where a difference is not.

  Args:
    x: images in [-1, 1]: k / 127.5 - 1, see `check_discrete`.
    mean: of the Gaussian, shape of x.
    log_scale: log of its standard deviation, a scalar or of x's shape.

  Returns:
    nats, shape of x. The bins of 0 and 255 are open to the outside.
  """
  scale = jnp.exp(-jnp.asarray(log_scale, jnp.result_type(x)))
  centre, half = (x - mean) * scale, scale / 255
  factor, cubic = 2 * math.sqrt(2 / math.pi), 0.044715

  def argument(z):
    return factor * (z + cubic * z**3)

  upper, lower = argument(centre + half), argument(centre - half)
  between = factor * (2 * half + cubic * half * (6 * centre**2 + 2 * half**2))
  below = jax.nn.log_sigmoid(upper)
  above = jax.nn.log_sigmoid(-lower)
  log_probability = jnp.where(
    x < -0.999,
    below,
    jnp.where(x > 0.999, above, below + above + jnp.log(-jnp.expm1(-between))),
  )
  return jnp.maximum(log_probability, math.log(1e-12))


def variances(schedule: Schedule, grid, variance) -> np.ndarray:
  """[K] float64: the variance of p(xs | xt) of every step of a grid.

  The last step's, the decoder's, is the posterior variance of the step before
  for both names: of 1 -> 0 on the full grid, as in `log_variance_table`.

  Args:
    schedule: the noise schedule.
    grid: K + 1 falling times, the last one -1; concrete.
    variance: one of `gaussian.VARIANCES`, see `gaussian.step_variance`; or [K]
      numbers, the decoder's the last.

  Raises:
    UserError: an unknown name, numbers that are not one a step and above 0, or
      a name for a grid of one step, which has no step before.
  """
  times = np.asarray(grid, np.float64)
  if not isinstance(variance, str):
    values = np.asarray(variance, np.float64)
    good = np.isfinite(values) & (values > 0)
    if values.shape != (len(times) - 1,) or not good.all():
      raise UserError(
        f'variance has shape {values.shape}: it takes {len(times) - 1} numbers '
        'above 0, one a step of the grid'
      )
    return values
  values = gaussian.step_variance(schedule, times[:-1], times[1:], variance)
  if len(values) < 2:
    raise UserError(
      f'variance={variance} says nothing of the decoder of a grid of one step: '
      'give the variance as a number, or use two steps'
    )
  decoder = gaussian.step_variance(schedule, times[-3], times[-2], 'fixedsmall')
  return np.append(values[:-1], decoder)


def prepare(schedule: Schedule, grid, variance='fixedlarge') -> Steps:
  """All that the bound needs of a schedule and a grid, in float64.

  Args:
    schedule: the noise schedule.
    grid: K + 1 falling times, the last one -1, see `samplers.grid`; concrete.
    variance: see `variances`.

  Raises:
    UserError: see `variances`.
  """
  times = np.asarray(grid, np.float64)
  t, s = times[:-1], times[1:]
  v = variances(schedule, grid, variance)
  c0, _, vq = gaussian.posterior_coefficients(schedule, t, s)
  constant = 0.5 * np.log(2 * np.pi * v)  # of the density at the end
  ratio = vq[:-1] / v[:-1]
  constant[:-1] = 0.5 * (ratio - 1 - np.log(ratio))
  log_alpha_bar, sigma2 = schedule.host(t)
  return Steps(
    t, np.exp(0.5 * log_alpha_bar), np.sqrt(sigma2), constant,
    c0**2 / (2 * v), 0.5 * np.log(v),
  )  # fmt: skip


def prior(schedule: Schedule, x0, t=None) -> jax.Array:
  """KL(q(xt | x0) || N(0, I)), what is left of an image at the last time.

  Args:
    schedule: the noise schedule.
    x0: [B, ...] data.
    t: the first time of the grid, concrete; T-1 by default.

  Returns:
    [B] bits per dimension.
  """
  t = schedule.num_timesteps - 1 if t is None else t
  alpha_bar = float(np.exp(schedule.host(t)[0]))
  constant = float(-alpha_bar - np.log1p(-alpha_bar))
  nats = 0.5 * (alpha_bar * _mean(jnp.square(x0)) + constant)
  return nats / math.log(2)


def term(
  denoiser: Denoiser, steps: Steps, i, x0, eps, discrete: bool = True
) -> Scored:
  """The term of one step of each example.

  Args:
    denoiser: (xt, t) -> (x0, eps); its x0 is scored.
    steps: of the grid, see `prepare`.
    i: [B] or a scalar, which of the K steps.
    x0: [B, ...] data.
    eps: [B, ...] standard normal noise, of which xt is made.
    discrete: whether the last step codes 8-bit values (see
      `discretised_log_likelihood`), or is minus the log of a density.

  Returns:
    Scored of [B]; an expectation over eps is a step's term in the bound.
  """
  i = jnp.broadcast_to(i, x0.shape[:1])
  row = jax.tree.map(lambda column: jnp.asarray(column, x0.dtype)[i], steps)
  xt = per_example(row.alpha, x0) * x0 + per_example(row.sigma, x0) * eps
  estimate = denoiser(xt, row.t).x0
  mse = _mean(jnp.square(x0 - estimate))
  nats = row.constant + row.weight * mse
  if discrete:
    log_scale = steps.log_scale[-1]
    decoder = _mean(discretised_log_likelihood(x0, estimate, log_scale))
    nats = jnp.where(i == len(steps.t) - 1, -decoder, nats)
  return Scored(nats / math.log(2), mse)


def _scan(denoiser, steps, x0, keys, which, labels, discrete) -> Scored:
  """Of steps which[j] ([k] or [k, B]), with noise by (keys[b], labels[j])."""

  def one(inputs):
    i, label = inputs

    def draw(key):
      key = jax.random.fold_in(key, label)
      return jax.random.normal(key, x0.shape[1:], x0.dtype)

    return term(denoiser, steps, i, x0, jax.vmap(draw)(keys), discrete)

  return jax.lax.map(one, (which, labels))


def terms(
  denoiser: Denoiser,
  steps: Steps,
  x0,
  keys,
  which=None,
  discrete: bool = True,
) -> Scored:
  """The terms of some steps, or of all: the bound in chunks.

  The noise of image b in step i depends on keys[b] and i alone, so neither the
  batch nor the chunks matter. One number of steps compiles once.

  Args:
    denoiser: (xt, t) -> (x0, eps).
    steps: of the whole grid, see `prepare`.
    x0: [B, ...] data.
    keys: [B] random keys.
    which: [k] integers, the steps asked for; by default 0 .. K-1.
    discrete: see `term`.

  Returns:
    Scored of [k, B].
  """
  which = jnp.arange(len(steps.t)) if which is None else jnp.asarray(which)
  return _scan(denoiser, steps, x0, keys, which, which, discrete)


def bound(
  denoiser: Denoiser,
  schedule: Schedule,
  grid,
  x0,
  keys,
  variance='fixedlarge',
  discrete: bool = True,
) -> Table:
  """The bound of each image (arXiv 2006.11239, eq. 5), K evaluations each.

  Args:
    denoiser: (xt, t) -> (x0, eps).
    schedule: the noise schedule.
    grid: K + 1 falling times, the last one -1, see `samplers.grid`; concrete.
    x0: [B, ...] data.
    keys: [B] random keys, see `terms`.
    variance: see `variances`.
    discrete: see `term`; `check_discrete` says whether x0 may be.

  Raises:
    UserError: see `variances`.
  """
  steps = prepare(schedule, grid, variance)
  scored = terms(denoiser, steps, x0, keys, discrete=discrete)
  return Table(prior(schedule, x0, grid[0]), *scored)


def rate_distortion(table: Table) -> tuple[jax.Array, jax.Array]:
  """How good an image is after how many bits (arXiv 2006.11239, table 4).

  Entry k is of who has received x_t, t the k-th time of the grid: the prior and
  the terms of all steps before. The decoder's own bits are never among them.

  Args:
    table: of any images.

  Returns:
    (rate [K] in bits per dimension, RMSE [K] of the estimate of x0 on the scale
    0 .. 255), of the mean rate and the mean squared error over images.
  """
  before = jnp.cumsum(table.bits, axis=0) - table.bits
  rate = jnp.mean(table.prior[None] + before, axis=1)
  return rate, 127.5 * jnp.sqrt(jnp.mean(table.mse, axis=1))


# --- The same from one evaluation in a hundred --------------------------------
#
# Prior and decoder are worked out for every image; the terms between are
# sampled: E over t ~ p of term(t) / p(t) is their sum for any p > 0. The error
# is least where p is proportional to the root mean square of the term, which a
# pilot finds (arXiv 2102.09672, section 3.3, samples the times of training so).
#
# Numbers folded into an image's key: 0 .. K-1 are the steps of `terms`; from K
# on they are, in turn, of `sampled` and of `pilot`, the offset first.


def _strata(keys, count, label):
  """[count, B]: for each key, one uniform number in each of `count` strata."""

  def offset(key):
    return jax.random.uniform(jax.random.fold_in(key, label))

  return (jnp.arange(count)[:, None] + jax.vmap(offset)(keys)[None]) / count


def pilot(
  denoiser: Denoiser, steps: Steps, x0, keys, count: int = 1
) -> tuple[jax.Array, jax.Array]:
  """Terms at some steps, spread evenly in the log of their place from the end.

  Args:
    denoiser: (xt, t) -> (x0, eps).
    steps: of the grid, K of at least 2.
    x0: [B, ...] data.
    keys: [B] random keys, those of `sampled`: the noise is another.
    count: evaluations for each image.

  Returns:
    (steps [count, B], bits [count, B]), for `proposal`.
  """
  num_steps = len(steps.t)
  place = jnp.floor(num_steps ** _strata(keys, count, num_steps + 1))
  place = jnp.clip(place.astype(jnp.int32), 1, num_steps - 1)
  which = num_steps - 1 - place
  labels = num_steps + 3 + 2 * jnp.arange(count)
  # No step is the last, so how that one is decoded does not matter.
  bits = _scan(denoiser, steps, x0, keys, which, labels, False).bits
  return which, bits


def proposal(
  which, bits, num_steps: int, uniform: float = 0.1, width: float = 0.25
) -> np.ndarray:
  """Probabilities of the steps, from a pilot; on the host.

  Proportional to the root mean square of the terms, smoothed over the log of
  the steps' place from the end by a Gaussian of standard deviation `width`. A
  part is uniform, so that no weight 1 / p is above (K - 1) / uniform.

  Args:
    which: any shape, steps that were tried, all below K - 1.
    bits: of the same shape, their terms.
    num_steps: K.
    uniform: the share of the uniform part.
    width: of the smoothing: 0.25 averages over a factor of about 1.3 in t.

  Returns:
    [K-1] float64, of every step but the last; the sum is 1.
  """
  which, bits = np.ravel(which), np.ravel(np.asarray(bits, np.float64))
  place = np.log(np.arange(num_steps - 1, 0, -1))
  kernel = np.exp(-0.5 * ((place[:, None] - place) / width) ** 2) + 1e-99
  count = np.bincount(which, minlength=num_steps - 1)
  square = np.bincount(which, bits**2, num_steps - 1)
  size = np.sqrt(kernel @ square / (kernel @ count))
  size += np.finfo(np.float64).tiny  # all terms 0: uniform
  return uniform / len(size) + (1 - uniform) * size / size.sum()


def sampled(
  denoiser: Denoiser,
  schedule: Schedule,
  steps: Steps,
  x0,
  keys,
  probabilities,
  draws: int = 8,
  discrete: bool = True,
) -> jax.Array:
  """An unbiased estimate of each image's bound, from draws + 1 evaluations.

  prior + decoder + the mean over draws of term / probability. The draws of an
  image lie one in each of `draws` strata of equal probability, at one random
  offset. Unbiased: each offset is uniform, so the mean over draws is one over
  p. It stays so where p comes from a pilot on the same images, whose noise and
  steps are independent of these: for every p the expectation is the image's
  bound. The decoder's noise is that of `terms`.

  Args:
    denoiser: (xt, t) -> (x0, eps).
    schedule: the noise schedule.
    steps: of the grid; concrete, not an argument of a jitted function.
    x0: [B, ...] data.
    keys: [B] random keys; an image's numbers depend on its own alone.
    probabilities: [K-1], see `proposal`.
    draws: how many steps are tried.
    discrete: see `term`.

  Returns:
    [B] bits per dimension, independent of each other given the probabilities.
  """
  num_steps = len(steps.t)
  edges = jnp.cumsum(jnp.asarray(probabilities, x0.dtype))
  edges = edges / edges[-1]
  # As they are drawn in this dtype, so that the weights are those of the draws.
  drawn = jnp.diff(edges, prepend=0)
  place = _strata(keys, draws, num_steps).astype(x0.dtype)
  tried = jnp.searchsorted(edges, place, side='right')
  tried = jnp.minimum(tried, num_steps - 2)
  decoder = jnp.full((1, len(x0)), num_steps - 1)
  labels = num_steps + 2 + 2 * jnp.arange(draws)
  bits = _scan(
    denoiser, steps, x0, keys, jnp.concatenate([decoder, tried]),
    jnp.append(num_steps - 1, labels), discrete,
  ).bits  # fmt: skip
  between = jnp.mean(bits[1:] / drawn[tried], axis=0)
  return prior(schedule, x0, steps.t[0]) + bits[0] + between


def _at_least_two(images):
  if images < 2:
    raise UserError(
      f'{images} images: an interval takes at least 2, score more'
    )


def interval(values) -> tuple[float, float, float]:
  """(mean, low, high): the 95% interval by Student's t; on the host.

  Images are the independent units. Their spread holds both how images differ
  and what their sampled times and noise add, so no second term is needed. It is
  for the mean over the distribution that the images come from, and so on the
  wide side for the mean over these images alone.

  Args:
    values: [N], from `sampled`.

  Raises:
    UserError: there are fewer than 2.
  """
  values = np.asarray(values, np.float64)
  _at_least_two(len(values))
  mean, error = values.mean(), values.std(ddof=1) / np.sqrt(len(values))
  half = scipy.special.stdtrit(len(values) - 1, 0.975) * error
  return float(mean), float(mean - half), float(mean + half)


def estimate(
  denoiser: Denoiser,
  schedule: Schedule,
  grid,
  x0,
  keys,
  variance='fixedlarge',
  discrete: bool = True,
  evaluations: int = 10,
) -> Estimated:
  """The mean bound of images from a few evaluations of each.

  With T = 1000 the default is one in a hundred of what `bound` takes: one an
  image for the decoder, one for the pilot, eight for the sampled steps. It is
  `pilot`, `proposal`, `sampled` and `interval`, which a caller with more images
  than fit at once calls batch by batch.

  Args:
    denoiser: (xt, t) -> (x0, eps).
    schedule: the noise schedule.
    grid: K + 1 falling times, the last one -1; concrete.
    x0: [B, ...] data, at least 2.
    keys: [B] random keys.
    variance: see `variances`.
    discrete: see `term`.
    evaluations: for each image, 3 to K - 1.

  Raises:
    UserError: evaluations or images out of range, or see `variances`.
  """
  steps = prepare(schedule, grid, variance)
  num_steps = len(steps.t)
  if not 3 <= evaluations < num_steps:
    raise UserError(
      f'evaluations={evaluations}: 3 to {num_steps - 1} for each image on a '
      f'grid of {num_steps} steps; the full bound takes {num_steps}'
    )
  _at_least_two(len(x0))
  which, bits = pilot(denoiser, steps, x0, keys)
  probabilities = proposal(which, bits, num_steps)
  values = sampled(
    denoiser, schedule, steps, x0, keys, probabilities, evaluations - 2,
    discrete,
  )  # fmt: skip
  return Estimated(*interval(values), len(x0) * evaluations)
