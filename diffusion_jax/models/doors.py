"""Doors of networks: layers that take conditions.

A door is named by how the network takes a condition, see
`conditioning.Conditioner`. A network's parameters for its doors are:

  label     label/embedding [classes + 1, width], added to the time embedding;
            the last row stands for 'no label'.
  vector    vector/kernel [d, width], added to the time embedding; a vector of
            zeros adds nothing. With two layers: vector1 and vector2, each with
            kernel and bias, as those of the time.
  tokens    cross-attention after each self-attention.
  channels  concatenated to the noised images, at the input.

Any U-Net also takes two inputs without parameters, with which a ControlNet
works, see `control`: HINT, a list of one map that is added to the first one,
and RESIDUALS, a list of maps that are added to its skips and its middle.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models import layers, styles
from diffusion_jax.system.errors import UserError

NAMES = ('label', 'vector', 'tokens', 'channels')
HINT, RESIDUALS = 'hint', 'residuals'


def check(doors, allowed: tuple[str, ...], name: str) -> None:
  """Checks that a network takes the conditions that it is given.

  Args:
    doors: the names of the doors.
    allowed: the names of the doors that the network can have.
    name: the network's name, for the message.

  Raises:
    UserError: it does not.
  """
  lacking = [door for door in doors if door not in allowed]
  if lacking:
    raise UserError(
      f'the condition has {" and ".join(lacking)}, but model.name={name} '
      f'takes {" and ".join(allowed) or "no condition"}: choose another '
      'network, or conditioning.name=none'
    )


def add_embeddings(
  module: nnx.Module,
  doors: dict[str, int],
  width: int,
  *,
  std=1.0,
  vector='linear',
  **kwargs,
) -> None:
  """Gives a module the layers `label` and `vector` that its doors need.

  Args:
    module: the network.
    doors: name -> size.
    width: the width of the time embedding.
    std: standard deviation of the labels' initial embeddings.
    vector: the layers of the vector, see `styles.Style`.
    **kwargs: dtype and rngs.
  """
  if 'label' in doors:
    module.label = nnx.Embed(
      doors['label'] + 1,
      width,
      embedding_init=nnx.initializers.normal(std),
      **kwargs,
    )
  if 'vector' in doors and vector == 'mlp':
    module.vector1 = layers.linear(doors['vector'], width, **kwargs)
    module.vector2 = layers.linear(width, width, **kwargs)
  elif 'vector' in doors:
    module.vector = layers.linear(
      doors['vector'], width, use_bias=False, **kwargs
    )


def embedded(module: nnx.Module, time: jax.Array, cond) -> jax.Array:
  """The time embedding [B or 1, width] plus those of label and vector.

  Args:
    module: the network.
    time: [B or 1, width].
    cond: door -> array, see `conditioning.Conditioner`; None if there are none.
  """
  for door in ('label', 'vector'):
    if hasattr(module, door):
      time = time + getattr(module, door)(cond[door])
  if hasattr(module, 'vector1'):
    time = time + module.vector2(nnx.swish(module.vector1(cond['vector'])))
  return time


def of_sizes(pooled: jax.Array, sizes: jax.Array, dim: int) -> jax.Array:
  """The door `vector` of SDXL (arXiv 2307.01952, section 2.2).

  Args:
    pooled: [B, d], the text as one vector.
    sizes: [B, n] numbers: height and width of the original, top and left of the
      crop, height and width of the image, in pixels.
    dim: features of each of these numbers, even.

  Returns:
    [B, d + n dim]: the text, then cosines and sines of the numbers.
  """
  features = layers.time_features(sizes.reshape(-1), dim, 'cos_sin', 0)
  return jnp.concatenate([pooled, features.reshape(len(sizes), -1)], -1)


def joined(xt: jax.Array, cond) -> jax.Array:
  """Noised images [B, H, W, C] with the door `channels`, if there is one.

  Raises:
    UserError: the channels are of another size, neither [H, W] nor [1, 1].
  """
  if not cond or 'channels' not in cond:
    return xt
  given = cond['channels'].astype(xt.dtype)
  there, here = given.shape[1:3], xt.shape[1:3]
  if there not in (here, (1, 1)):
    there, here = ('x'.join(map(str, sizes)) for sizes in (there, here))
    raise UserError(
      f'the condition channels is of {there}, but what is noised of {here}: '
      f'resize it to {here}'
    )
  given = jnp.broadcast_to(given, (*xt.shape[:-1], given.shape[-1]))
  return jnp.concatenate([xt, given], axis=-1)


def added(maps: list[jax.Array], cond, name: str) -> list[jax.Array]:
  """Maps [B, H, W, C_i] with what a condition adds to them, if it is given.

  Args:
    maps: the maps.
    cond: see `embedded`.
    name: HINT or RESIDUALS, of as many maps, [B or 1, H, W, C_i] each.
  """
  if not cond or name not in cond:
    return maps
  given = zip(maps, cond[name], strict=True)
  return [x + more.astype(x.dtype) for x, more in given]


def tokens_of(cond, batch: int) -> tuple[jax.Array, jax.Array] | None:
  """The door `tokens`: tokens [B, n, d] and mask [B, n]; None without it."""
  if not cond or 'tokens' not in cond:
    return None
  tokens = cond['tokens']
  mask = cond.get('mask', jnp.ones(tokens.shape[:2], bool)).astype(bool)
  return (
    jnp.broadcast_to(tokens, (batch, *tokens.shape[1:])),
    jnp.broadcast_to(mask, (batch, *mask.shape[1:])),
  )


class CrossAttention(nnx.Module):
  """Attention from all positions of a map to tokens, with norm and residual.

  A row none of whose tokens are valid gets only the bias of the last layer.
  """

  def __init__(
    self, channels, tokens, *, num_heads, num_groups, style=styles.DDPM,
    plain=frozenset(), **kwargs,
  ):  # fmt: skip
    self.num_heads, self.plain = num_heads, plain
    self.norm = layers.norm(
      channels, num_groups, epsilon=style.epsilon, **kwargs
    )
    kwargs['init'] = style.init
    self.query = layers.linear(channels, channels, **kwargs)
    self.key = layers.linear(tokens, channels, **kwargs)
    self.value = layers.linear(tokens, channels, **kwargs)
    self.out = layers.linear(
      channels, channels, scale=layers.ALMOST_ZERO, **kwargs
    )

  def __call__(self, x, tokens, mask):
    """Computes the map after attention.

    Args:
      x: [B, H, W, C].
      tokens: [B, n, d].
      mask: [B, n], whether a token is valid.
    """
    normed = layers.normalised(self.norm, (x,), swish=False, plain=self.plain)
    mixed = attend(
      self.query(normed), self.key(tokens), self.value(tokens), mask,
      self.num_heads,
    )  # fmt: skip
    return x + self.out(mixed)


def attend(query, key, value, mask, num_heads: int) -> jax.Array:
  """Attention to tokens; zero where no token is valid.

  Args:
    query: [B, ..., C].
    key: [B, n, C].
    value: [B, n, C].
    mask: [B, n] bool.
    num_heads: the number of heads, which divides C.

  Returns:
    [B, ..., C].
  """
  heads = (
    x.reshape(len(x), -1, num_heads, x.shape[-1] // num_heads)
    for x in (query, key, value)
  )
  mixed = jax.nn.dot_product_attention(*heads, mask=mask[:, None, None])
  mixed = jnp.where(mask.any(-1)[:, None, None, None], mixed, 0)
  return mixed.reshape(query.shape)
