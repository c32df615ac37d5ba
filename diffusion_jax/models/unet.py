"""The U-Net of DDPM (arXiv 2006.11239, appendix B) and of those after it.

Down: at each level `num_blocks` residual blocks, then halve. Middle: block,
attention, block. Up: at each level `num_blocks + 1` blocks, then double.
Attention follows *every* block whose map has a size in `attention_resolutions`.
The skips are the first convolution, each block (after its attention) and each
halving: 12 of them on CIFAR-10. `styles` lists how other papers' U-Nets differ.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models import doors as doors_of
from diffusion_jax.models import layers, pointwise, styles, transformer


class Given(NamedTuple):
  """What each block is given besides its maps.

  Attributes:
    times: number of a block -> [B or 1, outputs] float32, what its layer makes
      of the embedding of time, label and vector.
    tokens: tokens [B, n, d] and mask [B, n], or None.
  """

  times: dict[int, jax.Array]
  tokens: tuple[jax.Array, jax.Array] | None


class Stage(nnx.Module):
  """One level: blocks, the attentions after each or none, and a resampling."""

  def __init__(self, blocks, attentions, crosses, resample):
    self.blocks = nnx.List(blocks)
    self.attentions = nnx.List(attentions)
    self.crosses = nnx.List(crosses)
    self.resample = resample

  def block(self, i, xs, given, keys):
    block = self.blocks[i]
    x = block(xs, given.times[block.number], keys)
    # If there are fewer attentions than blocks, they follow the last ones.
    at = i - len(self.blocks) + len(self.attentions)
    if at < 0 or not self.attentions:
      return x
    # Dropout is for training, with a rate of 0, too.
    x = _attended(self.attentions[at], x, given, keys is not None)
    return self.crosses[at](x, *given.tokens) if self.crosses else x

  def resampled(self, x, given, keys, size=None):
    if isinstance(self.resample, layers.ResBlock):
      time = given.times[self.resample.number]
      return self.resample((x,), time, keys)
    return self.resample(x) if size is None else self.resample(x, size)


def _attended(layer, x, given, training):
  if isinstance(layer, transformer.Transformer):
    return layer(x, given.tokens, training)
  return layer(x, training)


def inputs_of(channels: int, widths: list[int], num_blocks: int):
  """The input widths of the blocks of each level, down and up.

  Args:
    channels: channels of the first convolution.
    widths: channels of each level.
    num_blocks: blocks per level down.
  """
  down, up, width = [], [], channels
  skips = skips_of(channels, widths, num_blocks)
  for outputs in widths:
    down.append([width] + [outputs] * (num_blocks - 1))
    width = outputs
  for outputs in reversed(widths):
    inputs = [width] + [outputs] * num_blocks
    up.append([i + skips.pop() for i in inputs])
    width = outputs
  return down, up[::-1]


def skips_of(channels: int, widths: list[int], num_blocks: int) -> list[int]:
  """The widths of the skips, in the order in which they are computed.

  Args:
    channels: channels of the first convolution.
    widths: channels of each level.
    num_blocks: blocks per level down.
  """
  found = [channels]
  for level, outputs in enumerate(widths):
    found += [outputs] * (num_blocks + (level < len(widths) - 1))
  return found


def _attending(sides, style, resolutions, levels) -> tuple[bool, ...]:
  """Whether each level and the middle have attention."""
  maps = (min(sides) // 2**level for level in range(levels))
  return *(size in resolutions for size in maps), style.middle_attention


def _attentions(width, count, depth, *, transforms, heads, tokens, **options):
  """What attends in a level, or the middle.

  Args:
    width: channels of the maps.
    count: how often.
    depth: blocks of a transformer; 0 = nothing attends.
    transforms: whether they are transformers, not just attention.
    heads: (their number, the channels of each in place of it or 0).
    tokens: width of the tokens, or None.
    **options: of `layers.Attention`.

  Returns:
    (self-attentions or transformers, cross-attentions if there are tokens).
  """
  number, channels = heads
  options['num_heads'] = width // channels if channels else number
  count = count if depth else 0
  if transforms:
    make = functools.partial(transformer.Transformer, width, tokens, **options)
    return [make(depth=depth) for _ in range(count)], []
  crosses = count if tokens else 0
  return (
    [layers.Attention(width, **options) for _ in range(count)],
    [doors_of.CrossAttention(width, tokens, **options) for _ in range(crosses)],
  )


def _resampler(width, way, style, block, plain, **common):
  """What halves ('down') or doubles ('up') the map of a level."""
  if style.resampling == 'block':
    return block(width, width, way)
  if way == 'down':
    return layers.Downsample(width, style=style, **common)
  return layers.Upsample(width, style=style, plain=plain, **common)


ZERO = layers.ALMOST_ZERO
REMAT = ('none', 'blocks', 'all')


class UNet(nnx.Module):
  """The U-Net, see the module docstring.

  Args:
    image_shape: (H, W, C) of x0.
    doors: name -> size, see `models.create`.
    out_channels: channels of the prediction; 0 = the network ends after the
      middle, see `control`.
    channels: channels of the first level.
    multipliers: channels of each level, relative to the first.
    num_blocks: residual blocks per level down (one more per level up).
    attention_resolutions: sizes of a map's shorter side, in pixels, at which
      blocks are followed by attention.
    transformer_depths: in place of attention_resolutions: for each level and
      for the middle, the blocks of the transformers in it, see `transformer`;
      0 = it has none.
    num_heads: number of attention heads.
    head_channels: channels of each head instead; 0 = as num_heads says.
    num_groups: groups of the group norms; divides the channels of all levels.
    style: a key of `styles.STYLES`.
    details: fields of `styles.Style` that differ, with their values.
    time_scale: factor on the times that the network is given.
    dropout: dropout rate in the residual blocks.
    dtype: dtype of the computation; parameters are float32.
    remat: what the backward pass computes again instead of keeping it: 'none',
      'blocks' (all within a block; its input and output are kept), or 'all'
      (also all within a level, except for the skips).
    plain: names of `layers.MEASURES` that are not taken, to compare.
    rngs: random keys of the initial values.
  """

  DOORS = doors_of.NAMES
  # Parameters that are used in the dtype of the computation alone.
  CAST = (
    r'(.*/)?(query|key|value|out|shortcut|conv2|resample/conv)/bias'
    r'|(time1|time2|conv_in)/bias'
  )

  def __init__(
    self, image_shape, *, doors, out_channels, channels=128,
    multipliers=(1, 2, 2, 2), num_blocks=2, attention_resolutions=(16,),
    transformer_depths=(), num_heads=1, head_channels=0, num_groups=32,
    style='ddpm', details=(), time_scale=1.0, dropout=0.1, dtype='float32',
    remat='none', plain=(), rngs,
  ):  # fmt: skip
    *sides, colors = image_shape
    widths = [channels * m for m in multipliers]
    last = len(widths) - 1
    self.style = how = styles.create(style, dict(details))
    self.remat, self.plain = remat, frozenset(plain)
    self.channels, self.time_scale = channels, time_scale
    common = {'dtype': jnp.dtype(dtype), 'rngs': rngs}
    dense = {'init': how.init, **common}
    measured = {'plain': self.plain, **common}
    blocks = {'num_groups': num_groups, 'style': how, **measured}
    numbers = itertools.count()  # tells the dropout layers apart

    def block(inputs, outputs, resample=None):
      return layers.ResBlock(
        inputs, outputs, time_dim=4 * channels, dropout=dropout,
        number=next(numbers), resample=resample, **blocks,
      )  # fmt: skip

    depths = transformer_depths or _attending(
      sides, how, attention_resolutions, len(widths)
    )
    attend = functools.partial(
      _attentions, transforms=bool(transformer_depths), **blocks,
      heads=(num_heads, head_channels), tokens=doors.get('tokens'),
    )  # fmt: skip

    def stage(level, inputs, way, count):
      width = widths[level]
      return Stage(
        [block(i, width) for i in inputs],
        *attend(width, count, depths[level]),
        way and _resampler(width, way, how, block, **measured),
      )

    self.time1 = layers.linear(channels, 4 * channels, **dense)
    self.time2 = layers.linear(4 * channels, 4 * channels, **dense)
    inputs = colors + doors.get('channels', 0)
    self.conv_in = layers.conv(inputs, channels, **dense)
    down, up = inputs_of(channels, widths, num_blocks)
    self.down = nnx.List(
      stage(level, inputs, 'down' if level < last else None, num_blocks)
      for level, inputs in enumerate(down)
    )
    self.middle1 = block(widths[-1], widths[-1])
    made, crosses = attend(widths[-1], 1, depths[-1])
    if made:
      (self.middle_attention,) = made
    self.middle_crosses = nnx.List(crosses)
    self.middle2 = block(widths[-1], widths[-1])
    if out_channels:
      attends = num_blocks + 1 if how.up_attention == 'all' else 1
      self.up = nnx.List(
        stage(level, up[level], 'up' if level > 0 else None, attends)
        for level in range(last, -1, -1)
      )
      self.norm_out = layers.norm(
        widths[0], num_groups, epsilon=how.epsilon, **common
      )
      self.conv_out = layers.conv(widths[0], out_channels, scale=ZERO, **dense)
    width = 4 * channels if how.doors_at == 'time' else channels
    doors_of.add_embeddings(self, doors, width, vector=how.vector, **common)

  def __call__(self, xt, t, keys=None, cond=None):
    """Computes the prediction for noised images.

    Args:
      xt: [B, H, W, C] float.
      t: [B] times, as the objective gives them: for DDPM, raw steps.
      keys: [B] random keys for dropout; None disables it.
      cond: door -> array, see `conditioning.Conditioner`, for all doors that
        the network was made with, and perhaps `doors.HINT` and
        `doors.RESIDUALS`.

    Returns:
      [B, H, W, out_channels] float32; without out_channels the skips, in the
      order in which they are computed, and the map of the middle.
    """
    times = layers.of_time(
      [m for _, m in nnx.iter_graph(self) if isinstance(m, layers.ResBlock)],
      self._time(t, cond),
    )
    given = Given(times, doors_of.tokens_of(cond, len(xt)))
    of_level = jax.checkpoint if self.remat == 'all' else lambda f: f

    xt = doors_of.joined(xt.astype(self.conv_in.dtype), cond)
    x = layers.convolved(self.conv_in, xt, plain=self.plain)
    x = x + pointwise.broadcast(self.conv_in.bias[...], x)
    (x,) = doors_of.added([x], cond, doors_of.HINT)
    skips = [x]
    for stage in self.down:
      x, found = of_level(functools.partial(self._down, stage))(x, given, keys)
      skips += found

    x = self._block(self.middle1)((x,), times[self.middle1.number], keys)
    if hasattr(self, 'middle_attention'):
      x = self._middle_attended(x, given, keys is not None)
    for cross in self.middle_crosses:
      x = cross(x, *given.tokens)
    x = self._block(self.middle2)((x,), times[self.middle2.number], keys)
    if not hasattr(self, 'up'):
      return [*skips, x]

    *skips, x = doors_of.added([*skips, x], cond, doors_of.RESIDUALS)
    for stage in self.up:
      left = len(skips) - len(stage.blocks)
      # That of the next skips: not twice that of x where halving rounded up.
      size = skips[left - 1].shape[1:3] if left else None
      x = of_level(functools.partial(self._up, stage, size))(
        x, skips[left:], given, keys
      )
      skips = skips[:left]
    x = layers.normalised(self.norm_out, (x,), plain=self.plain)
    x = layers.convolved(self.conv_out, x, plain=self.plain)
    x = x.astype(jnp.float32)
    return x + pointwise.broadcast(self.conv_out.bias[...], x)

  def _time(self, t, cond):
    """The embedding of time, label and vector, [B or 1, 4 * channels]."""
    time = layers.time_features(
      t * self.time_scale,
      self.channels,
      self.style.sinusoid,
      self.style.freq_shift,
    )
    if self.style.doors_at == 'sinusoid':
      time = doors_of.embedded(self, time, cond)
    time = self.time2(nnx.swish(self.time1(time)))
    if self.style.doors_at == 'time':
      time = doors_of.embedded(self, time, cond)
    return time

  def _block(self, block):
    return jax.checkpoint(block) if self.remat != 'none' else block

  def _down(self, stage, x, given, keys):
    """One level down: its output and its skips."""
    skips = []
    for i in range(len(stage.blocks)):
      x = self._block(functools.partial(stage.block, i))((x,), given, keys)
      skips.append(x)
    if stage.resample is not None:
      x = stage.resampled(x, given, keys)
      skips.append(x)
    return x, skips

  def _middle_attended(self, x, given, training):
    layer = self.middle_attention
    if not isinstance(layer, transformer.Transformer):
      return _attended(layer, x, given, training)
    # Up to ten blocks, which are as worth recomputing as a residual block.
    attended = functools.partial(_attended, layer, training=training)
    return self._block(attended)(x, given)

  def _up(self, stage, size, x, skips, given, keys):
    for i, skip in enumerate(reversed(skips)):
      x = self._block(functools.partial(stage.block, i))((x, skip), given, keys)
    if stage.resample is None:
      return x
    return stage.resampled(x, given, keys, size)
