"""Wrappers of a denoiser: guidance.*(denoiser, ...) -> denoiser."""

import jax.numpy as jnp

from diffusion_jax.process import gaussian, schedules


def clip_x0(
  denoiser: gaussian.Denoiser, schedule: schedules.Schedule, bound=1.0
) -> gaussian.Denoiser:
  """Clips x0 to [-bound, bound] and recomputes eps to match.

  DDPM clips in every ancestral step (arXiv 2006.11239, published sampler).
  Because eps is recomputed, xt = alpha x0 + sigma eps still holds, and a
  sampler may use either x0 or eps. At t = -1, clean data, eps is 0.

  Args:
    denoiser: (xt, t) -> (x0, eps).
    schedule: the noise schedule.
    bound: 1 for images in [-1, 1].
  """

  def denoise(xt, t):
    seen = denoiser(xt, t)
    x0 = jnp.clip(seen.x0, -bound, bound)
    alpha, sigma = gaussian.alpha_sigma(schedule, t, xt, jnp.inf)
    return seen._replace(x0=x0, eps=(xt - alpha * x0) / sigma)

  return denoise
