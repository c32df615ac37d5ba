"""Reads folders of diffusers' `ControlNetModel`.

  config.json  diffusion_pytorch_model.safetensors

The weights may be in any form that `states` reads. Most of the settings are
those of a `UNet2DConditionModel`, of which a ControlNet is the first half, and
`conditional` reads them. diffusers is not needed.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.models import control
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import (
  conditional,
  diffusers,
  named,
  places,
  states,
)
from diffusion_jax.weights.settings import agree, must_be, shown, whole

CLASS = 'ControlNetModel'
# Its own settings that may not differ: (diffusers' default, required value).
FIXED = {
  'controlnet_conditioning_channel_order': ('rgb', 'rgb'),
  'global_pool_conditions': (False, False),
  'conditioning_channels': (3, 3),
  'mid_block_type': (conditional.DEFAULTS['mid_block_type'],) * 2,
}
WIDTHS = 'conditioning_embedding_out_channels'
OWN = (*FIXED, WIDTHS)
LEVELS = [16, 32, 96, 256]  # diffusers' default of WIDTHS
ONE_EACH = 'controlnet_mid_block.weight'

UNET = f'{control.NET}/unet/'
_RENAMED = (
  (rf'^{control.NET}/skips/', 'controlnet_down_blocks.'),
  (rf'^{control.NET}/middle/', 'controlnet_mid_block.'),
  (rf'^{control.EMBEDDING}/', 'controlnet_cond_embedding.'),
  (r'[/.]kernel$', '.weight'),
  (r'/', '.'),
)
_POINTWISE = re.compile(rf'{control.NET}/(skips/\d+|middle)/kernel')


class Folder(NamedTuple):
  """The content of a folder.

  Attributes:
    options: arguments of `models.control.create`, without image_shape and
      doors.
    doors: the conditions, see `models.create`.
    tensors: name in the file -> array.
    sha256: the hash of the files of weights.
    notes: what was taken and assumed, one line each.
  """

  options: dict[str, Any]
  doors: dict[str, int]
  tensors: dict[str, np.ndarray]
  sha256: str
  notes: list[str]


def read(path, channels: int) -> Folder:
  """Reads a folder.

  Args:
    path: the folder.
    channels: of what is diffused.

  Raises:
    UserError: it is something else, damaged, or holds a ControlNet that is not
      supported; the message names the setting.
  """
  folder = files.at(path).expanduser()
  file = folder / places.SETTINGS
  options, doors = network_of(diffusers.read_settings(file), file, channels)
  state = states.read(folder, ONE_EACH)
  return Folder(options, doors, state.tensors, state.sha256, state.notes)


def network_of(
  settings: Mapping, path, channels: int
) -> tuple[dict[str, Any], dict[str, int]]:
  """Converts the settings of a ControlNetModel.

  Args:
    settings: the content of its config.json.
    path: the path of that file, for messages.
    channels: of what is diffused.

  Returns:
    (arguments of `models.control.create`, without image_shape and doors; the
    doors).

  Raises:
    UserError: it is not supported; the message names the setting.
  """
  agree(path, '_class_name', settings.get('_class_name'), [CLASS])
  must_be(settings, FIXED, path)
  for name in ('up_block_types', 'out_channels'):  # of what it has no half of
    agree(path, name, settings.get(name), [None])
  theirs = {**conditional.DEFAULTS, **settings}
  if whole('in_channels', theirs['in_channels'], path) < channels:
    raise UserError(
      f'{path}: in_channels is {theirs["in_channels"]}, but the run diffuses '
      f'{channels} channels: give a ControlNet of the same data'
    )
  kinds = theirs['down_block_types']
  if isinstance(kinds, list):
    kinds = [str(kind).replace('Down', 'Up') for kind in kinds[::-1]]
  found = conditional.network_of(
    {
      **{name: settings[name] for name in settings if name not in OWN},
      '_class_name': conditional.CLASS,
      'sample_size': 1,  # a ControlNet has none
      'out_channels': channels,
      'up_block_types': kinds,
    },
    path,
  )
  options = {k: v for k, v in found['model'].items() if k != 'name'}
  return {**options, 'widths': _widths_of(settings, path)}, found['doors']


def _widths_of(settings, path) -> list[int]:
  """The widths of the embedding."""
  widths = settings.get(WIDTHS, LEVELS)
  if not isinstance(widths, list) or not widths:
    raise UserError(
      f'{path}: {WIDTHS} is {shown(widths)}, but must be a list of numbers'
    )
  return [whole(WIDTHS, width, path) for width in widths]


def name_of(name: str) -> str:
  """Our name of a parameter -> diffusers' name."""
  if name.startswith(UNET):
    return diffusers.name_of(name.removeprefix(UNET))
  return named.renamed(name, _RENAMED)


def to_params(tensors: Mapping[str, np.ndarray], abstract, what: str) -> dict:
  """Converts diffusers' tensors to our parameters.

  Args:
    tensors: name -> array.
    abstract: our parameters' shapes, see `control.Control.init`.
    what: where the tensors come from, for the message.

  Raises:
    UserError: tensors are missing, left over, or of another shape; the message
      names them.
  """
  tensors = diffusers.of_today(tensors, what)
  return named.place(tensors, abstract, name_of, _to_ours, what)


def _to_ours(name: str, array: np.ndarray) -> np.ndarray:
  if _POINTWISE.fullmatch(name) and array.shape[2:] == (1, 1):
    return array[:, :, 0, 0].T
  return diffusers.to_ours(name.removeprefix(UNET), array)
