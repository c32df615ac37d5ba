"""What a reproduction costs: images, evaluations, FLOPs, and hours.

Hours are measured where a rate was measured, and estimated elsewhere, at the
share of a chip's peak that the paper's own run had. The two are never mixed.
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

# Of Inception at 299x299 up to its last features, counted likewise.
INCEPTION_FLOPS = 10.95e9

# Chips to rent -> FLOPs a second of all of them at the peak. TPU v4 counts two
# cores a chip, the later ones chips.
PLACES = {
  **{f'1 {name}': peak for name, peak in chips.GPUS.items()},
  '8 H100': 8 * chips.GPUS['H100'],
  'TPU v4-8': 4 * chips.CHIPS['v4'].flops,
  'TPU v5e-8': 8 * chips.CHIPS['v5e'].flops,
  'TPU v6e-8': 8 * chips.CHIPS['v6e'].flops,
}


class Work(NamedTuple):
  """All that is to be computed.

  Attributes:
    images: of training.
    drawn: evaluations of the network for the samples.
    scored: evaluations of it for the bits per dimension.
    judged: images that Inception looks at.
    train_flops: of a training image, forward and backward.
    evaluation_flops: of an evaluation, of one image.
  """

  images: int
  drawn: int
  scored: int
  judged: int
  train_flops: float
  evaluation_flops: float


class Hours(NamedTuple):
  """By part. Judging is not one: it is short, and no rate is on record."""

  training: float
  drawing: float
  bits: float


def flops_of(config: Mapping) -> tuple[float, float]:
  """FLOPs of a training image, and of an evaluation of the network.

  It is traced for one device of this process; nothing is compiled.

  Args:
    config: of the run, checked.
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
  """The shares of the peak that the paper's own run had: training, drawing.

  They are the only rates on record for these networks: 0.19 and 0.36 for
  CIFAR-10, which stands in where a recipe has none, 0.42 and 0.43 at 256x256.

  Args:
    recipe: what is published.
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
    work: what is to be done.
    images_per_sec: of training, all devices together; None = not known.
    evaluations_per_sec: of the network while sampling, likewise.
    most: hours that training may take.

  Returns:
    None where a rate that is needed is not known.
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
  """Hours at shares of the peak; see what half and double of them mean.

  Args:
    work: all of it.
    peak: FLOPs a second of all chips.
    shares: of it, in training and in drawing.
    most: hours that training may take.
  """
  train, draw = (share * peak for share in shares)
  return hours(
    work, train / work.train_flops, draw / work.evaluation_flops, most
  )


def table(
  work: Work, shares: tuple[float, float], most: float = math.inf
) -> tuple[list[str], list[list[str]]]:
  """(heads, rows): hours on chips to rent, estimated, with half and double.

  Args:
    work: all of it.
    shares: of `shares`.
    most: hours that training may take.
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
  """What is to be computed, and the hours that it takes, line by line.

  Args:
    work: all of it.
    steps: of training.
    shares: of `shares`.
    most: hours that training may take.
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
    "in drawing, the shares of the paper's run on a TPU v3-8: an estimate, "
    'nothing of this was measured. Fewer images on a chip, and faster chips, '
    'mean smaller shares; judging and compiling are not counted',
  ]
