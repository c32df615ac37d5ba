"""The last step of the variational bound: 8-bit values under a Gaussian."""

import math

import jax
import jax.numpy as jnp


def discretised_log_likelihood(x, mean, log_scale) -> jax.Array:
  """Log-probability of 8-bit values under a Gaussian in 256 bins.

  Equation 13 of arXiv 2006.11239, with its code's approximation of the normal
  distribution function, (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2, and
  with probabilities of at least 1e-12. As (1 + tanh y) / 2 = sigmoid(2 y), the
  probability of a bin is

    sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)),

  where the right-hand side is accurate to rounding even far out in the tails.

  Args:
    x: images in [-1, 1]: k / 127.5 - 1 with k = 0 .. 255.
    mean: the mean of the Gaussian, of x's shape.
    log_scale: log of its standard deviation, a scalar or of x's shape.

  Returns:
    nats, of x's shape. The bins of 0 and 255 extend to infinity.
  """
  scale = jnp.exp(-jnp.asarray(log_scale, jnp.result_type(x)))
  centre, half = (x - mean) * scale, scale / 255
  factor, cubic = 2 * math.sqrt(2 / math.pi), 0.044715

  def argument(z):
    return factor * (z + cubic * z**3)

  upper, lower = argument(centre + half), argument(centre - half)
  between = factor * (2 * half + cubic * half * (6 * centre**2 + 2 * half**2))
  below = jax.nn.log_sigmoid(upper)
  above = jax.nn.log_sigmoid(-lower)
  log_probability = jnp.where(
    x < -0.999,
    below,
    jnp.where(x > 0.999, above, below + above + jnp.log(-jnp.expm1(-between))),
  )
  return jnp.maximum(log_probability, math.log(1e-12))
