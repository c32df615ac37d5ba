"""Reads and writes folders of diffusers' autoencoders.

`AutoencoderKL` and `VQModel`, of any width, depth and size:

  config.json  diffusion_pytorch_model.safetensors

A folder is read as parts of a run's config and parameters that are renamed to
ours; writing them again gives bitwise the same numbers and equal settings.
diffusers is not needed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.models import autoencoder
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import coders, diffusers, places, shards, states

ONE_EACH = 'encoder.conv_in.weight'


class Folder(NamedTuple):
  """The content of a folder.

  Attributes:
    config: parts of a run's config: 'data' (image_size and channels only) and
      'codec'.
    kept: all settings, as they are.
    shift: what pipelines subtract from the latents, a number per channel.
    scale: what they divide the difference by.
    tensors: name in the file -> array: the averaged weights, or the only ones.
    raw: the same for raw weights next to averaged ones; None without.
    sha256: the hash of the files.
    names: the names of the files.
    notes: what was taken and assumed, one line each.
  """

  config: dict
  kept: dict[str, Any]
  shift: list[float]
  scale: list[float]
  tensors: dict[str, np.ndarray]
  raw: dict[str, np.ndarray] | None
  sha256: str
  names: list[str]
  notes: list[str]


def is_folder(path) -> bool:
  """Whether `read` finds an autoencoder at a path."""
  model = places.model_in(path)
  if model is None:
    return False
  path = (model.parent if model.is_file() else model) / places.SETTINGS
  return (
    path.is_file()
    and diffusers.read_settings(path).get('_class_name') in coders.KINDS
  )


def settings_in(path) -> dict:
  """The settings of the autoencoder at a path, as parts of a run's config."""
  file = places.find(path).network / places.SETTINGS
  return coders.network_of(diffusers.read_settings(file), file)


def read(
  path,
  image_size: int | tuple[int, int] | None = None,
  latent_size: int | list[int] | None = None,
) -> Folder:
  """Reads a folder.

  Args:
    path: the folder of an `AutoencoderKL` or a `VQModel`, a file of weights in
      it, or a folder around it, see `places.model_in`.
    image_size: the size of images; None = the folder's. The network takes any.
    latent_size: the size of latents, in place of that of images.

  Raises:
    UserError: the folder is something else, damaged, or holds an unsupported
      network; the message names the setting.
  """
  place = places.find(path)
  file = place.network / places.SETTINGS
  kept = diffusers.read_settings(file)
  theirs = {**kept}
  if image_size is not None:
    sides = image_size if isinstance(image_size, int) else list(image_size)
    theirs['sample_size'] = sides
  if latent_size is not None:
    levels = {**coders.DEFAULTS, **theirs}['block_out_channels']
    factor = 2 ** (len(levels) - 1)
    theirs['sample_size'] = (
      factor * latent_size
      if isinstance(latent_size, int)
      else [factor * side for side in latent_size]
    )
  config = coders.network_of(theirs, file)
  state = states.read(place.weights, ONE_EACH)
  channels = autoencoder.channels_of(**config['codec'])
  usual = coders.KEPT_OF[theirs['_class_name']]
  shift, scale = coders.scaling({**usual, **kept}, channels, file)
  return Folder(
    config, kept, shift, scale, state.tensors, state.raw, state.sha256,
    state.names, [*place.notes, *state.notes],
  )  # fmt: skip


def of_latents(path, size, channels: int) -> Folder:
  """Reads the autoencoder of a U-Net.

  Args:
    path: its folder, see `read`.
    size: the size of the latents.
    channels: their channels, those of the U-Net.

  Raises:
    UserError: as for `read`, or its latents have other channels.
  """
  found = read(path, latent_size=size)
  if len(found.scale) != channels:
    raise UserError(
      f'{path} has latents of {len(found.scale)} channels, but the U-Net takes '
      f'{channels}: they do not belong together'
    )
  return found


def write(path, config: Mapping, params, kept: Mapping | None = None) -> None:
  """Writes a folder that diffusers loads.

  Args:
    path: the folder; config.json is written last.
    config: the run's config.
    params: the autoencoder's parameters, on the host.
    kept: the settings that it was read with, see `coders.settings_of`; by
      default a scaling_factor of 1.

  Raises:
    UserError: diffusers does not support such a network, or as for
      `shards.write`.
  """
  settings = coders.settings_of(config, kept or {'scaling_factor': 1.0})
  path = files.at(path)
  shards.write(path, diffusers.to_tensors(params))
  files.write_json(path / places.SETTINGS, settings)
