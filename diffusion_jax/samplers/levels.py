"""Noise levels of a grid in the solvers' notation: alpha, sigma, lambda.

Computed on the host, in float64. lambda = log(alpha / sigma) is half the log
SNR, and infinite at clean data.
"""

from typing import NamedTuple

import numpy as np

from diffusion_jax.process.schedules import Schedule


class Levels(NamedTuple):
  """The variables of the solvers' formulas, at each time.

  Attributes:
    alpha: scale of the signal.
    sigma: standard deviation of the noise, 0 at clean data.
    lam: log(alpha / sigma), inf at clean data.
  """

  alpha: np.ndarray
  sigma: np.ndarray
  lam: np.ndarray


def of(schedule: Schedule, t) -> Levels:
  """The levels of times t, arrays of t's shape."""
  log_alpha_bar, variance = schedule.host(t)
  with np.errstate(divide='ignore'):
    lam = 0.5 * (log_alpha_bar - np.log(variance))
  return Levels(np.exp(0.5 * log_alpha_bar), np.sqrt(variance), lam)


def orders(grid, order: int, few: float = np.inf) -> list[int]:
  """The order of each step of a multistep method.

  The order rises from 1 as history accumulates. The step to clean data is
  infinitely long in lambda and is of order 1. With few steps, those before it
  are long, and the order decreases towards it: 3, 2, 1.

  Args:
    grid: decreasing times.
    order: the highest order.
    few: the number of steps below which the order decreases at the end.
  """
  num_steps = len(grid) - 1
  found = [min(order, i + 1) for i in range(num_steps)]
  if grid[-1] < 0:
    found[-1] = 1
    if num_steps < few:
      found = [min(p, num_steps - i) for i, p in enumerate(found)]
  return found


def stacked(rows: list[dict]) -> dict:
  """Stacks rows to a dict of float64 arrays, as `Sampler.init` returns."""
  return {
    name: np.array([row[name] for row in rows], np.float64) for name in rows[0]
  }
