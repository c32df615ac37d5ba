"""The transformer in the U-Net of latent diffusion (arXiv 2112.10752, E.2.1).

It takes the place of attention after the residual blocks of a U-Net: the pixels
of a map are read as a sequence. Its blocks are self-attention, cross-attention
to the door `tokens`, and a gated perceptron, each after a layer norm.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models import attention, doors, layers, styles

# Not those of the U-Net's other norms.
EPSILON = 1e-6  # of the group norm
EPSILON_LAYER = 1e-5
GROWTH = 4  # of the perceptron


class Attention(nnx.Module):
  """Attention of a sequence to itself or to tokens; only `out` has a bias."""

  def __init__(self, channels, inputs, *, num_heads, **kwargs):
    self.num_heads = num_heads
    bare = {'use_bias': False, **kwargs}
    self.query = layers.linear(channels, channels, **bare)
    self.key = layers.linear(inputs, channels, **bare)
    self.value = layers.linear(inputs, channels, **bare)
    self.out = layers.linear(channels, channels, **kwargs)

  def __call__(self, x, given=None, training=False):
    """Computes what attention adds to x.

    Args:
      x: [B, T, C].
      given: (tokens [B, n, d], mask [B, n]); None = x itself.
      training: see `attention.attend`.
    """
    tokens, mask = (x, None) if given is None else given
    query, key, value = self.query(x), self.key(tokens), self.value(tokens)
    if mask is not None:
      return self.out(doors.attend(query, key, value, mask, self.num_heads))
    heads = (
      y.reshape(*y.shape[:2], self.num_heads, -1) for y in (query, key, value)
    )
    return self.out(attention.attend(*heads, training).reshape(x.shape))


class Block(nnx.Module):
  """Self-attention, attention to tokens if there are any, and a perceptron."""

  def __init__(self, channels, tokens, *, num_heads, **kwargs):
    def norm():
      return nnx.LayerNorm(
        channels, epsilon=EPSILON_LAYER, use_fast_variance=False,
        dtype=kwargs['dtype'], rngs=kwargs['rngs'],
      )  # fmt: skip

    heads = {'num_heads': num_heads, **kwargs}
    self.norm1 = norm()
    self.attention = Attention(channels, channels, **heads)
    if tokens:
      self.norm2 = norm()
      self.cross = Attention(channels, tokens, **heads)
    self.norm3 = norm()
    width = GROWTH * channels
    self.mlp1 = layers.linear(channels, 2 * width, **kwargs)
    self.mlp2 = layers.linear(width, channels, **kwargs)

  def __call__(self, x, given, training):
    x = x + self.attention(self.norm1(x), training=training)
    if hasattr(self, 'cross'):
      x = x + self.cross(self.norm2(x), given)
    # GEGLU (arXiv 2002.05202, eq. 6).
    y, gate = jnp.split(self.mlp1(self.norm3(x)), 2, axis=-1)
    return x + self.mlp2(y * jax.nn.gelu(gate, approximate=False))


class Transformer(nnx.Module):
  """Norm, projection, blocks, projection, and residual.

  Args:
    channels: channels of the map.
    tokens: width of the tokens; 0 or None = there are none.
    depth: number of blocks.
    num_heads: attention heads; divides the channels.
    num_groups: groups of the norm; divides the channels.
    style: the U-Net's; only how values begin is taken from it.
    plain: see `unet.UNet`.
    **kwargs: dtype and rngs.
  """

  def __init__(
    self, channels, tokens, *, depth, num_heads, num_groups,
    style=styles.DDPM, plain=frozenset(), **kwargs,
  ):  # fmt: skip
    self.plain = plain
    dense = {'init': style.init, **kwargs}
    self.norm_in = layers.norm(channels, num_groups, epsilon=EPSILON, **kwargs)
    self.proj_in = layers.linear(channels, channels, **dense)
    self.blocks = nnx.List(
      Block(channels, tokens, num_heads=num_heads, **dense)
      for _ in range(depth)
    )
    self.proj_out = layers.linear(
      channels, channels, scale=layers.ALMOST_ZERO, **dense
    )

  def __call__(self, x, given=None, training=False):
    """Computes the map after the transformer.

    Args:
      x: [B, H, W, C].
      given: (tokens [B, n, d], mask [B, n]), if it was made with tokens.
      training: see `attention.attend`.
    """
    y = layers.normalised(self.norm_in, (x,), swish=False, plain=self.plain)
    b, h, w, c = x.shape
    y = self.proj_in(y).reshape(b, h * w, c)
    for block in self.blocks:
      y = block(y, given, training)
    return x + self.proj_out(y).reshape(x.shape)
