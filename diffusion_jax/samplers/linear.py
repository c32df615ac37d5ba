"""Solvers with steps that are linear in the network's outputs.

A row computes

  x' = cx start + w[0] m + w[1] m1 + w[2] m2 + ...,

where `start` is x at the start of the step, m is the network's current x0 or
eps, and m1, m2, ... are those at the starts of steps, the most recent first. A
step can have several rows and starts with the first of them.
"""

from collections.abc import Callable

import jax.numpy as jnp

from diffusion_jax.samplers.solve import Sampler, once_a_step


def linear(
  rows_of: Callable, kind: str, evaluations: Callable = once_a_step
) -> Sampler:
  """A sampler with rows that are linear in x0 or eps.

  Args:
    rows_of: (schedule, grid) -> rows, see `Sampler.init`: 't', 'cx', 'w'
      [rows, K], and 'begins', 1 if a row starts a step, omitted if all do. With
      'std', noise of that standard deviation is added, and with 'c0' c0 x0.
    kind: 'x0' or 'eps'.
    evaluations: see `Sampler`.
  """

  def init(schedule, grid, x):
    rows = rows_of(schedule, grid)
    return rows, memory_of(x, rows['w'].shape[1] - 1)

  def step(denoiser, row, x, memory, noise_fn):
    seen = denoiser(x, row['t'])
    x, memory = advance(getattr(seen, kind), row, x, memory)
    if 'c0' in row:
      x = x + row['c0'] * seen.x0
    return (x + row['std'] * noise_fn() if 'std' in row else x), memory

  return Sampler(init, step, evaluations)


def memory_of(x, size: int) -> tuple:
  """The initial memory of `advance`: start, m1 .. m_size."""
  return x, (jnp.zeros_like(x),) * size


def advance(seen, row, x, memory) -> tuple:
  """Computes one row.

  Args:
    seen: [B, ...], m.
    row: cx, w, and begins unless every row starts a step.
    x: [B, ...].
    memory: see `memory_of`.

  Returns:
    (x', memory).
  """
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
