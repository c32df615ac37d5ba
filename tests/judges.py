"""Made-up judges and sets of images, and distances by NumPy and SciPy."""

import jax
import numpy as np
import scipy.linalg

from diffusion_jax.data.sources import Source
from diffusion_jax.evaluation import features
from diffusion_jax.training import sharding


def scipy_distance(a, b):
  """The textbook's formula on features [N, D], with SciPy's matrix root."""
  covariances = [np.cov(x, rowvar=False) for x in (a, b)]
  root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
  return (
    np.square(a.mean(0) - b.mean(0)).sum()
    + np.trace(covariances[0])
    + np.trace(covariances[1])
    - 2 * np.trace(root.real)
  )


def random_features(count, dim, seed):
  rng = np.random.default_rng(seed)
  mixing = rng.normal(size=(dim, dim)) / np.sqrt(dim)
  return rng.normal(size=(count, dim)) @ mixing + rng.normal(size=dim)


def random_images(count, shape=(8, 8, 1), seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, *shape), dtype=np.uint8)


def levels(count, seed):
  """Images of one grey level each, but for a row of noise."""
  values = random_images(count, (1, 1, 1), seed)
  images = np.broadcast_to(values, (count, 8, 8, 1)).copy()
  images[:, 0] = random_images(count, (8, 1), seed + 100)
  return images


def source_of(images, labels=None):
  return Source(
    num_images=len(images),
    read_fn=lambda i: (images[i], -1 if labels is None else labels[i]),
    num_classes=0 if labels is None else 10,
    description='made up',
  )


def images_of(images, pieces=3):
  """`features.Images` that come in pieces of odd sizes."""
  return features.Images(
    len(images), lambda: np.array_split(images, pieces), 'made up'
  )


def mesh_of(count):
  return sharding.make_mesh(devices=jax.devices()[:count])


def brightness():
  """Two features, two classes: dark or bright, surely or not."""

  def apply(params, images):
    x = images.astype(np.float32).reshape(len(images), -1) / 255 * params['k']
    mean = x.mean(1)
    return {
      'both': jax.numpy.stack([mean, x[:, 0]], 1),
      'first': x[:, :3],
      'logits': jax.numpy.log(jax.numpy.stack([1 - mean, mean], 1)),
    }

  protocol = {
    'features': 'brightness', 'features_sha256': '', 'resize': 'none',
    'num_classes': 2,
  }  # fmt: skip
  return features.Judge(
    apply, {'k': np.float32(1)}, {'both': 'frechet', 'first': 'sfid'}, 'logits',
    protocol, {'note': 'x'},
  )  # fmt: skip


def brightness_of(images):
  """(both, first, logits), in float64."""
  x = images.reshape(len(images), -1) / 255.0
  mean = x.mean(1)
  return (
    np.stack([mean, x[:, 0]], 1),
    x[:, :3],
    np.log(np.stack([1 - mean, mean], 1)),
  )
