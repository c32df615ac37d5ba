"""The training step: one pure function, jitted once."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax
from jax.experimental import layout

from diffusion_jax import models
from diffusion_jax.data.resident import take
from diffusion_jax.models import convolution, splash
from diffusion_jax.objectives.objective import Aux, Objective
from diffusion_jax.training import averages, optim, sharding
from diffusion_jax.training.state import TrainState


def example_keys(key, step, batch_size: int) -> jax.Array:
  """[B] keys that depend only on the step and the row of the global batch.

  The noise is therefore the same on any mesh, for any number of hosts and
  microbatches, and after a restart.
  """
  key, rows = jax.random.fold_in(key, step), jnp.arange(batch_size)
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def accumulate(
  gradient_fn: Callable, params, rows, pieces: int, mesh: jax.sharding.Mesh
) -> tuple:
  """The gradient of a mean over rows, computed piece by piece.

  Args:
    gradient_fn: rows [b, ...] -> (grads, (values [b], Aux)), for the mean over
      b rows.
    params: float32, with the gradients' shapes.
    rows: a tree of [B, ...], split over the mesh.
    pieces: the number of pieces; pieces x data x fsdp divides B.
    mesh: the devices.

  Returns:
    The result of `gradient_fn` for all rows, except that `values` and `by_row`
    are both in the order of the pieces.
  """
  where = sharding.shardings(params, mesh)

  def add(total, piece):
    grads, (values, aux) = gradient_fn(piece)
    grads_sum, sums = total
    grads_sum = jax.tree.map(lambda a, g: a + g / pieces, grads_sum, grads)
    # The sum is sharded, too: no device holds all of it.
    grads_sum = jax.lax.with_sharding_constraint(grads_sum, where)
    sums = jax.tree.map(jnp.add, sums, aux.sums)
    return (grads_sum, sums), (values, aux.by_row)

  pieced = sharding.split_batch(rows, pieces, mesh)
  one = jax.tree.map(lambda x: x[0], pieced)
  shapes = jax.eval_shape(lambda: gradient_fn(one)[1][1].sums)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, shapes))
  with _loop(mesh):
    (grads, sums), by_row = jax.lax.scan(add, zeros, pieced)
  values, by_row = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), by_row)
  return grads, (values, Aux(by_row, sums))


def _loop(mesh: jax.sharding.Mesh):
  """The context in which the gradients of a loop are traced."""
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  return convolution.backwards() if on_cpu else contextlib.nullcontext()


def train_step(
  state: TrainState,
  frozen: dict,
  batch: dict,
  *,
  key: jax.Array,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  learning_rate: optax.Schedule,
  ema_decay: float,
  mesh: jax.sharding.Mesh,
  microbatches: int = 1,
  average_fns: Mapping[str, Callable] = MappingProxyType({}),
) -> tuple[TrainState, dict]:
  """One update.

  Args:
    state: the state before the update.
    frozen: name -> parameters of the parts that are not trained.
    batch: rows of data [B, ...], global; 'image' uint8 and 'label' int32.
    key: the run's root key.
    objective: the objective.
    optimizer: gradient -> update.
    learning_rate: step -> learning rate, reported as a metric.
    ema_decay: decay of the parameters' average, applied after the update;
      constant from the first step. Unused if the state has none.
    mesh: the devices.
    microbatches: number of pieces that the batch is processed in, one after the
      other. More pieces need less memory; results differ only by rounding.
    average_fns: the updates of further averages, see `averages.updates`.

  Returns:
    The state after the update, and float32 metrics, each a scalar or a
    `Mean`: the loss and the gradient norm before the update, `param_norm` after
    it.
  """

  def loss_fn(params, piece):
    parts = sharding.gather_fsdp({**frozen, **params}, mesh)
    with splash.over(mesh):
      values, aux = objective.loss(parts, state.extras, *piece)
    return jnp.mean(values), (values, aux)

  gradient_fn = functools.partial(jax.grad(loss_fn, has_aux=True), state.params)

  keys = example_keys(key, state.step, len(jax.tree.leaves(batch)[0]))
  if objective.whole:
    batch = {**batch, **objective.whole(keys)}
  if microbatches == 1:
    grads, (values, aux) = gradient_fn((batch, keys))
  else:
    grads, (values, aux) = accumulate(
      gradient_fn, state.params, (batch, keys), microbatches, mesh
    )
  # Each device keeps its shard: a reduce-scatter, not an all-reduce.
  grads = jax.lax.with_sharding_constraint(
    grads, sharding.shardings(state.params, mesh)
  )
  grads = _on_gpus(_row_major, grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  updates = _on_gpus(_together, updates)
  params = optax.apply_updates(state.params, updates)
  extras = objective.update(state.extras, aux)
  ema_params, others = averages.updated(state, params, ema_decay, average_fns)
  if objective.write:
    write = functools.partial(objective.write, extras=extras)
    params, ema_params, others = _written(write, params, ema_params, others)
  # Otherwise a GPU's kernel of several updates also sums squares for the norm,
  # and writes new arrays instead of the old ones.
  params = _on_gpus(jax.lax.optimization_barrier, params)
  metrics = {
    'loss': jnp.mean(values),
    'grad_norm': optim.global_norm(grads),
    'param_norm': optim.global_norm(params),
    'learning_rate': jnp.asarray(learning_rate(state.step), jnp.float32),
    **objective.metrics(values, *aux),
  }
  return TrainState(
    state.step + 1, params, ema_params, opt_state, extras, others
  ), metrics


def _written(write: Callable, params, ema_params, others):
  """Parameters and their averages, with what the objective writes."""
  return (
    write(params),
    ema_params and write(ema_params),
    {name: write(tree) for name, tree in others.items()},
  )


def _on_gpus(change: Callable, tree):
  """The tree, changed only in programs for NVIDIA's GPUs."""
  return jax.lax.platform_dependent(
    tree, cuda=change, default=lambda tree: tree
  )


