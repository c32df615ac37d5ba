"""DPM-Solver++, multistep (arXiv 2211.01095): 2M, 3M and the stochastic 2M.

In terms of x0, of which some of the last steps' are kept: one evaluation a
step. With lambda = log(alpha / sigma) and h the length of a step in it, all are

  x' = (sigma' / sigma) x + alpha' (1 - e^-h) x0 + terms in differences of x0,

the integral of e^lambda x0 over the step, x0 being extrapolated from its past.
The first steps have less past and are of lower order, the last one, to clean
data, is of the first: there h is infinite and x' = x0. With fewer than 15 steps
the one before it is of the second at the most, as in the authors' code.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import UserError
from diffusion_jax.samplers import levels
from diffusion_jax.samplers.solve import Sampler


def dpmpp_2m() -> Sampler:
  """DPM-Solver++ (2M), algorithm 2 of arXiv 2211.01095."""
  return _multistep(_second_order)


def dpmpp_2m_sde() -> Sampler:
  """SDE-DPM-Solver++ (2M): 2M for the reverse SDE.

  Arxiv 2211.01095, section 5 and appendix A.7. First order in the strong sense
  for the SDE: the noise is exact, the drift's x0 is extrapolated.
  """
  return _multistep(_second_order, stochastic=True)


def dpmpp_3m(
  variant: Literal['exact', 'published'] = 'exact',
) -> Sampler:
  """DPM-Solver++ (3M): x0 by the parabola through three of its values.

  Args:
    variant: 'exact', or 'published': the authors' code, k-diffusion and
      diffusers have half the second derivative, which is of second order.

  Raises:
    UserError: another variant.
  """
  if variant not in ('exact', 'published'):
    raise UserError(f'variant={variant}: exact or published')
  bend = 2.0 if variant == 'exact' else 1.0
  return _multistep(lambda *args: _third_order(*args, bend), order=3)


def _second_order(h, drop, before):
  """Weights of x0 now and before; half the difference, as the paper has it."""
  w = h / (2 * before[0])
  return [drop * (1 + w), -drop * w, 0.0]


def _third_order(h, drop, before, bend):
  """Weights of three x0; D1 and D2 are h and h^2 times its derivatives."""
  r0, r1 = before[0] / h, before[1] / h
  near = np.array([1, -1, 0]) / r0
  far = np.array([0, 1, -1]) / r1
  D1 = near + r0 / (r0 + r1) * (near - far)
  D2 = bend / (r0 + r1) * (near - far)
  c1 = 1 - drop / h
  c2 = 0.5 - (h - drop) / h**2
  return drop * np.array([1, 0, 0]) + c1 * D1 + c2 * D2


def _multistep(weights_of, order=2, stochastic=False):
  def init(schedule, grid, x):
    alpha, sigma, lam = levels.of(schedule, grid)
    h = np.diff(lam)
    # The SDE forgets x twice as fast, and makes it up with noise.
    drop = -np.expm1(-2 * h if stochastic else -h)
    weights = np.zeros((len(h), 3))
    for i, p in enumerate(levels.orders(grid, order, few=15)):
      before = h[:i][::-1]
      if p == 1:
        weights[i, 0] = drop[i]
      elif p == 2:
        weights[i] = _second_order(h[i], drop[i], before)
      else:
        weights[i] = weights_of(h[i], drop[i], before)
    w0, w1, w2 = alpha[1:] * weights.T
    rows = {
      't': grid[:-1],
      'cx': sigma[1:] / sigma[:-1] * (np.exp(-h) if stochastic else 1),
      'w0': w0,
      'w1': w1,
      'w2': w2,
    }
    if stochastic:
      rows['std'] = sigma[1:] * np.sqrt(drop)
    return rows, (jnp.zeros_like(x),) * (order - 1)

  def step(denoiser, row, x, memory, noise_fn):
    x0 = denoiser(x, row['t']).x0
    x = row['cx'] * x + row['w0'] * x0
    for name, past in zip(('w1', 'w2'), memory, strict=False):
      x = x + row[name] * past
    if stochastic:
      x = x + row['std'] * noise_fn()
    return x, (x0, *memory[:-1])

  return Sampler(init, step)
