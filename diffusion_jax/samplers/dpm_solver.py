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

import jax.numpy as jnp
import numpy as np

from diffusion_jax.samplers import levels
from diffusion_jax.samplers.solve import Sampler
from diffusion_jax.system.errors import UserError


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
  levels.check_order(order, 3)
  if variant not in ('paper', 'diffusers'):
    raise UserError(f'variant={variant}: paper or diffusers')

  def init(schedule, grid, x):
    alpha, sigma, lam = levels.of(schedule, grid)
    rows = []
    for size, first, now in stages(grid, order):
      to = now + 1
      # sigma' (e^h - 1), written so that it is finite at clean data.
      grown = alpha[to] * sigma[first] / alpha[first] - sigma[to]
      c1 = 0.0
      if now > first:
        h = lam[to] - lam[first]
        r = (lam[now] - lam[first]) / h
        c1 = (grown / h - sigma[to]) / r
        if size == 2 or (now == first + 1 and variant == 'diffusers'):
          c1 = grown / (2 * r)
      row = {'t': grid[now], 'begins': now == first}
      rows.append(
        {**row, 'cx': alpha[to] / alpha[first], 'c0': grown, 'c1': c1}
      )
    return levels.stacked(rows), (x, x)

  def step(denoiser, row, x, memory, noise_fn):
    eps = denoiser(x, row['t']).eps
    begins = row['begins'] > 0
    start = jnp.where(begins, x, memory[0])
    eps0 = jnp.where(begins, eps, memory[1])
    x = row['cx'] * start - row['c0'] * eps0 - row['c1'] * (eps - eps0)
    return x, (start, eps0)

  return Sampler(init, step)


def dpmpp_2s() -> Sampler:
  """DPM-Solver++ (2S), algorithm 1 of arXiv 2211.01095, for any r."""

  def init(schedule, grid, x):
    alpha, sigma, lam = levels.of(schedule, grid)
    rows = []
    for _, first, now in stages(grid, 2):
      to = now + 1
      h = lam[to] - lam[first]
      r = (lam[now] - lam[first]) / h if now > first else np.inf
      row = {'t': grid[now], 'begins': now == first, 'w': 1 / (2 * r)}
      c0 = -alpha[to] * np.expm1(-h)
      rows.append({**row, 'cx': sigma[to] / sigma[first], 'c0': c0})
    return levels.stacked(rows), (x, x)

  def step(denoiser, row, x, memory, noise_fn):
    x0 = denoiser(x, row['t']).x0
    begins = row['begins'] > 0
    start = jnp.where(begins, x, memory[0])
    first = jnp.where(begins, x0, memory[1])
    D = (1 - row['w']) * first + row['w'] * x0
    return row['cx'] * start + row['c0'] * D, (start, first)

  return Sampler(init, step)
