"""The cost of a reproduction: images, evaluations, FLOPs, and hours.

Hours come from measured rates if there are any, and otherwise from the share of
a chip's peak that the paper's own run reached. The two are never mixed.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.planning import chips, flops
from diffusion_jax.reproduction import published
from diffusion_jax.reproduction.task import Task
from diffusion_jax.runs import programs
from diffusion_jax.system import terminal
from diffusion_jax.training import sharding

# Inception at 299x299 up to its last features, counted by `planning.flops`.
INCEPTION_FLOPS = 10.95e9

# Chips for rent -> peak FLOPs per second of all of them. The number in a TPU's
# name counts two cores per chip for v4, and chips for later ones.
PLACES = {
  **{
    f'1 {name.upper()}': chips.CHIPS[name].flops
    for name in ('a100', 'h100', 'h200')
  },
  '8 H100': 8 * chips.CHIPS['h100'].flops,
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
  where = sharding.batch_sharding(mesh)
  batch = {
    name: jax.ShapeDtypeStruct(*given, sharding=where)
    for name, given in programs.rows(config, program.recipe, 1).items()
  }
  step = program.step_fn.trace(program.abstract, program.frozen, batch)
  recipe, params = program.recipe, program.abstract.params

  def evaluate(params, xt, t):
    null = recipe.conditioner.condition(params, {}, None)
    params = recipe.whole(params, mesh)
    return recipe.network.apply(params['net'], xt, t, None, null)

  evaluation = jax.make_jaxpr(evaluate)(
    {**program.frozen, **params},
    jax.ShapeDtypeStruct((1, *recipe.codec.shape), jnp.float32),
    jax.ShapeDtypeStruct((1,), jnp.int32),
  )
  counts = [flops.products(jaxpr).total() for jaxpr in (step.jaxpr, evaluation)]
  return tuple(map(float, counts))


def work(task: Task, counted: tuple[float, float]) -> Work:
  """The whole computation of a task, from the start.

  Args:
    task: the task.
    counted: the result of `flops_of`.
  """
  config, recipe, stores = task.config, task.recipe, 1 + task.curve
  heldout = recipe.num_heldout or 0
  # The reference and the held-out images pass through Inception once.
  seen = (recipe.num_train or 0) + min(heldout, task.num_samples)
  return Work(
    0 if task.origin else config['num_steps'] * config['batch_size'],
    stores * task.num_samples * task.evaluations,
    task.bits * heldout * config['process']['num_timesteps'],
    stores * task.num_samples + seen if task.by_inception else 0,
    *counted,
  )


def shares(recipe: published.Recipe) -> tuple[float, float]:
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


def estimate(task: Task, work: Work, peak: float) -> Hours:
  """Hours at the shares of the peak that the paper's run reached.

  Args:
    task: the task.
    work: its computation.
    peak: peak FLOPs per second of all chips.
  """
  train, draw = (share * peak for share in shares(task.recipe))
  rates = (train / work.train_flops, draw / work.evaluation_flops)
  return hours(work, *rates, task.most_training)


def table(task: Task, work: Work) -> list[list[str]]:
  """Estimated hours on chips for rent, also at half and double the shares.

  Returns:
    the heads, and a row for each of PLACES.
  """
  rows = [['hours, estimated', 'training', 'drawing', 'bits', 'all',
           'at half the share', 'at double']]  # fmt: skip
  for name, peak in PLACES.items():
    found, *others = (
      estimate(task, work, factor * peak) for factor in (1, 0.5, 2)
    )
    rows.append([name, *map(_short, (*found, *map(sum, (found, *others))))])
  return rows


def _short(hours: float) -> str:
  if 0 < hours < 0.001:
    return '< 0.001'
  return f'{hours:.1f}' if hours >= 10 else f'{hours:.2g}'


def lines(task: Task, work: Work) -> list[str]:
  """The computation and its estimated hours, as lines of text."""
  steps = 0 if task.origin else task.config['num_steps']
  train, draw = shares(task.recipe)
  evaluation = work.evaluation_flops
  parts = (
    (f'{steps:,} training steps, {{:,}} images', work.images, work.train_flops),
    ('{:,} evaluations for the samples', work.drawn, evaluation),
    ('{:,} evaluations for the bits per dimension', work.scored, evaluation),
    ('{:,} images judged by Inception', work.judged, INCEPTION_FLOPS),
  )
  counted = [
    f'{what.format(count)}: {count * each / 1e18:.4g} EFLOP'
    for what, count, each in parts
    if count
  ]
  heads, *rows = table(task, work)
  told = [
    f'{task.name} in {task.workdir}',
    *counted,
    '',
    *terminal.table(heads, rows),
    f'at {train:.0%} of the published peak in training and {draw:.0%} '
    "in drawing, the shares of the paper's run on a TPU v3-8: an estimate, not "
    'a measurement. With fewer images per chip, or faster chips, the shares '
    'are smaller; judging and compiling are not counted',
  ]
  if task.train_minutes:
    told.append(
      f'training stops after {task.train_minutes:g} minutes at any step: the '
      "hours include this limit, the steps are the config's"
    )
  if task.origin:
    told.append('imported weights: the time per step is not measured')
  return told
