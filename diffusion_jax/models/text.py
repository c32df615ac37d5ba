"""Transformers that encode text: CLIP's, and small ones of the same structure.

CLIP's (arXiv 2103.00020, section 2.4): embeddings of tokens and of positions,
blocks of self-attention and a perceptron with a norm before each, and a norm at
the end. A causal one reads from left to right, so that the end token has seen
the whole text and stands for it. Parameters are float32, initial values those
of the authors' code.

  token/embedding [vocabulary, width]  position/embedding [length, width]
  blocks/N/{norm1,query,key,value,out,norm2,mlp1,mlp2}
  norm_out  projection/kernel [width, projection]
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax import models
from diffusion_jax.system.errors import UserError, one_of

HIGHEST = -1  # see `eos` of `create`


def quick_gelu(x: jax.Array) -> jax.Array:
  """x sigmoid(1.702 x), which OpenAI's CLIP has in place of GELU."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
  'quick_gelu': quick_gelu,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
}


class Encoded(NamedTuple):
  """What a network makes of texts.

  Attributes:
    tokens: [B, n, width] float32, of each token.
    pooled: [B, projection or width] float32, of the whole text.
  """

  tokens: jax.Array
  pooled: jax.Array


def create(
  vocabulary: int,
  length: int = 77,
  *,
  width: int = 512,
  inner: int = 2048,
  num_layers: int = 12,
  num_heads: int = 8,
  activation: str = 'quick_gelu',
  causal: bool = True,
  eos: int = HIGHEST,
  projection: int = 0,
  skip: int = 0,
  final_norm: bool = True,
  epsilon: float = 1e-5,
  dtype: str = 'float32',
) -> models.Model:
  """A text encoder: `apply(params, ids [B, n], mask=None)` -> Encoded.

  Tokens do not attend to those with a False in `mask` [B, n], which CLIP is
  used without. `skip` and `final_norm` choose the layer as in Stable Diffusion
  1 (0, True: the last layer after the norm; so do folders of 2, which have 23
  of OpenCLIP's 24 layers) and XL (1, False: the last layer's input).

  Args:
    vocabulary: number of ids.
    length: the most tokens of a text.
    width: width of the tokens.
    inner: width within the perceptrons.
    num_layers: number of blocks.
    num_heads: number of attention heads.
    activation: a name of ACTIVATIONS.
    causal: whether tokens attend only to those before them.
    eos: the id of the end token, whose first place in a text gives `pooled`;
      HIGHEST = the largest id in the text.
    projection: width of `pooled` after a linear layer; 0 = no such layer.
    skip: how many of the last layers `tokens` leaves out.
    final_norm: whether `tokens` pass through the last norm; `pooled` does.
    epsilon: added to the variance in the norms.
    dtype: dtype of the computation; parameters are float32.

  Raises:
    UserError: the numbers do not fit each other, or, of `apply`, the texts are
      longer than `length`.
  """
  if num_heads < 1 or width % num_heads:
    raise UserError(
      f'a text encoder of width={width} with num_heads={num_heads}: the heads '
      'must divide the width'
    )
  if not 0 <= skip < num_layers:
    raise UserError(
      f'a text encoder with skip={skip}: at least 0 and below its '
      f'num_layers={num_layers}'
    )
  one_of('activation', activation, ACTIVATIONS)
  return models.fence(
    Transformer, vocabulary, length, width, inner, num_layers,
    projection=projection, eos=eos, skip=skip, final_norm=final_norm,
    num_heads=num_heads, activation=activation, causal=causal,
    epsilon=epsilon, dtype=jnp.dtype(dtype),
  )  # fmt: skip


class Transformer(nnx.Module):
  """The network, see `create`."""

  def __init__(
    self, vocabulary, length, width, inner, num_layers, *, projection, eos,
    skip, final_norm, num_heads, activation, causal, epsilon, dtype, rngs,
  ):  # fmt: skip
    self.eos, self.skip, self.final_norm = eos, skip, final_norm
    self.length = length
    common = {'dtype': dtype, 'rngs': rngs}
    embed = functools.partial(nnx.Embed, features=width, **common)
    self.token = embed(vocabulary, embedding_init=normal(0.02))
    self.position = embed(length, embedding_init=normal(0.01))
    self.blocks = nnx.List(
      Block(
        width, inner, num_layers, num_heads=num_heads, activation=activation,
        causal=causal, epsilon=epsilon, **common,
      )
      for _ in range(num_layers)
    )  # fmt: skip
    self.norm_out = norm(width, epsilon, **common)
    if projection:
      self.projection = nnx.Linear(
        width, projection, use_bias=False, kernel_init=normal(width**-0.5),
        **common,
      )  # fmt: skip

  def __call__(self, ids, mask=None):
    if ids.shape[1] > self.length:
      raise UserError(
        f'texts of {ids.shape[1]} tokens: this text encoder takes at most '
        f'{self.length}: give the tokenizer this length'
      )
    x = self.token(ids) + self.position(jnp.arange(ids.shape[1]))[None]
    tokens = x
    for number, block in enumerate(self.blocks, 1):
      x = block(x, mask)
      if number == len(self.blocks) - self.skip:
        tokens = x
    normed = self.norm_out(x)
    ends = ids if self.eos == HIGHEST else ids == self.eos
    pooled = normed[jnp.arange(len(ids)), jnp.argmax(ends, axis=1)]
    if hasattr(self, 'projection'):
      pooled = self.projection(pooled)
    if self.final_norm:
      tokens = self.norm_out(tokens)
    return Encoded(tokens.astype(jnp.float32), pooled.astype(jnp.float32))


class Block(nnx.Module):
  """Self-attention and a perceptron, a norm before and a residual for each."""

  def __init__(
    self, width, inner, num_layers, *, num_heads, activation, causal, epsilon,
    **common,
  ):  # fmt: skip
    self.num_heads, self.causal = num_heads, causal
    self.activation = activation
    residual = width**-0.5 * (2 * num_layers) ** -0.5

    def linear(inputs, outputs, std):
      return nnx.Linear(inputs, outputs, kernel_init=normal(std), **common)

    self.norm1, self.norm2 = (norm(width, epsilon, **common) for _ in range(2))
    self.query, self.key, self.value = (
      linear(width, width, width**-0.5) for _ in range(3)
    )
    self.out = linear(width, width, residual)
    self.mlp1 = linear(width, inner, (2 * width) ** -0.5)
    self.mlp2 = linear(inner, width, residual)

  def __call__(self, x, mask):
    x = x + self._attended(self.norm1(x), mask)
    h = ACTIVATIONS[self.activation](self.mlp1(self.norm2(x)))
    return x + self.mlp2(h)

  def _attended(self, x, mask):
    heads = (
      f(x).reshape(*x.shape[:2], self.num_heads, -1)
      for f in (self.query, self.key, self.value)
    )
    mixed = jax.nn.dot_product_attention(
      *heads,
      mask=None if mask is None else mask[:, None, None],
      is_causal=self.causal,
    )
    return self.out(mixed.reshape(x.shape))


def normal(std: float):
  """Normal initial values of this deviation."""
  return nnx.initializers.normal(std)


def norm(width: int, epsilon: float, **common) -> nnx.LayerNorm:
  """Layer norm with an accurate variance.

  Args:
    width: of the tokens.
    epsilon: added to the variance.
    **common: dtype and rngs.
  """
  return nnx.LayerNorm(
    width, epsilon=epsilon, use_fast_variance=False, **common
  )
