"""Classifier guidance (arXiv 2105.05233): a gradient added to the noise."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.process import gaussian
from diffusion_jax.process.gaussian import Denoiser
from diffusion_jax.process.schedules import Schedule


def by_classifier(
  denoiser: Denoiser,
  log_probability: Callable,
  schedule: Schedule,
  scale: float,
) -> Denoiser:
  """Moves samples towards a class by the gradient of a classifier.

  eps - scale sigma grad log p(y | xt), algorithm 2 of the paper, for any
  sampler. With scale 1 and exact networks it is the conditional denoiser.

  Args:
    denoiser: (xt, t) -> Denoised.
    log_probability: (xt [B, ...], t [B]) -> [B], of each example's label.
    schedule: the noise schedule.
    scale: the paper's s.
  """

  def denoise(xt, t):
    found, times = denoiser(xt, t), jnp.broadcast_to(t, xt.shape[:1])
    slope = jax.grad(lambda x: log_probability(x, times).sum())(xt)
    alpha, sigma = gaussian.alpha_sigma(schedule, t, xt)
    # Pure noise tells the classifier nothing, and alpha is 0.
    is_noise = alpha == 0
    slope = jnp.where(is_noise, 0, slope)
    return found._replace(
      x0=found.x0 + scale * sigma**2 / jnp.where(is_noise, 1, alpha) * slope,
      eps=found.eps - scale * sigma * slope,
    )

  return denoise
