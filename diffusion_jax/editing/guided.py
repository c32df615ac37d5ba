"""Guidance by the likelihood of y: gradients through the denoiser.

With C an approximation of Cov(x0 | xt), y | xt is N(A D, A C A' + noise^2), and
its gradient in xt moves the estimate of x0, by Tweedie's formula:

  x0 = D + sigma^2 / alpha (dD/dx)' A' (A C A' + noise^2)^-1 (y - A D)

The gradient of C is left out. With the exact C it is the denoiser of the
conditional distribution, if the data are Gaussian.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.editing import linear
from diffusion_jax.editing.editing import Editing, from_noise
from diffusion_jax.editing.measurements import Measurement
from diffusion_jax.models import convolution
from diffusion_jax.process import gaussian
from diffusion_jax.samplers.ddim import ddim
from diffusion_jax.samplers.solve import Sampler


def by_likelihood(
  denoiser: gaussian.Denoiser, schedule, y, explain: Callable, apply: Callable
) -> gaussian.Denoiser:
  """A denoiser that knows y, for any sampler.

  Args:
    denoiser: the model.
    schedule: the noise schedule.
    y: what is known.
    explain: (residual, alpha, sigma, back) -> A' (A C A' + noise^2)^-1
      residual, where back is v -> (dD/dx)' v.
    apply: x -> A x.
  """

  def denoise(xt, t):
    def seen_at(x):
      seen = denoiser(x, t)
      return seen.x0, seen

    with convolution.backwards():
      x0, vjp, seen = jax.vjp(seen_at, xt, has_aux=True)
    alpha, sigma = gaussian.alpha_sigma(schedule, t, xt)
    # Pure noise tells nothing of x0, and alpha is 0.
    alpha = jnp.where(alpha == 0, jnp.inf, alpha)
    slope = vjp(explain(y - apply(x0), alpha, sigma, lambda v: vjp(v)[0]))[0]
    return seen._replace(
      x0=x0 + sigma**2 / alpha * slope,
      eps=seen.eps - jnp.where(jnp.isinf(alpha), 0, sigma) * slope,
    )

  return denoise


def pigdm(
  denoiser: gaussian.Denoiser,
  schedule,
  measurement: Measurement,
  y,
  *,
  eta: float = 1.0,
  iterations: int = 20,
) -> Editing:
  """C = sigma^2 I: pseudo-inverse guidance (PiGDM, ICLR 2023, eq. 7).

  sigma^2 is the variance of x0 | xt for data of variance 1. The paper's code
  multiplies the gradient by alpha^2 in addition.

  Args:
    denoiser: the model.
    schedule: the noise schedule.
    measurement: the measurement.
    y: what is known.
    eta: of DDIM's steps, 1 for ancestral ones.
    iterations: of conjugate gradients, where the singular values are not known.
  """

  def explain(residual, alpha, sigma, back):
    return linear.explain(measurement, residual, sigma**2, iterations)

  guided = by_likelihood(denoiser, schedule, y, explain, measurement.apply)
  return Editing(ddim(eta), guided, from_noise)


def covariance(
  denoiser: gaussian.Denoiser,
  schedule,
  measurement: Measurement,
  y,
  *,
  eta: float = 1.0,
  iterations: int = 4,
) -> Editing:
  """C = sigma^2 / alpha (dD/dx)', which is Cov(x0 | xt) for an exact denoiser.

  Tweedie moment projection (arXiv 2310.06721) without its diagonal
  approximation: the equations are solved by conjugate gradients, each iteration
  of which goes back through the network once.

  Args:
    denoiser: the model.
    schedule: the noise schedule.
    measurement: the measurement.
    y: what is known.
    eta: of DDIM's steps, 1 for ancestral ones.
    iterations: of conjugate gradients.
  """

  def explain(residual, alpha, sigma, back):
    noise2 = linear.variance_of(measurement, residual)

    def multiply(w):
      spread = sigma**2 / alpha * back(measurement.adjoint(w))
      return measurement.apply(spread) + noise2 * w

    return measurement.adjoint(
      linear.conjugate_gradients(multiply, residual, iterations)
    )

  guided = by_likelihood(denoiser, schedule, y, explain, measurement.apply)
  return Editing(ddim(eta), guided, from_noise)


def dps(
  denoiser: gaussian.Denoiser,
  schedule,
  measurement: Measurement,
  y,
  *,
  zeta: float = 0.5,
) -> Editing:
  """An ancestral step, less zeta grad |y - A D| (DPS, arXiv 2209.14687).

  Algorithm 1, with the norm of each example; the paper's code takes that of the
  batch. A may be any differentiable function, such as one of decoded latents.
  The paper takes 1000 steps.

  Args:
    denoiser: the model.
    schedule: the noise schedule.
    measurement: the measurement; only `apply` is used.
    y: what is known.
    zeta: the length of the step of guidance; the paper's are 0.3 to 1.
  """

  def init(schedule, grid, x):
    c0, ct, variance = gaussian.posterior_coefficients(
      schedule, grid[:-1], grid[1:]
    )
    std = np.sqrt(variance)
    return {'t': grid[:-1], 'c0': c0, 'ct': ct, 'std': std}, ()

  def step(denoiser, row, x, memory, noise_fn):
    def residual_at(x):
      x0 = denoiser(x, row['t']).x0
      return y - measurement.apply(x0), x0

    with convolution.backwards():
      residual, vjp, x0 = jax.vjp(residual_at, x, has_aux=True)
    axes = tuple(range(1, residual.ndim))
    norm = jnp.sqrt(jnp.sum(residual**2, axes, keepdims=True))
    slope = vjp(residual / jnp.where(norm > 0, norm, 1))[0]
    mean = row['c0'] * x0 + row['ct'] * x
    return mean + row['std'] * noise_fn() - zeta * slope, memory

  return Editing(Sampler(init, step, from_noise=True), denoiser, from_noise)
