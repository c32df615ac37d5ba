"""The training step: one pure function, jitted once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax.models import Model
from diffusion_jax.objectives import denoising
from diffusion_jax.process.schedules import Schedule
from diffusion_jax.training import sharding
from diffusion_jax.training.state import TrainState

GOLDEN = 2654435769  # 2**32 over the golden ratio


def to_float(images: jax.Array) -> jax.Array:
  """uint8 images -> float32 in [-1, 1]: x / 127.5 - 1."""
  return images.astype(jnp.float32) / 127.5 - 1.0


def example_keys(key, step, batch_size: int) -> jax.Array:
  """[B] keys that depend on the step and the row of the global batch alone.

  So the noise is the same on any mesh, on any number of hosts, in any number of
  microbatches, and after a restart.
  """
  key = jax.random.fold_in(key, step)
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(
    jnp.arange(batch_size)
  )


def draw_noise(keys, schedule: Schedule, shape):
  """Per-example draws: (t [B], eps [B, *shape], dropout keys [B])."""

  def draw(key):
    t_key, eps_key, dropout_key = jax.random.split(key, 3)
    t = jax.random.randint(t_key, (), 0, schedule.num_timesteps)
    return t, jax.random.normal(eps_key, shape), dropout_key

  return jax.vmap(draw)(keys)


def by_quarter(values: jax.Array, t: jax.Array, num_timesteps: int) -> dict:
  """The mean of values, shaped as t, over each quarter of t; NaN if empty."""
  quarter = 4 * t // num_timesteps
  return {
    f'loss_q{q + 1}': jnp.mean(values, where=quarter == q) for q in range(4)
  }


def accumulate(gradient, params, rows, pieces: int, mesh: jax.sharding.Mesh):
  """The gradient of a mean over rows, one piece of them after the other.

  Args:
    gradient: (params, rows [b, ...]) -> (grads, aux), of the mean over b rows.
    params: float32.
    rows: a tree of [B, ...], split over the mesh.
    pieces: how many; pieces x data x fsdp divides B.
    mesh: the devices.

  Returns:
    The mean of the pieces' float32 gradients, and aux [pieces, ...].
  """
  where = sharding.shardings(params, mesh)

  def add(total, piece):
    grads, aux = gradient(params, piece)
    total = jax.tree.map(lambda sum_, g: sum_ + g / pieces, total, grads)
    # The sum lies in pieces too: no device holds it whole.
    return jax.lax.with_sharding_constraint(total, where), aux

  zeros = jax.tree.map(jnp.zeros_like, params)
  return jax.lax.scan(add, zeros, sharding.split_batch(rows, pieces, mesh))


def train_step(
  state: TrainState,
  batch: dict,
  *,
  key: jax.Array,
  model: Model,
  schedule: Schedule,
  prediction: str,
  optimizer: optax.GradientTransformation,
  learning_rate: optax.Schedule,
  ema_decay: float,
  mesh: jax.sharding.Mesh,
  microbatches: int = 1,
) -> tuple[TrainState, dict]:
  """One update.

  Args:
    state: before the update.
    batch: 'image' uint8 [B, H, W, C], global.
    key: the run's root key.
    model: the network.
    schedule: the noise schedule.
    prediction: what the network predicts, see `gaussian.from_prediction`.
    optimizer: gradient -> update.
    learning_rate: of the step, to be reported.
    ema_decay: of the parameters' average, applied after the update, no ramp.
    mesh: the devices.
    microbatches: pieces of the batch that go through the network one after the
      other. The numbers stay the same but for rounding, the memory shrinks.

  Returns:
    The state after the update, and float32 metrics: the loss and the gradient
    are of the state before the update, `param_norm` of the one after.
  """

  def gradient(params, rows):
    x0 = to_float(rows['image'])
    t, eps, dropout_keys = draw_noise(rows['key'], schedule, x0.shape[1:])

    def loss_fn(params):
      params = sharding.gather_fsdp(params, mesh)

      def predict(xt, t):
        return model.apply(params, xt, t, dropout_keys)

      values = denoising.squared_error(
        predict, schedule, prediction, x0, t, eps
      )
      return jnp.mean(values), values

    grads, values = jax.grad(loss_fn, has_aux=True)(params)
    return grads, (values, t)

  keys = example_keys(key, state.step, len(batch['image']))
  rows = {'image': batch['image'], 'key': keys}
  if microbatches == 1:
    grads, (values, t) = gradient(state.params, rows)
  else:
    grads, (values, t) = accumulate(
      gradient, state.params, rows, microbatches, mesh
    )
  # Each device keeps its piece: a reduce-scatter, not an all-reduce.
  grads = jax.lax.with_sharding_constraint(
    grads, sharding.shardings(state.params, mesh)
  )
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema_params = jax.tree.map(
    lambda ema, new: ema_decay * ema + (1.0 - ema_decay) * new,
    state.ema_params,
    params,
  )
  metrics = {
    'loss': jnp.mean(values),
    'grad_norm': optax.global_norm(grads),
    'param_norm': optax.global_norm(params),
    'learning_rate': jnp.asarray(learning_rate(state.step), jnp.float32),
    **by_quarter(values, t, schedule.num_timesteps),
  }
  state = TrainState(
    state.step + 1, params, ema_params, opt_state, state.extras
  )
  return state, metrics


def heldout_loss(
  params, batch: dict, weight, first, *, key, model, schedule, prediction, mesh
) -> jax.Array:
  """The weighted sum of the loss over one batch of held-out images.

  Image i of the set always meets the same noise, and the times are spread
  evenly over the set (golden-ratio steps), so that values of different
  checkpoints compare without the draw's variance.

  Args:
    params: the network's.
    batch: 'image' uint8 [B, H, W, C].
    weight: [B] float32, 0 for padding.
    first: the place of the first image in the held-out set.
    key: a root key of its own.
    model: the network.
    schedule: the noise schedule.
    prediction: what the network predicts.
    mesh: the devices.
  """
  x0 = to_float(batch['image'])
  index = first + jnp.arange(len(x0))
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
  _, eps, _ = draw_noise(keys, schedule, x0.shape[1:])
  # In integers: a float32 has no digits left for the fraction of a large index.
  spread = (index.astype(jnp.uint32) * np.uint32(GOLDEN)) >> 8
  t = (spread * (schedule.num_timesteps / 2**24)).astype(jnp.int32)
  params = sharding.gather_fsdp(params, mesh)
  values = denoising.squared_error(
    functools.partial(model.apply, params), schedule, prediction, x0, t, eps
  )
  return jnp.sum(values * weight)
