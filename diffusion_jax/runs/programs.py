"""What a run compiles: from its config to its jitted programs.

Training runs them; preflight compiles them for devices that are not there.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from diffusion_jax import samplers
from diffusion_jax.process.schedules import Schedule
from diffusion_jax.runs import draw, recipe
from diffusion_jax.runs.recipe import Recipe
from diffusion_jax.samplers import grid
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import optim, sharding, state, step
from diffusion_jax.training.state import TrainState


class Programs(NamedTuple):
  """A config on a mesh.

  Attributes:
    recipe: what the run is made of.
    optimizer: gradient -> update.
    init_key: of the initial parameters.
    abstract: shapes, dtypes and shardings of the state.
    frozen: name -> parameters of the parts that are not trained.
    step_fn: (state, frozen, batch) -> (state, metrics), see `step.train_step`;
      the state is donated.
    loss_fn: (params, extras, batch, weight, first) -> the weighted sum of the
      held-out loss, see `step.heldout_loss`.
    draw_fn: (params, indices) -> samples, as the config's `sample` says.
  """

  recipe: Recipe
  optimizer: optax.GradientTransformation
  init_key: jax.Array
  abstract: TrainState
  frozen: dict[str, Any]
  step_fn: Callable
  loss_fn: Callable
  draw_fn: Callable

  def create_state(self, mesh: Mesh, given: dict | None = None) -> TrainState:
    """The state at step 0, see `state.create`."""
    return state.create(
      self.init_key, self.recipe.init, self.optimizer, mesh, given,
      self.recipe.objective.extras,
    )  # fmt: skip


def create(config: Mapping, mesh: Mesh) -> Programs:
  """The programs of a run; nothing is compiled or allocated.

  Args:
    config: of the run, checked.
    mesh: the devices, which need not be there.

  Raises:
    UserError: the config asks for something that there is not.
  """
  return assemble(recipe.create(config), config, mesh)


def assemble(made: Recipe, config: Mapping, mesh: Mesh) -> Programs:
  """As `create`, of a recipe that is made already.

  Args:
    made: what the run is made of.
    config: its seed, optim, ema, microbatches and sample.
    mesh: the devices, which need not be there.

  Raises:
    UserError: the config asks for a sampler or a grid that there is not.
  """
  sampler, times = _sampling(config['sample'], made.schedule)
  optimizer = optim.create(**config['optim'])
  # Samples have the other child of the seed, see `draw.sample_keys`.
  root = jax.random.fold_in(jax.random.key(config['seed']), 0)
  init_key, step_key, heldout_key = jax.random.split(root, 3)
  objective = made.objective
  abstract = state.abstract_state(made.init, optimizer, mesh, objective.extras)
  step_fn = jax.jit(
    functools.partial(
      step.train_step,
      key=step_key,
      objective=objective,
      optimizer=optimizer,
      learning_rate=optim.learning_rate(**config['optim']),
      ema_decay=config['ema']['decay'],
      microbatches=config['microbatches'],
      mesh=mesh,
    ),
    donate_argnums=0,
    out_shardings=(
      jax.tree.map(lambda leaf: leaf.sharding, abstract),
      sharding.replicated(mesh),
    ),
  )
  loss_fn = jax.jit(
    functools.partial(
      step.heldout_loss, key=heldout_key, objective=objective, mesh=mesh
    )
  )
  draw_fn = jax.jit(
    draw.drawer(
      made, mesh, sampler, times, seed=config['seed'],
      clip=config['sample']['clip'],
    )
  )  # fmt: skip
  return Programs(
    made, optimizer, init_key, abstract, made.frozen, step_fn, loss_fn, draw_fn
  )


def _sampling(sample: Mapping, schedule: Schedule) -> tuple:
  """The sampler and the times of the grids on the way."""
  name = sample['sampler']
  if name in samplers.CALIBRATED or sample['grid'] == 'optimal':
    raise UserError(
      f'sample.sampler={name} with sample.grid={sample["grid"]} needs a '
      'calibrated network, and none is calibrated during training: use '
      'another, such as ddim'
    )
  sampler = samplers.create(name)
  if sampler.run:
    raise UserError(
      f'sample.sampler={name} chooses its own steps, and training draws with a '
      'fixed number of them: use another, such as ddim'
    )
  return sampler, grid.create(sample['grid'], schedule, sample['num_steps'])
