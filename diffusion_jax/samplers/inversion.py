"""From data back to noise: DDIM inverted; and the way between two noises."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.process import gaussian
from diffusion_jax.samplers import levels
from diffusion_jax.samplers.linear import linear
from diffusion_jax.samplers.solve import Sampler
from diffusion_jax.system.errors import UserError


def ddim_inversion(iterations: int = 1) -> Sampler:
  """DDIM's steps undone, from clean data (or any time) up to noise.

  `solve` runs it along a rising grid, that of the samples turned round:

    noise = solve(ddim_inversion(3), denoiser, schedule, grid[::-1], x0, keys)

  Where DDIM goes from t to s, x_s / alpha_s = x_t / alpha_t + (k_s - k_t) eps,
  k = sigma / alpha and eps that of (x_t, t), this solves for x_t:

    x_t = alpha_t / alpha_s x_s + alpha_t (k_t - k_s) eps(x_t, t).

  The first evaluation puts x_s in place of the unknown x_t on the right, as
  diffusers' DDIMInverseScheduler does, which errs by the length of the step
  squared. Each further one puts in the latest x_t, a fixed-point iteration (of
  arXiv 2309.04907 without its acceleration, of arXiv 2403.14602 without its
  averages and corrections). That shrinks the error of a step by
  |alpha_t (k_t - k_s) d eps / d x|, which for data N(m, v) is

    sigma_t (sigma_t - sigma_s alpha_t / alpha_s) / (alpha_t^2 v + sigma_t^2)

  which is below 1, and as small as the step is short. It is 1 in the step from
  clean data where v = 0: DDIM's last step takes all x to m there, and so is not
  to be undone. A denoiser is asked at the later time t, never at clean data.

  Args:
    iterations: evaluations in each step, at least 1.

  Raises:
    UserError: fewer.
  """
  if iterations < 1:
    raise UserError(f'iterations={iterations}: at least 1')

  def evaluations(grid):
    return iterations * (len(grid) - 1)

  def rows_of(schedule, grid):
    alpha, sigma, _ = levels.of(schedule, grid)
    a_step = {
      't': grid[1:],
      'cx': alpha[1:] / alpha[:-1],
      'w': (alpha[1:] * np.diff(sigma / alpha))[:, None],
    }
    rows = {
      name: np.repeat(value, iterations, axis=0)
      for name, value in a_step.items()
    }
    place = np.arange(len(rows['t'])) % iterations
    return {**rows, 'begins': place == 0, 'ends': place == iterations - 1}

  return linear(rows_of, 'eps', evaluations)


def slerp(a: jax.Array, b: jax.Array, weight: jax.Array) -> jax.Array:
  """Spherical interpolation, example by example (arXiv 2010.02502, eq. 67).

  It keeps the norm, where the average of two noises is too short for a noise.

  Args:
    a: [B, ...], what weight 0 gives.
    b: [B, ...], what weight 1 gives.
    weight: [B].

  Returns:
    [B, ...]. Vectors of one direction are joined by a straight line, and
    opposite ones too, between which no arc is the shortest.
  """
  axes = tuple(range(1, a.ndim))
  weight = gaussian.per_example(weight, a)

  def length(x):
    return jnp.sqrt(jnp.sum(x**2, axes, keepdims=True))

  def unit(x):
    return x / jnp.where(length(x) > 0, length(x), 1)

  u, v = unit(a), unit(b)
  # Of a small angle, arccos would lose half of the digits.
  angle = 2 * jnp.arctan2(length(u - v), length(u + v))
  whole = jnp.sinc(angle / jnp.pi)  # sin(angle) / angle
  is_arc = whole > 1e-6

  def share(part):
    arc = part * jnp.sinc(part * angle / jnp.pi) / jnp.where(is_arc, whole, 1)
    return jnp.where(is_arc, arc, part)

  return share(1 - weight) * a + share(weight) * b
