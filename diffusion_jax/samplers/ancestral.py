"""DDPM's ancestral sampling (arXiv 2006.11239, algorithm 2)."""

from typing import Literal

import jax.numpy as jnp
import numpy as np

from diffusion_jax.process import gaussian
from diffusion_jax.samplers.solve import Sampler
from diffusion_jax.system.errors import UserError, one_of


def ancestral(
  variance: Literal['fixedlarge', 'fixedsmall', 'learned'] = 'fixedlarge',
) -> Sampler:
  """Draws xs from N(mean of q(xs | xt, x0), variance) with x0 estimated.

  On a grid with fewer steps than the schedule, beta and the posterior are those
  of the longer step, as in arXiv 2102.09672, section 3.3. The last step adds no
  noise.

  Args:
    variance: 'fixedlarge' or 'fixedsmall', see `gaussian.step_variance`; or
      'learned', between them by the denoiser's fraction.

  Raises:
    UserError: another variance.
  """
  one_of('variance', variance, (*gaussian.VARIANCES, gaussian.LEARNED))
  learned = variance == gaussian.LEARNED

  def init(schedule, grid, x):
    t, s = grid[:-1], grid[1:]
    c0, ct, _ = gaussian.posterior_coefficients(schedule, t, s)
    fixed = 'fixedsmall' if learned else variance
    std = np.sqrt(gaussian.step_variance(schedule, t, s, fixed))
    rows = {'t': t, 'c0': c0, 'ct': ct, 'std': np.where(s < 0, 0, std)}
    if learned:
      rows['spread'] = gaussian.log_spread(schedule, t, s)
    return rows, ()

  return Sampler(init, _learned if learned else step, from_noise=True)


def _learned(denoiser, row, x, memory, noise_fn):
  """`step` with std exp(fraction spread / 2) for each dimension."""
  seen = denoiser(x, row['t'])
  if seen.fraction is None:
    raise UserError(
      'variance=learned needs a network trained with loss.variance=learned: '
      'use variance=fixedlarge or fixedsmall'
    )
  mean = row['c0'] * seen.x0 + row['ct'] * x
  std = row['std'] * jnp.exp(0.5 * seen.fraction * row['spread'])
  return mean + std * noise_fn(), memory


def step(denoiser, row, x, memory, noise_fn):
  """xs = c0 x0 + ct xt + noise of standard deviation std, see `Sampler`.

  Args:
    denoiser: (xt, t) -> (x0, eps).
    row: t, c0, ct and std.
    x: [B, ...] xt.
    memory: returned unchanged.
    noise_fn: () -> standard normal noise of x's shape.
  """
  x0 = denoiser(x, row['t']).x0
  mean = row['c0'] * x0 + row['ct'] * x
  return mean + row['std'] * noise_fn(), memory
