"""DAPS: decoupled annealing posterior sampling (arXiv 2407.01521)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.editing import linear
from diffusion_jax.editing.editing import Editing
from diffusion_jax.editing.measurements import Measurement
from diffusion_jax.process import gaussian
from diffusion_jax.samplers import levels
from diffusion_jax.samplers.solve import Sampler

RHO = 7.0  # EDM's spacing of levels


class Covariance(NamedTuple):
  """A covariance C of x0 given xt.

  Attributes:
    multiply: v [B, H, W, C] -> C v.
    root: v -> R v, with R R' = C.
  """

  multiply: Callable
  root: Callable


def daps(
  denoiser: gaussian.Denoiser,
  schedule,
  measurement: Measurement,
  y,
  *,
  ode_steps: int = 5,
  data_std: float = 0.0,
  iterations: int = 20,
  covariance: Callable | None = None,
) -> Editing:
  """At each level: x0 from x, x0 from that and y, noise of the next level.

  The first x0 is where Euler's method ends along the probability flow, or the
  denoiser's estimate with one step. The paper takes x0 | xt for Gaussian around
  it, with the level sigma / alpha as its deviation, and samples it given y by
  Langevin steps; here the draw is exact. It needs no gradients.

  The paper's grid is 'karras' with 200 levels.

  Args:
    denoiser: the model.
    schedule: the noise schedule.
    measurement: the measurement.
    y: what is known.
    ode_steps: evaluations per level.
    data_std: standard deviation q of the data: the variance of x0 | xt is then
      k^2 q^2 / (k^2 + q^2), with k = sigma / alpha; 0 for k^2, as in the paper.
    iterations: of conjugate gradients, where the singular values are not known.
    covariance: k -> the `Covariance` of x0 | xt, in place of a number.
  """

  def drawn(x0, k, noise_fn):
    if covariance is not None:
      given = covariance(k)
      return _matheron(measurement, y, x0, given, iterations, noise_fn)
    spread = 1 / (1 / k**2 + 1 / data_std**2) if data_std else k**2
    return _given(measurement, y, x0, spread, iterations, noise_fn)

  def init(schedule, grid, x):
    return _rows(schedule, grid, ode_steps), ()

  def step(denoiser, row, x, memory, noise_fn):
    seen = denoiser(x, row['t'])
    nearer = row['c0'] * seen.x0 + row['ceps'] * seen.eps

    def next_level():
      x0 = drawn(nearer, row['level'], noise_fn)
      return row['alpha'] * x0 + row['sigma'] * noise_fn(2)

    return jax.lax.cond(row['ends'] > 0, next_level, lambda: nearer), memory

  def start(noise, t):
    return float(levels.of(schedule, t).sigma) * noise

  def evaluations(grid):
    return ode_steps * (len(grid) - 1)

  return Editing(Sampler(init, step, evaluations), denoiser, start)


def _rows(schedule, grid, ode_steps: int) -> dict:
  """Euler's steps from each level to clean data, and the level after it.

  A level's flow is solved at levels that are evenly spaced in their 7th root,
  from its own to that of t = 0, and then to 0.
  """
  alpha, sigma, _ = levels.of(schedule, grid)
  low, rows = levels.of(schedule, 0), []
  least = float(low.sigma / low.alpha)
  for i, t in enumerate(grid[:-1]):
    k = sigma[i] / alpha[i]
    ends = (k ** (1 / RHO), min(least, k) ** (1 / RHO))
    between = np.linspace(*ends, ode_steps)[1:] ** RHO
    times = [t, *schedule.host_t_of_logsnr(-2 * np.log(between)), -1]
    there = levels.of(schedule, times)
    for j in range(ode_steps):
      rows.append(
        {
          't': times[j], 'c0': there.alpha[j + 1], 'ceps': there.sigma[j + 1],
          'level': k, 'alpha': alpha[i + 1], 'sigma': sigma[i + 1],
          'ends': j == ode_steps - 1,
        }
      )  # fmt: skip
  return levels.stacked(rows)


def _given(measurement, y, x0, spread, iterations, noise_fn):
  """A sample of N(x0, spread I) given y."""
  spectrum = measurement.spectrum
  if spectrum is None:
    root = jnp.sqrt(spread)
    like = Covariance(lambda v: spread * v, lambda v: root * v)
    return _matheron(measurement, y, x0, like, iterations, noise_fn)
  noise2 = linear.variance_of(measurement, y)
  both = spectrum.values**2 * spread + noise2
  std = jnp.sqrt(spread * noise2 / both)
  mean = x0 + spread * linear.explain(
    measurement, y - measurement.apply(x0), spread, iterations
  )
  return mean + spectrum.picture(std * noise_fn())


def _matheron(measurement, y, x0, like: Covariance, iterations, noise_fn):
  """A sample of N(x0, C) given y: Matheron's rule.

  A sample of x0 and its y are drawn together, and the sample is moved by what
  the difference from the given y explains.
  """
  noise2 = linear.variance_of(measurement, y)
  x = x0 + like.root(noise_fn())
  own = noise_fn(1).reshape(len(x), -1)[:, : np.prod(y.shape[1:])]
  own = jnp.sqrt(noise2) * own.reshape(y.shape)

  def multiply(w):
    spread = like.multiply(measurement.adjoint(w))
    return measurement.apply(spread) + noise2 * w

  residual = y + own - measurement.apply(x)
  w = linear.conjugate_gradients(multiply, residual, iterations)
  return x + like.multiply(measurement.adjoint(w))
