"""Networks as pure functions `init` and `apply` of `params`.

Networks are built with Flax NNX. The rest of the code only sees a nested dict
of arrays and two pure functions. Parameter names are the dict's paths joined by
'/', such as `down/0/blocks/1/conv1/kernel`.
"""

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from diffusion_jax.models import doors as doors_of
from diffusion_jax.models.dit import DiT
from diffusion_jax.models.encoder import Encoder
from diffusion_jax.models.unet import UNet
from diffusion_jax.system.errors import one_of

MODELS = {'unet': UNet, 'dit': DiT, 'encoder': Encoder}
MOST_KEPT = 16  # networks
KEPT = {}  # the networks that were used last, see `fence`
NET = 'net'  # name of the run's part that is the denoising network


class Model(NamedTuple):
  """A network as two pure functions.

  Attributes:
    init: key -> params, a nested dict of float32 arrays.
    apply: (params, *inputs) -> outputs. A denoising network takes
      (xt [B, ...], t [B], keys=None, cond=None) and returns its prediction
      [B, ...] float32; `keys` ([B] random keys) enable dropout, and `cond` is a
      dict of doors, see `conditioning.Conditioner`.
    doors: the names of the conditions that a denoising network takes, and
      needs.
  """

  init: Callable
  apply: Callable
  doors: tuple[str, ...] = ()


def create(
  name: str,
  image_shape: tuple[int, ...],
  doors: Mapping[str, int] | None = None,
  out_channels: int | None = None,
  **kwargs,
) -> Model:
  """A network by name.

  Args:
    name: a key of MODELS.
    image_shape: (H, W, C) of x0.
    doors: the conditions, by name, see `conditioning.Conditioner`, and the size
      of each: of 'label' the number of classes, without the null label; of the
      others their last axis.
    out_channels: channels of the prediction; by default those of x0.
    **kwargs: the network's arguments, see `unet.UNet` and `dit.DiT`; those of
      other networks are ignored.

  Raises:
    UserError: the name is not known, or the network lacks a door.
  """
  network = MODELS[one_of('model.name', name, MODELS)]
  others = set().union(*map(arguments, MODELS.values())) - arguments(network)
  kwargs = {key: kwargs[key] for key in kwargs if key not in others}
  doors = dict(doors or {})
  doors_of.check(doors, network.DOORS, name)
  out_channels = out_channels or image_shape[-1]
  model = fence(
    network, image_shape, doors=doors, out_channels=out_channels, **kwargs
  )
  dtype = jnp.dtype(kwargs.get('dtype', 'float32'))
  names = getattr(network, 'CAST', None)

  def apply(params, *args):
    if names and dtype != jnp.float32:
      params = _cast(params, names, dtype)
    return model.apply(params, *args)

  return Model(model.init, apply, tuple(doors))


def arguments(network: type) -> set[str]:
  """The names of the arguments of a network."""
  return set(inspect.signature(network.__init__).parameters)


def fence(network: Callable, *args, **kwargs) -> Model:
  """Converts an NNX module to two pure functions.

  Building a large module takes seconds, so equal arguments give the same two
  functions. Traces depend on contexts such as `convolution.backwards`: jit a
  function of your own that calls them, not `apply` itself.

  Args:
    network: (*args, rngs=..., **kwargs) -> module; `rngs` is a replacement for
      nnx.Rngs.
    *args: its arguments.
    **kwargs: more of them.
  """
  key = network, _frozen(args), _frozen(kwargs)
  made = KEPT.pop(key, None)
  made = made or _fenced(network, *copy.deepcopy(args), **copy.deepcopy(kwargs))
  KEPT[key] = made  # the last one used
  while len(KEPT) > MOST_KEPT:
    KEPT.pop(next(iter(KEPT)), None)
  return made


