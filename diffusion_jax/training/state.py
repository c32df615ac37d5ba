"""The training state."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffusion_jax import models
from diffusion_jax.training import sharding

AVERAGE = 'average_'  # of the names of further averages in checkpoints


class TrainState(NamedTuple):
  """The complete state of a run. Random keys are derived from the step.

  Attributes:
    step: int32 scalar, the number of updates made.
    params: name -> parameters of the trained parts.
    ema_params: their exponential moving average, a plain copy at step 0; {} if
      none is kept.
    opt_state: the optimiser's state.
    extras: the objective's state, see `Objective`; empty for DDPM.
    averages: name -> a further average of the parameters, see `averages`.
  """

  step: jax.Array
  params: Any
  ema_params: Any
  opt_state: optax.OptState
  extras: dict
  averages: dict = {}  # noqa: RUF012, never written to

  @property
  def averaged(self) -> Any:
    """The parameters to evaluate and sample with."""
    return self.ema_params or self.params

  @property
  def entries(self) -> dict:
    """Name -> what checkpoints hold of it: each further average is one."""
    named = self._asdict()
    others = named.pop('averages')
    return named | {AVERAGE + name: tree for name, tree in others.items()}

  @classmethod
  def of(cls, entries: dict) -> 'TrainState':
    """The state of its `entries`."""
    others = {x: entries[x] for x in entries if x.startswith(AVERAGE)}
    averages = {x.removeprefix(AVERAGE): tree for x, tree in others.items()}
    named = {x: entries[x] for x in entries if x not in others}
    return cls(**named, averages=averages)


def _at_start(key, given, init, optimizer, extras, ema, averages) -> TrainState:
  """The state at step 0; the arguments are those of `create`."""
  params = init(key)
  named = models.named(params)
  assert given.keys() <= named.keys()
  params = jax.tree.structure(params).unflatten((named | given).values())
  # Copies: a donated state must not contain the same buffer twice.
  copied = params if ema else {}
  others = dict.fromkeys(averages, params)
  ema_params, extras, others = jax.tree.map(
    jnp.copy, (copied, extras or {}, others)
  )
  step = jnp.zeros((), jnp.int32)
  return TrainState(
    step, params, ema_params, optimizer.init(params), extras, others
  )


def abstract_state(
  init: Callable,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  extras: dict | None = None,
  ema: bool = True,
  averages: Collection[str] = (),
) -> TrainState:
  """Shapes, dtypes and shardings of the state; nothing is allocated.

  Args:
    init: key -> parameters.
    optimizer: gradient -> update.
    mesh: the devices.
    extras: the objective's state at step 0.
    ema: whether to keep an average of the parameters.
    averages: the names of further ones.
  """
  how = init, optimizer, extras, ema, averages
  shapes = jax.eval_shape(lambda: _at_start(jax.random.key(0), {}, *how))
  return sharding.abstract(shapes, mesh)


def create(
  key,
  init: Callable,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  given: dict | None = None,
  extras: dict | None = None,
  ema: bool = True,
  averages: Collection[str] = (),
) -> TrainState:
  """Creates the state at step 0, sharded: no device holds all of it.

  Args:
    key: the random key of the initial values.
    init: key -> parameters.
    optimizer: gradient -> update; its moments start at zero.
    mesh: the devices.
    given: name -> array, initial values for any of the parameters (and their
      averages) in place of random ones.
    extras: the objective's state at step 0.
    ema: whether to keep an average of the parameters.
    averages: the names of further ones.
  """
  how = init, optimizer, extras, ema, averages
  abstract = abstract_state(init, optimizer, mesh, *how[2:])
  where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  # It runs only once: on a CPU, optimising it takes longer than running it.
  cpu = jax.default_backend() == 'cpu'
  return jax.jit(
    lambda key, given: _at_start(key, given, *how),
    out_shardings=where,
    compiler_options={'xla_backend_optimization_level': 0} if cpu else None,
  )(key, given or {})
