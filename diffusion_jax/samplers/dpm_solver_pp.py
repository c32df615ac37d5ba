"""DPM-Solver++, multistep (arXiv 2211.01095): 2M, 3M and the stochastic 2M.

The methods are in terms of x0 and keep its values from earlier steps, so each
step needs one evaluation. With lambda = log(alpha / sigma) and h the length of
a step in lambda, all have the form

  x' = (sigma' / sigma) x + alpha' (1 - e^-h) x0 + terms in differences of x0,

the integral of e^lambda x0 over the step, with x0 extrapolated from its past.
The first steps have less history and are of lower order. The last step, to
clean data, is of order 1: h is infinite and x' = x0. With fewer than 15 steps
the step before it is of order 2 at most, as in the authors' code.
"""

from typing import Literal

import numpy as np

from diffusion_jax.samplers import levels, linear
from diffusion_jax.samplers.solve import Sampler
from diffusion_jax.system.errors import one_of


def dpmpp_2m() -> Sampler:
  """DPM-Solver++ (2M), algorithm 2 of arXiv 2211.01095."""
  return _multistep(order=2)


def dpmpp_2m_sde() -> Sampler:
  """SDE-DPM-Solver++ (2M) of arXiv 2211.01095: 2M for the reverse SDE."""
  return _multistep(order=2, stochastic=True)


def dpmpp_3m(variant: Literal['exact', 'published'] = 'exact') -> Sampler:
  """DPM-Solver++ (3M): x0 by a parabola through its last three values.

  Args:
    variant: 'exact', or 'published' as in the authors' code, k-diffusion and
      diffusers, which halve the second derivative and are of second order.

  Raises:
    UserError: another variant.
  """
  one_of('variant', variant, ('exact', 'published'))
  return _multistep(order=3, bend=2.0 if variant == 'exact' else 1.0)


def _weights(order, h, drop, before, bend):
  """Weights of the current and earlier x0, without alpha'.

  Args:
    order: 1 to 3.
    h: length of the step.
    drop: 1 - e^-h.
    before: lengths of the earlier steps, the most recent first.
    bend: factor on the second difference; 2 makes D2 the second derivative.
  """
  m0, m1, m2 = np.eye(3)
  if order == 1:
    return drop * m0
  r0 = before[0] / h
  near = (m0 - m1) / r0
  if order == 2:
    return drop * (m0 + near / 2)  # 1/2 for the integral, as in the paper
  r1 = before[1] / h
  far = (m1 - m2) / r1
  D1 = near + r0 / (r0 + r1) * (near - far)  # h times the first derivative
  D2 = bend / (r0 + r1) * (near - far)  # h^2 times the second
  return drop * m0 + (1 - drop / h) * D1 + (0.5 - (h - drop) / h**2) * D2


def _multistep(order, stochastic=False, bend=2.0):
  def rows_of(schedule, grid):
    alpha, sigma, lam = levels.of(schedule, grid)
    h = np.diff(lam)
    # In the SDE x decays twice as fast, and noise replaces it.
    drop = -np.expm1(-2 * h if stochastic else -h)
    weights = [
      alpha[i + 1] * _weights(p, h[i], drop[i], h[:i][::-1], bend)[:order]
      for i, p in enumerate(levels.orders(grid, order, few=15))
    ]
    return {
      't': grid[:-1],
      'cx': sigma[1:] / sigma[:-1] * (np.exp(-h) if stochastic else 1),
      'w': np.array(weights),
      **({'std': sigma[1:] * np.sqrt(drop)} if stochastic else {}),
    }

  return linear.linear(rows_of, 'x0')