def _frozen(value):
  """The value as a key of a dict; 1 and True differ."""
  if hasattr(value, 'items'):  # a dict, or a ConfigDict
    return tuple((name, _frozen(each)) for name, each in value.items())
  if isinstance(value, (list, tuple)):
    return tuple(map(_frozen, value))
  return type(value), value


def _fenced(network, *args, **kwargs) -> Model:
  def module(key):
    return network(*args, rngs=_Keys(key), **kwargs)

  abstract = nnx.eval_shape(lambda: module(jax.random.key(0)))
  graphdef, state = nnx.split(abstract)

  def init(key):
    return _to_params(nnx.state(module(key)))

  def apply(params, *args):
    return nnx.merge(graphdef, _to_state(params, state))(*args)

  return Model(init, apply)


def _cast(params, names, dtype):
  """Casts the named parameters, which XLA does in few kernels of a GPU."""
  one = opaque_one()
  cast = {
    name: (leaf * one).astype(dtype) if re.fullmatch(names, name) else leaf
    for name, leaf in named(params).items()
  }
  return jax.tree.structure(params).unflatten(cast.values())


def opaque_one() -> jax.Array:
  """1.0, as one of two numbers that XLA does not know.

  For a GPU, XLA joins elementwise operations on arrays of one shape in one
  kernel if they read a common array, which a single number is not.
  """
  return jax.lax.optimization_barrier(jnp.ones(2))[0]


def named(params) -> dict:
  """Name -> parameter, in the order of `jax.tree.leaves`."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def network_fn(network: Model) -> Callable:
  """(params of all parts, input, label, cond, dropout keys) -> prediction.

  Args:
    network: the network, of the part NET.
  """

  def apply(params, xt, label, cond, keys):
    return network.apply(params[NET], xt, label, keys, cond)

  return apply


def names(params) -> list[str]:
  """The names of all parameters, in the order of `jax.tree.leaves`."""
  return list(named(params))


@jax.jit
def _is_finite(array: jax.Array) -> jax.Array:
  return jnp.isfinite(array).all()


def not_finite(params) -> str | None:
  """The name of the first parameter that is not finite; None if all are.

  Args:
    params: a tree of arrays, which may be sharded.
  """
  # One at a time, as for checksums.
  return next((n for n, x in named(params).items() if not _is_finite(x)), None)


def differences(there, here, look: Callable) -> list[dict]:
  """The leaves of two trees that are not in both, or do not look the same.

  Args:
    there: a tree of arrays or of their shapes, such as a checkpoint's.
    here: another one.
    look: leaf -> what has to be equal.

  Returns:
    {'name', 'there', 'here'} for each, ordered by name: how it looks in either
    tree, None if it is missing.
  """
  there, here = (
    {name: look(leaf) for name, leaf in named(tree).items()}
    for tree in (there, here)
  )
  return [
    {'name': name, 'there': there.get(name), 'here': here.get(name)}
    for name in sorted(there.keys() | here.keys())
    if there.get(name) != here.get(name)
  ]


def count(params) -> int:
  """The number of scalar parameters.

  Args:
    params: a nested dict of arrays or of their shapes.
  """
  return sum(leaf.size for leaf in jax.tree.leaves(params))


class _Keys:
  """The random keys of initial values, in the order that layers request them.

  Replaces nnx.Rngs, which makes building a network take seconds because it
  traces its counters.
  """

  def __init__(self, key):
    self._key, self._count = key, 0

  def params(self):
    self._count += 1
    return jax.random.fold_in(self._key, self._count - 1)


def _to_params(state: nnx.State) -> dict:
  flat = {
    tuple(map(str, path)): variable[...]
    for path, variable in nnx.to_flat_state(state)
  }
  return traverse_util.unflatten_dict(flat)


def _to_state(params: dict, like: nnx.State) -> nnx.State:
  flat = traverse_util.flatten_dict(params)
  return nnx.from_flat_state(
    (path, variable.replace(flat[tuple(map(str, path))]))
    for path, variable in nnx.to_flat_state(like)
  )
