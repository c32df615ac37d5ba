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
LEARNED = 'learned'  # between them, see `Denoised.fraction`
# What a network is told of the noise: the time or what its prediction says, or
# sqrt(alpha_bar), as in SR3 (arXiv 2104.07636).
LEVELS = ('auto', 'alpha')


class Denoised(NamedTuple):
  """A denoiser's estimates from xt; xt = alpha x0 + sigma eps if t >= 0.

  Attributes:
    x0: [B, ...], the estimate of the clean data.
    eps: [B, ...], the estimate of the noise.
    fraction: [B, ...], where a learned variance lies between the smallest (0)
      and the largest (1) of a step, see `step_variance`; None if the variance
      is not learned.
  """

  x0: jax.Array
  eps: jax.Array
  fraction: jax.Array | None = None


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


def log_spread(schedule: Schedule, t, s) -> np.ndarray:
  """log(fixedlarge / fixedsmall) of the steps t -> s, float64.

  A learned variance is fixedsmall exp(fraction log_spread), eq. 15 of arXiv
  2102.09672. 0 at s = -1, where fixedsmall is 0.

  Args:
    schedule: the noise schedule.
    t: times, concrete.
    s: earlier times of the same shape, -1 for clean data.
  """
  large, small = (
    step_variance(schedule, t, s, name) for name in ('fixedlarge', 'fixedsmall')
  )
  return np.log(large / np.where(small > 0, small, large))


class Parametrisation(NamedTuple):
  """The meaning of a network's output F, in closed form.

  alpha and sigma are functions of the log SNR alone, and so is each member.
  None of them is computed from another one, which would lose digits at one of
  the ends.

  Attributes:
    denoised: (F, xt, alpha, sigma) -> Denoised.
    target: (x0, eps, alpha, sigma) -> the F of a perfect network.
    gain: (alpha, sigma) -> the error of x0 that an error of 1 in F causes.
    scale: (alpha, sigma) -> the factor applied to xt as network input; None for
      1.
    label: (schedule, t) -> [B], the noise level as network input; None for t.
    clean: sigma at t = -1 for `denoised`; inf if it divides by sigma, so that
      clean data has eps 0.
    noise_only: whether it is defined for pure noise, alpha = 0.
  """

  denoised: Callable
  target: Callable
  gain: Callable | None = None
  scale: Callable | None = None
  label: Callable | None = None
  clean: float = 0.0
  noise_only: bool = True


def edm(sigma_data: float = 0.5) -> Parametrisation:
  """EDM's preconditioning (arXiv 2206.00364, table 1), in our process.

  The paper's z = xt / alpha has noise of level l = sigma / alpha, and its
  denoiser is c_skip z + c_out F(c_in z, ln(l) / 4) with

    c_skip = s^2 / (l^2 + s^2), c_out = l s / sqrt(l^2 + s^2),
    c_in = 1 / sqrt(l^2 + s^2),

  where s is `sigma_data`. With q = alpha^2 s^2 + sigma^2 this is

    x0 = alpha s^2 / q xt + sigma s / sqrt(q) F(xt / sqrt(q), ln(l) / 4).

  Args:
    sigma_data: the standard deviation of the data.
  """
  s = sigma_data

  def root(alpha, sigma):
    return jnp.sqrt((alpha * s) ** 2 + sigma**2)

  def denoised(F, xt, alpha, sigma):
    r = root(alpha, sigma)
    return Denoised(
      alpha * (s / r) ** 2 * xt + sigma * s / r * F,
      sigma / r**2 * xt - alpha * s / r * F,
    )

  def target(x0, eps, alpha, sigma):
    return (sigma * x0 / s - alpha * s * eps) / root(alpha, sigma)

  def label(schedule, t):
    log_alpha_bar = schedule.log_alpha_bar_at(t)
    return (jnp.log(-jnp.expm1(log_alpha_bar)) - log_alpha_bar) / 8

  return Parametrisation(
    denoised, target, lambda alpha, sigma: sigma * s / root(alpha, sigma),
    lambda alpha, sigma: 1 / root(alpha, sigma), label, noise_only=False,
  )  # fmt: skip


