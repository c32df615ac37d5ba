r"""The variational bound of DDPM, in bits per dimension.

A model that follows a grid of times t -> s, with the last s = -1, bounds the
code length of an image x0 by (arXiv 2006.11239, eq. 5)

    KL(q(x_T-1 | x0) || N(0, I))                    the prior
  + sum of KL(q(xs | xt, x0) || p(xs | xt))         the terms of steps t -> s
  - log p(x0 | xt)                                  the last step's: the decoder

with xt ~ q(xt | x0). p(xs | xt) is Gaussian with the mean of q(xs | xt, x0) at
the denoiser's estimate of x0. The two means therefore differ by
c0 (x0 - estimate), and a term is an affine function of the squared error of the
estimate:

  log(v / vq) / 2 + (vq / v - 1) / 2 + c0^2 / (2 v) |x0 - estimate|^2

in nats per dimension, with vq the variance of q and v that of p. `prepare`
computes the coefficients once in float64, and nothing cancels in float32. The
decoder is a Gaussian in 256 bins for images, and a density for continuous data.

To score the distribution of a sampler with clipping, wrap the denoiser in
`guidance.clip_x0`.

A learned variance v is between the fixed ones, for each dimension by itself:
v = vq exp(x) with x = fraction * spread, which is put into the term above.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.process import decoder, gaussian, noise, schedules
from diffusion_jax.system.errors import UserError


class Steps(NamedTuple):
  """The coefficients of a grid's steps; float64 arrays [K], see `prepare`.

  Attributes:
    t: the times at which the network is evaluated.
    alpha: alpha(t).
    sigma: sigma(t).
    constant: the term for a perfect estimate, in nats per dimension.
    weight: the factor of the squared error in the term.
    log_scale: log of the standard deviation of p(xs | xt).
    spread: of a learned variance, log of the ratio of the largest to the
      smallest, which `log_scale` is of; None if the variance is fixed.
  """

  t: np.ndarray
  alpha: np.ndarray
  sigma: np.ndarray
  constant: np.ndarray
  weight: np.ndarray
  log_scale: np.ndarray
  spread: np.ndarray | None = None


class Scored(NamedTuple):
  """The terms of some steps, and the errors of the estimates in them.

  Attributes:
    bits: [k, B] (or [B] for one step), bits per dimension.
    mse: the same shape, the squared error of the estimate of x0, averaged over
      dimensions, in units of x0.
  """

  bits: jax.Array
  mse: jax.Array


class Table(NamedTuple):
  """The parts of the bound, in the order of the grid.

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


def _mean(values):
  return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def variances(schedule: schedules.Schedule, grid, variance) -> np.ndarray:
  """[K] float64: the variance of p(xs | xt) for every step of a grid.

  For both names, the variance of the last step, the decoder, is the posterior
  variance of the step before it: 1 -> 0 on the full grid, as in the paper.

  Args:
    schedule: the noise schedule.
    grid: K + 1 decreasing times, the last one -1; concrete.
    variance: one of `gaussian.VARIANCES`, see `gaussian.step_variance`; or [K]
      numbers, with the decoder's last.

  Raises:
    UserError: an unknown name, numbers that are not one per step and above 0,
      or a name for a grid of one step, which has no step before the last.
  """
  times = np.asarray(grid, np.float64)
  if not isinstance(variance, str):
    values = np.asarray(variance, np.float64)
    good = np.isfinite(values) & (values > 0)
    if values.shape != (len(times) - 1,) or not good.all():
      raise UserError(
        f'variance has shape {values.shape}: it needs {len(times) - 1} numbers '
        'above 0, one per step of the grid'
      )
    return values
  values = gaussian.step_variance(schedule, times[:-1], times[1:], variance)
  if len(values) < 2:
    raise UserError(
      f'variance={variance} does not define the decoder of a grid of one step: '
      'give the variance as a number, or use two steps'
    )
  last = gaussian.step_variance(schedule, times[-3], times[-2], 'fixedsmall')
  return np.append(values[:-1], last)


def prepare(schedule: schedules.Schedule, grid, variance='fixedlarge') -> Steps:
  """Computes the coefficients of the bound for a grid, in float64.

  Args:
    schedule: the noise schedule.
    grid: K + 1 decreasing times, the last one -1, see `samplers.grid`;
      concrete.
    variance: see `variances`; or 'learned', for a denoiser that gives the
      fraction, see `gaussian.log_spread`.

  Raises:
    UserError: see `variances`.
  """
  times = np.asarray(grid, np.float64)
  t, s = times[:-1], times[1:]
  learned = isinstance(variance, str) and variance == gaussian.LEARNED
  v = variances(schedule, grid, 'fixedsmall' if learned else variance)
  c0, _, vq = gaussian.posterior_coefficients(schedule, t, s)
  constant = 0.5 * np.log(2 * np.pi * v)  # for the density of the last step
  ratio = vq[:-1] / v[:-1]
  constant[:-1] = 0.5 * (ratio - 1 - np.log(ratio))
  log_alpha_bar, sigma2 = schedule.host(t)
  return Steps(
    t, np.exp(0.5 * log_alpha_bar), np.sqrt(sigma2), constant,
    c0**2 / (2 * v), 0.5 * np.log(v),
    np.log(gaussian.step_variance(schedule, t, s, 'fixedlarge') / v)
    if learned else None,
  )  # fmt: skip


