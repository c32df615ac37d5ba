"""DDRM: diffusion in the coordinates of the singular vectors (2201.11793)."""

import jax.numpy as jnp
import numpy as np

from diffusion_jax.editing import measurements
from diffusion_jax.editing.editing import Editing
from diffusion_jax.editing.measurements import Measurement
from diffusion_jax.process import gaussian
from diffusion_jax.samplers import levels
from diffusion_jax.samplers.solve import Sampler


def ddrm(
  denoiser: gaussian.Denoiser,
  schedule,
  measurement: Measurement,
  y,
  *,
  eta: float = 0.85,
  eta_b: float = 1.0,
) -> Editing:
  """Each coordinate follows y once the noise is above that of y.

  Equations 7 and 8 of the paper, as in its code, for x / alpha and levels k =
  sigma / alpha. With l = noise / s of a coordinate with singular value s, D the
  estimate of x0 and a step to the level k':

    s = 0     D + sqrt(1 - eta^2) k' eps + eta k' z
    k' < l    D + sqrt(1 - eta^2) k' (U'y / s - D) / l + eta k' z
    k' >= l   eta_b U'y / s + (1 - eta_b) D + sqrt(k'^2 - eta_b^2 l^2) z

  The paper takes 20 steps.

  Args:
    denoiser: the model.
    schedule: the noise schedule.
    measurement: one with a spectrum.
    y: what is known.
    eta: noise of steps that y does not decide.
    eta_b: how much y decides in steps that it does.
  """
  known, level = measurements.estimates(measurement, y)
  spectrum = measurement.spectrum
  kept = float(np.sqrt(1 - eta**2))
  own = jnp.where((level > 0) & (level < jnp.inf), level, 1)

  def start(noise, t):
    alpha, sigma, _ = levels.of(schedule, t)
    if alpha == 0:
      return noise
    # Divided by the level, as in the code: x differs from it by alpha / sigma.
    k = float(sigma / alpha)
    std = jnp.sqrt(jnp.maximum(1 - (level / k) ** 2, 0))
    there = jnp.where(level < k, known / k + std * noise, noise)
    return spectrum.picture(there)

  def init(schedule, grid, x):
    alpha, sigma, _ = levels.of(schedule, grid[1:])
    return {'t': grid[:-1], 'alpha': alpha, 'k': sigma / alpha}, ()

  def step(denoiser, row, x, memory, noise_fn):
    seen, k = denoiser(x, row['t']), row['k']
    x0, eps = map(spectrum.coordinates, (seen.x0, seen.eps))
    # y is less noisy than the step's end; or noisier; or there is none.
    std = jnp.sqrt(jnp.maximum(k**2 - (eta_b * level) ** 2, 0))
    above = eta_b * known + (1 - eta_b) * x0 + std * noise_fn()
    slope = jnp.where(jnp.isinf(level), eps, (known - x0) / own)
    below = x0 + kept * k * slope + eta * k * noise_fn()
    there = jnp.where(k >= level, above, below)
    return row['alpha'] * spectrum.picture(there), memory

  return Editing(Sampler(init, step), denoiser, start)
