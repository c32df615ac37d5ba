"""DPM-Solver, singlestep (arXiv 2206.00927), and DPM-Solver++ 2S (2211.01095).

Singlestep methods look at the network several times on the way from one time to
a later one, and forget what they saw. Here the times between are entries of the
grid too: each group of `order` steps of the grid is one step of the method. So
each entry but the last is one evaluation, the grid says all the times the
network sees, and r1, r2 of the papers are what the grid makes them: 1/2 or 1/3
and 2/3, as the papers choose them, where it is uniform in log SNR
(grid=logsnr). What is left over at the end, and the step to clean data, whose
length is infinite in lambda, are of lower order.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from diffusion_jax.samplers import levels
from diffusion_jax.samplers.linear import linear
from diffusion_jax.samplers.solve import Sampler, choose


def groups(grid, order: int) -> list[int]:
  """How many steps of the grid each step of the method has: 3, 3, 2, 1."""
  clean = int(grid[-1] < 0)
  whole, rest = divmod(len(grid) - 1 - clean, order)
  return [order] * whole + [rest] * (rest > 0) + [1] * clean


def stages(grid, order: int) -> Iterator[tuple[int, int, int]]:
  """(size of its group, where that begins, where it looks) of each step."""
  first = 0
  for size in groups(grid, order):
    yield from ((size, first, first + i) for i in range(size))
    first += size


def dpm_solver(
  order: Literal[3, 2, 1] = 3,
  variant: Literal['paper', 'diffusers'] = 'paper',
) -> Sampler:
  """DPM-Solver-1, -2 and -3: exact in the linear part, eps by Taylor in lambda.

  Algorithms 1 and 2 of arXiv 2206.00927, but for any r1 and r2. Order 1 is
  DDIM.

  Args:
    order: 1 to 3, of the method; this many evaluations a step of it.
    variant: 'paper', or 'diffusers', whose third order has the midpoint rule in
      its second stage. Both are of third order.

  Raises:
    UserError: another order or variant.
  """
  choose('order', order, 3, 2, 1)
  choose('variant', variant, 'paper', 'diffusers')

  def weights(alpha, sigma, lam, size, first, now):
    to, h = now + 1, lam[now + 1] - lam[first]
    # sigma' (e^h - 1), written so that it is finite at clean data.
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
  """x' = cx start + whole m1 + slope (m - m1), m1 being m where it begins.

  Args:
    order: of the method.
    kind: of m, 'x0' or 'eps'.
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

  return linear(rows_of, kind)
