"""CLIP's encoder of pictures, a vision transformer (arXiv 2103.00020).

Patches and a class token with embeddings of positions, a norm, blocks as those
of the text encoder in which all attend to all, and a norm and a projection of
the class token. Parameters are float32.

  patch/kernel [p, p, 3, width]  class/embedding [1, width]
  position/embedding [1 + patches, width]  norm_in
  blocks/N/{norm1,query,key,value,out,norm2,mlp1,mlp2}
  norm_out  projection/kernel [width, projection]
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax import models
from diffusion_jax.models.text import Block, norm, normal
from diffusion_jax.system.errors import UserError


def create(
  image_size: int,
  patch_size: int,
  *,
  width: int = 768,
  inner: int = 3072,
  num_layers: int = 12,
  num_heads: int = 12,
  activation: str = 'quick_gelu',
  projection: int = 512,
  epsilon: float = 1e-5,
) -> models.Model:
  """An encoder: `apply(params, x [B, S, S, 3])` -> [B, projection] float32.

  Args:
    image_size: pixels per side of a picture.
    patch_size: pixels per side of a patch; what is left over is not seen.
    width: width of the tokens.
    inner: width within the perceptrons.
    num_layers: number of blocks.
    num_heads: number of attention heads.
    activation: a name of `text.ACTIVATIONS`.
    projection: width of the result.
    epsilon: added to the variance in the norms.

  Raises:
    UserError: the numbers do not fit each other.
  """
  if num_heads < 1 or width % num_heads:
    raise UserError(
      f'an encoder of pictures of width={width} with num_heads={num_heads}: '
      'the heads must divide the width'
    )
  if not 1 <= patch_size <= image_size:
    raise UserError(
      f'an encoder of pictures of {image_size} pixels with patches of '
      f'{patch_size}: at least 1, and not larger than the picture'
    )
  return models.fence(
    Vision, image_size // patch_size, patch_size, width, inner, num_layers,
    num_heads=num_heads, activation=activation, projection=projection,
    epsilon=epsilon, dtype=jnp.float32,
  )  # fmt: skip


class Vision(nnx.Module):
  """The network, see `create`."""

  def __init__(
    self, side, patch_size, width, inner, num_layers, *, num_heads, activation,
    projection, epsilon, **common,
  ):  # fmt: skip
    embed = functools.partial(nnx.Embed, features=width, **common)
    self.patch = nnx.Conv(
      3, width, (patch_size,) * 2, strides=patch_size, padding='VALID',
      use_bias=False, kernel_init=normal(0.02), **common,
    )  # fmt: skip
    setattr(self, 'class', embed(1, embedding_init=normal(width**-0.5)))
    self.position = embed(1 + side**2, embedding_init=normal(0.02))
    self.norm_in = norm(width, epsilon, **common)
    self.blocks = nnx.List(
      Block(
        width, inner, num_layers, num_heads=num_heads, activation=activation,
        causal=False, epsilon=epsilon, **common,
      )
      for _ in range(num_layers)
    )  # fmt: skip
    self.norm_out = norm(width, epsilon, **common)
    self.projection = nnx.Linear(
      width, projection, use_bias=False, kernel_init=normal(width**-0.5),
      **common,
    )  # fmt: skip

  def __call__(self, x: jax.Array) -> jax.Array:
    patches = self.patch(x)
    patches = patches.reshape(len(x), -1, patches.shape[-1])
    first = getattr(self, 'class')(jnp.zeros((len(x), 1), jnp.int32))
    tokens = jnp.concatenate([first, patches], axis=1)
    tokens = tokens + self.position(jnp.arange(tokens.shape[1]))[None]
    tokens = self.norm_in(tokens)
    for block in self.blocks:
      tokens = block(tokens, None)
    return self.projection(self.norm_out(tokens[:, 0])).astype(jnp.float32)
