"""Classification of noised data, for classifier guidance (2105.05233)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from diffusion_jax.codecs.codec import Codec
from diffusion_jax.conditioning import Conditioner
from diffusion_jax.objectives.laws import uniform_times
from diffusion_jax.objectives.objective import Aux, Mean, Objective, branch
from diffusion_jax.process import gaussian, noise, schedules


def create(
  network_fn: Callable,
  codec: Codec,
  conditioner: Conditioner,
  schedule: schedules.Schedule,
  *unused,
  **ignored,
) -> Objective:
  """The cross-entropy of the label given xt, at times drawn uniformly.

  Args:
    network_fn: (params, xt, t, cond, dropout keys or None) -> logits [B, K].
    codec: rows -> x0.
    conditioner: unused; a classifier has no condition.
    schedule: the noise schedule.
    *unused: the prediction, which a classifier has not.
    **ignored: options of denoising.
  """
  del conditioner, unused, ignored

  def values_at(params, rows, keys, t, dropout):
    x0 = codec.encode(params, rows, branch(keys, 'codec'))
    eps = noise.normal(branch(keys, 'eps'), x0.shape[1:])
    xt = gaussian.q_sample(schedule, x0, t, eps)
    logits = network_fn(params, xt, t, {}, dropout)
    label = rows['label']
    values = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return values, jnp.argmax(logits, axis=-1) == label

  def times(keys):
    return uniform_times(branch(keys, 't'), schedule.num_timesteps)

  def loss(params, extras, rows, keys):
    t = times(keys)
    values, right = values_at(params, rows, keys, t, branch(keys, 'dropout'))
    return values, Aux({'t': t, 'right': right}, {})

  def heldout(params, extras, rows, keys, index):
    # An example always has the same key here, and so the same time.
    return values_at(params, rows, keys, times(keys), None)[0]

  def metrics(values, by_row, sums):
    quarter = 4 * by_row['t'] // schedule.num_timesteps
    return {
      f'accuracy_q{q + 1}': Mean(
        jnp.sum(by_row['right'], where=quarter == q, dtype=values.dtype),
        jnp.sum(quarter == q, dtype=values.dtype),
      )
      for q in range(4)
    }

  return Objective(loss, heldout, metrics)


def log_probability(network_fn: Callable, params, xt, t, label) -> jax.Array:
  """log p(label | xt) of a classifier.

  Args:
    network_fn: (params, xt, t, cond, dropout keys or None) -> logits [B, K].
    params: all parts of its run.
    xt: [B, ...] noised data.
    t: [B] times.
    label: [B] int labels.

  Returns:
    [B] float32.
  """
  logits = jax.nn.log_softmax(network_fn(params, xt, t, {}, None))
  return jnp.take_along_axis(logits, label[:, None], axis=1)[:, 0]
