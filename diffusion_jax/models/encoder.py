"""A classifier of noised images, for classifier guidance (arXiv 2105.05233).

Levels of residual blocks as on the way down of the U-Net, each halved but the
last; then the means of at most 4x4 parts of the map, and logits.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models import layers
from diffusion_jax.models.unet import Given, Stage, inputs_of

PARTS = 4  # a side


class Encoder(nnx.Module):
  """The classifier, see the module docstring.

  Args:
    image_shape: (H, W, C) of x0.
    doors: unused; a classifier takes no condition.
    out_channels: number of classes.
    channels: channels of the first level.
    multipliers: channels of each level, relative to the first.
    num_blocks: residual blocks per level.
    attention_resolutions: sizes of a map's shorter side at which blocks are
      followed by attention.
    num_heads: number of attention heads.
    num_groups: groups of the group norms; divides the channels of all levels.
    time_scale: factor on the times that the network is given.
    dropout: dropout rate in the residual blocks.
    dtype: dtype of the computation; parameters are float32.
    rngs: random keys of the initial values.
  """

  DOORS = ()

  def __init__(
    self,
    image_shape,
    *,
    doors,
    out_channels,
    channels=128,
    multipliers=(1, 2, 2, 2),
    num_blocks=2,
    attention_resolutions=(16,),
    num_heads=1,
    num_groups=32,
    time_scale=1.0,
    dropout=0.1,
    dtype='float32',
    rngs,
  ):
    del doors
    *sides, colors = image_shape
    widths = [channels * m for m in multipliers]
    last = len(widths) - 1
    self.channels, self.time_scale = channels, time_scale
    common = {'dtype': jnp.dtype(dtype), 'rngs': rngs}
    normed = {'num_groups': num_groups, **common}
    numbers = itertools.count()  # tells the dropout layers apart

    def stage(level, inputs):
      width, attends = widths[level], min(sides) // 2**level
      attends = attends in attention_resolutions
      return Stage(
        [
          layers.ResBlock(
            i, width, time_dim=4 * channels, dropout=dropout,
            number=next(numbers), **normed,
          )
          for i in inputs
        ],
        [
          layers.Attention(width, num_heads=num_heads, **normed)
          for _ in range(num_blocks * attends)
        ],
        [],
        layers.Downsample(width, **common) if level < last else None,
      )  # fmt: skip

    self.time1 = layers.linear(channels, 4 * channels, **common)
    self.time2 = layers.linear(4 * channels, 4 * channels, **common)
    self.conv_in = layers.conv(colors, channels, **common)
    down, _ = inputs_of(channels, widths, num_blocks)
    self.down = nnx.List(itertools.starmap(stage, enumerate(down)))
    self.norm_out = layers.norm(widths[-1], num_groups, **common)
    self.parts = tuple(min(PARTS, side // 2**last) for side in sides)
    inputs = widths[-1] * self.parts[0] * self.parts[1]
    self.out = layers.linear(inputs, out_channels, **common)

  def __call__(self, xt, t, keys=None, cond=None):
    """Computes logits of noised images.

    Args:
      xt: [B, H, W, C] float.
      t: [B] times, as the objective gives them.
      keys: [B] random keys for dropout; None disables it.
      cond: unused.

    Returns:
      [B, out_channels] float32.
    """
    del cond
    time = layers.sinusoid(self.time_scale * t, self.channels)
    time = self.time2(nnx.swish(self.time1(time)))
    blocks = [block for stage in self.down for block in stage.blocks]
    given = Given(layers.of_time(blocks, time), None)
    x = self.conv_in(xt.astype(self.conv_in.dtype))
    for stage in self.down:
      for i in range(len(stage.blocks)):
        x = stage.block(i, (x,), given, keys)
      if stage.resample is not None:
        x = stage.resampled(x, given, keys)
    x = layers.normalised(self.norm_out, (x,))
    x = jax.image.resize(
      x, (len(x), *self.parts, x.shape[-1]), 'linear', antialias=True
    )
    return self.out(x.reshape(len(x), -1)).astype(jnp.float32)
