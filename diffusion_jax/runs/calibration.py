"""Calibration: the errors of a network at each time, saved with its run.

Samplers with the optimal variance and the optimal grids are computed from it.
WORKDIR/calibration/step3000.json is for the averaged weights of step 3000,
step3000_raw.json for the raw ones.
"""

import json
from typing import NamedTuple

import numpy as np

from diffusion_jax import runs
from diffusion_jax.runs import averaged
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError


class Calibration(NamedTuple):
  """The mean squared error of the estimate of x0 at the times 0 .. T-1.

  Averaged over data, noise and dimensions. For the optimal denoiser it is
  E Var(x0 | xt).

  Attributes:
    mse: [T], the error of the unclipped estimate.
    clipped_mse: [T], the error of the estimate clipped to [-1, 1].
    weights_sha256: the hash of the parameters, see `Trained`.
  """

  mse: list[float]
  clipped_mse: list[float]
  weights_sha256: str

  def of(self, clip: bool) -> list[float]:
    """The table to use for sampling with or without clipping of x0."""
    return self.clipped_mse if clip else self.mse


def path(workdir, step: int, weights: bool | str) -> files.Path:
  """The calibration file in a run's folder."""
  name = f'step{step}' + averaged.suffix(weights)
  return files.at(workdir) / 'calibration' / f'{name}.json'


def write(place, calibration: Calibration, about: dict) -> None:
  """Writes a calibration atomically.

  Args:
    place: the path of the file, see `path`.
    calibration: the calibration.
    about: facts to save with it, such as the images and the seed.
  """
  files.write_json(place, {**about, **calibration._asdict()})


def read(
  workdir, step: int, weights: bool | str, num_timesteps: int
) -> Calibration:
  """Reads the calibration of a run's checkpoint.

  Args:
    workdir: the run's folder.
    step: the step of the checkpoint.
    weights: of which weights, see `Trained.weights`.
    num_timesteps: T.

  Raises:
    UserError: there is no calibration, or it is damaged.
  """
  place = path(workdir, step, weights)
  if not place.exists():
    raise UserError(
      f'the statistics of step {step} are not yet computed: run '
      + _command(workdir, step, weights)
    )
  try:
    told = json.loads(place.read_text())
    found = Calibration(*(told[name] for name in Calibration._fields))
    tables = np.array(found[:-1], float)
    if tables.shape != (2, num_timesteps) or not (tables >= 0).all():
      raise ValueError('tables of another size')
    return found
  except (OSError, ValueError, KeyError, TypeError) as e:
    told = f'{place} is damaged ({e}): run {_command(workdir, step, weights)}'
    raise UserError(told) from e


def _command(workdir, step, weights) -> str:
  which = '' if weights else ' --ema=false'
  if isinstance(weights, str):
    which = f' --ema_profile={weights}'
  return (
    f'python -m diffusion_jax.calibrate --workdir={workdir} '
    f'--step={step}{which}'
  )


def check_plain(trained, sides: tuple[int, int] | None = None) -> None:
  """Checks that a `Trained` is the network of its checkpoint.

  Args:
    trained: the network.
    sides: the size of images that it is asked for; None for its own.

  Raises:
    UserError: it has been changed, or is for images of another size.
  """
  own = runs.image_shape(runs.read_config(trained.workdir)['data'])[:2]
  changes = [f'--{name}' for name in trained.about_changes]
  without = ' and '.join(changes)
  if (sides or trained.image_shape[:2]) != own:
    without = f'another size than {own[0]}x{own[1]}'
  if without:
    raise UserError(
      f'the statistics of a checkpoint are for its network without {without}: '
      'use a sampler and a grid that are not calibrated, such as ddim and '
      'uniform'
    )


def check(calibration: Calibration, trained) -> None:
  """Raises UserError unless a calibration is for a `Trained`'s weights."""
  if calibration.weights_sha256 != trained.weights_sha256:
    raise UserError(
      f'the statistics of step {trained.step} are not for the weights of the '
      'checkpoint: run '
      + _command(trained.workdir, trained.step, trained.weights)
    )
