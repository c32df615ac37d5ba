"""The judge for small labelled images: a classifier of the run's own data.

It is trained once and saved in the run's folder. Its features are those of its
hidden layer. Its accuracy is measured on held-out images.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special
from flax import traverse_util

from diffusion_jax import models
from diffusion_jax.codecs.pixels import to_float
from diffusion_jax.data import Source
from diffusion_jax.evaluation import features, kept
from diffusion_jax.models.classifier import Classifier
from diffusion_jax.system import errors, files
from diffusion_jax.system.npz import DAMAGED

NUM_STEPS = 1500
BATCH = 128
LEARNING_RATE = 2e-3
LEAST_STEPS = 300
PLENTY = 1000  # images that take all steps
KEEP_EVERY = 50  # steps
LARGEST = 64  # pixels: the largest images for this small network

MOST_CLASSES = 1000
SIGNIFICANT = 0.01

FACTS = 'facts'  # the entry of a file that is not a parameter


def network(*shape) -> models.Model:
  """apply(params, x [B, H, W, C], keys=None) -> (features, logits).

  Args:
    *shape: (H, W, C) and the number of classes.
  """
  return models.fence(Classifier, *shape)


def num_steps_for(num_images: int) -> int:
  """The number of training steps for a set of images.

  A small set is learnt sooner: below PLENTY images the steps are fewer in
  proportion, but at least LEAST_STEPS.

  Args:
    num_images: the size of the set.
  """
  return min(NUM_STEPS, max(LEAST_STEPS, NUM_STEPS * num_images // PLENTY))


def unfit(num_classes: int, image_shape) -> str:
  """Why no classifier judges such data, in words; '' if one does.

  Args:
    num_classes: of the data; 0 without labels.
    image_shape: (H, W, C) of the images.
  """
  if num_classes < 2:
    return f'the data have {"1 class" if num_classes else "no labels"}'
  if max(image_shape) > LARGEST:
    return (
      f'a classifier takes at most {LARGEST} pixels, not {max(image_shape)}'
    )
  if num_classes > MOST_CLASSES:
    return (
      f'a classifier takes at most {MOST_CLASSES} classes, not {num_classes}'
    )
  return ''


def train(
  path,
  source: Source,
  *,
  num_steps: int | None = None,
  on_steps: Callable[[int], None] = lambda count: None,
) -> None:
  """Trains a classifier on a labelled source and saves it in `path` (.npz).

  It uses Adam with a cosine learning rate. Images are shifted by up to a
  sixteenth of their size, or one pixel if that is larger. It runs on one
  device, so the same data give the same parameters on any mesh of one kind of
  machine. Every KEEP_EVERY steps the progress is saved next to `path`; an
  interrupted training continues from there, with the same result.

  Args:
    path: the file, written atomically.
    source: the images to train on.
    num_steps: number of steps, of 128 images each; by default
      `num_steps_for(len(source))`.
    on_steps: called with the number of steps just done.
  """
  num_steps = num_steps or num_steps_for(len(source))
  images, labels = map(jnp.asarray, _arrays(source))
  model = network(images.shape[1:], source.num_classes)
  init_key, root = jax.random.split(jax.random.key(0))
  optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, num_steps))
  step = _step(model, optimizer, images, labels, root)
  params = model.init(init_key)
  path = files.at(path)
  part = part_of(path)
  state = {'params': params, 'optimizer': optimizer.init(params)}
  first, state = _continued(part, num_steps, state)
  if first:
    on_steps(first)
  for number in range(first, num_steps):
    state = step(state, number)
    on_steps(1)
    if (number + 1) % KEEP_EVERY == 0 and number + 1 < num_steps:
      _keep(part, number + 1, num_steps, state)
  facts = {
    'image_shape': images.shape[1:],
    'num_classes': source.num_classes,
    'trained_on': source.description,
  }
  flat = traverse_util.flatten_dict(jax.device_get(state['params']), sep='/')
  kept.write(path, {**flat, FACTS: json.dumps(facts)})
  part.unlink(missing_ok=True)


def part_of(path) -> files.Path:
  """The file of an unfinished training of the classifier of this file."""
  return files.at(path).with_name(f'{files.at(path).name}.part')


def kept_of(done: int) -> int:
  """How many of the steps done are in that file."""
  return done - done % KEEP_EVERY


def _step(model, optimizer, images, labels, root):
  """(state, number of the step) -> state."""
  shift = max(1, images.shape[1] // 16)

  def shifted(key, image):
    by = jax.random.randint(key, (2,), 0, 2 * shift + 1)
    padded = jnp.pad(image, ((shift, shift), (shift, shift), (0, 0)), 'edge')
    return jax.lax.dynamic_slice(padded, (by[0], by[1], 0), image.shape)

  # Not a scan: on a CPU, XLA's convolutions are slow inside a scan.
  @jax.jit
  def step(state, number):
    keys = jax.random.split(jax.random.fold_in(root, number), 3)
    chosen = jax.random.randint(keys[0], (BATCH,), 0, len(images))
    each = jax.random.split(keys[1], BATCH)
    batch = jax.vmap(shifted)(each, to_float(images[chosen]))

    def loss_fn(params):
      _, logits = model.apply(params, batch, jax.random.split(keys[2], BATCH))
      loss = optax.softmax_cross_entropy_with_integer_labels
      return loss(logits, labels[chosen]).mean()

    params = state['params']
    updates, moments = optimizer.update(
      jax.grad(loss_fn)(params), state['optimizer']
    )
    return {
      'params': optax.apply_updates(params, updates),
      'optimizer': moments,
    }

  return step


def _keep(part, done, num_steps, state) -> None:
  """Saves the progress of a training."""
  leaves = jax.device_get(jax.tree.leaves(state))
  steps = {'steps': np.array([done, num_steps])}
  kept.write(part, {**{str(i): x for i, x in enumerate(leaves)}, **steps})


def _continued(part, num_steps, state) -> tuple[int, dict]:
  """(steps done, state) of an interrupted training, or (0, state)."""
  leaves, tree = jax.tree.flatten(state)
  with contextlib.suppress(*DAMAGED):
    found = kept.read(part)
    done, total = found.pop('steps').tolist()
    again = [found.pop(str(i)) for i in range(len(leaves))]
    kinds = [[(x.shape, x.dtype) for x in one] for one in (again, leaves)]
    if total == num_steps and not found and kinds[0] == kinds[1]:
      return done, tree.unflatten(again)
  return 0, state


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


class Score(NamedTuple):
  """How often a classifier is right on held-out images.

  Attributes:
    right: number of images that it classifies correctly.
    guessed: number that the most frequent class alone gets right.
    count: number of images.
  """

  right: int
  guessed: int
  count: int

  @property
  def accuracy(self) -> float:
    return self.right / self.count

  @property
  def is_skill(self) -> bool:
    """Whether guessing would be right as often in less than 1% of the cases.

    Guesses of the most frequent class are right independently, with that
    class's share as their probability, so the number of right ones is binomial.
    """
    share = self.guessed / self.count
    # The probability of more than right - 1 right guesses.
    chance = scipy.special.bdtrc(self.right - 1, self.count, share)
    return bool(chance < SIGNIFICANT)

  def doubt(self) -> str:
    """Why a classifier without skill cannot judge, in words."""
    return (
      f'the classifier is right on {self.right} of {self.count} held-out '
      'images, which is no better than chance: guessing the most frequent '
      f'class is right on {self.guessed}'
    )


def score(judge: features.Judge, source: Source) -> Score | None:
  """Counts how often a judge is right; None unless all images have labels.

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
  right = np.count_nonzero(np.concatenate(taken) == labels)
  return Score(int(right), int(np.bincount(labels).max()), len(labels))


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
  images, labels = zip(*map(source.read_fn, range(len(source))), strict=True)
  return np.stack(images), np.array(labels, np.int32)
