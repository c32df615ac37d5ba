"""CLIP as a judge of pictures and texts, from a folder of its weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from diffusion_jax.conditioning import tokenizers
from diffusion_jax.evaluation import features
from diffusion_jax.evaluation.agreement import Encoders
from diffusion_jax.models import text, vision
from diffusion_jax.system import terminal
from diffusion_jax.training import sharding
from diffusion_jax.weights import clip

BATCH = 32  # pictures at once, over all devices


def of_folder(path, mesh: Mesh) -> Encoders:
  """The encoders of a `CLIPModel` of transformers.

  Args:
    path: the folder, with a tokenizer.
    mesh: the devices.

  Raises:
    UserError: there is no such network or tokenizer, or it is damaged.
  """
  found = clip.read(path)
  length = found.text['length']
  made = tokenizers.read(path, length)
  for note in found.notes:
    terminal.say(f'{path}: {note}')
  words, sights = text.create(**found.text), vision.create(**found.vision)
  size = sharding.rounded(BATCH, mesh)
  params = jax.device_put(found.params, sharding.replicated(mesh))

  @jax.jit
  def image_fn(params, x):
    return unit(sights.apply(params, x))

  @jax.jit
  def text_fn(params, ids):
    return unit(words.apply(params, ids).pooled)

  def batched(fn, part, rows):
    own = functools.partial(fn, params[part])
    return sharding.in_batches(own, rows, size, mesh)

  def see(images):
    return batched(image_fn, 'image', prepared(images, found.pictures))

  def read(given):
    each = made.encode(given)
    for number, left in each.cut.items():
      terminal.say_once(
        f'{given[number]!r:.60} is longer than the {made.length} tokens of '
        f'{path}: {left[:60]!r} is left out'
      )
    return batched(text_fn, 'text', each.ids)

  facts = {
    'text_judge': 'clip',
    'text_judge_sha256': found.sha256,
    'text_judge_resize': (
      f'bicubic to {found.pictures.resized}, centre {found.pictures.cropped}'
    ),
    'tokenizer_sha256': made.sha256,
  }
  return Encoders(
    see,
    read,
    lambda given: [row.tobytes() for row in made.encode(given).ids],
    facts,
    {'judge': str(path)},
    scores=True,
  )


def unit(x: jax.Array) -> jax.Array:
  """Vectors of length 1."""
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def prepared(images: np.ndarray, how: clip.Pictures) -> np.ndarray:
  """Pictures as CLIP takes them: float32 [n, S, S, 3].

  Args:
    images: [n, H, W, C] in [0, 255]; floats are rounded, and grey becomes RGB.
    how: the sizes, and the mean and deviation of each channel.
  """
  rows = []
  for image in features.whole(np.asarray(images)):
    one = Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)))
    width, height = (side * how.resized // min(one.size) for side in one.size)
    one = one.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - how.cropped) // 2, (height - how.cropped) // 2
    box = left, top, left + how.cropped, top + how.cropped
    rows.append(np.asarray(one.crop(box), np.float32))
  mean, std = (np.array(x, np.float32) for x in (how.mean, how.std))
  return (np.stack(rows) / np.float32(255) - mean) / std
