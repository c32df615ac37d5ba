"""DiT, the diffusion transformer with adaLN-Zero (arXiv 2212.09748).

Images are cut into patches, each of which is a token. Blocks of self-attention
and a two-layer perceptron follow; the embedding of time and conditions scales,
shifts and gates both, by layers that are zero at first, so that every block
begins as the identity. Cross-attention to tokens has no gate; its last layer is
zero at first.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_jax.models import attention, layers, styles
from diffusion_jax.models import doors as doors_of

SINUSOID = 256  # features of the time before its two layers
SMALL = nnx.initializers.normal(0.02)


class Details(NamedTuple):
  """Details in which other implementations differ from the authors'.

  Attributes:
    epsilon: added to the variance in the norms before the perceptrons; in all
      other norms it is 1e-6.
    freq_shift: see `layers.time_features`.
  """

  epsilon: float = 1e-6
  freq_shift: int = 0


DETAILS = Details()


def positions(rows: int, columns: int, width: int) -> np.ndarray:
  """float32 [rows * columns, width]: sines and cosines of a grid's positions.

  The first half of the features is for the column, the second for the row.
  """
  omega = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
  row, column = np.mgrid[:rows, :columns].reshape(2, -1, 1) * omega
  features = [np.sin(column), np.cos(column), np.sin(row), np.cos(row)]
  return np.concatenate(features, axis=-1).astype(np.float32)


def normed(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
  """Layer norm over the last axis without parameters; statistics in float32."""
  wide = x.astype(jnp.float32)
  wide -= wide.mean(-1, keepdims=True)
  variance = jnp.square(wide).mean(-1, keepdims=True)
  return (wide * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)


def modulated(x, shift, scale) -> jax.Array:
  """x [B, T, D] scaled by 1 + scale [B or 1, D] and shifted by shift."""
  return x * (1 + scale[:, None]) + shift[:, None]


class Block(nnx.Module):
  """Self-attention, cross-attention if there are tokens, and a perceptron."""

  def __init__(
    self, width, *, num_heads, tokens, dropout, number, epsilon, plain, **kwargs
  ):
    linear = functools.partial(layers.linear, width, **kwargs)
    self.num_heads, self.plain, self.epsilon = num_heads, plain, epsilon
    self.rate, self.number = dropout, number
    self.modulation = linear(6 * width, scale=0.0)
    self.query, self.key = linear(width), linear(width)
    self.value, self.out = linear(width), linear(width)
    self.mlp1 = linear(4 * width)
    self.mlp2 = layers.linear(4 * width, width, **kwargs)
    if tokens:
      self.cross_query = linear(width)
      self.cross_key = layers.linear(tokens, width, **kwargs)
      self.cross_value = layers.linear(tokens, width, **kwargs)
      self.cross_out = linear(width, scale=0.0)

  def __call__(self, x, time, tokens, keys):
    modulation = self.modulation(nnx.swish(time))
    shift, scale, gate, *of_mlp = jnp.split(modulation, 6, -1)
    h = self._attend(modulated(normed(x), shift, scale), keys is not None)
    x = x + gate[:, None] * h
    if tokens is not None:
      told, mask = tokens
      mixed = doors_of.attend(
        self.cross_query(x), self.cross_key(told), self.cross_value(told),
        mask, self.num_heads,
      )  # fmt: skip
      x = x + self.cross_out(mixed)
    shift, scale, gate = of_mlp
    h = self.mlp1(modulated(normed(x, self.epsilon), shift, scale))
    h = nnx.gelu(h, approximate=True)
    h = layers.dropout(h, self.rate, keys, self.number, self.plain)
    return x + gate[:, None] * self.mlp2(h)

  def _attend(self, x, training):
    heads = (
      f(x).reshape(*x.shape[:2], self.num_heads, -1)
      for f in (self.query, self.key, self.value)
    )
    if 'attention' in self.plain:
      mixed = jax.nn.dot_product_attention(*heads)
    else:
      mixed = attention.attend(*heads, training=training)
    return self.out(mixed.reshape(x.shape))


class DiT(nnx.Module):
  """The transformer, see the module docstring.

  Args:
    image_shape: (H, W, C) of x0.
    doors: name -> size, see `models.create`.
    out_channels: channels of the prediction.
    channels: width of the tokens, a multiple of 4.
    num_blocks: number of blocks.
    num_heads: number of attention heads.
    patch_size: pixels per side of a patch; divides H and W.
    dropout: dropout rate in the perceptrons.
    dtype: dtype of the computation; parameters are float32.
    remat: what the backward pass computes again instead of keeping it: 'none',
      or 'blocks' or 'all' (all within a block).
    time_scale: factor on the times that the network is given.
    details: fields of `Details` that differ.
    plain: names of `layers.MEASURES` that are not taken, to compare.
    rngs: random keys of the initial values.
  """

  DOORS = doors_of.NAMES

  def __init__(
    self,
    image_shape,
    *,
    doors,
    out_channels,
    channels=384,
    num_blocks=12,
    num_heads=6,
    patch_size=2,
    dropout=0.0,
    dtype='float32',
    remat='none',
    time_scale=1.0,
    details=(),
    plain=(),
    rngs,
  ):
    height, width, colors = image_shape
    details = styles.changed(DETAILS, dict(details))
    self.patch, self.out_channels = patch_size, out_channels
    self.grid = height // patch_size, width // patch_size
    self.remat, self.time_scale = remat, time_scale
    self.freq_shift, self.dtype = details.freq_shift, jnp.dtype(dtype)
    common = {'dtype': self.dtype, 'rngs': rngs}
    small = {'kernel_init': SMALL, **common}
    inputs = patch_size**2 * (colors + doors.get('channels', 0))
    self.patches = layers.linear(inputs, channels, **common)
    self.time1 = nnx.Linear(SINUSOID, channels, **small)
    self.time2 = nnx.Linear(channels, channels, **small)
    self.blocks = nnx.List(
      Block(
        channels, num_heads=num_heads, tokens=doors.get('tokens'),
        dropout=dropout, number=number, epsilon=details.epsilon,
        plain=frozenset(plain), **common,
      )
      for number in range(num_blocks)
    )  # fmt: skip
    zero = functools.partial(layers.linear, channels, scale=0.0, **common)
    self.modulation = zero(2 * channels)
    self.out = zero(patch_size**2 * out_channels)
    doors_of.add_embeddings(self, doors, channels, std=0.02, **common)

  def __call__(self, xt, t, keys=None, cond=None):
    """Computes the prediction for noised images, like `unet.UNet`."""
    time = layers.time_features(
      t * self.time_scale, SINUSOID, 'cos_sin', self.freq_shift
    )
    time = self.time2(nnx.swish(self.time1(time)))
    time = doors_of.embedded(self, time, cond)
    tokens = doors_of.tokens_of(cond, len(xt))

    x = doors_of.joined(xt.astype(self.dtype), cond)
    x = self.patches(self._cut(x))
    x = x + positions(*self.grid, x.shape[-1]).astype(x.dtype)[None]
    for block in self.blocks:
      call = block if self.remat == 'none' else jax.checkpoint(block)
      x = call(x, time, tokens, keys)
    shift, scale = jnp.split(self.modulation(nnx.swish(time)), 2, -1)
    x = self.out(modulated(normed(x), shift, scale))
    return self._put_together(x).astype(jnp.float32)

  def _cut(self, x):
    """[B, H, W, C] -> [B, T, features of a patch]."""
    (rows, columns), size = self.grid, self.patch
    x = x.reshape(len(x), rows, size, columns, size, -1)
    return x.swapaxes(2, 3).reshape(len(x), rows * columns, -1)

  def _put_together(self, x):
    (rows, columns), size = self.grid, self.patch
    x = x.reshape(len(x), rows, columns, size, size, -1).swapaxes(2, 3)
    return x.reshape(len(x), rows * size, columns * size, self.out_channels)
