"""DDPM and DDIM with the optimal variance: Analytic-DPM (arXiv 2201.06503)."""

from collections.abc import Sequence

import numpy as np

from diffusion_jax.process import gaussian
from diffusion_jax.samplers import levels
from diffusion_jax.samplers.ancestral import step
from diffusion_jax.samplers.solve import Sampler
from diffusion_jax.system.errors import UserError


def analytic_ddpm(
  x0_variance: Sequence[float], pixel_noise: float = 2.0
) -> Sampler:
  """Ancestral steps with the variance that optimises the likelihood bound.

  A step draws xs = c0 x0 + ct xt + noise of variance v, which is q(xs | xt, x0)
  for an estimate of x0. The error of the estimate adds to the noise:

      v + c0^2 E |x0 - estimate|^2

  is the variance that optimises the likelihood bound (arXiv 2206.07309). For
  the optimal denoiser the error is E Var(x0 | xt), theorem 1 of Analytic-DPM.
  The paper computes it from the norm of the network's eps, as
  sigma^2 / alpha^2 (1 - E |eps|^2), which is equal only for that denoiser: if
  eps is too short by 0.01% at T-1, the result is above 1, more than the
  variance of any data in [-1, 1].

  Args:
    x0_variance: the squared error of x0 per dimension, see `calibration`: a
      number for each step of the grid, in order.
    pixel_noise: bound on the last noise that is added: the mean displacement of
      a pixel in levels of 255 (2 or 1 in the paper); inf for no bound.

  Raises:
    UserError: a number out of range; or, when the sampler runs, a number of
      values different from the number of steps.
  """
  return _analytic(x0_variance, pixel_noise, eta=1.0)


def analytic_ddim(
  x0_variance: Sequence[float], pixel_noise: float = 2.0
) -> Sampler:
  """DDIM steps (v = 0) with the variance that optimises the likelihood bound.

  Args:
    x0_variance: see `analytic_ddpm`.
    pixel_noise: see `analytic_ddpm`.

  Raises:
    UserError: see `analytic_ddpm`.
  """
  return _analytic(x0_variance, pixel_noise, eta=0.0)


def _analytic(x0_variance, pixel_noise, eta):
  given = np.asarray(x0_variance, np.float64)
  if given.ndim != 1 or not (np.isfinite(given) & (given >= 0)).all():
    raise UserError(
      f'x0_variance={x0_variance}: numbers of 0 or more, one per step'
    )
  if not pixel_noise >= 0:
    raise UserError(f'pixel_noise={pixel_noise}: at least 0')

  def init(schedule, grid, x):
    t, s = grid[:-1], grid[1:]
    if len(t) != len(given):
      raise UserError(
        f'x0_variance has {len(given)} numbers and the grid has {len(t)} '
        'steps: give one per step'
      )
    alpha, sigma, _ = levels.of(schedule, grid)
    v = eta**2 * gaussian.step_variance(schedule, t, s, 'fixedsmall')
    ct = np.sqrt(sigma[1:] ** 2 - v) / sigma[:-1]
    c0 = alpha[1:] - ct * alpha[:-1]
    std = np.sqrt(v + c0**2 * given)
    if s[-1] < 0:
      std[-1] = 0
      # The mean of |N(0, 1)| is sqrt(2 / pi), and a level is 2 / 255.
      most = pixel_noise * 2 / 255 / np.sqrt(2 / np.pi)
      std[-2:-1] = np.minimum(std[-2:-1], most)
    return {'t': t, 'c0': c0, 'ct': ct, 'std': std}, ()

  return Sampler(init, step, from_noise=True)
