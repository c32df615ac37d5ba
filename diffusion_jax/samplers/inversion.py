"""DDIM inversion, from data to noise, and interpolation between noises."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.process import gaussian
from diffusion_jax.samplers import levels, linear
from diffusion_jax.samplers.solve import Sampler
from diffusion_jax.system.errors import UserError


def ddim_inversion(iterations: int = 1) -> Sampler:
  """Inverts DDIM's steps, from clean data (or any time) to noise.

  `solve` runs it along an increasing grid, the reversed grid of the samples:

    noise = solve(ddim_inversion(3), denoiser, schedule, grid[::-1], x0, keys)

  DDIM's step from t to s is x_s / alpha_s = x_t / alpha_t + (k_s - k_t) eps,
  with k = sigma / alpha and eps = eps(x_t, t). The inversion solves for x_t:

    x_t = alpha_t / alpha_s x_s + alpha_t (k_t - k_s) eps(x_t, t).

  The first evaluation uses x_s for the unknown x_t on the right, like
  diffusers' DDIMInverseScheduler; its error is proportional to the square of
  the step. Each further evaluation uses the latest x_t: a fixed-point iteration
  (as in arXiv 2309.04907 without acceleration, and in arXiv 2403.14602 without
  averaging and corrections). It multiplies the error of a step by
  |alpha_t (k_t - k_s) d eps / d x|, which for data N(m, v) is

    sigma_t (sigma_t - sigma_s alpha_t / alpha_s) / (alpha_t^2 v + sigma_t^2).

  This factor is below 1, and small for short steps. It is 1 for the step from
  clean data if v = 0: DDIM's last step then maps all x to m and cannot be
  inverted. The denoiser is evaluated at the later time t, never at clean data.

  Args:
    iterations: evaluations per step, at least 1.

  Raises:
    UserError: iterations is below 1.
  """
  if iterations < 1:
    raise UserError(f'iterations={iterations}: at least 1')

  def evaluations(grid):
    return iterations * (len(grid) - 1)

  def rows_of(schedule, grid):
    alpha, sigma, _ = levels.of(schedule, grid)
    with np.errstate(divide='ignore', invalid='ignore'):
      k = sigma / alpha
      a_step = {
        't': grid[1:],
        'cx': alpha[1:] / alpha[:-1],
        'w': (alpha[1:] * np.diff(k))[:, None],
      }
    if alpha[-1] == 0:  # pure noise is (xs - alpha_s x0) / sigma_s
      if sigma[-2] == 0:
        raise UserError(
          'a single step from clean data to pure noise cannot be inverted: use '
          'a grid of two steps or more'
        )
      a_step['c0'] = np.zeros(len(grid) - 1)
      a_step['c0'][-1] = -alpha[-2] / sigma[-2]
      a_step['cx'][-1], a_step['w'][-1] = 1 / sigma[-2], 0
    rows = {k: np.repeat(v, iterations, axis=0) for k, v in a_step.items()}
    place = np.arange(len(rows['t'])) % iterations
    return {**rows, 'begins': place == 0, 'ends': place == iterations - 1}

  return linear.linear(rows_of, 'eps', evaluations)


def slerp(a: jax.Array, b: jax.Array, weight: jax.Array) -> jax.Array:
  """Spherical interpolation of each example (arXiv 2010.02502, eq. 67).

  It preserves the norm; the linear average of two noises would be too short.

  Args:
    a: [B, ...], the result for weight 0.
    b: [B, ...], the result for weight 1.
    weight: [B].

  Returns:
    [B, ...]. Parallel and opposite vectors are interpolated linearly, because
    they have no unique shortest arc.
  """
  axes = tuple(range(1, a.ndim))
  weight = gaussian.per_example(weight, a)

  def length(x):
    return jnp.sqrt(jnp.sum(x**2, axes, keepdims=True))

  def unit(x):
    return x / jnp.where(length(x) > 0, length(x), 1)

  u, v = unit(a), unit(b)
  # arccos would lose half of the digits for a small angle.
  angle = 2 * jnp.arctan2(length(u - v), length(u + v))
  whole = jnp.sinc(angle / jnp.pi)  # sin(angle) / angle
  is_arc = whole > 1e-6

  def share(part):
    arc = part * jnp.sinc(part * angle / jnp.pi) / jnp.where(is_arc, whole, 1)
    return jnp.where(is_arc, arc, part)

  return share(1 - weight) * a + share(weight) * b
