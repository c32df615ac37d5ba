"""Autoencoders of images: those of latent diffusion (arXiv 2112.10752).

Encoder: a convolution, levels of residual blocks, each level halved but the
last, a middle of block, attention and block, and a convolution to the latents.
Decoder: the same backwards, with one block more a level. This is the structure
of diffusers' `AutoencoderKL` and `VQModel`.

A hybrid encoder has blocks of a transformer over all positions after its
convolutions.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax import models
from diffusion_jax.models import bottleneck, dit, layers, pointwise
from diffusion_jax.models.attention import attend


class Coder(NamedTuple):
  """An autoencoder as pure functions.

  `params` is {'encoder': ..., 'decoder': ...}, without a decoder only the
  encoder, and for 'vq' also 'quantize': {'codebook': [n, e]}.

  Attributes:
    init: key -> params.
    encode: (params, images [B, H, W, C] in [-1, 1]) -> [B, h, w, m] float32.
      For 'kl' m = 2 z, see `bottleneck.posterior`. Otherwise m = z: latents
      before quantisation, for 'fsq' bounded, for 'norm' normalised.
    snap: (params, z) -> z, the values that a decoder is trained on: for 'vq'
      the nearest code, for 'fsq' the nearest levels, for 'norm' normalised, and
      z itself for 'kl'.
    decode: (params, z [B, h, w, z]) -> images [B, H, W, C] float32, in about
      [-1, 1] and not clipped; None without a decoder. It does not snap.
    shape: (h, w, z) of the latents.
    regulariser: a name of `bottleneck.REGULARISERS`.
    codes: the number of codes, 0 for latents that are not quantised.
    index_of: (params, what `encode` returns) -> int32 [B, h, w], the number of
      each code below `codes`; None without codes.
  """

  init: Callable
  encode: Callable
  snap: Callable
  decode: Callable | None
  shape: tuple[int, int, int]
  regulariser: str
  codes: int = 0
  index_of: Callable | None = None


def create(
  image_shape: tuple[int, int, int],
  *,
  channels: int = 128,
  multipliers: Sequence[int] = (1, 2, 4),
  num_blocks: int = 2,
  latent_channels: int = 4,
  attention: bool = True,
  attention_resolutions: Sequence[int] = (),
  num_groups: int = 32,
  quant_conv: bool = True,
  hybrid: int = 0,
  regulariser: str = 'kl',
  codes: int = 8192,
  code_channels: int = 0,
  levels: Sequence[int] = (8, 5, 5, 5),
  decoder: bool = True,
  dtype: str = 'float32',
) -> Coder:
  """An autoencoder.

  Args:
    image_shape: (H, W, C), multiples of 2 ** (levels - 1).
    channels: channels of the first level.
    multipliers: channels of each level, relative to the first. The latents are
      2 ** (len - 1) times smaller than the images a side.
    num_blocks: residual blocks per level of the encoder (one more per level of
      the decoder).
    latent_channels: channels between the networks and the 1x1 convolutions.
    attention: whether the middles have attention.
    attention_resolutions: sizes of a map's shorter side at which blocks are
      followed by attention.
    num_groups: groups of the group norms; divides the channels of all levels.
    quant_conv: whether there are 1x1 convolutions before and after the latents.
    hybrid: blocks of a transformer at the end of the encoder.
    regulariser: a name of `bottleneck.REGULARISERS`.
    codes: of 'vq': the size of the codebook.
    code_channels: of 'vq': channels of a code; 0 = latent_channels.
    levels: of 'fsq': the levels of each channel of the latents.
    decoder: whether there is a decoder.
    dtype: dtype of the computation; parameters are float32.
  """
  *sides, colours = image_shape
  widths = [channels * m for m in multipliers]
  common = {
    'sides': tuple(sides), 'widths': widths, 'num_blocks': num_blocks,
    'attends': attention, 'resolutions': tuple(attention_resolutions),
    'num_groups': num_groups, 'dtype': jnp.dtype(dtype),
  }  # fmt: skip
  latents = channels_of(regulariser, latent_channels, code_channels, levels)
  doubled = 1 + (regulariser == 'kl')
  coder = models.fence(
    Encoder, colours, doubled * latent_channels, doubled * latents,
    quant_conv=quant_conv, hybrid=hybrid, **common,
  )  # fmt: skip
  parts = {'encoder': coder.init}
  if decoder:
    uncoder = models.fence(
      Decoder, latents, latent_channels, colours, quant_conv=quant_conv,
      **common,
    )  # fmt: skip
    parts['decoder'] = uncoder.init
  if regulariser == 'vq':
    parts['quantize'] = lambda key: _codebook(key, codes, latents)
  bound, snap, index_of = _regulariser(regulariser, tuple(levels))
  return Coder(
    init=lambda key: _initial(key, parts),
    encode=lambda params, x: bound(coder.apply(params['encoder'], x)),
    snap=snap,
    decode=(lambda p, z: uncoder.apply(p['decoder'], z)) if decoder else None,
    shape=(*(side // 2 ** (len(widths) - 1) for side in sides), latents),
    regulariser=regulariser,
    codes={'vq': codes, 'fsq': math.prod(levels)}.get(regulariser, 0),
    index_of=index_of,
  )


def channels_of(
  regulariser: str,
  latent_channels: int,
  code_channels: int = 0,
  levels: Sequence[int] = (),
  **others,
) -> int:
  """The channels of the latents.

  Args:
    regulariser: as for `create`.
    latent_channels: channels of the encoder's latents.
    code_channels: of 'vq': channels of a code; 0 for latent_channels.
    levels: of 'fsq': the levels of each channel.
    **others: the other options of `create`, unused.
  """
  del others
  sizes = {'vq': code_channels or latent_channels, 'fsq': len(levels)}
  return sizes.get(regulariser, latent_channels)


def _initial(key, parts):
  return {
    name: init(jax.random.fold_in(key, number))
    for number, (name, init) in enumerate(parts.items())
  }


def _codebook(key, codes, channels):
  edge = 1 / codes
  shape = codes, channels
  return {'codebook': jax.random.uniform(key, shape, minval=-edge, maxval=edge)}


def _regulariser(name: str, levels) -> tuple:
  """What follows the encoder, `Coder.snap`, and `Coder.index_of`."""
  if name == 'fsq':
    return (
      lambda z: bottleneck.bounded(z, levels),
      lambda params, z: bottleneck.rounded(z, levels),
      lambda params, z: bottleneck.level_index(z, levels),
    )
  if name == 'norm':
    return bottleneck.normed, lambda params, z: bottleneck.normed(z), None
  if name == 'vq':

    def index_of(params, z):
      return bottleneck.nearest(params['quantize']['codebook'], z)

    def snap(params, z):
      return params['quantize']['codebook'][index_of(params, z)]

    return lambda z: z, snap, index_of
  return lambda z: z, lambda params, z: z, None


# --- networks ----------------------------------------------------------------


class Level(nnx.Module):
  """Residual blocks, each with attention or none, and a resampling or none."""

  def __init__(self, inputs, width, attends, resample, **options):
    normed = {'num_groups': options.pop('num_groups'), **options}
    self.blocks = nnx.List(_block(i, width, **normed) for i in inputs)
    self.attentions = nnx.List(
      layers.Attention(width, num_heads=1, **normed)
      for _ in range(len(inputs) * attends)
    )
    self.resample = resample and resample(width, **options)

  def __call__(self, x):
    for i, block in enumerate(self.blocks):
      x = block((x,), 0, None)
      if self.attentions:
        x = self.attentions[i](x)
    return x if self.resample is None else self.resample(x)


def _block(inputs, width, **options):
  return layers.ResBlock(
    inputs, width, time_dim=0, dropout=0.0, number=0, **options
  )


class Encoder(nnx.Module):
  """Images -> latents, see the module docstring.

  Args:
    colours: channels of the images.
    middle: channels before the 1x1 convolution.
    outputs: channels after it.
    sides: (H, W) of the images.
    widths: channels of each level.
    num_blocks: residual blocks per level.
    attends: whether the middle has attention.
    resolutions: sizes of a map's shorter side with attention.
    num_groups: groups of the group norms.
    quant_conv: whether there is a 1x1 convolution at the end.
    hybrid: blocks of a transformer.
    dtype: dtype of the computation.
    rngs: random keys of the initial values.
  """

  def __init__(
    self, colours, middle, outputs, *, sides, widths, num_blocks, attends,
    resolutions, num_groups, quant_conv, hybrid, dtype, rngs,
  ):  # fmt: skip
    options = {'dtype': dtype, 'rngs': rngs}
    normed = {'num_groups': num_groups, **options}
    last = len(widths) - 1
    self.conv_in = layers.conv(colours, widths[0], **options)
    befores = [widths[0], *widths]
    self.down = nnx.List(
      Level(
        [befores[level]] + [width] * (num_blocks - 1),
        width,
        min(sides) // 2**level in resolutions,
        layers.Downsample if level < last else None,
        **normed,
      )
      for level, width in enumerate(widths)
    )
    _add_middle(self, widths[-1], attends, **normed)
    size = tuple(side // 2**last for side in sides)
    self.hybrid = nnx.List(
      Transformer(size, widths[-1], **options) for _ in range(hybrid)
    )
    self.norm_out = layers.norm(widths[-1], num_groups, **options)
    self.conv_out = layers.conv(widths[-1], middle, **options)
    if quant_conv:
      self.quant_conv = layers.linear(middle, outputs, **options)

  def __call__(self, x):
    """[B, H, W, colours] -> [B, h, w, outputs] float32."""
    x = _convolved(self.conv_in, x)
    for level in self.down:
      x = level(x)
    x = _middle(self, x)
    for block in self.hybrid:
      x = block(x)
    x = _convolved(self.conv_out, layers.normalised(self.norm_out, (x,)))
    if hasattr(self, 'quant_conv'):
      x = self.quant_conv(x)
    return x.astype(jnp.float32)


class Decoder(nnx.Module):
  """Latents -> images, see the module docstring.

  Args:
    inputs: channels of the latents.
    middle: channels after the 1x1 convolution.
    colours: channels of the images.
    sides: (H, W) of the images.
    widths: channels of each level of the encoder.
    num_blocks: residual blocks per level of the encoder; here one more.
    attends: whether the middle has attention.
    resolutions: sizes of a map's shorter side with attention.
    num_groups: groups of the group norms.
    quant_conv: whether there is a 1x1 convolution at the beginning.
    dtype: dtype of the computation.
    rngs: random keys of the initial values.
  """

  def __init__(
    self, inputs, middle, colours, *, sides, widths, num_blocks, attends,
    resolutions, num_groups, quant_conv, dtype, rngs,
  ):  # fmt: skip
    options = {'dtype': dtype, 'rngs': rngs}
    normed = {'num_groups': num_groups, **options}
    if quant_conv:
      self.post_quant_conv = layers.linear(inputs, middle, **options)
    self.conv_in = layers.conv(middle, widths[-1], **options)
    _add_middle(self, widths[-1], attends, **normed)
    befores = [*widths[1:], widths[-1]]
    self.up = nnx.List(
      Level(
        [befores[level]] + [widths[level]] * num_blocks,
        widths[level],
        min(sides) // 2**level in resolutions,
        layers.Upsample if level > 0 else None,
        **normed,
      )
      for level in reversed(range(len(widths)))
    )
    self.norm_out = layers.norm(widths[0], num_groups, **options)
    self.conv_out = layers.conv(widths[0], colours, **options)

  def __call__(self, z):
    """[B, h, w, inputs] -> [B, H, W, colours] float32."""
    z = z.astype(self.conv_in.dtype)
    if hasattr(self, 'post_quant_conv'):
      z = self.post_quant_conv(z)
    x = _middle(self, _convolved(self.conv_in, z))
    for level in self.up:
      x = level(x)
    x = _convolved(self.conv_out, layers.normalised(self.norm_out, (x,)))
    return x.astype(jnp.float32)


def _convolved(layer, x):
  y = layers.convolved(layer, x.astype(layer.dtype))
  return y + pointwise.broadcast(layer.bias[...], y)


def _add_middle(module, width, attends, **options):
  module.middle1 = _block(width, width, **options)
  if attends:
    module.middle_attention = layers.Attention(width, num_heads=1, **options)
  module.middle2 = _block(width, width, **options)


def _middle(module, x):
  x = module.middle1((x,), 0, None)
  if hasattr(module, 'middle_attention'):
    x = module.middle_attention(x)
  return module.middle2((x,), 0, None)


class Transformer(nnx.Module):
  """Self-attention over all positions and a perceptron, both with a residual.

  The last layers of both are zero at first.

  Args:
    size: (h, w) of the maps.
    width: C, a multiple of 4; heads have HEAD channels if that divides it.
    **options: dtype and rngs.
  """

  HEAD = 32

  def __init__(self, size, width, **options):
    self.size, self.width = size, width
    self.heads = 1 if width % self.HEAD else width // self.HEAD
    self.query, self.key, self.value, self.mlp1 = (
      layers.linear(width, outputs, **options)
      for outputs in (width, width, width, 4 * width)
    )
    self.out, self.mlp2 = (
      layers.linear(inputs, width, scale=layers.ALMOST_ZERO, **options)
      for inputs in (width, 4 * width)
    )

  def __call__(self, x):
    """[B, h, w, C] -> [B, h, w, C]."""
    tokens = x.reshape(len(x), -1, self.width)
    where = jnp.asarray(dit.positions(*self.size, self.width), x.dtype)
    h = dit.normed(tokens) + where[None]
    heads = (
      f(h).reshape(*h.shape[:2], self.heads, -1)
      for f in (self.query, self.key, self.value)
    )
    tokens = tokens + self.out(attend(*heads).reshape(h.shape))
    h = nnx.gelu(self.mlp1(dit.normed(tokens)), approximate=True)
    return (tokens + self.mlp2(h)).reshape(x.shape)
