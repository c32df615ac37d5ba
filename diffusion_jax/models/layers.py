"""Layers of the networks, NHWC, as in DDPM (arXiv 2006.11239).

Initialisation follows the original: variance scaling (fan average, uniform) for
kernels, 0 for biases, and a scale of 1e-10 for layers with an output of almost
zero. Parameters are float32; `dtype` is the dtype of the computation.
"""

import jax
import jax.numpy as jnp
from flax import nnx


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


def norm(channels, num_groups, **kwargs) -> nnx.GroupNorm:
  # Statistics are float32 for any dtype; two passes for accuracy.
  return nnx.GroupNorm(
    channels, num_groups, epsilon=1e-6, use_fast_variance=False, **kwargs
  )


def sinusoid(t: jax.Array, dim: int) -> jax.Array:
  """[B] times -> [B, dim]: sin, then cos, of t exp(-ln(10000) i / (dim/2 - 1)).

  t is the raw step, not scaled to [0, 1].
  """
  half = dim // 2
  frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / (half - 1))
  angles = t.astype(jnp.float32)[:, None] * frequencies[None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def dropout(x: jax.Array, rate: float, keys, layer: int) -> jax.Array:
  """Dropout with a key per example: masks do not depend on batch or mesh.

  Args:
    x: [B, H, W, C].
    rate: the probability of dropping, in [0, 1).
    keys: [B] random keys, or None to drop nothing.
    layer: a number that is unique to this layer, so that masks differ.
  """
  if keys is None or rate == 0.0:
    return x

  def mask(key):
    key = jax.random.fold_in(key, layer)
    return jax.random.bernoulli(key, 1.0 - rate, x.shape[1:])

  return jnp.where(jax.vmap(mask)(keys), x / (1.0 - rate), jnp.zeros_like(x))


class ResBlock(nnx.Module):
  """norm - swish - conv, plus time, norm - swish - dropout - conv, plus x."""

  def __init__(
    self, inputs, outputs, *, time_dim, num_groups, dropout, number, **kwargs
  ):
    self.rate, self.number = dropout, number
    self.norm1 = norm(inputs, num_groups, **kwargs)
    self.conv1 = conv(inputs, outputs, **kwargs)
    self.time = linear(time_dim, outputs, **kwargs)
    self.norm2 = norm(outputs, num_groups, **kwargs)
    self.conv2 = conv(outputs, outputs, scale=ALMOST_ZERO, **kwargs)
    if inputs != outputs:
      self.shortcut = linear(inputs, outputs, **kwargs)

  def __call__(self, x, time, keys):
    h = self.conv1(nnx.swish(self.norm1(x)))
    h = h + self.time(nnx.swish(time))[:, None, None, :]
    h = dropout(nnx.swish(self.norm2(h)), self.rate, keys, self.number)
    h = self.conv2(h)
    return h + (self.shortcut(x) if hasattr(self, 'shortcut') else x)


class Attention(nnx.Module):
  """Self-attention over all positions, with its own norm and residual."""

  def __init__(self, channels, *, num_heads, num_groups, **kwargs):
    self.num_heads = num_heads
    self.norm = norm(channels, num_groups, **kwargs)
    self.query = linear(channels, channels, **kwargs)
    self.key = linear(channels, channels, **kwargs)
    self.value = linear(channels, channels, **kwargs)
    self.out = linear(channels, channels, scale=ALMOST_ZERO, **kwargs)

  def __call__(self, x):
    b, h, w, c = x.shape
    normed = self.norm(x)

    def heads(layer):  # [B, H, W, C] -> [B, H W, heads, C / heads]
      return layer(normed).reshape(b, h * w, self.num_heads, -1)

    # Scaled by (C / heads) ** -0.5; the softmax is float32 inside.
    mixed = jax.nn.dot_product_attention(
      heads(self.query), heads(self.key), heads(self.value)
    )
    return x + self.out(mixed.reshape(b, h, w, c))


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

  def __init__(self, channels, **kwargs):
    self.conv = conv(channels, channels, **kwargs)

  def __call__(self, x):
    return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))
