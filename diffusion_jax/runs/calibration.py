"""What a network's errors are at each time: kept beside its checkpoint.

Samplers with the optimal variance and the optimal grids are made from it.
WORKDIR/calibration/step3000.json belongs to the averaged weights of step 3000,
step3000_raw.json to the raw ones.
"""

import json
from typing import NamedTuple

import numpy as np

from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError


class Calibration(NamedTuple):
  """The squared error of the estimate of x0 at the times 0 .. T-1.

  Means over data and noise, per dimension; of the best denoiser that is
  E Var(x0 | xt).

  Attributes:
    mse: [T], of the estimate as it is.
    clipped_mse: [T], of the estimate clipped to [-1, 1].
    weights_sha256: of the parameters, see `Trained`.
  """

  mse: list[float]
  clipped_mse: list[float]
  weights_sha256: str

  def of(self, clip: bool) -> list[float]:
    """The table of samples whose x0 is clipped, or not."""
    return self.clipped_mse if clip else self.mse


def path(workdir, step: int, ema: bool) -> files.Path:
  """Its file in a run's folder."""
  name = f'step{step}' + '_raw' * (not ema)
  return files.at(workdir) / 'calibration' / f'{name}.json'


def write(place, calibration: Calibration, about: dict) -> None:
  """Writes it, whole or not at all.

  Args:
    place: of the file, see `path`.
    calibration: what was found.
    about: of what images, with what seed.
  """
  told = {**about, **calibration._asdict()}
  files.make(files.at(place).parent)
  with files.replacing(files.at(place)) as file:
    file.write(json.dumps(told).encode() + b'\n')


def read(workdir, step: int, ema: bool, num_timesteps: int) -> Calibration:
  """What is kept of a run's checkpoint.

  Args:
    workdir: the run's folder.
    step: of the checkpoint.
    ema: of the averaged weights, or of the raw ones.
    num_timesteps: T.

  Raises:
    UserError: there is none, or it is damaged.
  """
  place = path(workdir, step, ema)
  if not place.exists():
    raise UserError(
      f'the statistics of step {step} are not yet computed: run '
      + _command(workdir, step, ema)
    )
  try:
    told = json.loads(place.read_text())
    found = Calibration(*(told[name] for name in Calibration._fields))
    tables = np.array(found[:-1], float)
    if tables.shape != (2, num_timesteps) or not (tables >= 0).all():
      raise ValueError('tables of another size')
    return found
  except (OSError, ValueError, KeyError, TypeError) as e:
    told = f'{place} is damaged ({e}): run {_command(workdir, step, ema)}'
    raise UserError(told) from e


def _command(workdir, step, ema) -> str:
  raw = '' if ema else ' --ema=false'
  return (
    f'python -m diffusion_jax.calibrate --workdir={workdir} --step={step}{raw}'
  )


def check(
  calibration: Calibration, weights_sha256: str, workdir, step: int, ema: bool
) -> None:
  """Raises UserError unless the calibration is of these weights.

  Args:
    calibration: as read.
    weights_sha256: of the checkpoint.
    workdir: of the run, for the message, as are the next two.
    step: of the checkpoint.
    ema: whether the averaged weights are meant.
  """
  if calibration.weights_sha256 != weights_sha256:
    raise UserError(
      f'the statistics of step {step} are of other weights than those of the '
      f'checkpoint: run {_command(workdir, step, ema)}'
    )
