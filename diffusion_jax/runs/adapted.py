"""Low-rank changes (LoRA) that a trained network gets when it is used."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax

from diffusion_jax import codecs, runs
from diffusion_jax.models import control, lora
from diffusion_jax.runs import low_rank, recipe
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checksum
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
    path: a file of LoRA, a folder with a file of diffusers' name, or a run that
      has trained LoRA, whose newest averaged changes are taken.
    scale: a factor on the changes.
    config: the config of the run whose network gets them.

  Raises:
    UserError: it is none of these, or is for a network with other layers.
  """
  if not math.isfinite(scale):
    raise UserError(f'lora={path}: the scale {scale} is not a finite number')
  if config['loss']['name'] != 'denoising' or codecs.reconstructs(config):
    raise UserError(
      f'lora={path} changes a denoising network, and this run has loss.name='
      f'{config["loss"]["name"]}: leave it out'
    )
  network = recipe.create(low_rank.plain(config)).network
  kernels = lora.kernels(jax.eval_shape(network.init, jax.random.key(0)))
  place = files.at(path).expanduser()
  if (place / 'config.json').exists():
    found = _of_run(place, kernels)
  else:
    place = place / weights.FILE if place.is_dir() else place
    names = weights.names_of(config['model']['name'])
    found = weights.read(place, kernels, names)
  return Change(str(path), scale, found, weights.sha256(found))


def _of_run(workdir, kernels) -> lora.Lora:
  """The changes that a run has trained, checked."""
  if not low_rank.is_used(runs.read_config(workdir, 'lora')):
    raise UserError(
      f'lora={workdir} is a run without LoRA (lora.rank=0): give one that has '
      f'trained it, or a file of {weights.states.SAFE}'
    )
  found, *_ = low_rank.read(workdir)
  for layer, (a, b) in found.pairs.items():
    there = (*a.shape[:-1], b.shape[-1])
    here = layer in kernels and kernels[layer].shape
    if there != here:
      raise UserError(
        f'lora={workdir} changes the layer {layer} of {list(there)}, which is '
        f'{list(here) if here else "missing"} here: give a run whose network '
        'is this one'
      )
  return found


def applied(trained, change: Change):
  """A `Trained` with changes that have been read.

  Args:
    trained: the network.
    change: low-rank changes of it.
  """
  known = trained.known_sha256
  if change.scale:
    own = {k: x for k, x in trained.params.items() if k != control.PART}
    before, scale = known or checksum.sha256(own), float(change.scale)
    known = low_rank.joined([before, change.sha256, repr(scale)])
  return dataclasses.replace(
    trained,
    params=low_rank.merged(trained.params, change.lora, change.scale),
    changes=(*trained.changes, change),
    known_sha256=known,
  )


def sha256(params: Mapping, known: str) -> str:
  """The hash of a network's parameters, see `Trained.weights_sha256`.

  Args:
    params: all parts.
    known: the hash of those of them that are no ControlNet, if low-rank changes
      are in the network; otherwise ''.
  """
  if not known:
    return checksum.sha256(params)
  if control.PART not in params:
    return known
  return low_rank.joined([known, checksum.sha256(params[control.PART])])
