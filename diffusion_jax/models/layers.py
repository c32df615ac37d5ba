"""Layers of the networks, NHWC, as in DDPM (arXiv 2006.11239).

Initialisation follows the original: variance scaling (fan average, uniform) for
kernels, 0 for biases, and a scale of 1e-10 for layers with an output of almost
zero; see `initial` for others. Parameters are float32; `dtype` is the dtype of
the computation.
"""

import collections
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models import (
  attention,
  convolution,
  normalise,
  pointwise,
  styles,
  upsampling,
)

# What is computed in another, faster form than it is usually written. Networks
# take a set of these names, `plain`, to compute them in the usual form.
MEASURES = ('norm', 'padding', 'upsampling', 'attention', 'dropout')
COLOURS = 8


def kernel_init(scale: float = 1.0):
  return nnx.initializers.variance_scaling(scale, 'fan_avg', 'uniform')


ALMOST_ZERO = 1e-10


def initial(init: str, scale: float, inputs: int) -> dict:
  """The initializers of a layer, as arguments of nnx.Conv and nnx.Linear.

  Args:
    init: see `styles.Style`.
    scale: of the variance for 'ddpm'; ALMOST_ZERO is zero for 'torch'.
    inputs: number of inputs of each output.
  """
  if init == 'ddpm':
    return {'kernel_init': kernel_init(scale)}
  bound = 0.0 if scale == ALMOST_ZERO else inputs**-0.5

  def uniform(key, shape, dtype, *_, **__):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return {'kernel_init': uniform, 'bias_init': uniform}


def conv(inputs, outputs, *, scale=1.0, init='ddpm', **kwargs) -> nnx.Conv:
  """A 3x3 convolution, padded to keep the size.

  Args:
    inputs: input channels.
    outputs: output channels.
    scale: scale of the initial kernel, see `initial`.
    init: see `initial`.
    **kwargs: arguments of nnx.Conv.
  """
  how = initial(init, scale, 9 * inputs)
  how['conv_general_dilated'] = convolution.general
  return nnx.Conv(inputs, outputs, (3, 3), **how, **kwargs)


def linear(inputs, outputs, *, scale=1.0, init='ddpm', **kwargs) -> nnx.Linear:
  """A dense layer over the last axis, which is also a 1x1 convolution.

  Args:
    inputs: input channels.
    outputs: output channels.
    scale: scale of the initial kernel, see `initial`.
    init: see `initial`.
    **kwargs: arguments of nnx.Linear.
  """
  return nnx.Linear(inputs, outputs, **initial(init, scale, inputs), **kwargs)


def norm(channels, num_groups, *, epsilon=1e-6, **kwargs) -> nnx.GroupNorm:
  """Group norm, with float32 statistics for any dtype.

  Args:
    channels: channels of the maps.
    num_groups: number of groups.
    epsilon: added to the variance.
    **kwargs: dtype and rngs.
  """
  # In two passes, for accuracy.
  return nnx.GroupNorm(
    channels, num_groups, epsilon=epsilon, use_fast_variance=False, **kwargs
  )


def normalised(
  layer: nnx.GroupNorm,
  xs: tuple[jax.Array, ...],
  *,
  shift: jax.Array | None = None,
  modulation: tuple[jax.Array, jax.Array] | None = None,
  swish: bool = True,
  plain: frozenset = frozenset(),
) -> jax.Array:
  """Group norm of maps as if concatenated, see `normalise.group_norm`.

  Args:
    layer: its parameters.
    xs: maps [B, H, W, C_i].
    shift: [B, C], added to every pixel before the norm.
    modulation: a factor less 1 and an offset, [B, C] each, for the norm's
      result before swish.
    swish: whether to apply swish to the result.
    plain: the measures that are not taken.
  """
  if 'norm' not in plain:
    scale, bias = layer.scale[...], layer.bias[...]
    if modulation is not None:
      factor, offset = modulation
      scale = scale[None] * (1 + factor)
      bias = bias[None] * (1 + factor) + offset
    return normalise.group_norm(
      xs, scale, bias, layer.num_groups, shift, swish, layer.epsilon
    )
  x = jnp.concatenate(xs, axis=-1)
  if shift is not None:
    x = x + shift.astype(x.dtype)[:, None, None, :]
  y = layer(x)
  if modulation is not None:
    factor, offset = (m.astype(y.dtype)[:, None, None] for m in modulation)
    y = y * (1 + factor) + offset
  return nnx.swish(y) if swish else y


