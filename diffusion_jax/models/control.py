"""ControlNet (arXiv 2302.05543): a picture steers a U-Net that is not changed.

The net is the first half of another U-Net. An embedding of the picture is added
to its first map, and what 1x1 convolutions make of its skips and its middle is
added to those of the U-Net. These convolutions begin with zeros.

  picture --embedding--> hint
  xt, t, cond, hint --net--> residuals
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax import models
from diffusion_jax.models import doors as doors_of
from diffusion_jax.models import layers, unet
from diffusion_jax.system.errors import UserError

PART = 'control'  # name of the part of a run's parameters
NET, EMBEDDING = 'net', 'embedding'
PICTURE, SCALE = 'picture', 'scale'
ZERO = {'scale': layers.ALMOST_ZERO, 'init': 'torch'}


class Control(NamedTuple):
  """A ControlNet as pure functions.

  Attributes:
    net: (params, xt, t, None, cond) -> residuals, see `doors.RESIDUALS`.
    embedding: (params, picture [1, H, W, 3] in [0, 1]) -> hint [1, h, w, C].
    doors: the conditions of the net.
  """

  net: models.Model
  embedding: models.Model
  doors: tuple[str, ...]

  def init(self, key) -> dict:
    """Initial parameters: {NET: ..., EMBEDDING: ...}."""
    keys = jax.random.split(key)
    return {
      NET: self.net.init(keys[0]),
      EMBEDDING: self.embedding.init(keys[1]),
    }


class Net(nnx.Module):
  """The first half of a U-Net, and a 1x1 convolution for each of its maps."""

  def __init__(
    self, image_shape, *, doors, channels, multipliers, num_blocks, rngs,
    dtype='float32', **options,
  ):  # fmt: skip
    self.unet = unet.UNet(
      image_shape, doors=doors, out_channels=0, channels=channels,
      multipliers=multipliers, num_blocks=num_blocks, dtype=dtype, rngs=rngs,
      **options,
    )  # fmt: skip
    widths = [channels * m for m in multipliers]
    how = {**ZERO, 'dtype': jnp.dtype(dtype), 'rngs': rngs}
    self.skips = nnx.List(
      layers.linear(width, width, **how)
      for width in unet.skips_of(channels, widths, num_blocks)
    )
    self.middle = layers.linear(widths[-1], widths[-1], **how)

  def __call__(self, xt, t, keys=None, cond=None):
    maps = self.unet(xt, t, keys, cond)
    last = [*self.skips, self.middle]
    return [layer(x) for layer, x in zip(last, maps, strict=True)]


class Embedding(nnx.Module):
  """The embedding of a picture, halved between each two widths."""

  def __init__(self, widths, outputs, *, dtype, rngs):
    how = {'init': 'torch', 'dtype': jnp.dtype(dtype), 'rngs': rngs}
    half = {'strides': 2, 'padding': ((1, 1), (1, 1))}
    self.conv_in = layers.conv(3, widths[0], **how)
    self.blocks = nnx.List()
    for width, following in itertools.pairwise(widths):
      self.blocks.append(layers.conv(width, width, **how))
      self.blocks.append(layers.conv(width, following, **how, **half))
    self.conv_out = layers.conv(widths[-1], outputs, **{**how, **ZERO})

  def __call__(self, picture):
    x = nnx.swish(self.conv_in(picture))
    for layer in self.blocks:
      x = nnx.swish(layer(x))
    return self.conv_out(x)


def create(
  image_shape: Sequence[int],
  doors: Mapping[str, int],
  widths: Sequence[int],
  channels: int,
  dtype: str = 'float32',
  **options,
) -> Control:
  """A ControlNet.

  Args:
    image_shape: (H, W, C) of x0.
    doors: the conditions, see `models.create`.
    widths: those of the embedding.
    channels: channels of the first level.
    dtype: dtype of the computation.
    **options: other arguments of `unet.UNet`.
  """
  net = models.fence(
    Net, image_shape, doors=doors, channels=channels, dtype=dtype, **options
  )
  embedding = models.fence(Embedding, widths, channels, dtype=dtype)
  return Control(net, embedding, tuple(doors))


def side_of(side: int, widths: Sequence[int]) -> int:
  """The side of the hint that belongs to a side of the picture, in pixels."""
  for _ in widths[1:]:
    side = -(-side // 2)
  return side


def hints(
  controls: Sequence[Control], given: Sequence[Mapping], sides
) -> list[jax.Array]:
  """The hints of several nets, [1, h, w, C] each.

  Args:
    controls: the nets.
    given: of each NET, EMBEDDING, PICTURE [1, H, W, 3] and SCALE.
    sides: (h, w) of what is noised.

  Raises:
    UserError: a picture is for images of another size.
  """
  found = [
    control.embedding.apply(one[EMBEDDING], one[PICTURE])
    for control, one in zip(controls, given, strict=True)
  ]
  for hint in found:
    if hint.shape[1:3] != tuple(sides):
      there, here = ('x'.join(map(str, x)) for x in (hint.shape[1:3], sides))
      raise UserError(
        f'the picture of a ControlNet is for maps of {there}, but what is '
        f'noised is of {here}: give with_control the image_size'
      )
  return found


def residuals(
  controls: Sequence[Control],
  given: Sequence[Mapping],
  embedded: Sequence[jax.Array],
  xt: jax.Array,
  t: jax.Array,
  cond: Mapping,
) -> list[jax.Array]:
  """What several nets add to the maps of the U-Net: the sum, float32.

  Args:
    controls: the nets.
    given: see `hints`.
    embedded: the hints.
    xt: [B, H, W, C].
    t: times, see `unet.UNet`.
    cond: the conditions of the U-Net; a net takes those that it has.
  """
  found = []
  for control, one, hint in zip(controls, given, embedded, strict=True):
    own = {name: cond[name] for name in control.doors}
    if 'mask' in cond:  # of the tokens
      own['mask'] = cond['mask']
    own[doors_of.HINT] = [hint]
    maps = control.net.apply(one[NET], xt, t, None, own)
    found.append([one[SCALE] * x.astype(jnp.float32) for x in maps])
  return [sum(maps) for maps in zip(*found, strict=True)]
