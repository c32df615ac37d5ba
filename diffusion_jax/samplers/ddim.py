"""DDIM (arXiv 2010.02502, equations 12 and 16)."""

import numpy as np

from diffusion_jax.process import gaussian
from diffusion_jax.samplers.solve import Sampler
from diffusion_jax.system.errors import UserError


def ddim(eta: float = 0.0) -> Sampler:
  """Deterministic at eta = 0; at eta = 1 ancestral with the small variance.

  Args:
    eta: the noise's standard deviation relative to the posterior's, in [0, 1].

  Raises:
    UserError: eta is out of range.
  """
  if not 0 <= eta <= 1:
    raise UserError(f'eta={eta}: between 0 (deterministic) and 1')

  def init(schedule, grid, x):
    t, s = grid[:-1], grid[1:]
    log_s, var_s = schedule.host(s)
    std = eta * np.sqrt(gaussian.step_variance(schedule, t, s, 'fixedsmall'))
    return {
      't': t,
      'c0': np.exp(0.5 * log_s),
      'ceps': np.sqrt(np.maximum(var_s - std**2, 0)),
      'std': std,
    }, ()

  def step(denoiser, row, x, memory, noise_fn):
    seen = denoiser(x, row['t'])
    x = row['c0'] * seen.x0 + row['ceps'] * seen.eps
    return (x + row['std'] * noise_fn() if eta else x), memory

  return Sampler(init, step, from_noise=True)
