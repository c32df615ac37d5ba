"""Low-rank changes (LoRA) that a trained network gets when it is used."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax

from diffusion_jax import codecs, models
from diffusion_jax.models import lora
from diffusion_jax.runs import recipe
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import lora as weights


class Change(NamedTuple):
  """Low-rank changes and how much of them is added.

  Attributes:
    path: where they come from.
    scale: a factor on all of them.
    lora: the changes.
    sha256: their hash, whatever file they come from, see `weights.lora`.
  """

  path: str
  scale: float
  lora: lora.Lora
  sha256: str

  @property
  def facts(self) -> dict:
    """What samples depend on."""
    return {'sha256': self.sha256, 'scale': self.scale}


def read(path, scale: float, config: Mapping) -> Change:
  """Reads low-rank changes of a run's network.

  Args:
    path: a file of LoRA, or a folder with a file of diffusers' name.
    scale: a factor on the changes.
    config: the config of the run whose network gets them.

  Raises:
    UserError: it is no such file, or is for a network with other layers.
  """
  if not math.isfinite(scale):
    raise UserError(f'lora={path}: the scale {scale} is not a finite number')
  if codecs.reconstructs(config):
    raise UserError(
      f'lora={path} changes a denoising network, and this run is an '
      'autoencoder: leave it out'
    )
  place = files.at(path).expanduser()
  if place.is_dir():
    place = place / weights.FILE
  shapes = jax.eval_shape(
    recipe.create(config).parts[models.NET].init, jax.random.key(0)
  )
  found = weights.read(
    place, lora.kernels(shapes), weights.names_of(config['model']['name'])
  )
  return Change(str(path), scale, found, weights.sha256(found))


def applied(trained, change: Change):
  """A `Trained` with changes that have been read.

  Args:
    trained: the network.
    change: low-rank changes of it.
  """
  params = changed(trained.params, [change])
  changes = *trained.changes, change
  return dataclasses.replace(trained, params=params, changes=changes)


def changed(params: Mapping, changes: Iterable[Change]) -> Mapping:
  """The parameters of a run with low-rank changes of its network.

  Args:
    params: all parts.
    changes: what is added, each to all before it.
  """
  for change in changes:
    before = params[models.NET]
    net = lora.merged(before, change.lora, change.scale)
    # Where the parameters lie; XLA may have chosen otherwise.
    where = jax.tree.map(lambda leaf: leaf.sharding, before)
    params = {**params, models.NET: jax.device_put(net, where)}
  return params
