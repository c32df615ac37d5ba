"""What a reproduction takes: images, evaluations, FLOPs, and hours.

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
from diffusion_jax.training import sharding

# Of Inception at 299x299 up to its last features, counted likewise.
INCEPTION_FLOPS = 10.95e9


class Place(NamedTuple):
  """Chips to rent.

  Attributes:
    name: as they are asked for.
    count: of chips.
    peak: FLOPs a second of one.
  """

  name: str
  count: int
  peak: float


# TPU v4 counts two cores a chip, the later ones chips.
PLACES = (
  *(Place(f'1 {name}', 1, flops) for name, flops in chips.GPUS.items()),
  Place('8 H100', 8, chips.GPUS['H100']),
  Place('TPU v4-8', 4, chips.CHIPS['v4'].flops),
  Place('TPU v5e-8', 8, chips.CHIPS['v5e'].flops),
  Place('TPU v6e-8', 8, chips.CHIPS['v6e'].flops),
)


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
  """By part. Judging is no part: it is little, and at no rate on record."""

  training: float
  drawing: float
  bits: float

  @property
  def total(self) -> float:
    return sum(self)


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


def estimate(
  work: Work,
  place: Place,
  shares: tuple[float, float],
  most: float = math.inf,
) -> Hours:
  """Hours at shares of the peak; see what half and double of them mean.

  Args:
    work: all of it.
    place: the chips.
    shares: of their peak, in training and in drawing.
    most: hours that training may take.
  """
  train, sample = (share * place.count * place.peak for share in shares)

  def hours(count, each, rate):
    return count * each / rate / 3600

  return Hours(
    min(hours(work.images, work.train_flops, train), most),
    hours(work.drawn, work.evaluation_flops, sample),
    hours(work.scored, work.evaluation_flops, sample),
  )


def measured(
  work: Work,
  images_per_sec: float | None,
  evaluations_per_sec: float | None,
  most: float = math.inf,
) -> Hours | None:
  """At rates that were measured on the machine in question.

  Args:
    work: what is left of it.
    images_per_sec: of training, all devices together; None = not measured.
    evaluations_per_sec: of the network while sampling, likewise.
    most: hours that training may take.

  Returns:
    None where a rate that is needed was not measured.
  """
  needed = (
    (work.images, images_per_sec),
    (work.drawn + work.scored, evaluations_per_sec),
  )
  if any(count and not rate for count, rate in needed):
    return None

  def hours(count, rate):
    return count / rate / 3600 if count else 0.0

  return Hours(
    min(hours(work.images, images_per_sec), most),
    hours(work.drawn, evaluations_per_sec),
    hours(work.scored, evaluations_per_sec),
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
  for place in PLACES:
    found, half, double = (
      estimate(work, place, (shares[0] * f, shares[1] * f), most)
      for f in (1, 0.5, 2)
    )
    totals = (found.total, half.total, double.total)
    rows.append([place.name, *map(_short, (*found, *totals))])
  return heads, rows


def _short(hours: float) -> str:
  if 0 < hours < 0.001:
    return '< 0.001'
  return f'{hours:.1f}' if hours >= 10 else f'{hours:.2g}'


def lines(work: Work, steps: int) -> list[str]:
  """What is to be computed, line by line.

  Args:
    work: all of it.
    steps: of training.
  """
  parts = (
    (f'{steps:,} training steps, {work.images:,} images', work.images,
     work.train_flops),
    (f'{work.drawn:,} evaluations for the samples', work.drawn,
     work.evaluation_flops),
    (f'{work.scored:,} evaluations for the bits per dimension', work.scored,
     work.evaluation_flops),
    (f'{work.judged:,} images judged by Inception', work.judged,
     INCEPTION_FLOPS),
  )  # fmt: skip
  return [
    f'{told}: {count * each / 1e18:.4g} EFLOP'
    for told, count, each in parts
    if count
  ]
