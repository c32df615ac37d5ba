"""A pair of encoders, of pictures and of captions (CLIP, arXiv 2103.00020).

Both map to unit vectors of one space. Of a batch, each picture is to find its
caption among all captions, and each caption its picture: the mean of two
cross-entropies of cosines over a temperature, which is learned within bounds
(section 2.3, figure 3). What is equal to a picture's own caption is no mistake
and is left out of its sum.

A value depends on the whole batch, so there are no microbatches; each example's
random numbers depend on its own key only.
"""

import math

import jax
import jax.numpy as jnp
import optax

from diffusion_jax.codecs import pixels
from diffusion_jax.conditioning import text
from diffusion_jax.data import jitter
from diffusion_jax.models import Model
from diffusion_jax.objectives.objective import Aux, Objective, branch
from diffusion_jax.process import noise as noises

# The trained parts: the encoders, and the temperature's logarithm.
IMAGE, TEXT, TEMPERATURE = 'image', text.PART, 'temperature'
LOG = 'log'
WARMEST = 1.0


def create(
  image: Model,
  words: Model,
  ids: dict,
  *,
  coldest: float = 0.01,
  shift: float = 0.0,
  scale: float = 0.0,
  noise: float = 0.0,
) -> Objective:
  """The contrastive loss.

  Args:
    image: the encoder of pictures, see `seen`.
    words: the encoder of captions, see `read`.
    ids: the numbers of special tokens, see `text.ids_of`.
    coldest: the lowest temperature; the highest is 1.
    shift: of training pictures, see `jitter.apply`.
    scale: the same.
    noise: the largest deviation of noise, in levels of 255. That of a picture
      is uniform from 0 on.
  """

  def values_at(params, x, rows, dropout):
    a = seen(image, params[IMAGE], x, dropout)
    b = read(words, params[TEXT], rows[text.ROW], ids)
    sharpness = jnp.exp(-params[TEMPERATURE][LOG])
    return compared(sharpness, a, b, rows[text.ROW])

  def loss(params, extras, rows, keys):
    del extras
    own = branch(keys, 'jitter')
    share = noises.draw(own, 0, (), float, jax.random.uniform)
    x = pixels.to_float(rows['image'])
    if shift or scale or noise:
      x = jitter.apply(x, branch(own, 'eps'), shift, scale, noise * share)
    values, right = values_at(params, x, rows, branch(keys, 'dropout'))
    warmth = jnp.exp(params[TEMPERATURE][LOG])
    return values, Aux({'right': right}, {'temperature': warmth})

  def heldout(params, extras, rows, keys, index):
    # Among the captions of a batch of held-out examples, always the same one.
    del extras, keys, index
    x = pixels.to_float(rows['image'])
    return values_at(params, x, rows, None)[0]

  def metrics(values, by_row, sums):
    return {
      'accuracy': jnp.mean(by_row['right'].astype(values.dtype)),
      'temperature': sums['temperature'],
    }

  def write(params, extras):
    del extras
    log = jnp.clip(
      params[TEMPERATURE][LOG], math.log(coldest), math.log(WARMEST)
    )
    return {**params, TEMPERATURE: {LOG: log}}

  return Objective(loss, heldout, metrics, write=write)


def compared(
  sharpness: jax.Array, a: jax.Array, b: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The loss of each pair, and whether the picture finds its caption.

  Args:
    sharpness: the inverse of the temperature.
    a: [B, D] unit vectors of pictures.
    b: [B, D] those of their captions.
    tokens: [B, length] the captions.

  Returns:
    ([B] float32, [B] bool).
  """
  own = jnp.eye(len(a), dtype=bool)
  same = jnp.all(tokens[:, None] == tokens[None], axis=-1)
  logits = sharpness * jnp.matmul(a, b.T, precision='highest')
  logits = jnp.where(same & ~own, -jnp.inf, logits)
  numbers = jnp.arange(len(a))
  entropy = optax.softmax_cross_entropy_with_integer_labels
  values = (entropy(logits, numbers) + entropy(logits.T, numbers)) / 2
  return values, jnp.argmax(logits, axis=1) == numbers


def pooled(image: Model, pool: int) -> Model:
  """An encoder of means over squares of pixels.

  Args:
    image: the encoder of smaller pictures.
    pool: pixels per side of a square.
  """

  def apply(params, x, *more):
    size, height, width, channels = x.shape
    blocks = size, height // pool, pool, width // pool, pool, channels
    return image.apply(params, x.reshape(blocks).mean((2, 4)), *more)

  return image if pool == 1 else Model(image.init, apply, image.doors)


def seen(image: Model, params, x: jax.Array, dropout=None) -> jax.Array:
  """Unit vectors of pictures: [B, D] float32.

  Args:
    image: a network of pictures and times, which are 0 here.
    params: its parameters.
    x: [B, H, W, C] in [-1, 1].
    dropout: [B] random keys; None for none.
  """
  return _unit(image.apply(params, x, jnp.zeros(len(x)), dropout, {}))


def read(words: Model, params, tokens: jax.Array, ids: dict) -> jax.Array:
  """Unit vectors of captions: [B, D] float32.

  Args:
    words: a text encoder, see `text.network`.
    params: its parameters.
    tokens: [B, length] int32.
    ids: the numbers of special tokens, see `text.ids_of`.
  """
  mask = text.valid(tokens, ids['eos'])
  return _unit(words.apply(params, tokens, mask).pooled)


def _unit(x) -> jax.Array:
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
