"""Sampling from a noised picture: SDEdit, and denoising."""

import jax
import jax.numpy as jnp

from diffusion_jax.editing.editing import Editing
from diffusion_jax.editing.measurements import Measurement
from diffusion_jax.process import gaussian
from diffusion_jax.samplers.solve import Sampler


def _from(schedule, t0, eta: float) -> Sampler:
  """DDIM's steps from a time of each example to clean data.

  The grid of `solve` says how the way is divided: its times, as shares of the
  first, are those of the way from t0, also between whole times.

  Args:
    schedule: the noise schedule.
    t0: [B], each in [-1, T-1].
    eta: 1 for ancestral steps, 0 for the probability flow.
  """

  def init(schedule, grid, x):
    share = (grid + 1) / (grid[0] + 1)
    return {'t': grid[:-1], 'share': share[:-1], 'next': share[1:]}, ()

  def step(denoiser, row, x, memory, noise_fn):
    t, s = ((t0 + 1) * row[name] - 1 for name in ('share', 'next'))
    log_t, log_s = (schedule.log_alpha_bar_at(at, x.dtype) for at in (t, s))
    var_t, var_s = -jnp.expm1(log_t), -jnp.expm1(log_s)
    beta = -jnp.expm1(log_t - log_s)  # the variance added between s and t
    variance = beta * var_s / jnp.where(var_t > 0, var_t, 1)
    std = eta * jnp.sqrt(variance)
    ceps = jnp.sqrt(jnp.maximum(var_s - std**2, 0))
    c0, ceps, std = (
      gaussian.per_example(of, x) for of in (jnp.exp(0.5 * log_s), ceps, std)
    )
    seen = denoiser(x, t)
    moved = c0 * seen.x0 + ceps * seen.eps + std * noise_fn()
    # From clean data there is no way to go.
    return jnp.where(gaussian.per_example(t0 < 0, x), x, moved), memory

  return Sampler(init, step, from_noise=True)


def sdedit(
  denoiser: gaussian.Denoiser,
  schedule,
  measurement: Measurement | None,
  y,
  *,
  t0,
  eta: float = 1.0,
) -> Editing:
  """SDEdit (arXiv 2108.01073): noise a picture to t0, and sample from there.

  Args:
    denoiser: the model, with the condition of the result.
    schedule: the noise schedule.
    measurement: not used.
    y: the picture, or its latents, [B, H, W, C].
    t0: [B], in [0, T-1]; a strength s is s T - 1.
    eta: 1 for ancestral steps, 0 for the probability flow.
  """

  def start(noise, t):
    return gaussian.q_sample(schedule, y, t0, noise)

  return Editing(_from(schedule, t0, eta), denoiser, start)


def level_time(schedule, noise, dtype=jnp.float32) -> jax.Array:
  """The time whose noise has a standard deviation of `noise` beside x0.

  Args:
    schedule: the noise schedule.
    noise: [B], sigma / alpha, in units of x0.
    dtype: the dtype of the result.

  Returns:
    [B], in [-1, T-1]; that of the last time if the noise is above it.
  """
  noise = jnp.asarray(noise, dtype)
  return schedule.t_of_logsnr(-2 * jnp.log(noise), dtype)


def denoise(
  denoiser: gaussian.Denoiser,
  schedule,
  measurement: Measurement,
  y,
  *,
  eta: float = 1.0,
) -> Editing:
  """Samples of the posterior of a noisy picture.

  alpha y has the distribution of xt at the time whose noise is that of y, so
  sampling goes on from there, exactly. A single step gives the posterior mean.
  The squared error of a sample is twice that of the mean, for any data.

  Args:
    denoiser: the model.
    schedule: the noise schedule.
    measurement: its noise is that of y.
    y: [B, H, W, C], x0 + noise n.
    eta: 1 for ancestral steps, 0 for the probability flow, whose end is a
      function of y and no sample of the posterior.
  """
  x, t0 = _noised(schedule, measurement, y)
  return Editing(_from(schedule, t0, eta), denoiser, lambda noise, t: x)


def _noised(schedule, measurement, y):
  """(alpha y, t) at the noise level of y."""
  noise = jnp.broadcast_to(measurement.noise, y.shape[:1])
  t = level_time(schedule, noise, y.dtype)
  return gaussian.per_example(schedule.alpha(t, y.dtype), y) * y, t
