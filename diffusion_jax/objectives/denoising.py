"""Denoising: DDPM's L_simple (arXiv 2006.11239, eq. 14), for any prediction."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.codecs.codec import Codec
from diffusion_jax.conditioning import Conditioner
from diffusion_jax.objectives.objective import Aux, Mean, Objective, branch
from diffusion_jax.process import gaussian, noise, schedules

GOLDEN = 2654435769  # 2**32 divided by the golden ratio


def create(
  network_fn: Callable,
  codec: Codec,
  conditioner: Conditioner,
  schedule: schedules.Schedule,
  prediction: str = 'eps',
) -> Objective:
  """The squared error of the prediction at times drawn uniformly.

  Args:
    network_fn: (params, input, label, cond, dropout keys or None) ->
      prediction.
    codec: rows -> x0.
    conditioner: rows -> the network's conditioning input.
    schedule: the noise schedule.
    prediction: a key of `gaussian.PARAMETRISATIONS`.

  Raises:
    UserError: the prediction is not known.
  """
  gaussian.parametrisation(prediction)
  num_timesteps = schedule.num_timesteps

  def values_at(params, rows, keys, t, cond_keys, dropout):
    x0 = codec.encode(params, rows, branch(keys, 'codec'))
    eps = noise.normal(branch(keys, 'eps'), x0.shape[1:])
    cond = conditioner.condition(params, rows, cond_keys)

    def network(xt, label):
      return network_fn(params, xt, label, cond, dropout)

    return squared_error(network, schedule, prediction, x0, t, eps)

  def loss(params, extras, rows, keys):
    t = uniform_times(branch(keys, 't'), num_timesteps)
    values = values_at(
      params, rows, keys, t, branch(keys, 'condition'), branch(keys, 'dropout')
    )
    return values, Aux({'t': t}, {})

  def heldout(params, extras, rows, keys, index):
    # Times are spread evenly over the set (golden-ratio steps), which compares
    # checkpoints without the variance of random times. In integers, because
    # float32 has no digits left for the fraction of a large index.
    spread = (index.astype(jnp.uint32) * np.uint32(GOLDEN)) >> 8
    t = (spread * (num_timesteps / 2**24)).astype(jnp.int32)
    return values_at(params, rows, keys, t, None, None)

  def metrics(values, by_row, sums):
    return by_quarter(values, by_row['t'], num_timesteps)

  return Objective(loss, heldout, metrics)


def uniform_times(keys: jax.Array, num_timesteps: int) -> jax.Array:
  """[B] keys -> t int32 [B], uniform in 0 .. num_timesteps - 1."""
  return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_timesteps))(
    keys
  )


def squared_error(network_fn, schedule, kind: str, x0, t, eps) -> jax.Array:
  """The squared error of a network's prediction at given times and noise.

  Args:
    network_fn: (input [B, ...], label [B]) -> prediction [B, ...].
    schedule: the noise schedule.
    kind: a key of `gaussian.PARAMETRISATIONS`.
    x0: [B, ...] clean data, see `Codec`.
    t: [B] integer times.
    eps: [B, ...] standard normal noise.

  Returns:
    [B] float32, the mean over each example's dimensions.
  """
  xt = gaussian.q_sample(schedule, x0, t, eps)
  target = gaussian.to_target(schedule, x0, eps, t, kind)
  prediction = gaussian.predict(network_fn, schedule, xt, t, kind)
  error = prediction.astype(jnp.float32) - target
  return jnp.mean(jnp.square(error), axis=tuple(range(1, x0.ndim)))


def by_quarter(
  values: jax.Array, t: jax.Array, num_timesteps: int
) -> dict[str, Mean]:
  """The mean of values [B] over each quarter of t [B], which may be empty."""
  quarter = 4 * t // num_timesteps
  return {
    f'loss_q{q + 1}': Mean(
      jnp.sum(values, where=quarter == q),
      jnp.sum(quarter == q, dtype=values.dtype),
    )
    for q in range(4)
  }