def of_time(blocks: list, time: jax.Array) -> dict[int, jax.Array]:
  """What each block's dense layer makes of the time.

  One product for each width, since a product of a GPU takes some microseconds
  at least, forwards and backwards.

  Args:
    blocks: residual blocks.
    time: [B, T].

  Returns:
    The number of each block -> [B, outputs] float32.
  """
  alike = collections.defaultdict(list)
  for block in blocks:
    alike[block.time.kernel.shape].append(block)
  found = {}
  for some in alike.values():
    kernels = jnp.stack([block.time.kernel[...] for block in some], 1)
    biases = jnp.stack([block.time.bias[...] for block in some])
    y = jnp.einsum('bt,tno->bno', nnx.swish(time), kernels.astype(time.dtype))
    y = y.astype(jnp.float32) + biases[None]
    parts = jnp.split(y, len(some), axis=1)
    numbers = (block.number for block in some)
    found |= zip(numbers, (part[:, 0] for part in parts), strict=True)
  return found


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
  return convolution.same(x, kernel)[..., :outputs]


def time_features(
  t: jax.Array, dim: int, kind: str = 'sin_cos', freq_shift: int = 1
) -> jax.Array:
  """[B] times -> [B, dim], the features of the time.

  Args:
    t: times as the objective gives them; for DDPM raw steps, not scaled to
      [0, 1].
    dim: number of features, even.
    kind: 'sin_cos' or 'cos_sin', see `sinusoid`, in this order of the halves,
      or 'fourier': cos and sin of 2 pi 16 f t with normal f (arXiv 2011.13456).
      In place of random f, their absolute values are the normal distribution's
      quantiles.
    freq_shift: see `sinusoid`.
  """
  half = dim // 2
  if kind == 'fourier':
    quantiles = 0.5 + (jnp.arange(half) + 0.5) / dim
    frequencies = 2 * jnp.pi * 16 * jax.scipy.special.ndtri(quantiles)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
  features = sinusoid(t, dim, freq_shift)
  return jnp.roll(features, half, -1) if kind == 'cos_sin' else features


