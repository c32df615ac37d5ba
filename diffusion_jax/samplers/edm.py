"""Euler's and Heun's methods in EDM's form, with churn (arXiv 2206.00364).

EDM integrates x / alpha over the noise level sigma / alpha, in which the
probability flow is d(x / alpha) = eps d(sigma / alpha): algorithm 2 with
s(t) = 1. The model takes times, so it is evaluated at the fractional t of the
noise level.
"""

import numpy as np

from diffusion_jax.samplers import levels, linear
from diffusion_jax.samplers.solve import Sampler
from diffusion_jax.system.errors import UserError

MOST = np.sqrt(2) - 1  # bound on the noise added per step, from the paper


def euler(
  churn: float = 0.0,
  churn_min: float = 0.0,
  churn_max: float | None = None,
  churn_noise: float = 1.0,
) -> Sampler:
  """Euler's method; without churn it is DDIM.

  Args:
    churn: the paper's S_churn: noise to add, over all steps; 0 for none.
    churn_min: S_tmin, the lowest sigma / alpha at which noise is added.
    churn_max: S_tmax, the highest; None for no bound.
    churn_noise: S_noise, the standard deviation of the added noise.

  Raises:
    UserError: a number below 0.
  """
  return _edm(churn, churn_min, churn_max, churn_noise, second=False)


def heun(
  churn: float = 0.0,
  churn_min: float = 0.0,
  churn_max: float | None = None,
  churn_noise: float = 1.0,
) -> Sampler:
  """Heun's method: two evaluations per step, one for the step to clean data.

  Args:
    churn: the paper's S_churn: noise to add, over all steps; 0 for none.
    churn_min: S_tmin, the lowest sigma / alpha at which noise is added.
    churn_max: S_tmax, the highest; None for no bound.
    churn_noise: S_noise, the standard deviation of the added noise.

  Raises:
    UserError: a number below 0.
  """
  return _edm(churn, churn_min, churn_max, churn_noise, second=True)


def _edm(churn, churn_min, churn_max, churn_noise, second):
  churn_max = np.inf if churn_max is None else churn_max
  options = {'churn': churn, 'churn_min': churn_min, 'churn_max': churn_max}
  for name, value in {**options, 'churn_noise': churn_noise}.items():
    if not value >= 0:
      raise UserError(f'{name}={value}: at least 0')

  def evaluations(grid):
    num_steps = len(grid) - 1
    return 2 * num_steps - int(grid[-1] < 0) if second else num_steps

  def init(schedule, grid, x):
    alpha, sigma, _ = levels.of(schedule, grid)
    level = sigma / alpha
    gamma = min(churn / (len(grid) - 1), MOST)
    churns = (level >= churn_min) & (level <= churn_max)
    # The model was not trained at levels above this one.
    top = levels.of(schedule, schedule.last)
    raised = np.where(churns, level * (1 + gamma), level)
    raised = np.minimum(raised, np.maximum(level, top.sigma / top.alpha))
    t = grid.copy()
    moved = raised > level
    t[moved] = schedule.host_t_of_logsnr(-2 * np.log(raised[moved]))
    scale = np.where(moved, 1 / np.sqrt(1 + raised**2), alpha)  # alpha at t
    std = scale * np.sqrt(raised**2 - level**2) * churn_noise
    cx, ceps = alpha[1:] / scale[:-1], alpha[1:] * (level[1:] - raised[:-1])
    rows = []
    for i, to in enumerate(grid[1:]):
      again = second and to >= 0
      row = {'t': t[i], 'begins': 1, 'ends': not again, 'cx': cx[i]}
      row |= {'up': scale[i] / alpha[i], 'std': std[i], 'w': [ceps[i], 0]}
      rows.append(row)
      if again:
        end = {'t': to, 'begins': 0, 'ends': 1, 'up': 1, 'std': 0}
        rows.append({**row, **end, 'w': [ceps[i] / 2, ceps[i] / 2]})
    return levels.stacked(rows), linear.memory_of(x, 1)

  def step(denoiser, row, x, memory, noise_fn):
    if churn:
      x = row['up'] * x + row['std'] * noise_fn()
    return linear.advance(denoiser(x, row['t']).eps, row, x, memory)

  return Sampler(init, step, evaluations)
