"""Scores images by how unlike a run's data they are.

Two scores, each a mean over noise levels that are standardised on reference
images, see `metrics.anomaly`:

  bound           the terms of the variational bound at chosen times t,
                  KL(q(xt-1 | xt, x0) || p(xt-1 | xt)), one evaluation each
                  (arXiv 2006.11239, eq. 5)
  reconstruction  the squared error of an image that is noised to a time t and
                  denoised again by a few steps of DDIM (DDPM-OOD, arXiv
                  2211.07740, which takes PNDM, and adds LPIPS)

The heat map of an image is the second one per pixel: the mean over levels of
the pixel's squared error, standardised by the mean and the deviation of all
pixels of all reference images at that level. A pixel's own deviation would be 0
where the data never change.

An image's noises depend on the seed, its pixels and the time only. So its
scores are the same in any set, order and batch, and on any mesh.
"""

import hashlib
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import samplers
from diffusion_jax.codecs import pixels
from diffusion_jax.evaluation import features
from diffusion_jax.evaluation.batches import Batches
from diffusion_jax.evaluation.metrics import anomaly
from diffusion_jax.guidance import clipping
from diffusion_jax.process import likelihood, noise
from diffusion_jax.runs import draw
from diffusion_jax.system.errors import UserError

STREAM = 5  # of the random keys, see `Batches.program`
INFINITE = 'no finite score: was training healthy? --clip may help'
SCORES = ('reconstruction', 'bound')


class How(NamedTuple):
  """The settings that scores depend on, in addition to weights and images.

  Attributes:
    seed: seed of the noise.
    bound_times: times of the bound's terms, falling.
    start_times: times that images are noised to, falling.
    num_steps: network evaluations of a reconstruction.
    variance: variance of p(xt-1 | xt) in the bound.
    clip: whether to clip the estimates of x0, in both scores.
    bound_draws: noises that each of the bound's terms is the mean over.
    start_draws: the same of reconstructions.
  """

  seed: int
  bound_times: list[int]
  start_times: list[int]
  num_steps: int
  variance: str
  clip: bool
  bound_draws: int = 10
  start_draws: int = 1

  @property
  def evaluations(self) -> int:
    """Network evaluations per image."""
    reconstructions = len(self.start_times) * self.start_draws
    terms = len(self.bound_times) * self.bound_draws
    return terms + reconstructions * self.num_steps


class Found(NamedTuple):
  """The errors of N images.

  Attributes:
    bound: [N, K] the terms, in bits per dimension.
    reconstruction: [N, L] squared errors, averaged over pixels, in units of
      [-1, 1].
    squares: [N, L] the squares of the pixels' squared errors, averaged alike.
    maps: [N, H, W], see the module docstring; None for the reference.
  """

  bound: np.ndarray
  reconstruction: np.ndarray
  squares: np.ndarray
  maps: np.ndarray | None = None

  def errors(self, score: str) -> np.ndarray:
    """The errors of one of SCORES: [N, levels]."""
    return getattr(self, score)


