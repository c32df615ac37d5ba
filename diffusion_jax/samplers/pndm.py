"""PNDM's pseudo linear multistep method (arXiv 2202.09778), with three starts.

A pseudo method is a classical method with DDIM's step in place of x + h f:
phi(x, e, t, s) moves xt to xs as if its noise were e. Here e is the
Adams-Bashforth mean of the last four eps, with the weights for equal steps, as
published. In sigma / alpha, in which DDIM's step is Euler's, steps are rarely
equal; these methods are therefore of second order, on any smooth grid.
"""

import itertools
from typing import Literal

import jax.numpy as jnp
import numpy as np

from diffusion_jax.samplers import levels, linear
from diffusion_jax.samplers.solve import Sampler
from diffusion_jax.system.errors import one_of

# Adams-Bashforth weights of orders 1 to 4: of the current eps, then the past.
ADAMS = [
  np.array([1, 0, 0, 0]),
  np.array([3, -1, 0, 0]) / 2,
  np.array([23, -16, 5, 0]) / 12,
  np.array([55, -59, 37, -9]) / 24,
]


def plms(
  variant: Literal['runge_kutta', 'improved_euler'] = 'runge_kutta',
) -> Sampler:
  """PNDM's linear multistep method, with a start for the missing history.

  The last step goes to clean data with the same mean of eps, as published.

  Args:
    variant: the start. 'runge_kutta' is the paper's F-PNDM: three steps of its
      pseudo Runge-Kutta method, four evaluations each. 'improved_euler' follows
      latent diffusion's code: two evaluations for the first step, then lower
      orders.

  Raises:
    UserError: another variant.
  """
  one_of('variant', variant, ('runge_kutta', 'improved_euler'))
  return _multistep(variant)


def ipndm() -> Sampler:
  """iPNDM: lower orders at the start (named so by arXiv 2204.13902)."""
  return _multistep('lower_orders')


def _stages(start, i, t, s):
  """The evaluations of step i: (time, target time, weight in the mean)."""
  if start == 'runge_kutta' and i < 3 and s >= 0:
    mid = (t + s) / 2
    # (time of the evaluation, time x moves to, weight in the final mean)
    return [(t, mid, 1 / 6), (mid, mid, 1 / 3), (mid, s, 1 / 3), (s, s, 1 / 6)]
  if start == 'improved_euler' and i == 0 and s >= 0:
    return [(t, s, 1 / 2), (s, s, 1 / 2)]
  return [(t, s, 0)]


def _multistep(start):
  def steps_of(grid):
    pairs = enumerate(itertools.pairwise(grid))
    return [_stages(start, i, t, s) for i, (t, s) in pairs]

  def evaluations(grid):
    return sum(map(len, steps_of(grid)))

  def init(schedule, grid, x):
    rows = []
    for i, stages in enumerate(steps_of(grid)):
      alpha, sigma, _ = levels.of(schedule, grid[i])
      several = len(stages) > 1
      for k, (t, to, share) in enumerate(stages):
        new_alpha, new_sigma, _ = levels.of(schedule, to)
        ends = k == len(stages) - 1
        # phi: x' = alpha' (x - sigma e) / alpha + sigma' e
        ce = new_sigma - new_alpha * sigma / alpha
        row = {'t': t, 'begins': k == 0, 'ends': ends, 'share': share}
        row |= {'averages': ends and several, 'cx': new_alpha / alpha}
        rows.append({**row, 'w': ce * ADAMS[0 if several else min(i, 3)]})
    return levels.stacked(rows), (jnp.zeros_like(x), linear.memory_of(x, 3))

  def step(denoiser, row, x, memory, noise_fn):
    mean, memory = memory
    eps = denoiser(x, row['t']).eps
    mean = row['share'] * eps + jnp.where(row['begins'] > 0, 0, mean)
    # At the end of a step of several evaluations, use their mean.
    e = jnp.where(row['averages'] > 0, mean, eps)
    x, memory = linear.advance(e, row, x, memory)
    return x, (mean, memory)

  return Sampler(init, step, evaluations)
