"""Predictor-corrector sampling (score SDEs, arXiv 2011.13456), discrete VP."""

import jax.numpy as jnp
import numpy as np

from diffusion_jax.process import gaussian
from diffusion_jax.samplers import levels
from diffusion_jax.samplers.solve import Sampler
from diffusion_jax.system.errors import UserError


def predictor_corrector(snr: float = 0.16, corrector_steps: int = 1) -> Sampler:
  """Ancestral steps, each followed by Langevin steps at its new time.

  Algorithms 3 and 5 of arXiv 2011.13456, with DDPM's ancestral predictor (the
  large variance). Clean data has no score, so the last step is not corrected.
  The length of a Langevin step is 2 a (snr |noise| / |score|)^2 with
  a = 1 - beta; the norms are per example, so that a sample does not depend on
  its batch.

  Args:
    snr: the paper's r, above 0.
    corrector_steps: Langevin steps after each ancestral step, at least 1; one
      evaluation each.

  Raises:
    UserError: a number out of range.
  """
  if not 0 < snr < np.inf:
    raise UserError(f'snr={snr}: above 0')
  if corrector_steps < 1 or corrector_steps % 1:
    raise UserError(
      f'corrector_steps={corrector_steps}: a whole number, at least 1; for '
      'none use sampler=ancestral'
    )

  def evaluations(grid):
    return sum(1 + (s >= 0) * corrector_steps for s in grid[1:])

  def init(schedule, grid, x):
    t, s = grid[:-1], grid[1:]
    c0, ct, _ = gaussian.posterior_coefficients(schedule, t, s)
    std = np.sqrt(gaussian.step_variance(schedule, t, s, 'fixedlarge'))
    before = np.maximum(s - 1, -1)
    a = 1 - gaussian.step_variance(schedule, s, before, 'fixedlarge')
    sigma = levels.of(schedule, s).sigma
    rows = []
    for i, to in enumerate(s):
      row = {'t': t[i], 'c0': c0[i], 'ct': ct[i], 'std': std[i] * (to >= 0)}
      steps = corrector_steps if to >= 0 else 0
      row |= {'corrects': 0, 'a': 0, 'sigma': 1, 'ends': steps == 0}
      rows.append(row)
      for k in range(steps):
        corrects = {'t': to, 'corrects': 1, 'a': a[i], 'sigma': sigma[i]}
        rows.append({**row, **corrects, 'ends': k == steps - 1})
    return levels.stacked(rows), ()

  def step(denoiser, row, x, memory, noise_fn):
    x0, eps, _ = denoiser(x, row['t'])
    z = noise_fn()
    predicted = row['c0'] * x0 + row['ct'] * x + row['std'] * z
    score = -eps / row['sigma']
    size = 2 * row['a'] * (snr * _norm(z) / _norm(score)) ** 2
    corrected = x + size * score + jnp.sqrt(2 * size) * z
    return jnp.where(row['corrects'] > 0, corrected, predicted), memory

  return Sampler(init, step, evaluations)


def _norm(x):
  """The norm of each example, [B, 1, ...]."""
  axes = tuple(range(1, x.ndim))
  return jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=True))
