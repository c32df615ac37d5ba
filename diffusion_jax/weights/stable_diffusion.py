"""Reads and writes folders of diffusers' `UNet2DConditionModel`.

  config.json  diffusion_pytorch_model.safetensors

The weights may also be a variant (.fp16.safetensors) or shards with an index. A
folder is read as parts of a run's config and parameters that are renamed to
ours; writing them again gives bitwise the same numbers and equal settings.
`conditional` defines which networks can be read. diffusers is not needed.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import (
  conditional,
  diffusers,
  places,
  shards,
  states,
)

CLASS = conditional.CLASS
VARIANTS = {'': np.float32, 'fp16': np.float16}
# What is a 1x1 convolution in folders without use_linear_projection.
_PROJECTION = re.compile(r'.*\.attentions\.\d+\.proj_(in|out)\.weight')


class Folder(NamedTuple):
  """The content of a folder.

  Attributes:
    config: parts of a run's config: 'data' (image_size and channels of what is
      diffused), 'model' and 'loss' (variance only).
    doors: the network's conditions, see `models.create`.
    kept: all settings, as they are.
    tensors: name in the file -> array: the averaged weights, or the only ones.
    raw: the same for raw weights next to averaged ones; None without.
    sha256: the hash of the files.
    names: the names of the files.
    notes: what was taken and assumed, one line each.
  """

  config: dict
  doors: dict[str, int]
  kept: dict[str, Any]
  tensors: dict[str, np.ndarray]
  raw: dict[str, np.ndarray] | None
  sha256: str
  names: list[str]
  notes: list[str]


def is_folder(path) -> bool:
  """Whether `read` finds a UNet2DConditionModel at a path."""
  if places.model_in(path) is None:
    return False
  file = places.find(path).network / places.SETTINGS
  return (
    file.is_file()
    and diffusers.read_settings(file).get('_class_name') == conditional.CLASS
  )


def read(path) -> Folder:
  """Reads a folder.

  Args:
    path: the folder of a `UNet2DConditionModel`, or of a pipeline with one in
      unet/, a file of weights, or a folder around it, see `places.model_in`.

  Raises:
    UserError: the folder is something else, damaged, or holds an unsupported
      network; the message names the setting.
  """
  place = places.find(path)
  file = place.network / places.SETTINGS
  kept = diffusers.read_settings(file)
  config = conditional.network_of(kept, file)
  doors = config.pop('doors')
  state = states.read(place.weights)
  return Folder(
    config, doors, kept, state.tensors, state.raw, state.sha256, state.names,
    [*place.notes, *state.notes],
  )  # fmt: skip


def settings_of(
  config: Mapping, doors: Mapping[str, int], kept: Mapping | None = None
) -> dict:
  """The content of config.json, see `conditional.unet_of`."""
  return conditional.unet_of(config, doors, kept)


def write(
  path,
  config: Mapping,
  doors: Mapping[str, int],
  params,
  kept: Mapping | None = None,
  variant: str = '',
  largest: int = shards.LARGEST,
) -> None:
  """Writes a folder that diffusers loads.

  Args:
    path: the folder; config.json is written last.
    config: the run's config, with the 'data' of what is diffused.
    doors: the network's conditions, see `models.create`.
    params: the network's parameters, on the host.
    kept: the settings that the network was read with, see `Folder`.
    variant: a key of VARIANTS.
    largest: bytes of a file of weights, see `shards.write`.

  Raises:
    UserError: diffusers does not support such a network, or a number is too
      large for float16.
  """
  settings = settings_of(config, doors, kept)
  tensors = to_tensors(params, settings)
  if variant:
    tensors = {n: _halved(n, array) for n, array in tensors.items()}
  path = files.at(path)
  shards.write(path, tensors, variant, largest)
  files.write_json(path / places.SETTINGS, settings)


def to_tensors(params, settings: Mapping) -> dict[str, np.ndarray]:
  """Converts our parameters to diffusers' state dict, float32.

  Args:
    params: a nested dict of arrays.
    settings: of the network in diffusers, which name the layout.
  """
  tensors = diffusers.to_tensors(params)
  if settings.get('use_linear_projection', False):
    return tensors
  return {
    name: array[:, :, None, None] if _PROJECTION.fullmatch(name) else array
    for name, array in tensors.items()
  }


def _halved(name: str, array: np.ndarray) -> np.ndarray:
  most = np.abs(array).max(initial=0)
  if most > np.finfo(np.float16).max:
    raise UserError(
      f'{name} has the number {most:.3g}, too large for float16: write float32'
    )
  return array.astype(VARIANTS['fp16'])
