"""Captions as the condition: token ids -> the doors 'tokens' and 'mask'.

A text encoder, the part 'text' of a run, makes a vector of each token of a
caption, to which the network attends. The network can also be told the vector
of the end token, which stands for the whole caption, as in GLIDE (arXiv
2112.10741): the door 'vector'. A dropped caption is the empty one, which the
encoder encodes like any other.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusion_jax import models
from diffusion_jax.conditioning.conditioner import Conditioner
from diffusion_jax.models import text

PART = 'text'
ROW = 'tokens'  # in batches: ids of captions, int32 [B, length]
LONGEST = 77  # where a config leaves the length open, and no run has begun


def ids_of(options: Mapping) -> dict[str, int]:
  """The numbers of special tokens, of a config's conditioning.

  'bos', 'eos' and 'pad'. Before a run has begun, which sets them, those of a
  vocabulary that is full.
  """
  size = options['vocabulary']
  full = {'pad': size - 3, 'bos': size - 2, 'eos': size - 1}
  return {**full, **options.get('ids', {})}


def length_of(options: Mapping) -> int:
  """The number of tokens of a caption, of a config's conditioning."""
  if 'encoders' in options:
    return sum(one['length'] for one in options['encoders'].values())
  return options['length'] or LONGEST


def structure(options: Mapping) -> dict:
  """The options of `models.text.create`, of a config's conditioning."""
  return {
    'vocabulary': options['vocabulary'],
    'length': length_of(options),
    'width': options['width'],
    'inner': 4 * options['width'],
    'num_layers': options['num_layers'],
    'num_heads': options['num_heads'],
    'activation': 'gelu',
    'causal': False,
    'eos': ids_of(options)['eos'],
    'projection': 0,
    'skip': 0,
    'final_norm': True,
    'epsilon': 1e-5,
  }


def network(options: Mapping, projection: int = 0) -> models.Model:
  """The text encoder: `apply(params, ids, mask)`, see `models.text.create`.

  Args:
    options: a config's conditioning.
    projection: see there.

  Raises:
    UserError: the heads do not divide the width.
  """
  return text.create(**structure(options) | {'projection': projection})


def empty(ids: Mapping, length: int) -> jax.Array:
  """The empty caption: [1, length] int32."""
  rest = length - 2
  return jnp.array([[ids['bos'], ids['eos'], *[ids['pad']] * rest]], jnp.int32)


def dropped(keys: jax.Array, drop: float) -> jax.Array:
  """Whether each example's caption is dropped: [B] bool.

  Args:
    keys: [B] random keys.
    drop: the probability.
  """
  return jax.vmap(lambda key: jax.random.bernoulli(key, drop))(keys)


def valid(tokens: jax.Array, eos: int) -> jax.Array:
  """Which tokens are not padding: up to the end token, bool [B, length].

  Args:
    tokens: int32 [B, length].
    eos: the id of the end, which may also be that of padding.
  """
  last = jnp.argmax(tokens == eos, axis=1)
  return jnp.arange(tokens.shape[1])[None] <= last[:, None]


def create(drop: float, pooled: bool = False, **options) -> Conditioner:
  """The tokens of each caption, replaced by the empty caption at random.

  Args:
    drop: the probability with which training drops an example's caption.
    pooled: whether there is the door 'vector'.
    **options: the other keys of a config's conditioning.
  """
  encoder, ids = network(options), ids_of(options)
  none = empty(ids, length_of(options))

  def condition(params, rows, keys):
    tokens = rows.get(ROW, none)
    if ROW in rows and keys is not None and drop:
      tokens = jnp.where(dropped(keys, drop)[:, None], none, tokens)
    mask = valid(tokens, ids['eos'])
    encoded = encoder.apply(params[PART], tokens, mask)
    cond = {'tokens': encoded.tokens, 'mask': mask}
    return cond | ({'vector': encoded.pooled} if pooled else {})

  names = ('tokens', 'vector') if pooled else ('tokens',)
  return Conditioner(condition, dict.fromkeys(names, options['width']), drop)
