"""LoRA: low-rank changes of a network's kernels (arXiv 2106.09685, eq. 3).

A kernel W [..., inputs, outputs] becomes W + factor A B, with A [..., inputs,
rank] and B [rank, outputs]. That of a convolution, [H, W, inputs, outputs], has
A [H, W, inputs, rank]: a convolution of few channels, then one of 1x1. Layers
have the names of their kernels, without the last part, such as
`down/0/attentions/0/query`.
"""

import fnmatch
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from diffusion_jax import models
from diffusion_jax.system.errors import UserError

PART = 'lora'  # name of the run's part
KERNEL = '/kernel'
ATTENTION, LINEAR, ALL = 'attention', 'all-linear', 'all'
OF_ATTENTION = ('query', 'key', 'value', 'out')
CROSS = 'cross_'  # of names in a DiT
ENDS = ('conv_in', 'conv_out')  # of few channels, so of a low rank
SHOWN = 24  # names in a message


class Lora(NamedTuple):
  """Low-rank changes of some layers.

  Attributes:
    pairs: layer -> (A, B).
    factors: layer -> the factor of its product.
  """

  pairs: dict[str, tuple[jax.Array, jax.Array]]
  factors: dict[str, float]


def kernels(params) -> dict:
  """Layer -> its kernel, for dense layers and convolutions.

  Args:
    params: a network's parameters, or their shapes.
  """
  return {
    name.removesuffix(KERNEL): leaf
    for name, leaf in models.named(params).items()
    if name.endswith(KERNEL) and leaf.ndim in (2, 4)
  }


def chosen(params, patterns: Iterable[str], rank: int) -> list[str]:
  """The layers that patterns choose, in the network's order.

  Args:
    params: a network's parameters, or their shapes.
    patterns: 'attention' (query, key, value and out of attentions),
      'all-linear' (dense layers), 'all' (convolutions, too, but the first and
      the last), or ends of layers' names with `*` for anything, such as 'query'
      or 'cross/*'.
    rank: the rank of the changes.

  Raises:
    UserError: a pattern chooses nothing, or the rank is too large for a layer.
  """
  there, found = kernels(params), set()
  for pattern in patterns:
    some = {layer for layer in there if _fits(layer, pattern, there)}
    if not some:
      raise UserError(
        f'lora.layers: {pattern!r} is no layer of this network: give '
        f'{ATTENTION}, {LINEAR}, {ALL}, or a layer or the end of its name, of '
        f'{_ends(there)}, with * for anything'
      )
    found |= some
  for layer in sorted(found, key=lambda layer: most(there[layer].shape)):
    if rank > most(there[layer].shape):
      raise UserError(
        f'lora.rank={rank}: the layer {layer} has a kernel of '
        f'{list(there[layer].shape)}, whose rank is at most '
        f'{most(there[layer].shape)}: give this or less, or other lora.layers'
      )
  return [layer for layer in there if layer in found]


def most(shape: tuple[int, ...]) -> int:
  """The largest rank of a kernel of this shape."""
  return min(math.prod(shape[:-1]), shape[-1])


def _fits(layer, pattern, there) -> bool:
  if pattern == ALL:
    return layer not in ENDS
  if pattern == LINEAR:
    return there[layer].ndim == 2
  if pattern == ATTENTION:
    parent, slash, last = layer.rpartition('/')
    cross = CROSS * last.startswith(CROSS)
    # A network's last layer may be called out, too.
    return (
      last.removeprefix(CROSS) in OF_ATTENTION
      and f'{parent}{slash}{cross}query' in there
    )
  return fnmatch.fnmatchcase(f'/{layer}', f'*/{pattern}')


def _ends(layers) -> str:
  """The last parts of layers' names, for a message."""
  ends = sorted(
    {layer.rpartition('/')[2] for layer in layers} - {*'0123456789'}
  )
  more = f' and {len(ends) - SHOWN} more' * (len(ends) > SHOWN)
  return ', '.join(ends[:SHOWN]) + more


def create(params, layers: Iterable[str], rank: int) -> models.Model:
  """The low-rank changes of layers as a part that is trained.

  A begins as in the authors' code and PEFT, uniform within the inverse root of
  the number of inputs, and B with zeros, so that the network begins as it is.
  The values of a layer do not depend on which others are chosen.

  Args:
    params: the network's parameters, or their shapes.
    layers: see `chosen`.
    rank: the rank of the changes.

  Returns:
    A model with `init` alone; its parameters are LAYER/A and LAYER/B.
  """
  shapes = {layer: kernels(params)[layer].shape for layer in layers}

  def init(key):
    tree = {}
    for layer, (*others, outputs) in shapes.items():
      bound = math.prod(others) ** -0.5
      own = jax.random.fold_in(key, zlib.crc32(layer.encode()))
      tree[layer, 'A'] = jax.random.uniform(
        own, (*others, rank), jnp.float32, -bound, bound
      )
      tree[layer, 'B'] = jnp.zeros((rank, outputs), jnp.float32)
    return _nested(tree)

  return models.Model(init, None)


def of(tree, factor: float) -> Lora:
  """Low-rank changes of the parameters of a trained part.

  Args:
    tree: see `create`.
    factor: of all products.
  """
  named = models.named(tree)
  layers = [name.removesuffix('/A') for name in named if name.endswith('/A')]
  pairs = {x: (named[f'{x}/A'], named[f'{x}/B']) for x in layers}
  return Lora(pairs, dict.fromkeys(layers, factor))


def network_fn(network: models.Model, factor: float) -> Callable:
  """`models.network_fn` of a network with low-rank changes in a part.

  Args:
    network: the network, of the part NET.
    factor: of all products of the part PART.
  """

  def apply(params, *args):
    net = merged(params[models.NET], of(params[PART], factor))
    return models.network_fn(network)({**params, models.NET: net}, *args)

  return apply


def _nested(tree: Mapping) -> dict:
  """{(layer, 'A'): array} -> the nested dict of the layer's path."""
  return traverse_util.unflatten_dict(
    {(*layer.split('/'), name): leaf for (layer, name), leaf in tree.items()}
  )


def merged(params, lora: Lora, scale: float = 1.0):
  """A network's parameters with low-rank changes in its kernels.

  Other parameters, and with a scale of 0 all of them, are the same arrays.

  Args:
    params: a network's parameters, which may be traced.
    lora: the changes; all of its layers are the network's.
    scale: a factor on all of them.
  """
  if not scale:
    return params
  named = models.named(params)
  for layer, (a, b) in lora.pairs.items():
    name = layer + KERNEL
    named[name] = _changed(named[name], a, b, scale * lora.factors[layer])
  return jax.tree.structure(params).unflatten(named.values())


@jax.jit
def _changed(kernel, a, b, factor):
  # On TPUs, products of float32 are otherwise rounded to bfloat16.
  product = jnp.einsum(
    '...ir,ro->...io', a, b, precision=jax.lax.Precision.HIGHEST
  )
  return kernel + jnp.asarray(factor, kernel.dtype) * product
