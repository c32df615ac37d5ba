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
from diffusion_jax.system.errors import one_of

VARIANCES = ('fixedsmall', 'fixedlarge')


class Denoised(NamedTuple):
  """A denoiser's estimates from xt; xt = alpha x0 + sigma eps if t >= 0.

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


def alpha_sigma(schedule: Schedule, t, like, clean=0.0) -> tuple:
  """(alpha, sigma) at t, to multiply an array.

  Args:
    schedule: the noise schedule.
    t: times, [B] or a scalar.
    like: an array [B, ...] that they will multiply.
    clean: sigma at t = -1, see `Schedule.sigma`.
  """
  dtype = jnp.result_type(like)  # JAX's dtype: no float64 by default
  alpha, sigma = schedule.alpha(t, dtype), schedule.sigma(t, dtype, clean)
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
  alpha, sigma = alpha_sigma(schedule, t, x0)
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

  'fixedsmall' is the posterior variance (eq. 7 of arXiv 2006.11239),
  'fixedlarge' the variance added between s and t (beta_t if s = t - 1).

  Args:
    schedule: the noise schedule.
    t: times, concrete.
    s: earlier times of the same shape, -1 for clean data.
    variance: one of VARIANCES.

  Raises:
    UserError: the variance is not known.
  """
  if one_of('variance', variance, VARIANCES) == 'fixedsmall':
    return posterior_coefficients(schedule, t, s)[2]
  return -np.expm1(schedule.host(t)[0] - schedule.host(s)[0])


class Parametrisation(NamedTuple):
  """The meaning of a network's output F, in closed form.

  Attributes:
    denoised: (F, xt, alpha, sigma) -> Denoised.
    target: (x0, eps, alpha, sigma) -> the F of a perfect network.
    scale: (alpha, sigma) -> the factor applied to xt as network input; None for
      1.
    label: (schedule, t) -> [B], the noise level as network input; None for t.
    clean: sigma at t = -1 for `denoised`; inf if it divides by sigma, so that
      clean data has eps 0.
  """

  denoised: Callable
  target: Callable
  scale: Callable | None = None
  label: Callable | None = None
  clean: float = 0.0


PARAMETRISATIONS = {
  'eps': Parametrisation(
    lambda F, xt, alpha, sigma: Denoised((xt - sigma * F) / alpha, F),
    lambda x0, eps, alpha, sigma: eps,
  ),
  'x0': Parametrisation(
    lambda F, xt, alpha, sigma: Denoised(F, (xt - alpha * F) / sigma),
    lambda x0, eps, alpha, sigma: x0,
    clean=np.inf,
  ),
  'v': Parametrisation(  # arXiv 2202.00512
    lambda F, xt, alpha, sigma: Denoised(
      alpha * xt - sigma * F, sigma * xt + alpha * F
    ),
    lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
  ),
}


def parametrisation(name: str) -> Parametrisation:
  """One of PARAMETRISATIONS.

  Raises:
    UserError: the name is not known.
  """
  return PARAMETRISATIONS[one_of('prediction', name, PARAMETRISATIONS)]


def from_prediction(schedule, prediction, xt, t, kind: str) -> Denoised:
  """(prediction, xt, t) -> (x0, eps).

  Args:
    schedule: the noise schedule.
    prediction: [B, ...], the output of the network.
    xt: [B, ...], noised data.
    t: [B] times.
    kind: a key of PARAMETRISATIONS.

  Raises:
    UserError: the kind is not known.
  """
  how = parametrisation(kind)
  levels = alpha_sigma(schedule, t, xt, how.clean)
  return how.denoised(prediction, xt, *levels)


def to_target(schedule, x0, eps, t, kind: str) -> jax.Array:
  """(x0, eps, t) -> target, the inverse of `from_prediction`.

  Args:
    schedule: the noise schedule.
    x0: [B, ...] clean data.
    eps: [B, ...] noise.
    t: [B] times.
    kind: a key of PARAMETRISATIONS.

  Returns:
    [B, ...].

  Raises:
    UserError: the kind is not known.
  """
  return parametrisation(kind).target(x0, eps, *alpha_sigma(schedule, t, x0))


def predict(network_fn, schedule: Schedule, xt, t, kind: str) -> jax.Array:
  """The output of the network for xt, scaled and labelled as it expects.

  Args:
    network_fn: (input [B, ...], label [B]) -> prediction [B, ...].
    schedule: the noise schedule.
    xt: [B, ...] noised data.
    t: [B] times.
    kind: a key of PARAMETRISATIONS.

  Raises:
    UserError: the kind is not known.
  """
  how = parametrisation(kind)
  if how.scale:
    xt = xt * how.scale(*alpha_sigma(schedule, t, xt))
  return network_fn(xt, how.label(schedule, t) if how.label else t)


def denoiser(network_fn, schedule: Schedule, kind: str) -> Denoiser:
  """A denoiser from a network.

  Args:
    network_fn: (input [B, ...], label [B]) -> prediction [B, ...].
    schedule: the noise schedule.
    kind: a key of PARAMETRISATIONS.

  Returns:
    denoise(xt, t) -> Denoised, where t is [B] or a scalar.
  """

  def denoise(xt, t):
    t = jnp.broadcast_to(t, xt.shape[:1])
    # The network is not trained on clean data: t = -1 is evaluated as 0.
    prediction = predict(network_fn, schedule, xt, jnp.maximum(t, 0), kind)
    return from_prediction(schedule, prediction, xt, t, kind)

  return denoise
