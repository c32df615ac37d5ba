"""Linear equations of measurements: what a residual says of x."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.editing.measurements import Measurement
from diffusion_jax.process import gaussian

# Standard deviation of rounding to uint8, in units of x: noise that y has even
# if it is said to have none.
ROUNDING = 2 / 255 / np.sqrt(12)


def variance_of(measurement: Measurement, y) -> jax.Array:
  """The variance of y's noise, at least that of rounding, [B, 1, 1, 1].

  Args:
    measurement: the measurement.
    y: what multiplies it.
  """
  noise = jnp.maximum(measurement.noise, ROUNDING).astype(y.dtype)
  return gaussian.per_example(noise, y) ** 2


def conjugate_gradients(multiply, b, iterations: int) -> jax.Array:
  """Solves M x = b for each example, with M positive.

  An example stops where it has converged, or where M turns out not to be
  positive: a network's Jacobian need not be.

  Args:
    multiply: x [B, ...] -> M x.
    b: [B, ...].
    iterations: at most so many.
  """
  axes = tuple(range(1, b.ndim))

  def dot(u, v):
    return jnp.sum(u * v, axes, keepdims=True)

  def body(_, state):
    x, r, p, rr = state
    mp = multiply(p)
    curvature = dot(p, mp)
    goes = (curvature > 0) & (rr > 0)
    size = jnp.where(goes, rr / jnp.where(goes, curvature, 1), 0)
    x, r = x + size * p, r - size * mp
    newer = dot(r, r)
    turn = jnp.where(goes, newer / jnp.where(goes, rr, 1), 0)
    stays = jnp.where(goes, r + turn * p, 0)
    return x, r, stays, jnp.where(goes, newer, 0)

  start = (jnp.zeros_like(b), b, b, dot(b, b))
  return jax.lax.fori_loop(0, iterations, body, start)[0]


def explain(
  measurement: Measurement, residual, spread, iterations: int
) -> jax.Array:
  """A' (spread A A' + noise^2)^-1 residual.

  By the singular values where they are known, otherwise by conjugate gradients.

  Args:
    measurement: the measurement.
    residual: of y's shape.
    spread: a variance of x, a scalar.
    iterations: of conjugate gradients.
  """
  noise2 = variance_of(measurement, residual)
  spectrum = measurement.spectrum
  if spectrum is not None:
    factor = spectrum.values / (spread * spectrum.values**2 + noise2)
    return spectrum.picture(factor * spectrum.observed(residual))

  def multiply(w):
    return spread * measurement.apply(measurement.adjoint(w)) + noise2 * w

  return measurement.adjoint(
    conjugate_gradients(multiply, residual, iterations)
  )