PARAMETRISATIONS = {
  'eps': Parametrisation(
    lambda F, xt, alpha, sigma: Denoised((xt - sigma * F) / alpha, F),
    lambda x0, eps, alpha, sigma: eps,
    lambda alpha, sigma: sigma / alpha,
    noise_only=False,
  ),
  'x0': Parametrisation(
    lambda F, xt, alpha, sigma: Denoised(F, (xt - alpha * F) / sigma),
    lambda x0, eps, alpha, sigma: x0,
    lambda alpha, sigma: jnp.ones_like(alpha),
    clean=np.inf,
  ),
  'v': Parametrisation(  # arXiv 2202.00512
    lambda F, xt, alpha, sigma: Denoised(
      alpha * xt - sigma * F, sigma * xt + alpha * F
    ),
    lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
    lambda alpha, sigma: sigma,
  ),
  'edm': edm(),
  # Rectified flow (arXiv 2209.03003): the network sees (1 - u) x0 + u eps,
  # which is xt / (alpha + sigma), and u, and predicts eps - x0.
  'flow': Parametrisation(
    lambda F, xt, alpha, sigma: Denoised(
      (xt - sigma * F) / (alpha + sigma), (xt + alpha * F) / (alpha + sigma)
    ),
    lambda x0, eps, alpha, sigma: eps - x0,
    lambda alpha, sigma: sigma / (alpha + sigma),
    lambda alpha, sigma: 1 / (alpha + sigma),
    lambda schedule, t: (
      schedule.sigma(t) / (schedule.alpha(t) + schedule.sigma(t))
    ),
  ),
}


def parametrisation(
  kind: str | Parametrisation, sigma_data: float = 0.5, level: str = 'auto'
) -> Parametrisation:
  """One of PARAMETRISATIONS.

  Args:
    kind: its name, or a parametrisation, which is returned.
    sigma_data: of 'edm', see `edm`.
    level: one of LEVELS, unless a parametrisation is given.

  Raises:
    UserError: the name is not known.
  """
  if isinstance(kind, Parametrisation):
    return kind
  one_of('prediction', kind, PARAMETRISATIONS)
  how = edm(sigma_data) if kind == 'edm' else PARAMETRISATIONS[kind]
  if one_of('level', level, LEVELS) == 'auto':
    return how
  return how._replace(label=lambda schedule, t: schedule.alpha(t))


def split(output, channels: int) -> tuple:
  """A network's output -> (F, the fraction of a learned variance or None).

  The second half of the channels, if there are twice as many as in the data,
  is 2 fraction - 1 (arXiv 2102.09672, eq. 15, as in its code).

  Args:
    output: [B, ..., channels] or [B, ..., 2 channels].
    channels: those of the data.
  """
  if output.shape[-1] != 2 * channels:
    return output, None
  return output[..., :channels], (output[..., channels:] + 1) / 2


def from_prediction(schedule, prediction, xt, t, kind) -> Denoised:
  """(prediction, xt, t) -> (x0, eps), and the fraction of a learned variance.

  Args:
    schedule: the noise schedule.
    prediction: [B, ...], the output of the network, see `split`.
    xt: [B, ...], noised data.
    t: [B] times.
    kind: a parametrisation, or its name.

  Raises:
    UserError: the kind is not known.
  """
  how = parametrisation(kind)
  levels = alpha_sigma(schedule, t, xt, how.clean)
  F, fraction = split(prediction, xt.shape[-1])
  return how.denoised(F, xt, *levels)._replace(fraction=fraction)


def to_target(schedule, x0, eps, t, kind) -> jax.Array:
  """(x0, eps, t) -> target, the inverse of `from_prediction`.

  Args:
    schedule: the noise schedule.
    x0: [B, ...] clean data.
    eps: [B, ...] noise.
    t: [B] times.
    kind: a parametrisation, or its name.

  Returns:
    [B, ...].

  Raises:
    UserError: the kind is not known.
  """
  return parametrisation(kind).target(x0, eps, *alpha_sigma(schedule, t, x0))


def predict(network_fn, schedule: Schedule, xt, t, kind) -> jax.Array:
  """The output of the network for xt, scaled and labelled as it expects.

  Args:
    network_fn: (input [B, ...], label [B]) -> prediction [B, ...].
    schedule: the noise schedule.
    xt: [B, ...] noised data.
    t: [B] times.
    kind: a parametrisation, or its name.

  Raises:
    UserError: the kind is not known.
  """
  how = parametrisation(kind)
  if how.scale:
    xt = xt * how.scale(*alpha_sigma(schedule, t, xt))
  return network_fn(xt, how.label(schedule, t) if how.label else t)


def denoiser(network_fn, schedule: Schedule, kind) -> Denoiser:
  """A denoiser from a network.

  Args:
    network_fn: (input [B, ...], label [B]) -> prediction [B, ...].
    schedule: the noise schedule.
    kind: a parametrisation, or its name.

  Returns:
    denoise(xt, t) -> Denoised, where t is [B] or a scalar.
  """

  def denoise(xt, t):
    t = jnp.broadcast_to(t, xt.shape[:1])
    # The network is not trained on clean data: t = -1 is evaluated as 0.
    prediction = predict(network_fn, schedule, xt, jnp.maximum(t, 0), kind)
    return from_prediction(schedule, prediction, xt, t, kind)

  return denoise
