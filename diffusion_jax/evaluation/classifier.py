"""The judge for small labelled images: a classifier of the run's own data.

It is trained once and saved in the run's folder. Its features are those of its
hidden layer. Its accuracy is measured on held-out images.
"""

import hashlib
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from diffusion_jax import models
from diffusion_jax.codecs.pixels import to_float
from diffusion_jax.data import Source
from diffusion_jax.evaluation import features, kept
from diffusion_jax.models.classifier import Classifier
from diffusion_jax.system import errors

NUM_STEPS = 1500
BATCH = 128
LEARNING_RATE = 2e-3
LARGEST = 64  # pixels: the largest images for this small network

MOST_CLASSES = 1000

FACTS = 'facts'  # the entry of a file that is not a parameter


def network(*shape) -> models.Model:
  """apply(params, x [B, H, W, C], keys=None) -> (features, logits).

  Args:
    *shape: (H, W, C) and the number of classes.
  """
  return models.fence(lambda keys: Classifier(*shape, rngs=keys))


def train(
  path,
  source: Source,
  *,
  num_steps: int = NUM_STEPS,
  on_step: Callable[[], None] = lambda: None,
) -> None:
  """Trains a classifier on a labelled source and saves it in `path` (.npz).

  It uses Adam with a cosine learning rate. Images are shifted by up to a
  sixteenth of their size, or one pixel if that is larger. It runs on one
  device, so the same data give the same parameters on any mesh of one kind of
  machine.

  Args:
    path: the file, written atomically.
    source: the images to train on.
    num_steps: number of steps, of 128 images each.
    on_step: called after each step.
  """
  images, labels = map(jnp.asarray, _arrays(source))
  model = network(images.shape[1:], source.num_classes)
  init_key, root = jax.random.split(jax.random.key(0))
  params = model.init(init_key)
  optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, num_steps))
  shift = max(1, images.shape[1] // 16)

  def shifted(key, image):
    by = jax.random.randint(key, (2,), 0, 2 * shift + 1)
    padded = jnp.pad(image, ((shift, shift), (shift, shift), (0, 0)), 'edge')
    return jax.lax.dynamic_slice(padded, (by[0], by[1], 0), image.shape)

  # Not a scan: on a CPU, XLA's convolutions are slow inside a scan.
  @jax.jit
  def step(params, state, number):
    keys = jax.random.split(jax.random.fold_in(root, number), 3)
    chosen = jax.random.randint(keys[0], (BATCH,), 0, len(images))
    each = jax.random.split(keys[1], BATCH)
    batch = jax.vmap(shifted)(each, to_float(images[chosen]))

    def loss_fn(params):
      _, logits = model.apply(params, batch, jax.random.split(keys[2], BATCH))
      loss = optax.softmax_cross_entropy_with_integer_labels
      return loss(logits, labels[chosen]).mean()

    updates, state = optimizer.update(jax.grad(loss_fn)(params), state)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  for number in range(num_steps):
    params, state = step(params, state, number)
    on_step()
  facts = {
    'image_shape': images.shape[1:],
    'num_classes': source.num_classes,
    'trained_on': source.description,
  }
  flat = traverse_util.flatten_dict(jax.device_get(params), sep='/')
  kept.write(path, {**flat, FACTS: json.dumps(facts)})


def fingerprint(source: Source) -> str:
  """A hash of all images and labels, to identify a classifier's data.

  Args:
    source: a set of moderate size; all of it is read.
  """
  digest = hashlib.sha256(str(source.num_classes).encode())
  for i in range(len(source)):
    image, label = source.read_fn(i)
    digest.update(np.ascontiguousarray(image))
    digest.update(int(label).to_bytes(8, 'little', signed=True))
  return digest.hexdigest()


def accuracy(judge: features.Judge, source: Source) -> float | None:
  """A judge's accuracy; None unless all images have labels.

  Args:
    judge: a judge from `load`.
    source: images that it was not trained on.
  """
  images, labels = _arrays(source)
  if labels.min() < 0:
    return None
  apply = jax.jit(judge.apply)
  taken = [
    np.argmax(apply(judge.params, part)[judge.logits], axis=1)
    for part in np.array_split(images, -(-len(images) // 1024))
  ]
  return float(np.mean(np.concatenate(taken) == labels))


def load(path, image_shape: tuple[int, int, int]) -> features.Judge:
  """Loads a judge from a file that `train` wrote.

  Args:
    path: the file.
    image_shape: (H, W, C) of the images to judge.

  Raises:
    UserError: there is no such file, it is not a classifier, or it judges
      images of another shape.
  """
  with errors.one_line(
    f'{path} is not a classifier of this package (',
    '): delete it, or give another --features',
  ):
    flat = kept.read(path)
    facts = json.loads(str(flat.pop(FACTS)))
    shape, classes = tuple(facts['image_shape']), int(facts['num_classes'])
    if len(shape) != 3 or max(shape) > LARGEST or classes > MOST_CLASSES:
      raise ValueError(f'it judges {classes} classes of {shape}')
    model = network(shape, classes)
    params = traverse_util.unflatten_dict(flat, sep='/')
    wanted = jax.eval_shape(model.init, jax.random.key(0))
    if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, wanted):
      raise ValueError('its parameters are of another network')
  if shape != tuple(image_shape):
    raise errors.UserError(
      f'{path} judges images of {shape}, not of {tuple(image_shape)}: give '
      'another --features'
    )

  def apply(params, images):
    hidden, logits = model.apply(params, to_float(images))
    return {'hidden': hidden, 'logits': logits}

  protocol = {
    'features': 'classifier',
    'num_classes': classes,
    'features_sha256': kept.sha256(jax.tree.leaves(params)),
    'resize': 'none',
  }
  details = {'classifier_trained_on': str(facts['trained_on'])}
  taps = {'hidden': 'frechet'}
  return features.Judge(apply, params, taps, 'logits', protocol, details)


def _arrays(source):
  images, labels = zip(*(source.read_fn(i) for i in range(len(source))))  # noqa: B905
  return np.stack(images), np.array(labels, np.int32)
