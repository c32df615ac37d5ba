r"""The Gaussian process: noising, its posterior, and the prediction algebra.

Letters as in DDPM (arXiv 2006.11239) with alpha = sqrt(alpha_bar), see
`schedules`. A time s < t may be any earlier time, not just t - 1, so that
samplers can take long steps; s = -1 is clean data.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.process.schedules import Schedule
from diffusion_jax.system.errors import UserError

PREDICTIONS = ('eps', 'x0', 'v')
VARIANCES = ('fixedsmall', 'fixedlarge')


class Denoised(NamedTuple):
  """What a denoiser says of xt; xt = alpha x0 + sigma eps always holds.

  Attributes:
    x0: [B, ...], the estimate of the clean data.
    eps: [B, ...], the estimate of the noise.
  """

  x0: jax.Array
  eps: jax.Array


Denoiser = Callable[[jax.Array, jax.Array], Denoised]


def per_example(values: jax.Array, like: jax.Array) -> jax.Array:
  """[B] (or a scalar) -> [B, 1, ...], to multiply `like` [B, ...]."""
  return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _alpha_sigma(schedule, t, like):
  dtype = jnp.result_type(like)  # of JAX, which has no float64 by default
  alpha, sigma = schedule.alpha(t, dtype), schedule.sigma(t, dtype)
  return per_example(alpha, like), per_example(sigma, like)


def q_sample(schedule: Schedule, x0, t, eps) -> jax.Array:
  """xt ~ q(xt | x0) for the noise eps (arXiv 2006.11239, eq. 4).

  Args:
    schedule: the noise schedule.
    x0: [B, ...] clean data.
    t: [B] times.
    eps: [B, ...] standard normal noise.

  Returns:
    [B, ...], alpha(t) x0 + sigma(t) eps.
  """
  alpha, sigma = _alpha_sigma(schedule, t, x0)
  return alpha * x0 + sigma * eps


def posterior_coefficients(schedule: Schedule, t, s) -> tuple:
  """q(xs | xt, x0) = N(c0 x0 + ct xt, variance), in float64.

  Equations 6 and 7 of arXiv 2006.11239 for any s < t, on the host.

  Args:
    schedule: the noise schedule.
    t: times, concrete.
    s: earlier times of the same shape, -1 for clean data.

  Returns:
    (c0, ct, variance), float64 arrays of t's shape; variance 0 at s = -1.
  """
  log_t, var_t = schedule.host(t)
  log_s, var_s = schedule.host(s)
  beta = -np.expm1(log_t - log_s)  # the variance added between s and t
  c0 = np.exp(0.5 * log_s) * beta / var_t
  ct = np.exp(0.5 * (log_t - log_s)) * var_s / var_t
  return c0, ct, beta * var_s / var_t


def step_variance(schedule: Schedule, t, s, variance: str) -> np.ndarray:
  """The fixed variance of p(xs | xt), float64, for any steps t -> s.

  'fixedsmall' is the posterior's (eq. 7 of arXiv 2006.11239), 'fixedlarge' the
  variance that was added between s and t (beta_t where s = t - 1).

  Args:
    schedule: the noise schedule.
    t: times, concrete.
    s: earlier times of the same shape, -1 for clean data.
    variance: one of VARIANCES.

  Raises:
    UserError: another variance was asked for.
  """
  if variance not in VARIANCES:
    raise UserError(
      f'variance {variance!r} is not known: use one of {", ".join(VARIANCES)}'
    )
  if variance == 'fixedsmall':
    return posterior_coefficients(schedule, t, s)[2]
  return -np.expm1(schedule.host(t)[0] - schedule.host(s)[0])


def log_variance_table(schedule: Schedule, variance: str) -> np.ndarray:
  """[T] float64: log of the fixed variance of every step, as a decoder needs.

  The first entry (t = 0, of which no noise is drawn) is the posterior variance
  of t = 1 for both choices, as in the paper's likelihoods; it would be log 0
  for 'fixedsmall'.

  Args:
    schedule: the noise schedule.
    variance: one of VARIANCES.
  """
  t = np.arange(schedule.num_timesteps)
  values = step_variance(schedule, t, t - 1, variance)
  first = step_variance(schedule, 1, 0, 'fixedsmall')
  return np.log(np.concatenate([[first], values[1:]]))


def from_prediction(schedule, prediction, xt, t, kind: str) -> Denoised:
  """(prediction, xt, t) -> (x0, eps): one half of the prediction algebra.

  Args:
    schedule: the noise schedule.
    prediction: [B, ...], what the network gave.
    xt: [B, ...], what it was given.
    t: [B] times.
    kind: what the prediction means: 'eps', 'x0', or
      'v' = alpha eps - sigma x0 (arXiv 2202.00512).

  Raises:
    UserError: the kind is not known.
  """
  alpha, sigma = _alpha_sigma(schedule, t, xt)
  if kind == 'eps':
    return Denoised((xt - sigma * prediction) / alpha, prediction)
  if kind == 'x0':
    return Denoised(prediction, (xt - alpha * prediction) / sigma)
  if kind == 'v':
    return Denoised(
      alpha * xt - sigma * prediction, sigma * xt + alpha * prediction
    )
  raise UserError(_unknown_prediction(kind))


def to_target(schedule, x0, eps, t, kind: str) -> jax.Array:
  """(x0, eps, t) -> target: the other half; the inverse of the first.

  Args:
    schedule: the noise schedule.
    x0: [B, ...] clean data.
    eps: [B, ...] noise.
    t: [B] times.
    kind: what the network is to predict, see `from_prediction`.

  Returns:
    [B, ...].

  Raises:
    UserError: the kind is not known.
  """
  alpha, sigma = _alpha_sigma(schedule, t, x0)
  if kind == 'eps':
    return eps
  if kind == 'x0':
    return x0
  if kind == 'v':
    return alpha * eps - sigma * x0
  raise UserError(_unknown_prediction(kind))


def _unknown_prediction(kind):
  return (
    f'prediction {kind!r} is not known: use one of {", ".join(PREDICTIONS)}'
  )


def denoiser(predict_fn, schedule: Schedule, kind: str) -> Denoiser:
  """A denoiser from a network.

  Args:
    predict_fn: (xt [B, ...], t [B]) -> prediction [B, ...].
    schedule: the noise schedule.
    kind: what the network predicts, see `from_prediction`.

  Returns:
    denoise(xt, t) -> Denoised, where t is [B] or a scalar.
  """

  def denoise(xt, t):
    t = jnp.broadcast_to(t, xt.shape[:1])
    # The network knows no clean data: it sees t = -1 as 0.
    prediction = predict_fn(xt, jnp.maximum(t, 0))
    return from_prediction(schedule, prediction, xt, t, kind)

  return denoise
