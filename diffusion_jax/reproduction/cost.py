"""The cost of a reproduction: images, evaluations, FLOPs, and hours.

Hours come from measured rates if there are any, and otherwise from the share of
a chip's peak that the paper's own run reached. The two are never mixed.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax import runs
from diffusion_jax.planning import chips, flops
from diffusion_jax.reproduction import published
from diffusion_jax.reproduction.published import Recipe
from diffusion_jax.runs import programs
from diffusion_jax.system import terminal
from diffusion_jax.training import sharding

# Inception at 299x299 up to its last features, counted by `planning.flops`.
INCEPTION_FLOPS = 10.95e9

# Chips for rent -> peak FLOPs per second of all of them. The number in a TPU's
# name counts two cores per chip for v4, and chips for later ones.
PLACES = {
  **{f'1 {name}': peak for name, peak in chips.GPUS.items()},
  '8 H100': 8 * chips.GPUS['H100'],
  'TPU v4-8': 4 * chips.CHIPS['v4'].flops,
  'TPU v5e-8': 8 * chips.CHIPS['v5e'].flops,
  'TPU v6e-8': 8 * chips.CHIPS['v6e'].flops,
}


class Work(NamedTuple):
  """The whole computation of a reproduction.

  Attributes:
    images: training images, repeats included.
    drawn: network evaluations for the samples.
    scored: network evaluations for the bits per dimension.
    judged: images that pass through Inception.
    train_flops: FLOPs per training image, forward and backward.
    evaluation_flops: FLOPs per network evaluation of one image.
  """

  images: int
  drawn: int
  scored: int
  judged: int
  train_flops: float
  evaluation_flops: float


class Hours(NamedTuple):
  """Hours by part. Judging is not included: it is short and has no rate."""

  training: float
  drawing: float
  bits: float


def flops_of(config: Mapping) -> tuple[float, float]:
  """FLOPs per training image, and per network evaluation.

  The programs are traced for one device of this process; nothing is compiled.

  Args:
    config: the run's config, checked.
  """
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  program = programs.create({**config, 'microbatches': 1}, mesh)
  shape = (1, *runs.image_shape(config['data']))
  where = sharding.batch_sharding(mesh)
  batch = {'image': jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=where)}
  step = program.step_fn.trace(program.abstract, program.frozen, batch)
  evaluation = jax.make_jaxpr(program.recipe.parts['net'].apply)(
    program.abstract.params['net'],
    jax.ShapeDtypeStruct(shape, jnp.float32),
    jax.ShapeDtypeStruct((1,), jnp.int32),
  )
  return (
    float(flops.products(step.jaxpr).total()),
    float(flops.products(evaluation).total()),
  )


def shares(recipe: Recipe) -> tuple[float, float]:
  """The shares of the peak that the paper's run reached: training, drawing.

  They are the only published rates for these networks: 0.19 and 0.36 for
  CIFAR-10, which is used for recipes without rates, 0.42 and 0.43 at 256x256.

  Args:
    recipe: the published recipe.
  """
  if not recipe.flops:
    recipe = published.find('cifar10')
  return (
    recipe.images_per_sec * recipe.flops[0] / published.PAPER_PEAK,
    recipe.evaluations_per_sec * recipe.flops[1] / published.PAPER_PEAK,
  )


def hours(
  work: Work,
  images_per_sec: float | None,
  evaluations_per_sec: float | None,
  most: float = math.inf,
) -> Hours | None:
  """Hours at known rates.

  Args:
    work: the computation.
    images_per_sec: training rate of all devices together; None = not known.
    evaluations_per_sec: rate of network evaluations in sampling, likewise.
    most: time limit of training, in hours.

  Returns:
    the hours; None if a required rate is not known.
  """
  parts = (
    (work.images, images_per_sec),
    (work.drawn, evaluations_per_sec),
    (work.scored, evaluations_per_sec),
  )
  if any(count and not rate for count, rate in parts):
    return None
  training, *others = (count / (rate or 1) / 3600 for count, rate in parts)
  return Hours(min(training, most), *others)


def estimate(
  work: Work, peak: float, shares: tuple[float, float], most: float = math.inf
) -> Hours:
  """Hours at given shares of the peak.

  Args:
    work: the computation.
    peak: peak FLOPs per second of all chips.
    shares: shares of the peak in training and in drawing.
    most: time limit of training, in hours.
  """
  train, draw = (share * peak for share in shares)
  return hours(
    work, train / work.train_flops, draw / work.evaluation_flops, most
  )


def table(
  work: Work, shares: tuple[float, float], most: float = math.inf
) -> tuple[list[str], list[list[str]]]:
  """Estimated hours on chips for rent, also at half and double the shares.

  Args:
    work: the computation.
    shares: a result of `shares`.
    most: time limit of training, in hours.

  Returns:
    (heads, rows) of the table.
  """
  heads = ['hours, estimated', 'training', 'drawing', 'bits', 'all',
           'at half the share', 'at double']  # fmt: skip
  rows = []
  for name, peak in PLACES.items():
    found, *others = (
      estimate(work, factor * peak, shares, most) for factor in (1, 0.5, 2)
    )
    totals = [sum(one) for one in (found, *others)]
    rows.append([name, *map(_short, (*found, *totals))])
  return heads, rows


def _short(hours: float) -> str:
  if 0 < hours < 0.001:
    return '< 0.001'
  return f'{hours:.1f}' if hours >= 10 else f'{hours:.2g}'


def lines(
  work: Work, steps: int, shares: tuple[float, float], most: float = math.inf
) -> list[str]:
  """The computation and its estimated hours, as lines of text.

  Args:
    work: the computation.
    steps: training steps.
    shares: a result of `shares`.
    most: time limit of training, in hours.
  """
  parts = (
    (work.images, f'{steps:,} training steps, {work.images:,} images',
     work.train_flops),
    (work.drawn, f'{work.drawn:,} evaluations for the samples',
     work.evaluation_flops),
    (work.scored, f'{work.scored:,} evaluations for the bits per dimension',
     work.evaluation_flops),
    (work.judged, f'{work.judged:,} images judged by Inception',
     INCEPTION_FLOPS),
  )  # fmt: skip
  return [
    *(
      f'{told}: {count * each / 1e18:.4g} EFLOP'
      for count, told, each in parts
      if count
    ),
    '',
    *terminal.table(*table(work, shares, most)),
    f'at {shares[0]:.0%} of the published peak in training and {shares[1]:.0%} '
    "in drawing, the shares of the paper's run on a TPU v3-8: an estimate, not "
    'a measurement. With fewer images per chip, or faster chips, the shares '
    'are smaller; judging and compiling are not counted',
  ]
