"""Training objectives, one value per example."""

import jax
import jax.numpy as jnp

from diffusion_jax.process import gaussian


def squared_error(predict_fn, schedule, kind: str, x0, t, eps) -> jax.Array:
  """L_simple (arXiv 2006.11239, eq. 14) for any prediction target.

  Args:
    predict_fn: (xt [B, ...], t [B]) -> prediction [B, ...].
    schedule: the noise schedule.
    kind: what the network predicts, see `gaussian.from_prediction`.
    x0: [B, ...] data, in [-1, 1] for images.
    t: [B] integer times.
    eps: [B, ...] standard normal noise.

  Returns:
    [B] float32, the squared error's mean over each example's dimensions.
  """
  xt = gaussian.q_sample(schedule, x0, t, eps)
  target = gaussian.to_target(schedule, x0, eps, t, kind)
  error = predict_fn(xt, t).astype(jnp.float32) - target
  return jnp.mean(jnp.square(error), axis=tuple(range(1, x0.ndim)))
