"""What is known is put back, noised, at every step: replacement and RePaint.

Both take the known coordinates of V' x, see `measurements.Spectrum`: the pixels
of a mask, the means of blocks, the grey of a colour. Neither samples the exact
posterior: what is put back does not know of the rest.
"""

import jax.numpy as jnp
import numpy as np

from diffusion_jax.editing import measurements
from diffusion_jax.editing.editing import Editing, from_noise
from diffusion_jax.editing.measurements import Measurement
from diffusion_jax.process import gaussian
from diffusion_jax.samplers import levels
from diffusion_jax.samplers.ddim import ddim
from diffusion_jax.samplers.solve import Sampler


def _putting(measurement: Measurement, y):
  """(x, alpha, sigma, noise) -> x with what is known of it, at that level.

  A known coordinate becomes alpha y + sigma n. If y is noisy, it counts less: x
  moves towards alpha y by the share of y in their precisions, k^2 / (k^2 +
  level^2) at k = sigma / alpha, and gets as much noise as keeps its level, if
  the noises of x and y are independent.
  """
  known, level = measurements.estimates(measurement, y)
  spectrum = measurement.spectrum

  def put(x, alpha, sigma, noise):
    own = alpha * jnp.where(jnp.isinf(level), 0, level)
    total = sigma**2 + own**2
    share = jnp.where(total > 0, sigma**2 / jnp.where(total > 0, total, 1), 1)
    share = jnp.where(jnp.isinf(level), 0, share)
    there = spectrum.coordinates(x)
    moved = there + share * (alpha * known - there)
    return spectrum.picture(moved + sigma * jnp.sqrt(share) * noise)

  return put


def replacement(
  denoiser: gaussian.Denoiser,
  schedule,
  measurement: Measurement,
  y,
  *,
  eta: float = 1.0,
) -> Editing:
  """After each step, what is known becomes alpha y + sigma n (2011.13456, I).

  Args:
    denoiser: the model.
    schedule: the noise schedule.
    measurement: one with a spectrum.
    y: what is known.
    eta: of DDIM's steps, 1 for ancestral ones.
  """
  steps = ddim(eta)
  put = _putting(measurement, y)

  def init(schedule, grid, x):
    rows, memory = steps.init(schedule, grid, x)
    alpha, sigma, _ = levels.of(schedule, grid[1:])
    return rows | {'alpha': alpha, 'sigma': sigma}, memory

  def step(denoiser, row, x, memory, noise_fn):
    x, memory = steps.step(denoiser, row, x, memory, noise_fn)
    return put(x, row['alpha'], row['sigma'], noise_fn(1)), memory

  return Editing(Sampler(init, step, from_noise=True), denoiser, from_noise)


def walk(num_steps: int, jump_length: int, jump_n_sample: int) -> list:
  """RePaint's way through a grid: (from, to) of each evaluation.

  Places count down from num_steps - 1 to -1, clean data. An evaluation leads
  one place down, and where a jump follows `jump_length` places up again: there
  is one from each multiple of the length, `jump_n_sample` - 1 times.

  Args:
    num_steps: steps of the grid.
    jump_length: see above.
    jump_n_sample: see above.
  """
  starts = range(0, num_steps - jump_length, jump_length)
  left = dict.fromkeys(starts, jump_n_sample - 1)
  place, found = num_steps - 1, []
  while place >= 0:
    below = place - 1
    jumps = left.get(below, 0) > 0
    if jumps:
      left[below] -= 1
    found.append((place, below + jump_length if jumps else below))
    place = found[-1][1]
  return found


def repaint(
  denoiser: gaussian.Denoiser,
  schedule,
  measurement: Measurement,
  y,
  *,
  jump_length: int = 10,
  jump_n_sample: int = 10,
) -> Editing:
  """RePaint (arXiv 2201.09865): replacement, with ways back up.

  As in its code, what is known is put back before an evaluation, except the
  first; the way up is forward noise. The last x0 is the model's. The paper's
  grid has 250 steps.

  Args:
    denoiser: the model.
    schedule: the noise schedule.
    measurement: one with a spectrum.
    y: what is known.
    jump_length: how many steps of the grid to go up at a time.
    jump_n_sample: how often to go down each part of the way; 1 for no jumps.
  """
  put = _putting(measurement, y)

  def evaluations(grid):
    return len(walk(len(grid) - 1, jump_length, jump_n_sample))

  def init(schedule, grid, x):
    way = np.array(walk(len(grid) - 1, jump_length, jump_n_sample))
    upwards = grid[::-1]  # place k is entry k + 1
    t, s, back = (upwards[k + 1] for k in (way[:, 0], way[:, 0] - 1, way[:, 1]))
    c0, ct, variance = gaussian.posterior_coefficients(schedule, t, s)
    alpha, sigma, _ = levels.of(schedule, t)
    fall = schedule.host(back)[0] - schedule.host(s)[0]
    # The last evaluation of each step of the grid ends it.
    last = {place: row for row, place in enumerate(way[:, 0])}
    ends = np.zeros(len(way))
    ends[list(last.values())] = 1
    return {
      't': t, 'c0': c0, 'ct': ct, 'std': np.sqrt(variance),
      'alpha': alpha, 'sigma': sigma, 'puts': np.arange(len(way)) > 0,
      'up': np.exp(0.5 * fall), 'up_std': np.sqrt(-np.expm1(fall)),
      'ends': ends,
    }, ()  # fmt: skip

  def step(denoiser, row, x, memory, noise_fn):
    known = put(x, row['alpha'], row['sigma'], noise_fn(1))
    x = jnp.where(row['puts'] > 0, known, x)
    x = row['c0'] * denoiser(x, row['t']).x0 + row['ct'] * x
    x = x + row['std'] * noise_fn()
    return row['up'] * x + row['up_std'] * noise_fn(2), memory

  sampler = Sampler(init, step, evaluations, from_noise=True)
  return Editing(sampler, denoiser, from_noise)
