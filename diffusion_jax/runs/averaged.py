"""The average of the parameters to use: a kept one, or a reconstructed one."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from diffusion_jax.system import distributed, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import averages, checkpoint
from diffusion_jax.training.averages import DECAY, PROFILE, Average

WORST = 0.1  # the largest relative error of a fit that is used


def find(ema: Mapping, asked: str) -> bool | str | None:
  """Where a checkpoint holds an average.

  Args:
    ema: the config's group `ema`.
    asked: WIDTH or decay:DECAY, see `averages.parse`.

  Returns:
    What `checkpoint.load_params` takes as `ema`; None if the average is not
    kept, but can be reconstructed if there are enough checkpoints.

  Raises:
    UserError: it is neither.
  """
  wanted, kept = averages.parse(asked), averages.kept(ema)
  if wanted in kept:
    return wanted.name
  if wanted == Average(DECAY, ema['decay']):
    return True
  decays = [ema['decay']] * (ema['decay'] > 0)
  decays += [one.number for one in kept if one.kind == DECAY]
  if wanted.kind == DECAY:
    there = ', '.join(f'decay:{x!r}' for x in decays) or 'none with a decay'
    raise UserError(
      f'--ema_profile={asked}: the run keeps {there}; only a relative width, '
      'such as 0.1, can be reconstructed'
    )
  if PROFILE not in [one.kind for one in kept]:
    raise UserError(
      f'--ema_profile={asked}: the run keeps no profile to reconstruct it '
      'from: train with --config.ema.profiles="(0.05, 0.1)"'
    )
  return None


def check(ema: Mapping, averaged: bool, asked: str | float | None) -> dict:
  """The facts about an average that are known before it is loaded.

  Args:
    ema: the config's group `ema`.
    averaged: whether averaged parameters are asked for.
    asked: the `ema_profile`; None = the average of `ema.decay`.

  Raises:
    UserError: the run has no such average, see `find`.
  """
  if asked is None:
    return {}
  asked = averages.parse(str(asked)).text
  find(ema, asked)
  if not averaged:
    raise UserError(
      f'--ema_profile={asked} chooses an average, and --noema none: leave one '
      'of them out'
    )
  return {'ema_profile': asked}


def suffix(weights: bool | str) -> str:
  """The part of a file's name that says of which weights it is.

  Args:
    weights: whether the averaged ones or the raw ones, or an `ema_profile`.
  """
  if isinstance(weights, str):
    return f'_ema{weights.replace(":", "")}'
  return '_raw' * (not weights)


def load(
  directory, step: int, abstract, ema: Mapping, asked: bool | str
) -> tuple[Any, dict]:
  """Loads an average of the parameters, or reconstructs it.

  Checkpoints are read one after the other: two copies of the parameters are in
  memory. Call it in all processes.

  Args:
    directory: the folder of the checkpoints.
    step: the step of the checkpoint. Later ones are not used.
    abstract: the parameters' shapes, dtypes and shardings.
    ema: the config's group `ema`.
    asked: whether to load the averaged or the raw parameters; or WIDTH or
      decay:DECAY, see `averages.parse`.

  Returns:
    The parameters, and facts about them: {} unless a profile is asked for,
    otherwise 'ema_profile'; if reconstructed also 'ema_error', the relative
    error of the profile, and 'ema_averages', the number of averages that it is
    made of.

  Raises:
    UserError: the average is not kept and cannot be reconstructed, or as for
      `checkpoint.load_params`.
  """
  named = isinstance(asked, str)
  facts = {'ema_profile': asked} if named else {}
  place = find(ema, asked) if named else asked
  if place is not None:
    params = checkpoint.load_params(directory, step, abstract, ema=place)
    return params, facts
  steps = distributed.on_first(lambda: checkpoint.steps(directory))
  snapshots = [
    (one, at)
    for at in steps
    if at <= step
    for one in averages.kept(ema)
    if one.kind == PROFILE
  ]
  fit = averages.fit(
    averages.parse(asked).number,
    step,
    [one.number for one, _ in snapshots],
    [at for _, at in snapshots],
  )
  if fit.error > WORST:
    raise UserError(
      f'--ema_profile={asked}: the {len(snapshots)} profiles in checkpoints up '
      f'to step {step} give it with an error of {fit.error:.0%}, above '
      f'{WORST:.0%}: train with two or more ema.profiles around it, and a '
      'smaller keep_every'
    )
  whole = None
  for (one, at), weight in zip(snapshots, fit.weights, strict=True):
    with _of_snapshot(at, step):
      part = checkpoint.load_params(directory, at, abstract, ema=one.name)
    whole = _add(whole, part, weight)
  terminal.say_once(
    f'the average of width {asked} is reconstructed from {len(snapshots)} in '
    f'checkpoints; its profile has a relative error of {fit.error:.1e}'
  )
  told = {'ema_error': fit.error, 'ema_averages': len(snapshots)}
  return whole, facts | told


@contextlib.contextmanager
def _of_snapshot(at: int, step: int) -> Iterator[None]:
  """A damaged older checkpoint does not make the newest one unusable."""
  try:
    yield
  except checkpoint.Damaged as e:
    if at == step:
      raise
    raise UserError(str(e)) from e


def _add(whole, part, weight: float):
  if whole is None:
    return jax.tree.map(lambda x: weight * x, part)
  return jax.tree.map(lambda a, x: a + weight * x, whole, part)
