"""Captions as the condition, encoded by text encoders that are not trained.

Such as CLIP's in Stable Diffusion. With several encoders, their tokens are
joined; in a row of data, the ids for each encoder stand side by side. SDXL
(arXiv 2307.01952, section 2.2) also tells the network the pooled text of the
last one, and sizes: the door 'vector'.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import models
from diffusion_jax.conditioning.conditioner import Conditioner
from diffusion_jax.conditioning.text import ROW, dropped, empty, valid
from diffusion_jax.models import doors, text

SIZES = 6  # height and width of the original, top and left, height and width


def networks(encoders: Mapping) -> dict[str, models.Model]:
  """The text encoders: part -> `apply(params, ids, mask)`.

  Args:
    encoders: part -> options of `models.text.create`.
  """
  return {name: text.create(**encoders[name]) for name in sorted(encoders)}


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
  made = networks(encoders)
  lengths = [encoders[name]['length'] for name in made]
  ends = np.cumsum(lengths)[:-1]
  # Before a run has begun, which sets them, any ids do.
  unset = {'bos': 0, 'eos': 1, 'pad': 2}
  special = {name: ids.get(name) or unset for name in made}
  none = jnp.concatenate(
    [empty(special[name], n) for name, n in zip(made, lengths, strict=True)],
    axis=1,
  )
  height, width = image_shape[:2]
  sizes = jnp.array([[height, width, 0, 0, height, width]], jnp.float32)
  found = {'tokens': sum(encoders[name]['width'] for name in made)}
  if size_features:
    last = encoders[[*made][-1]]
    pooled = last['projection'] or last['width']
    found['vector'] = pooled + SIZES * size_features

  def encode(params, tokens):
    parts = jnp.split(tokens, ends, axis=1)
    masks = {
      name: valid(part, special[name]['eos'])
      for name, part in zip(made, parts, strict=True)
    }
    encoded = [
      made[name].apply(params[name], part, masks[name] if masked else None)
      for name, part in zip(made, parts, strict=True)
    ]
    # Joined, they must be of one length.
    cond = {'tokens': jnp.concatenate([x.tokens for x in encoded], axis=-1)}
    if masked:
      cond['mask'] = next(iter(masks.values()))
    if size_features:
      cond['vector'] = encoded[-1].pooled
    return cond

  def condition(params, rows, keys):
    tokens = rows.get(ROW, none)
    away = jnp.full(len(tokens), ROW not in rows)
    if ROW in rows and keys is not None and drop:
      away = dropped(keys, drop)
      if not zeros:
        tokens = jnp.where(away[:, None], none, tokens)
    cond = encode(params, tokens)
    if zeros:
      cond = jax.tree.map(
        lambda x: jnp.where(away.reshape(-1, *[1] * (x.ndim - 1)), 0, x), cond
      )
    if size_features:
      count = len(cond['vector'])
      cond['vector'] = doors.of_sizes(
        cond['vector'], jnp.broadcast_to(sizes, (count, SIZES)), size_features
      )
    return cond

  return Conditioner(condition, found, drop)
