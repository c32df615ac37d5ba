"""What a run compiles: from its config to its network and jitted programs.

Training runs them; preflight compiles them for devices that are not there.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from diffusion_jax import models
from diffusion_jax import runs
from diffusion_jax import samplers
from diffusion_jax.system.errors import UserError
from diffusion_jax.models import Model
from diffusion_jax.process import schedules
from diffusion_jax.runs import draw
from diffusion_jax.samplers import grid
from diffusion_jax.training import optim
from diffusion_jax.training import sharding
from diffusion_jax.training import state
from diffusion_jax.training import step
from diffusion_jax.training.state import TrainState


class Programs(NamedTuple):
  """A config on a mesh.

  Attributes:
    model: the network.
    optimizer: gradient -> update.
    init_key: of the initial parameters.
    abstract: shapes, dtypes and shardings of the state.
    step_fn: (state, batch) -> (state, metrics), see `step.train_step`; the
      state is donated.
    loss_fn: (params, batch, weight, first) -> the weighted sum of the held-out
      loss, see `step.heldout_loss`.
    draw_fn: (params, indices) -> uint8 images, as the config's `sample` says.
  """

  model: Model
  optimizer: optax.GradientTransformation
  init_key: jax.Array
  abstract: TrainState
  step_fn: Callable
  loss_fn: Callable
  draw_fn: Callable


def create(config: Mapping, mesh: Mesh) -> Programs:
  """The programs of a run; nothing is compiled or allocated.

  Args:
    config: of the run, checked.
    mesh: the devices, which need not be there.

  Raises:
    UserError: the config asks for a sampler or a grid that there is not.
  """
  sample, image_shape = config['sample'], runs.image_shape(config['data'])
  if sample['sampler'] in samplers.CALIBRATED or sample['grid'] == 'optimal':
    raise UserError(
      f'sample.sampler={sample["sampler"]} with sample.grid={sample["grid"]} '
      'takes a network that is calibrated, which none is in training: use '
      'another, such as ddim'
    )
  sampler = samplers.create(sample['sampler'])
  if sampler.run:
    raise UserError(
      f'sample.sampler={sample["sampler"]} chooses its own steps, and training '
      'draws with a number of them that is known: use another, such as ddim'
    )
  schedule = schedules.create(**config['process'])
  times = grid.create(sample['grid'], schedule, sample['num_steps'])
  model = models.create(image_shape=image_shape, **config['model'])
  optimizer = optim.create(**config['optim'])
  # Samples have the other child of the seed, see `draw.sample_keys`.
  root = jax.random.fold_in(jax.random.key(config['seed']), 0)
  init_key, step_key, heldout_key = jax.random.split(root, 3)
  process = {
    'model': model,
    'schedule': schedule,
    'prediction': config['loss']['prediction'],
  }
  abstract = state.abstract_state(model, optimizer, mesh)
  step_fn = jax.jit(
    functools.partial(
      step.train_step,
      key=step_key,
      optimizer=optimizer,
      learning_rate=optim.learning_rate(**config['optim']),
      ema_decay=config['ema']['decay'],
      microbatches=config['microbatches'],
      mesh=mesh,
      **process,
    ),
    donate_argnums=0,
    out_shardings=(
      jax.tree.map(lambda leaf: leaf.sharding, abstract),
      sharding.replicated(mesh),
    ),
  )
  loss_fn = jax.jit(
    functools.partial(step.heldout_loss, key=heldout_key, mesh=mesh, **process)
  )
  draw_fn = jax.jit(
    draw.drawer(
      sharding.gathering(model.apply, mesh), process['schedule'],
      process['prediction'], sampler, times, image_shape, seed=config['seed'],
      clip=sample['clip'],
    )
  )  # fmt: skip
  return Programs(
    model, optimizer, init_key, abstract, step_fn, loss_fn, draw_fn
  )
