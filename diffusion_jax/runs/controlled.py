"""ControlNets that steer a trained network when samples are drawn."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from diffusion_jax import codecs, runs
from diffusion_jax.data import images
from diffusion_jax.models import control
from diffusion_jax.runs import sizes, text_pipelines
from diffusion_jax.system import files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding
from diffusion_jax.weights import control as weights

SAME = ('channels', 'multipliers', 'num_blocks')  # of both networks


class Steering(NamedTuple):
  """A ControlNet, its picture, and how much it adds.

  Attributes:
    control: the net.
    params: its parameters, its picture and its scale, see `control.hints`;
      NumPy arrays.
    facts: what samples depend on: hashes of the files of weights and of the
      picture as it is shown to the net, and the scale.
  """

  control: control.Control
  params: dict[str, Any]
  facts: dict[str, Any]


def read(
  path, picture, scale: float, config: Mapping, image_size=None
) -> Steering:
  """Reads a ControlNet and a picture for a run's network.

  Args:
    path: a folder of diffusers' `ControlNetModel`.
    picture: a path, or uint8 [H, W], [H, W, 1] or [H, W, 3].
    scale: a factor on all that the net adds.
    config: the config of the run.
    image_size: of the images to draw, see `sizes.parsed`.

  Raises:
    UserError: it is no such folder, or is for another network; or the picture
      cannot be read, or has other proportions than the images.
  """
  told = f'control={path}'
  if not math.isfinite(scale):
    raise UserError(f'{told}: the scale {scale} is not a finite number')
  if codecs.reconstructs(config) or config['model']['name'] != 'unet':
    raise UserError(
      f'{told} is for a U-Net that denoises, which this run does not have: '
      'leave it out'
    )
  if sides := sizes.parsed(image_size, config):
    config = sizes.config_for(config, sides)
  shape = runs.image_shape(config['data'])
  latent = codecs.x0_shape(shape, config['codec'])
  pixels = _picture(picture, shape)  # read at once; the weights may be large
  folder = weights.read(path, latent[-1])
  _check(folder, config, shape, latent, told)
  model = config['model']
  same = ('dtype', 'plain', 'time_scale')
  options = {name: model[name] for name in same if name in model}
  made = _made(
    json.dumps(
      {
        **folder.options, **options, 'dropout': 0.0,
        'doors': folder.doors, 'image_shape': latent,
      },
      default=list,
    )
  )  # fmt: skip
  shapes = jax.eval_shape(made.init, jax.random.key(0))
  params = {
    **weights.to_params(folder.tensors, shapes, str(path)),
    control.PICTURE: np.float32(pixels / 255)[None],
    control.SCALE: np.asarray(scale, np.float32),
  }
  facts = {
    'sha256': folder.sha256,
    'picture_sha256': hashlib.sha256(pixels.tobytes()).hexdigest(),
    'scale': scale,
  }
  return Steering(made, params, facts)


@functools.lru_cache(maxsize=8)
def _made(options: str) -> control.Control:
  """The net of options as JSON; the same again, as what is compiled for it."""
  return control.create(**json.loads(options))


def applied(trained, steering: Steering):
  """A `Trained` with one more ControlNet, which is a frozen part of it.

  Args:
    trained: the network.
    steering: the ControlNet, read for the same run.
  """
  made = trained.recipe
  before = made.frozen.get(control.PART, [])
  part = [*before, sharding.placed(steering.params, trained.mesh)]
  made = made._replace(
    controls=(*made.controls, steering.control),
    frozen={**made.frozen, control.PART: part},
  )
  return dataclasses.replace(
    trained,
    recipe=made,
    params={**trained.params, control.PART: part},
    compiled=trained.compiled.controlled(steering.control),
    controls=(*trained.controls, steering.facts),
    of_sizes={},
  )


def _check(folder, config, shape, latent, told: str) -> None:
  """Raises UserError unless a ControlNet fits a run."""
  own = {key: _plain(config['model'][key]) for key in SAME}
  theirs = {key: _plain(folder.options[key]) for key in SAME}
  if own != theirs:
    raise UserError(
      f'{told} is for a U-Net of {_listed(theirs)}, this run has '
      f'{_listed(own)}: give a ControlNet of the same model'
    )
  doors = text_pipelines.doors_of(config)
  for door, size in folder.doors.items():
    if doors.get(door) != size:
      raise UserError(
        f'{told} needs the condition {door} of {size}, this run has '
        f'{doors.get(door, "none")}: give a ControlNet of the same model'
      )
  sides = [
    control.side_of(side, folder.options['widths']) for side in shape[:2]
  ]
  if sides != [*latent[:2]]:
    raise UserError(
      f'{told} makes maps of {sides[0]}x{sides[1]} of pictures of '
      f'{shape[0]}x{shape[1]}, but the run diffuses {latent[0]}x{latent[1]}: '
      'give a ControlNet of the same model'
    )


def _plain(value):
  return value if isinstance(value, int) else list(value)


def _listed(values: Mapping) -> str:
  return ', '.join(f'{name}={value}' for name, value in values.items())


def _picture(picture, shape) -> np.ndarray:
  """The picture in the size of a run's images: uint8 [H, W, 3]."""
  height, width = shape[:2]
  if isinstance(picture, np.ndarray):
    name, found = 'control_image', _rgb(picture)
  else:
    name, path = f'control_image={picture}', files.at(picture).expanduser()
    if not path.is_file():
      raise UserError(f'{name} is not a file: give a picture')
    with path.open('rb') as file:
      found = images.whole(file, str(picture))
  high, wide = found.shape[:2]
  if (high, wide) == (height, width):
    return found
  # Equal but for the rounding of a side to whole pixels.
  if abs(high * width - wide * height) >= max(height, width):
    raise UserError(
      f'{name} is {wide} wide and {high} high, the images to draw {width} wide '
      f'and {height} high: crop it or pad it to the same proportions'
    )
  terminal.say_once(
    f'{name}, {wide} wide and {high} high, is resized to {width} and {height}, '
    'as the images to draw'
  )
  return images.fit(Image.fromarray(found), (height, width), 3)


def _rgb(picture: np.ndarray) -> np.ndarray:
  if picture.ndim == 2:
    picture = picture[..., None]
  colours = picture.shape[-1] if picture.ndim == 3 else 0
  if picture.dtype != np.uint8 or colours not in (1, 3) or not picture.size:
    raise UserError(
      f'control_image is an array of {picture.dtype} {list(picture.shape)}: '
      'give uint8 [height, width, 3], or a file'
    )
  return np.broadcast_to(picture, (*picture.shape[:2], 3)).copy()