def default_times(num_timesteps: int) -> list[int]:
  """Nine evenly spaced times, at tenths of the schedule, falling."""
  return [num_timesteps * tenth // 10 for tenth in range(9, 0, -1)]


def check_times(flag: str, times, least: int, num_timesteps: int) -> list[int]:
  """Times in falling order.

  Args:
    flag: the name of the flag that gives them.
    times: numbers as text.
    least: the smallest that is allowed.
    num_timesteps: T of the schedule.

  Raises:
    UserError: they are not whole numbers from `least` to T-1, or repeat.
  """
  given = ','.join(map(str, times))
  words = [str(time).strip() for time in times]
  found = [int(word) for word in words if word.isdecimal()]
  inside = all(least <= time < num_timesteps for time in found)
  if not words or len(found) < len(words) or not inside:
    raise UserError(
      f'--{flag}={given}: give whole times from {least} to '
      f'{num_timesteps - 1}, separated by commas'
    )
  if len({*found}) < len(found):
    raise UserError(f'--{flag}={given}: give each time once')
  return sorted(found, reverse=True)


def grid_of(start: int, num_steps: int) -> list[float]:
  """The times of a reconstruction: evenly spaced to 0, then clean data.

  Whole times, unless they would repeat.

  Args:
    start: the first time, at least 1.
    num_steps: number of steps.
  """
  times = np.linspace(start, 0, num_steps)
  whole = np.rint(times)
  times = whole if (np.diff(whole) < 0).all() else times
  return [*times.tolist(), -1.0]


def number_of(image: np.ndarray) -> int:
  """32 bits that depend on the pixels of an image: of their SHA-256."""
  digest = hashlib.sha256(np.ascontiguousarray(image)).digest()
  return int.from_bytes(digest[:4])


def numbers_of(images: features.Images) -> np.ndarray:
  """The numbers of all images of a set, which is read once: uint32 [N]."""
  found = [number_of(image) for batch in images.stream() for image in batch]
  return np.array(found, np.uint32)


def place_of(folder, how: How, trained, sha256: str, levels=None):
  """The folder of a set's errors, batch by batch.

  Args:
    folder: the folder of all sets.
    how: the settings.
    trained: the network.
    sha256: the hash of the images.
    levels: of the pixels of the reference, if there are maps.
  """
  told = [how, trained.weights_sha256, sha256]
  told += [] if levels is None else [[x.tolist() for x in levels]]
  digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
  return folder / f'kept_{digest[:16]}'


def measure(
  batches: Batches,
  how: How,
  numbers: np.ndarray,
  levels: anomaly.Levels | None = None,
) -> Found:
  """Measures the errors of a set of images.

  Args:
    batches: the network and the images, uint8.
    how: the settings.
    numbers: those of the images, see `numbers_of`.
    levels: see `levels_of_pixels`, for the maps; None for no maps.

  Raises:
    UserError: an error is not finite, or the run needs a condition.
  """
  program = _program(batches, how)
  table = np.asarray(numbers, np.uint32)
  look_up = jax.jit(lambda indices: jnp.asarray(table)[indices])
  count = len(how.start_times)
  weights, offset = np.zeros(count), 0.0
  if levels is not None:
    weights = 1 / (count * levels.deviation)
    offset = float((levels.mean * weights).sum())

  def compute(images, indices, tell):
    found = program(images, look_up(indices), images, np.float32(weights))
    tell(how.evaluations)
    maps = found.pop('map') - np.float32(offset)
    return found if levels is None else {**found, 'map': maps}

  kept = batches.each('errors', compute, how.evaluations, INFINITE)
  turned = {name: np.moveaxis(x, -1, 0) for name, x in kept.items()}
  return Found(
    *(np.asarray(turned[name], np.float64) for name in Found._fields[:3]),
    turned.get('map'),
  )


def levels_of_pixels(reference: Found) -> anomaly.Levels:
  """The mean and the deviation of pixels' squared errors at each level.

  Args:
    reference: the errors of the reference images.

  Raises:
    UserError: all pixels of all images have the same error.
  """
  mean = reference.reconstruction.mean(0)
  variance = reference.squares.mean(0) - mean**2
  if not (variance > 0).all():
    raise UserError(
      'the reference images have the same error in all pixels: give others'
    )
  return anomaly.Levels(mean, np.sqrt(variance))


def _program(batches: Batches, how: How):
  """(images, numbers, images, weights [L]) -> arrays [..., B], compiled."""
  trained = batches.trained
  codec, schedule = trained.codec, trained.schedule
  last = schedule.num_timesteps - 1
  steps = likelihood.prepare(schedule, range(last, -2, -1), how.variance)
  # What the noises depend on: [times, draws].
  labels, others = (
    np.asarray(times)[:, None] + schedule.num_timesteps * np.arange(draws)
    for times, draws in (
      (how.bound_times, how.bound_draws), (how.start_times, how.start_draws),
    )
  )  # fmt: skip
  which = np.repeat(last - np.asarray(how.bound_times), how.bound_draws)
  starts = np.asarray(how.start_times, np.float64)
  log_alpha_bar, variance = schedule.host(starts)
  sampler = samplers.create('ddim')
  rows = [
    sampler.init(schedule, np.array(grid_of(start, how.num_steps)), None)[0]
    for start in how.start_times
  ]
  # One program for all levels: their coefficients are data.
  levels = jax.tree.map(
    lambda x: np.asarray(x, np.float32),
    {
      'alpha': np.exp(0.5 * log_alpha_bar),
      'sigma': np.sqrt(variance),
      'steps': jax.tree.map(lambda *x: np.stack(x), *rows),
    },
  )

  def errors(params, cond, x0, keys, images, weights):
    def denoiser(xt, t):
      return trained.compiled.denoise(params, xt, t, cond)

    if how.clip and codec.bound is not None:
      denoiser = clipping.clip_x0(denoiser, schedule, codec.bound)
    first, second = (
      jax.vmap(lambda key, part=part: jax.random.fold_in(key, part))(keys)
      for part in range(2)
    )
    bits = likelihood.terms(
      denoiser, steps, x0, first, which, codec.levels == 256, labels.ravel(),
    ).bits.reshape(*labels.shape, len(x0)).mean(1)  # fmt: skip
    seen = pixels.to_float(images)

    def level(total, given):
      each, weight, at = given

      def one(sum_of, label):
        eps = noise.draw(second, label, x0.shape[1:], x0.dtype)
        x, _ = jax.lax.scan(
          lambda x, row: (sampler.step(denoiser, row, x, (), None)[0], None),
          at['alpha'] * x0 + at['sigma'] * eps,
          at['steps'],
        )
        data = draw.in_groups(codec, params, x, second, trained.mesh)
        off = jnp.square(pixels.to_float(data) - seen).mean(-1)
        return sum_of + off / how.start_draws, None

      off, _ = jax.lax.scan(one, jnp.zeros_like(total), each)
      means = off.mean((1, 2)), jnp.square(off).mean((1, 2))
      return total + weight * off, means

    total, (means, squares) = jax.lax.scan(
      level,
      jnp.zeros(seen.shape[:-1], seen.dtype),
      (others, weights, levels),
    )
    maps = jnp.moveaxis(total, 0, -1)
    return {
      'bound': bits, 'reconstruction': means, 'squares': squares, 'map': maps,
    }  # fmt: skip

  return batches.program(errors, seed=how.seed, stream=STREAM, dtype='float32')
