"""Solvers whose steps are linear in what the network has said.

A row goes from where its step begins, at `start`, to

  x' = cx start + w[0] m + w[1] m1 + w[2] m2 + ...,

m being the network's x0 or eps now, and m1, m2, ... those at the beginnings of
steps, the last one first. A step of several rows begins with its first one.
"""

from collections.abc import Callable

import jax.numpy as jnp

from diffusion_jax.samplers.solve import Sampler, once_a_step


def linear(
  rows_of: Callable, kind: str, evaluations: Callable = once_a_step
) -> Sampler:
  """A sampler of rows that are linear in x0, or in eps.

  Args:
    rows_of: (schedule, grid) -> rows, see `Sampler.init`: 't', 'cx', 'w'
      [rows, K], and 'begins', 1 where a row begins a step, left out where all
      do. With 'std', noise of that standard deviation is added.
    kind: 'x0' or 'eps'.
    evaluations: see `Sampler`.
  """

  def init(schedule, grid, x):
    rows = rows_of(schedule, grid)
    return rows, memory_of(x, rows['w'].shape[1] - 1)

  def step(denoiser, row, x, memory, noise_fn):
    seen = getattr(denoiser(x, row['t']), kind)
    x, memory = advance(seen, row, x, memory)
    return (x + row['std'] * noise_fn() if 'std' in row else x), memory

  return Sampler(init, step, evaluations)


def memory_of(x, size: int) -> tuple:
  """What `advance` remembers before the first row: start, m1 .. m_size."""
  return x, (jnp.zeros_like(x),) * size


def advance(seen, row, x, memory) -> tuple:
  """(x', memory) of one row; `seen` is m."""
  start, past = memory
  newer = (seen, *past[:-1]) if past else ()
  if 'begins' in row:
    begins = row['begins'] > 0
    x = jnp.where(begins, x, start)
    newer = tuple(map(lambda *of: jnp.where(begins, *of), newer, past))
  there = row['cx'] * x
  for weight, m in zip(row['w'], (seen, *past), strict=False):
    there = there + weight * m
  return there, (x, newer)
