"""Layers of the networks, NHWC, as in DDPM (arXiv 2006.11239).

Initialisation follows the original: variance scaling (fan average, uniform) for
kernels, 0 for biases, and a scale of 1e-10 for layers with an output of almost
zero. Parameters are float32; `dtype` is the dtype of the computation.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models import attention, normalise, upsampling

# What is computed in another, faster form than it is usually written. Networks
# take a set of these names, `plain`, to compute them in the usual form.
MEASURES = ('norm', 'padding', 'upsampling', 'attention', 'dropout')
COLOURS = 8
LAYOUT = ('NHWC', 'HWIO', 'NHWC')


def kernel_init(scale: float = 1.0):
  return nnx.initializers.variance_scaling(scale, 'fan_avg', 'uniform')


ALMOST_ZERO = 1e-10


def conv(inputs, outputs, *, scale=1.0, **kwargs) -> nnx.Conv:
  """A 3x3 convolution, padded to keep the size.

  Args:
    inputs: input channels.
    outputs: output channels.
    scale: scale of the initial kernel, see `kernel_init`.
    **kwargs: arguments of nnx.Conv.
  """
  return nnx.Conv(
    inputs, outputs, (3, 3), kernel_init=kernel_init(scale), **kwargs
  )


def linear(inputs, outputs, *, scale=1.0, **kwargs) -> nnx.Linear:
  """A dense layer over the last axis, which is also a 1x1 convolution.

  Args:
    inputs: input channels.
    outputs: output channels.
    scale: scale of the initial kernel, see `kernel_init`.
    **kwargs: arguments of nnx.Linear.
  """
  return nnx.Linear(inputs, outputs, kernel_init=kernel_init(scale), **kwargs)


def norm(channels, num_groups, *, epsilon=1e-6, **kwargs) -> nnx.GroupNorm:
  # Statistics are float32 for any dtype; two passes for accuracy.
  return nnx.GroupNorm(
    channels, num_groups, epsilon=epsilon, use_fast_variance=False, **kwargs
  )


def normalised(
  layer: nnx.GroupNorm,
  xs: tuple[jax.Array, ...],
  *,
  shift: jax.Array | None = None,
  swish: bool = True,
  plain: frozenset = frozenset(),
) -> jax.Array:
  """Group norm of maps as if concatenated, see `normalise.group_norm`.

  Args:
    layer: its parameters.
    xs: maps [B, H, W, C_i].
    shift: [B, C], added to every pixel before the norm.
    swish: whether to apply swish to the result.
    plain: the measures that are not taken.
  """
  if 'norm' not in plain:
    return normalise.group_norm(
      xs, layer.scale[...], layer.bias[...], layer.num_groups, shift, swish,
      layer.epsilon,
    )  # fmt: skip
  x = jnp.concatenate(xs, axis=-1)
  if shift is not None:
    x = x + shift.astype(x.dtype)[:, None, None, :]
  return nnx.swish(layer(x)) if swish else layer(x)


def projected(
  layer: nnx.Linear,
  xs: tuple[jax.Array, ...],
  added: jax.Array | None = None,
  bias: jax.Array | float = 0.0,
) -> jax.Array:
  """A dense layer over maps as if concatenated, plus another map and bias.

  The concatenation is never written. As 1x1 convolutions, since those of GPUs
  can add a bias and a map, forwards and backwards.

  Args:
    layer: its parameters.
    xs: maps [B, H, W, C_i].
    added: [B, H, W, outputs], added to the result.
    bias: [outputs], added to the layer's bias.
  """
  ends = list(itertools.accumulate(x.shape[-1] for x in xs))[:-1]
  bias = broadcast(layer.bias[...] + bias, xs[0])
  y = added
  for x, kernel in zip(xs, jnp.split(layer.kernel[...], ends), strict=True):
    product = jax.lax.conv_general_dilated(
      x, kernel.astype(x.dtype)[None, None], (1, 1), 'VALID',
      dimension_numbers=LAYOUT,
    )  # fmt: skip
    if bias is not None:
      product, bias = product + bias, None
    y = product if y is None else product + y
  return y


def broadcast(bias: jax.Array, like: jax.Array) -> jax.Array:
  """A bias [C] in the dtype and with the rank of a map [..., C]."""
  return bias.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def convolved(
  layer: nnx.Conv, x: jax.Array, *, plain: frozenset = frozenset()
) -> jax.Array:
  """A 3x3 convolution without its bias.

  Colours are padded to COLOURS channels, since the fast kernels of GPUs need
  channels in multiples of 8.
  """
  kernel = layer.kernel[...].astype(x.dtype)
  _, _, inputs, outputs = kernel.shape
  if 'padding' not in plain:
    missing = [max(0, COLOURS - size) for size in (inputs, outputs)]
    kernel = jnp.pad(kernel, [(0, 0), (0, 0), *((0, n) for n in missing)])
    x = jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, missing[0])])
  y = jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=LAYOUT
  )
  return y[..., :outputs]


def sinusoid(t: jax.Array, dim: int) -> jax.Array:
  """[B] times -> [B, dim]: sin, then cos, of t exp(-ln(10000) i / (dim/2 - 1)).

  t is the raw step, not scaled to [0, 1].
  """
  half = dim // 2
  frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / (half - 1))
  angles = t.astype(jnp.float32)[:, None] * frequencies[None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def dropout(
  x: jax.Array,
  rate: float,
  keys,
  layer: int,
  plain: frozenset = frozenset(),
) -> jax.Array:
  """Dropout with a key per example: masks do not depend on batch or mesh.

  Args:
    x: [B, H, W, C].
    rate: the probability of dropping, in [0, 1).
    keys: [B] random keys, or None to drop nothing.
    layer: a number that is unique to this layer, so that masks differ.
    plain: the measures that are not taken, see `MEASURES`.
  """
  if keys is None or rate == 0.0:
    return x
  # 16 bits an element: half the random words, a rate within 1e-5 of the given.
  kept = round((1.0 - rate) * 2**16)

  def mask(key):
    key = jax.random.fold_in(key, layer)
    if 'dropout' in plain:
      return jax.random.bernoulli(key, 1.0 - rate, x.shape[1:])
    return jax.random.bits(key, x.shape[1:], jnp.uint16) < kept

  masks = jax.vmap(mask)(keys)
  if 'dropout' in plain:
    return jnp.where(masks, x / (1.0 - rate), jnp.zeros_like(x))
  # With the barrier, the norm before writes the dropped map at once.
  masks = jax.lax.optimization_barrier(masks)
  return jnp.where(masks, x * (2**16 / kept), jnp.zeros_like(x))


class ResBlock(nnx.Module):
  """norm - swish - conv, plus time, norm - swish - dropout - conv, plus x.

  Takes a tuple of maps, as if concatenated.
  """

  def __init__(
    self, inputs, outputs, *, time_dim, num_groups, dropout, number,
    plain=frozenset(), **kwargs,
  ):  # fmt: skip
    self.rate, self.number, self.plain = dropout, number, plain
    self.norm1 = norm(inputs, num_groups, **kwargs)
    self.conv1 = conv(inputs, outputs, **kwargs)
    self.time = linear(time_dim, outputs, **kwargs)
    self.norm2 = norm(outputs, num_groups, **kwargs)
    self.conv2 = conv(outputs, outputs, scale=ALMOST_ZERO, **kwargs)
    if inputs != outputs:
      self.shortcut = linear(inputs, outputs, **kwargs)

  def __call__(self, xs, time, keys):
    h = normalised(self.norm1, xs, plain=self.plain)
    h = convolved(self.conv1, h)
    # The bias and the time are a shift of the norm, not passes over the map.
    shift = self.time(nnx.swish(time)).astype(jnp.float32)
    shift = shift + self.conv1.bias[...][None]
    h = normalised(self.norm2, (h,), shift=shift, plain=self.plain)
    h = dropout(h, self.rate, keys, self.number, self.plain)
    if not hasattr(self, 'shortcut'):
      return xs[0] + self.conv2(h)
    if 'norm' in self.plain:
      return self.shortcut(jnp.concatenate(xs, axis=-1)) + self.conv2(h)
    skip = projected(self.shortcut, xs, bias=self.conv2.bias[...])
    return convolved(self.conv2, h) + skip


class Attention(nnx.Module):
  """Self-attention over all positions, with its own norm and residual."""

  def __init__(
    self, channels, *, num_heads, num_groups, plain=frozenset(), **kwargs
  ):
    self.num_heads, self.plain = num_heads, plain
    self.norm = norm(channels, num_groups, **kwargs)
    self.query = linear(channels, channels, **kwargs)
    self.key = linear(channels, channels, **kwargs)
    self.value = linear(channels, channels, **kwargs)
    self.out = linear(channels, channels, scale=ALMOST_ZERO, **kwargs)

  def __call__(self, x, training=False):
    b, h, w, c = x.shape
    normed = normalised(self.norm, (x,), swish=False, plain=self.plain)
    plain = 'attention' in self.plain
    mix = (
      _plain_attention
      if plain
      else functools.partial(attention.attend, training=training)
    )
    # [B, H, W, C] -> [B, H W, heads, C / heads]
    heads = (
      (f(normed) if plain else projected(f, (normed,))).reshape(
        b, h * w, self.num_heads, -1
      )
      for f in (self.query, self.key, self.value)
    )
    mixed = mix(*heads).reshape(b, h, w, c)
    if plain:
      return x + self.out(mixed)
    return projected(self.out, (mixed,), x)


def _plain_attention(query, key, value):
  # Scaled by (C / heads) ** -0.5; the softmax is float32 inside.
  return jax.nn.dot_product_attention(query, key, value)


class Downsample(nnx.Module):
  """Halves the map by a strided 3x3 convolution."""

  def __init__(self, channels, **kwargs):
    # As TensorFlow's SAME, which pads even sizes only at the end.
    self.conv = conv(
      channels, channels, strides=2, padding=((0, 1), (0, 1)), **kwargs
    )

  def __call__(self, x):
    return self.conv(x)


class Upsample(nnx.Module):
  """Doubles the map by nearest neighbour, then a 3x3 convolution."""

  def __init__(self, channels, *, plain=frozenset(), **kwargs):
    self.plain = plain
    self.conv = conv(channels, channels, **kwargs)

  def __call__(self, x):
    if 'upsampling' in self.plain:
      return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))
    y = upsampling.upsample_conv(x, self.conv.kernel[...])
    return y + broadcast(self.conv.bias[...], y)
