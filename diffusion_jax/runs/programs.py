"""The jitted programs of a run, made from its config.

Training runs them; preflight compiles them for devices that are not present.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from diffusion_jax import objectives, runs, samplers
from diffusion_jax.conditioning import text
from diffusion_jax.data import augment
from diffusion_jax.runs import autoencoders, draw, encoding, pairs, recipe
from diffusion_jax.samplers import grid, guided, plan
from diffusion_jax.samplers.solve import starts_at_noise
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import averages, optim, sharding, state, step


class Programs(NamedTuple):
  """The programs of a config on a mesh.

  Attributes:
    recipe: the run's recipe.
    optimizer: gradient -> update.
    init_key: the random key of the initial parameters.
    abstract: shapes, dtypes and shardings of the state.
    frozen: name -> parameters of the parts that are not trained; their shapes
      and shardings, if the recipe has no more.
    step_fn: (state, frozen, batch) -> (state, metrics), see `step.train_step`;
      the state is donated.
    steps_fn: (state, frozen, batches, resident) -> (state, metrics), several
      updates, see `step.train_steps`; the state is donated.
    loss_fn: (params, extras, batch, weight, first) -> the weighted sum of the
      held-out loss, see `step.heldout_loss`.
    draw_fn: (params, indices, rows, texts) -> (samples, whether they are
      finite), with the config's `sample` settings, see `draw.drawer`; of an
      autoencoder (params, indices, images) -> (reconstructions, ...), see
      `autoencoders.reconstructor`.
    plan: the plan of these samples; None for an autoencoder.
  """

  recipe: recipe.Recipe
  optimizer: optax.GradientTransformation
  init_key: jax.Array
  abstract: state.TrainState
  frozen: dict[str, Any]
  step_fn: Callable
  steps_fn: Callable
  loss_fn: Callable
  draw_fn: Callable
  plan: plan.Plan | None

  def create_state(
    self, mesh: Mesh, given: dict | None = None
  ) -> state.TrainState:
    """The state at step 0, see `state.create`."""
    return state.create(
      self.init_key, self.recipe.init, self.optimizer, mesh, given,
      self.recipe.objective.extras, bool(self.abstract.ema_params),
      self.abstract.averages.keys(),
    )  # fmt: skip


def create(
  config: Mapping, mesh: Mesh, made: recipe.Recipe | None = None
) -> Programs:
  """Makes the programs of a run; nothing is compiled or allocated.

  Args:
    config: the run's config, validated. With a recipe: the seed, optim, ema,
      microbatches and sample settings.
    mesh: the devices, which need not be present.
    made: the run's recipe; by default the config's.

  Raises:
    UserError: the config asks for something that does not exist.
  """
  made = made or recipe.create(config)
  how = None if made.reconstructs else _plan(config, made)
  optimizer = optim.create(**config['optim'])
  # Samples use fold_in(seed, 1), see `draw.sample_keys`.
  root = jax.random.fold_in(jax.random.key(config['seed']), 0)
  init_key, step_key, heldout_key = jax.random.split(root, 3)
  objective = made.objective
  others = averages.updates(config['ema'])
  abstract = state.abstract_state(
    made.init, optimizer, mesh, objective.extras, config['ema']['decay'] > 0,
    others.keys(),
  )  # fmt: skip
  common = {'objective': objective, 'mesh': mesh}
  train_step = functools.partial(
    step.train_step,
    key=step_key,
    optimizer=optimizer,
    learning_rate=optim.learning_rate(**config['optim']),
    ema_decay=config['ema']['decay'],
    average_fns=others,
    microbatches=config['microbatches'],
    **common,
  )
  train_steps = functools.partial(
    step.train_steps, step_fn=train_step, mesh=mesh
  )
  step_fn, steps_fn = (
    jax.jit(
      fn,
      donate_argnums=0,
      out_shardings=(
        jax.tree.map(lambda leaf: leaf.sharding, abstract),
        sharding.replicated(mesh),
      ),
    )
    for fn in (train_step, train_steps)
  )
  loss_fn = jax.jit(
    functools.partial(step.heldout_loss, key=heldout_key, **common)
  )
  draw_fn = jax.jit(
    draw.drawer(made, mesh, how)
    if how
    else autoencoders.reconstructor(made.codec, mesh)
  )
  frozen = made.frozen
  if any(not isinstance(x, jax.Array) for x in jax.tree.leaves(frozen)):
    frozen = sharding.abstract(frozen, mesh)
  return Programs(
    made, optimizer, init_key, abstract, frozen, step_fn, steps_fn,
    loss_fn, draw_fn, how,
  )  # fmt: skip


def rows(config: Mapping, made: recipe.Recipe, batch_size: int) -> dict:
  """The arrays of a batch that the training step reads: name -> (shape, dtype).

  Args:
    config: the run's config.
    made: its recipe.
    batch_size: rows of the batch.
  """
  found = {'image': ((batch_size, *runs.image_shape(config['data'])), np.uint8)}
  if config['codec'].get('cache'):
    coder = encoding.coder_of(config)
    shape = (*coder.shape[:-1], encoding.size_of(coder))
    found = {'moments': ((batch_size, *shape), np.float32)}
  classifies = config['loss']['name'] == objectives.CLASSIFICATION
  if 'label' in made.conditioner.doors or classifies:
    found['label'] = ((batch_size,), np.int32)
  if text.ROW in made.conditioner.doors or pairs.trains(config):
    length = text.length_of(config['conditioning'])
    found[text.ROW] = ((batch_size, length), np.int32)
  if config['data'].get('augment'):
    found['augment'] = ((batch_size, augment.SIZE), np.float32)
  return found


def prompts(config: Mapping, made: recipe.Recipe) -> dict:
  """The arrays of a prompt, of which samples are drawn: name -> (shape, dtype).

  Args:
    config: the run's config.
    made: its recipe.

  Returns:
    As `draw.conditions` takes them; {} for runs that take no prompts.
  """
  if text.ROW not in made.conditioner.doors:
    return {}
  return {text.ROW: ((1, text.length_of(config['conditioning'])), np.int32)}


def _plan(config: Mapping, made: recipe.Recipe) -> plan.Plan:
  """The plan of samples drawn during training; labels come in turn."""
  sample, schedule = config['sample'], made.schedule
  name = sample['sampler']
  if plan.is_calibrated(name, sample['grid']):
    raise UserError(
      f'sample.sampler={name} with sample.grid={sample["grid"]} needs a '
      'calibrated network, which training does not have: use another, such as '
      'ddim'
    )
  if name in samplers.ADAPTIVE:
    raise UserError(
      f'sample.sampler={name} chooses its own steps, but training samples with '
      'a fixed number of steps: use another, such as ddim'
    )
  given = {'variance'} & samplers.takes(name).keys()
  options = samplers.options(name, **{key: sample[key] for key in given})
  times = grid.create(sample['grid'], schedule, sample['num_steps'])
  classes, guidance = made.conditioner.doors.get('label'), {}
  if classes or text.ROW in made.conditioner.doors:
    of = {'name': 'label', 'drop': made.conditioner.drop}
    guidance = guided.chosen(of, {}, sample.get('guidance', 1.0))
  sampler = samplers.create(name, **options)
  return plan.Plan(
    name, options, times, sample['clip'], config['seed'],
    {'label': list(range(classes))} if classes else {}, guidance,
    guided.rows(schedule, sampler, times, guidance),
    starts_at_noise(schedule, times),
  )  # fmt: skip
