"""The critic of patches, against which autoencoders are trained.

That of pix2pix (arXiv 1611.07004) as in VQGAN (arXiv 2012.09841): 4x4
convolutions, of which the first few halve the map, then one logit for each
patch. It has group norm in place of batch norm, so that the logits of an
example do not depend on the others.
"""

import itertools
import math

import jax.numpy as jnp
from flax import nnx

from diffusion_jax import models
from diffusion_jax.models import layers

WIDEST = 8  # the largest multiple of the first layer's channels
SMALLEST = 3  # a side of the map that the two last convolutions need
GROUPS = 32
SMALL = nnx.initializers.normal(0.02)


def strides_of(image_shape: tuple[int, int, int], most: int = 3) -> int:
  """How often a critic halves images: at most `most` times.

  Args:
    image_shape: (H, W, C).
    most: the largest number.
  """
  side = min(image_shape[:2])
  return max(n for n in range(most + 1) if n == 0 or side >> n >= SMALLEST)


def create(
  image_shape: tuple[int, int, int],
  channels: int = 64,
  strides: int = 3,
  dtype: str = 'float32',
) -> models.Model:
  """A critic: `apply(params, images [B, H, W, C])` -> logits [B, h, w] float32.

  Args:
    image_shape: (H, W, C), at least 3x3.
    channels: channels of the first layer.
    strides: how often the map is halved; less often for small images, see
      `strides_of`.
    dtype: dtype of the computation; parameters are float32.
  """
  count = strides_of(image_shape, strides)
  return models.fence(
    Critic, image_shape[-1], channels, count, dtype=jnp.dtype(dtype)
  )


class Critic(nnx.Module):
  """The network, see the module docstring.

  Args:
    colours: channels of the images.
    channels: channels of the first layer.
    strides: how often the map is halved.
    dtype: dtype of the computation.
    rngs: random keys of the initial values.
  """

  def __init__(self, colours, channels, strides, *, dtype, rngs):
    options = {
      'kernel_size': (4, 4), 'kernel_init': SMALL, 'padding': 1,
      'dtype': dtype, 'rngs': rngs,
    }  # fmt: skip
    widths = [channels * min(2**i, WIDEST) for i in range(strides + 1)]
    self.convs = nnx.List(
      nnx.Conv(
        inputs,
        width,
        strides=2 if i < strides else 1,
        use_bias=i == 0,
        **options,
      )
      for i, (inputs, width) in enumerate(
        itertools.pairwise([colours, *widths])
      )
    )
    self.norms = nnx.List(
      layers.norm(width, math.gcd(GROUPS, width), dtype=dtype, rngs=rngs)
      for width in widths[1:]
    )
    self.out = nnx.Conv(widths[-1], 1, **options)

  def __call__(self, x):
    """[B, H, W, colours] -> [B, h, w] float32."""
    x = x.astype(self.out.dtype)
    for i, conv in enumerate(self.convs):
      x = conv(x)
      if i > 0:
        x = layers.normalised(self.norms[i - 1], (x,), swish=False)
      x = nnx.leaky_relu(x, 0.2)
    return self.out(x)[..., 0].astype(jnp.float32)
