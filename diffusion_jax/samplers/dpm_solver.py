"""DPM-Solver, singlestep (arXiv 2206.00927), and DPM-Solver++ 2S (2211.01095).

Singlestep methods evaluate the network several times within a step and keep
nothing for the next step. Here the intermediate times are entries of the grid,
too: each group of `order` steps of the grid is one step of the method. Each
entry but the last is therefore one evaluation, and the grid lists every time at
which the network is evaluated. The papers' r1 and r2 follow from the grid: they
are 1/2, or 1/3 and 2/3, as in the papers, if the grid is uniform in log SNR
(grid=logsnr). Leftover steps at the end, and the step to clean data, which is
infinitely long in lambda, are of lower order.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from diffusion_jax.samplers import levels, linear
from diffusion_jax.samplers.solve import Sampler
from diffusion_jax.system.errors import one_of


def stages(grid, order: int) -> Iterator[tuple[int, int, int]]:
  """For each grid step: (size of its group, the group's first step, step).

  The groups are the steps of the method, of sizes such as 3, 3, 2, 1.
  """
  clean = int(grid[-1] < 0)
  whole, rest = divmod(len(grid) - 1 - clean, order)
  first = 0
  for size in [order] * whole + [rest] * (rest > 0) + [1] * clean:
    yield from ((size, first, first + i) for i in range(size))
    first += size


def dpm_solver(
  order: Literal[3, 2, 1] = 3, variant: Literal['paper', 'diffusers'] = 'paper'
) -> Sampler:
  """DPM-Solver-1, -2 and -3: the linear part exact, eps by Taylor in lambda.

  Algorithms 1 and 2 of arXiv 2206.00927, for any r1 and r2. Order 1 is DDIM.

  Args:
    order: order of the method, 1 to 3, and its evaluations per step.
    variant: 'paper', or 'diffusers', which uses the midpoint rule in the second
      stage of order 3. Both are of third order.

  Raises:
    UserError: another order or variant.
  """
  one_of('order', order, (3, 2, 1))
  one_of('variant', variant, ('paper', 'diffusers'))

  def weights(alpha, sigma, lam, size, first, now):
    to, h = now + 1, lam[now + 1] - lam[first]
    # sigma' (e^h - 1), in a form that is finite at clean data.
    grown = alpha[to] * sigma[first] / alpha[first] - sigma[to]
    slope = 0.0
    if now > first:
      r = (lam[now] - lam[first]) / h
      midpoint = size == 2 or (now == first + 1 and variant == 'diffusers')
      slope = grown / (2 * r) if midpoint else (grown / h - sigma[to]) / r
    return alpha[to] / alpha[first], -grown, -slope

  return _singlestep(order, 'eps', weights)


def dpmpp_2s() -> Sampler:
  """DPM-Solver++ (2S), algorithm 1 of arXiv 2211.01095, for any r."""

  def weights(alpha, sigma, lam, size, first, now):
    to, h = now + 1, lam[now + 1] - lam[first]
    whole = -alpha[to] * np.expm1(-h)
    slope = whole * h / (2 * (lam[now] - lam[first])) if now > first else 0.0
    return sigma[to] / sigma[first], whole, slope

  return _singlestep(2, 'x0', weights)


def _singlestep(order, kind, weights):
  """x' = cx start + whole m1 + slope (m - m1), with m1 the first m of the step.

  Args:
    order: the order of the method.
    kind: what m is, 'x0' or 'eps'.
    weights: (*levels, size, first, now), see `stages` -> (cx, whole, slope).
  """

  def rows_of(schedule, grid):
    found = levels.of(schedule, grid)
    rows = []
    for size, first, now in stages(grid, order):
      cx, whole, slope = weights(*found, size, first, now)
      begins = now == first
      w = [whole, 0.0] if begins else [slope, whole - slope]
      rows.append({'t': grid[now], 'begins': begins, 'cx': cx, 'w': w})
    return levels.stacked(rows)

  return linear.linear(rows_of, kind)
