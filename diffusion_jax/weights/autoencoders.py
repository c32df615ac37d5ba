"""Reads and writes folders of diffusers' autoencoders.

`AutoencoderKL` and `VQModel`, of any width, depth and size:

  config.json  diffusion_pytorch_model.safetensors

A folder is read as parts of a run's config and parameters that are renamed to
ours; writing them again gives bitwise the same numbers. Settings that concern
what is done with the latents, such as scaling_factor, are kept as they are.
diffusers is not needed.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from diffusion_jax import models
from diffusion_jax.system import files
from diffusion_jax.weights import coders, diffusers, named, places, states

CODEBOOK = 'quantize/codebook'
ONE_EACH = 'encoder.conv_in.weight'

# Dense layers here, of which diffusers has the second as 1x1 convolutions.
_DENSE = re.compile(r'(.*/)?(query|key|value|out)/kernel')
_POINTWISE = re.compile(r'(.*/)?(shortcut|(post_)?quant_conv)/kernel')


class Folder(NamedTuple):
  """The content of a folder.

  Attributes:
    config: parts of a run's config: 'data' (image_size and channels only) and
      'codec'.
    kept: settings that the config does not have, name -> value.
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
  latent_size: int | None = None,
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
  theirs = diffusers.read_settings(file)
  if image_size is not None:
    sides = image_size if isinstance(image_size, int) else list(image_size)
    theirs['sample_size'] = sides
  if latent_size is not None:
    levels = theirs.get('block_out_channels', [0])
    theirs['sample_size'] = latent_size * 2 ** (len(levels) - 1)
  config = coders.network_of(theirs, file)
  state = states.read(place.weights, ONE_EACH)
  kept = {**coders.KEPT_OF[theirs['_class_name']]}
  kept |= {name: theirs[name] for name in kept if name in theirs}
  codec = config['codec']
  channels = codec.get('code_channels') or codec['latent_channels']
  shift, scale = coders.scaling(kept, channels, file)
  return Folder(
    config, kept, shift, scale, state.tensors, state.raw, state.sha256,
    state.names, [*place.notes, *state.notes],
  )  # fmt: skip


def write(path, config: Mapping, params, kept: Mapping | None = None) -> None:
  """Writes a folder that diffusers loads.

  Args:
    path: the folder; config.json is written last.
    config: the run's config.
    params: the autoencoder's parameters, on the host.
    kept: settings that the config does not have, see `Folder`; by default
      diffusers', and a scaling_factor of 1.

  Raises:
    UserError: diffusers does not support such a network.
  """
  settings = coders.settings_of(config, kept or {'scaling_factor': 1.0})
  path = files.make(files.at(path))
  weights = safetensors.numpy.save(to_tensors(params), {'format': 'pt'})
  with files.replacing(path / states.WEIGHTS) as file:
    file.write(weights)
  files.write_json(path / places.SETTINGS, settings)


# --- tensors -----------------------------------------------------------------


def to_params(tensors: Mapping[str, np.ndarray], abstract, what: str) -> dict:
  """Converts diffusers' tensors to our parameters.

  Args:
    tensors: name -> array, with current or old names of attention, whose
      layers may be linear or 1x1 convolutions.
    abstract: our parameters' shapes.
    what: where the tensors come from, for the message.

  Raises:
    UserError: tensors are missing, left over, or of another shape; the message
      names them.
  """
  tensors = diffusers.of_today(tensors, what)
  return named.place(tensors, abstract, name_of, _to_ours, what)


def to_tensors(params) -> dict[str, np.ndarray]:
  """Converts our parameters to diffusers' state dict, float32.

  Args:
    params: a nested dict of arrays.
  """
  return {
    name_of(name): np.ascontiguousarray(to_theirs(name, np.asarray(leaf)))
    for name, leaf in models.named(params).items()
  }


def name_of(name: str) -> str:
  """Our name of a parameter -> diffusers' current name."""
  if name == CODEBOOK:
    return 'quantize.embedding.weight'
  part, _, rest = name.partition('/')
  theirs = diffusers.name_of(rest)
  return theirs if 'quant_conv' in rest else f'{part}.{theirs}'


def to_theirs(name: str, array: np.ndarray) -> np.ndarray:
  """Our parameter in diffusers' layout, by our name of it."""
  if array.ndim == 4:
    return array.transpose(3, 2, 0, 1)  # HWIO -> OIHW
  if _POINTWISE.fullmatch(name):
    return array.T[:, :, None, None]
  return array if name == CODEBOOK else array.T


def _to_ours(name: str, array: np.ndarray) -> np.ndarray:
  if name == CODEBOOK:
    return array
  dense = _DENSE.fullmatch(name) or _POINTWISE.fullmatch(name)
  if dense and array.shape[2:] == (1, 1):
    return array[:, :, 0, 0].T
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