def sinusoid(t: jax.Array, dim: int, freq_shift: int = 1) -> jax.Array:
  """sin, then cos, of t exp(-ln(10000) i / (dim/2 - freq_shift)), [B, dim]."""
  half = dim // 2
  exponents = jnp.arange(half) / (half - freq_shift)
  frequencies = jnp.exp(-jnp.log(10000.0) * exponents)
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

  Takes a tuple of maps, as if concatenated, and its part of `of_time`, or 0 if
  `time_dim` is 0. With `resample` 'down' or 'up' it halves (by averaging) or
  doubles (by repeating) a map, after the first swish.
  """

  def __init__(
    self, inputs, outputs, *, time_dim, num_groups, dropout, number,
    style=styles.DDPM, resample=None, plain=frozenset(), **kwargs,
  ):  # fmt: skip
    self.rate, self.number, self.plain = dropout, number, plain
    self.style, self.resample = style, resample
    of_norm = {'epsilon': style.epsilon, **kwargs}
    kwargs['init'] = style.init
    self.norm1 = norm(inputs, num_groups, **of_norm)
    self.conv1 = conv(inputs, outputs, **kwargs)
    if time_dim:
      self.time = linear(time_dim, outputs * (1 + style.scale_shift), **kwargs)
    self.norm2 = norm(outputs, num_groups, **of_norm)
    self.conv2 = conv(outputs, outputs, scale=ALMOST_ZERO, **kwargs)
    if inputs != outputs or (resample and style.resampled_shortcut):
      self.shortcut = linear(inputs, outputs, **kwargs)

  def __call__(self, xs, time, keys):
    h = self._first(normalised(self.norm1, xs, plain=self.plain))
    # The bias and the time are a shift of the norm, not passes over the map.
    shift, modulation = time, None
    if self.style.scale_shift:
      modulation, shift = jnp.split(shift, 2, -1), jnp.zeros(())
    shift = shift + self.conv1.bias[...][None]
    h = normalised(
      self.norm2, (h,), shift=shift, modulation=modulation, plain=self.plain
    )
    h = dropout(h, self.rate, keys, self.number, self.plain)
    y = self._second(h, tuple(resized(x, self.resample) for x in xs))
    scale = self.style.skip_scale
    return y if scale == 1 else y * jnp.asarray(scale, y.dtype)

  def _first(self, h):
    if self.resample == 'up' and 'upsampling' not in self.plain:
      return upsampling.upsample_conv(h, self.conv1.kernel[...])
    return convolved(self.conv1, resized(h, self.resample))

  def _second(self, h, xs):
    if not hasattr(self, 'shortcut'):
      return xs[0] + self.conv2(h)
    if 'norm' in self.plain:
      return self.shortcut(jnp.concatenate(xs, axis=-1)) + self.conv2(h)
    return self.conv2(h) + pointwise.projected(self.shortcut, xs)


def resized(x: jax.Array, how: str | None) -> jax.Array:
  """A map [B, H, W, C] halved ('down'), doubled ('up') or as it is (None)."""
  if how == 'up':
    return x.repeat(2, axis=1).repeat(2, axis=2)
  if how == 'down':
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c)
    return x.mean((2, 4), dtype=jnp.float32).astype(x.dtype)
  return x


class Attention(nnx.Module):
  """Self-attention over all positions, with its own norm and residual."""

  def __init__(
    self, channels, *, num_heads, num_groups, style=styles.DDPM,
    plain=frozenset(), **kwargs,
  ):  # fmt: skip
    self.num_heads, self.plain = num_heads, plain
    self.skip_scale = style.skip_scale
    self.norm = norm(channels, num_groups, epsilon=style.epsilon, **kwargs)
    kwargs['init'] = style.init
    inner = {'scale': style.attention_init, **kwargs}
    self.query = linear(channels, channels, **inner)
    self.key = linear(channels, channels, **inner)
    self.value = linear(channels, channels, **inner)
    self.out = linear(channels, channels, scale=ALMOST_ZERO, **kwargs)

  def __call__(self, x, training=False):
    y = self._attended(x, training)
    scale = self.skip_scale
    return y if scale == 1 else y * jnp.asarray(scale, y.dtype)

  def _attended(self, x, training):
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
      (f(normed) if plain else pointwise.projected(f, (normed,))).reshape(
        b, h * w, self.num_heads, -1
      )
      for f in (self.query, self.key, self.value)
    )
    mixed = mix(*heads).reshape(b, h, w, c)
    if plain:
      return x + self.out(mixed)
    return pointwise.projected(self.out, (mixed,), x)


def _plain_attention(query, key, value):
  # Scaled by (C / heads) ** -0.5; the softmax is float32 inside.
  return jax.nn.dot_product_attention(query, key, value)


class Downsample(nnx.Module):
  """Halves the map by a strided 3x3 convolution."""

  def __init__(self, channels, *, style=styles.DDPM, **kwargs):
    # 'end': as TensorFlow's SAME, which pads even sizes only at the end.
    side = (int(style.padding == 'both'), 1)
    self.conv = conv(
      channels, channels, strides=2, padding=(side, side), init=style.init,
      **kwargs,
    )  # fmt: skip

  def __call__(self, x):
    return self.conv(x)


class Upsample(nnx.Module):
  """Doubles the map by nearest neighbour, then a 3x3 convolution."""

  def __init__(
    self, channels, *, style=styles.DDPM, plain=frozenset(), **kwargs
  ):
    self.plain = plain
    self.conv = conv(channels, channels, init=style.init, **kwargs)

  def __call__(self, x, size=None):
    h, w = size or (2 * side for side in x.shape[1:3])
    if 'upsampling' in self.plain or (h % 2 or w % 2):
      return self.conv(resized(x, 'up')[:, :h, :w])
    y = upsampling.upsample_conv(x, self.conv.kernel[...])
    return y + pointwise.broadcast(self.conv.bias[...], y)