def _row_major(grads):
  """Gradients in the layout of the state.

  For a GPU, XLA would update the state in the layout that the gradients of
  convolutions come in, and copy each new array into its own.
  """

  def constrain(leaf):
    order = layout.Layout(tuple(range(leaf.ndim)))
    return layout.with_layout_constraint(leaf, order)

  return jax.tree.map(constrain, grads)


def _together(updates):
  """The same updates, of which XLA applies several in one kernel of a GPU.

  It joins kernels for arrays of one shape that read a common array.
  """
  one = models.opaque_one()
  return jax.tree.map(lambda update: update * one, updates)


def train_steps(
  state: TrainState,
  frozen: dict,
  batches,
  resident=None,
  *,
  step_fn: Callable,
  mesh: jax.sharding.Mesh,
) -> tuple[TrainState, dict]:
  """Several updates in one program.

  Args:
    state: the state before the updates.
    frozen: name -> parameters of the parts that are not trained.
    batches: [K, B, ...] rows of data, or their orders, see `resident.orders`.
    resident: all images, of which `batches` are orders, see `resident.place`.
    step_fn: (state, frozen, batch) -> (state, metrics), one update.
    mesh: the devices.

  Returns:
    The state after K updates, and their metrics [K].
  """

  def one(state, batch):
    if resident is not None:
      batch = take(resident, batch)
    return step_fn(state, frozen, batch)

  with _loop(mesh):
    return jax.lax.scan(one, state, batches)


def heldout_loss(
  parts, extras, batch: dict, weight, first, *, key, objective, mesh
) -> jax.Array:
  """The weighted sum of the loss over one batch of held-out examples.

  Example i of the set always gets the same noise, so that the losses of
  different checkpoints are comparable.

  Args:
    parts: name -> parameters of all parts.
    extras: the objective's state.
    batch: rows of data [B, ...].
    weight: [B] float32, 0 for padding.
    first: the index of the first example in the held-out set.
    key: a root key used for nothing else.
    objective: the objective.
    mesh: the devices.
  """
  index = first + jnp.arange(len(weight))
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
  parts = sharding.gather_fsdp(parts, mesh)
  with splash.over(mesh):
    values = objective.heldout(parts, extras, batch, keys, index)
  return jnp.sum(values * weight)
