"""Captions as the condition, encoded by text encoders that are not trained.

Such as CLIP's in Stable Diffusion. With several encoders, their tokens are
joined; in a row of data, the ids for each encoder stand side by side. SDXL
(arXiv 2307.01952, section 2.2) also tells the network the pooled text of the
last one, and sizes: the door 'vector'.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import models
from diffusion_jax.conditioning.conditioner import Conditioner
from diffusion_jax.conditioning.text import ROW, dropped, empty, valid
from diffusion_jax.models import doors, text

# Rows with what the encoders make of captions, if it was computed before.
ENCODED, POOLED = 'encoded', 'pooled'
SIZES = 6  # height and width of the original, top and left, height and width


def networks(encoders: Mapping) -> dict[str, models.Model]:
  """The text encoders: part -> `apply(params, ids, mask)`.

  Args:
    encoders: part -> options of `models.text.create`.
  """
  return {name: text.create(**encoders[name]) for name in sorted(encoders)}


def encoder(
  encoders: Mapping, ids: Mapping, masked: bool, size_features: int
) -> Callable:
  """(params of all parts, tokens [B, length]) -> what rows may hold instead.

  That is {ENCODED: float32 [B, n, d]} and, if the network is told sizes,
  {POOLED: float32 [B, p]}.

  Args:
    encoders: part -> options of `models.text.create`.
    ids: part -> its special tokens 'bos', 'eos' and 'pad'.
    masked: whether the padding is hidden from the encoders.
    size_features: see `create`.
  """
  made = networks(encoders)

  def encode(params, tokens):
    encoded = []
    for name, part in split(tokens, encoders).items():
      mask = valid(part, ids[name]['eos']) if masked else None
      encoded.append(made[name].apply(params[name], part, mask))
    # Joined, they must be of one length.
    found = {ENCODED: jnp.concatenate([x.tokens for x in encoded], axis=-1)}
    return found | ({POOLED: encoded[-1].pooled} if size_features else {})

  return encode


def split(tokens: jax.Array, encoders: Mapping) -> dict[str, jax.Array]:
  """The tokens of each encoder, which stand side by side in a row."""
  names = sorted(encoders)
  ends = np.cumsum([encoders[name]['length'] for name in names])[:-1]
  return dict(zip(names, jnp.split(tokens, ends, axis=1), strict=True))


def create(
  drop: float,
  encoders: Mapping,
  ids: Mapping,
  masked: bool,
  zeros: bool,
  size_features: int,
  image_shape: tuple[int, ...],
  **others,
) -> Conditioner:
  """The tokens of each caption, replaced by no caption at random.

  Args:
    drop: the probability with which training drops an example's caption.
    encoders: part -> options of `models.text.create`.
    ids: part -> its special tokens 'bos', 'eos' and 'pad'.
    masked: whether the padding is hidden from the encoders and the network.
    zeros: whether no caption is a vector of zeros, as in SDXL; otherwise it is
      the empty caption.
    size_features: features of each of the sizes; 0 = no door 'vector'.
    image_shape: (H, W, C), the sizes that the network is told.
    **others: where the encoders come from.
  """
  del others
  # Before a run has begun, which sets them, any ids do.
  unset = {'bos': 0, 'eos': 1, 'pad': 2}
  ids = {name: ids.get(name) or unset for name in sorted(encoders)}
  encode = encoder(encoders, ids, masked, size_features)
  none = jnp.concatenate(
    [empty(ids[name], encoders[name]['length']) for name in ids], axis=1
  )
  height, width = image_shape[:2]
  sizes = jnp.array([[height, width, 0, 0, height, width]], jnp.float32)
  found = {'tokens': sum(one['width'] for one in encoders.values())}
  if size_features:
    last = encoders[max(ids)]
    pooled = last['projection'] or last['width']
    found['vector'] = pooled + SIZES * size_features

  def without(params):
    """No caption, in one row."""
    encoded = encode(params, none)
    return jax.tree.map(jnp.zeros_like, encoded) if zeros else encoded

  def condition(params, rows, keys):
    tokens = rows.get(ROW, none)
    if ROW not in rows:
      encoded = without(params)
    elif ENCODED in rows:
      encoded = {name: rows[name] for name in (ENCODED, POOLED) if name in rows}
    else:
      encoded = encode(params, tokens)
    if ROW in rows and keys is not None and drop:
      away = dropped(keys, drop)
      tokens = jnp.where(away[:, None], none, tokens)
      encoded = jax.tree.map(
        lambda x, other: jnp.where(
          away.reshape(-1, *[1] * (x.ndim - 1)), other, x
        ),
        encoded,
        without(params),
      )
    cond = {'tokens': encoded[ENCODED]}
    if masked:
      name, part = next(iter(split(tokens, encoders).items()))
      cond['mask'] = valid(part, ids[name]['eos'])
    if size_features:
      rows_of = jnp.broadcast_to(sizes, (len(encoded[POOLED]), SIZES))
      cond['vector'] = doors.of_sizes(encoded[POOLED], rows_of, size_features)
    return cond

  return Conditioner(condition, found, drop)