def prior(schedule: schedules.Schedule, x0, t=None) -> jax.Array:
  """KL(q(xt | x0) || N(0, I)) at the first time of a grid.

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
  denoiser: gaussian.Denoiser, steps: Steps, i, x0, eps, discrete: bool = True
) -> Scored:
  """The term of one step of each example.

  Args:
    denoiser: (xt, t) -> (x0, eps); its x0 is scored, with its fraction if the
      variance is learned.
    steps: the steps of the grid, see `prepare`.
    i: [B] or a scalar, the index of the step, below K.
    x0: [B, ...] data.
    eps: [B, ...] standard normal noise, which xt is computed with.
    discrete: whether the last step codes 8-bit values (see
      `decoder.discretised_log_likelihood`), or is minus the log of a density.

  Returns:
    Scored of [B]; its expectation over eps is the step's term in the bound.
  """
  i = jnp.broadcast_to(i, x0.shape[:1])
  row = jax.tree.map(lambda column: jnp.asarray(column, x0.dtype)[i], steps)
  alpha = gaussian.per_example(row.alpha, x0)
  xt = alpha * x0 + gaussian.per_example(row.sigma, x0) * eps
  seen = denoiser(xt, row.t)
  estimate, scale = seen.x0, steps.log_scale[-1]
  mse = _mean(jnp.square(x0 - estimate))
  nats = row.constant + row.weight * mse
  is_last = i == len(steps.t) - 1
  if steps.spread is not None:
    x = seen.fraction * gaussian.per_example(row.spread, x0)
    scale = scale + 0.5 * x
    # The Gaussians' ratio counts, but the last step's is a density.
    ratio = jnp.where(gaussian.per_example(is_last, x0), 0.0, jnp.expm1(-x))
    off = jnp.square(x0 - estimate) * jnp.exp(-x)
    nats = row.constant + 0.5 * _mean(x + ratio) + row.weight * _mean(off)
  if discrete:
    last = decoder.discretised_log_likelihood(x0, estimate, scale)
    nats = jnp.where(is_last, -_mean(last), nats)
  return Scored(nats / math.log(2), mse)


def terms(
  denoiser: gaussian.Denoiser,
  steps: Steps,
  x0,
  keys,
  which=None,
  discrete: bool = True,
  labels=None,
) -> Scored:
  """The terms of some or all steps, computed one after the other.

  The noise of image b in step i depends only on keys[b] and i, so the result
  does not depend on the batch, and the bound can be computed in chunks. It
  compiles once per number of steps.

  Args:
    denoiser: (xt, t) -> (x0, eps).
    steps: the steps of the whole grid, see `prepare`.
    x0: [B, ...] data.
    keys: [B] random keys.
    which: [k] or [k, B] integers, the indices of the steps; by default
      0 .. K-1.
    discrete: see `term`.
    labels: [k] integers that the noise depends on in place of the steps.

  Returns:
    Scored of [k, B].
  """
  which = jnp.arange(len(steps.t)) if which is None else jnp.asarray(which)

  def one(inputs):
    i, label = inputs
    eps = noise.draw(keys, label, x0.shape[1:], x0.dtype)
    return term(denoiser, steps, i, x0, eps, discrete)

  return jax.lax.map(one, (which, which if labels is None else labels))


def rate_distortion(table: Table) -> tuple[jax.Array, jax.Array]:
  """The rate-distortion curve (arXiv 2006.11239, table 4).

  Entry k is for a receiver of x_t at the k-th time of the grid: the rate is the
  prior and the terms of all earlier steps. The decoder's bits are not included.

  Args:
    table: the bound of any images.

  Returns:
    (rate [K] in bits per dimension, RMSE [K] of the estimate of x0 on the scale
    0 .. 255), from the mean rate and the mean squared error over images.
  """
  before = jnp.cumsum(table.bits, axis=0) - table.bits
  rate = jnp.mean(table.prior[None] + before, axis=1)
  return rate, 127.5 * jnp.sqrt(jnp.mean(table.mse, axis=1))
