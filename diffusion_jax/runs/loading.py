"""Reads the parameters of a run's checkpoint into its network."""

import dataclasses
import functools

import jax

from diffusion_jax.runs import adapted, averaged, low_rank
from diffusion_jax.training import checkpoint, sharding


def at(trained, step: int | None):
  """A `Trained` at a checkpoint, with all that changes or steers it.

  Args:
    trained: the network; perhaps without parameters yet.
    step: the step of the checkpoint; None = the newest that is not damaged.

  Raises:
    UserError: there is no such checkpoint, it is damaged, or its parameters
      are not finite.
  """
  config, mesh, made = trained.config, trained.mesh, trained.recipe
  directory = trained.workdir / 'checkpoints'
  shapes = jax.eval_shape(made.init, jax.random.key(0))
  if low_rank.is_used(config):
    shapes, _ = low_rank.shapes(config)
  abstract = sharding.abstract(shapes, mesh)

  def read(at):
    params, average = averaged.load(
      directory, at, abstract, config['ema'], trained.weights
    )
    params, known = low_rank.whole(trained.workdir, config, params, mesh)
    found = dataclasses.replace(
      trained, step=at, params={**made.frozen, **params}, average=average,
      changes=(), known_sha256=known,
    )  # fmt: skip
    return functools.reduce(adapted.applied, trained.changes, found)

  if step is None:
    return checkpoint.read_newest(directory, read)
  return read(checkpoint.find_step(directory, step, 'step'))


def using(trained, ema_profile: str | float | None):
  """A `Trained` with another average of its parameters.

  Args:
    trained: the network.
    ema_profile: the average, see `trained.load`; None = that of `ema.decay`.

  Raises:
    UserError: there is no such average, or as for `at`.
  """
  average = averaged.check(trained.config['ema'], True, ema_profile)
  if average.get('ema_profile') == trained.average.get('ema_profile'):
    return trained
  ema = bool(average) or trained.config['ema']['decay'] > 0
  found = dataclasses.replace(trained, ema=ema, average=average)
  return at(found, trained.step)
