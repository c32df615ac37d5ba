"""Pictures that a user gives one by one, each at its own size."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from diffusion_jax.data import folders, images
from diffusion_jax.system.errors import UserError


class Picture(NamedTuple):
  """A picture.

  Attributes:
    name: without its suffix, to name results after; unique.
    pixels: uint8 [H, W, C].
    alpha: uint8 [H, W], 0 where it is transparent; None without transparency.
  """

  name: str
  pixels: np.ndarray
  alpha: np.ndarray | None = None


def listed(place: str, flag: str) -> dict[str, Path]:
  """Name -> file of a picture, or of all pictures in a folder.

  The names of a folder's pictures are their paths without the suffix, with '_'
  for '/'; those that would be equal keep their suffix, and a number if need be.

  Args:
    place: a file or a folder.
    flag: the name of the flag that gave it, for messages.

  Raises:
    UserError: there is no such place, or the folder has no images.
  """
  path = Path(place).expanduser()
  if path.is_file():
    return {path.stem: path}
  found = folders.files_of(path, f'--{flag}={place}')
  paths = [path for path, _ in found.images]
  short = [Path(name).with_suffix('').as_posix() for name in paths]
  names = {}
  for name, whole in zip(short, paths, strict=True):
    called = name.replace('/', '_')
    if [other.replace('/', '_') for other in short].count(called) > 1:
      called = whole.replace('/', '_')
    while called in names:
      called += '_2'
    names[called] = path / whole
  return names


def read(name: str, path: Path, channels: int) -> Picture:
  """Reads a picture.

  Args:
    name: what to call it.
    path: the file.
    channels: 1 for grey, or 3.

  Raises:
    UserError: it cannot be read.
  """
  pixels = images.whole(str(path), repr(str(path)))
  alpha = images.opacity(str(path), repr(str(path)))
  return Picture(name, in_channels(pixels, channels), alpha)


def in_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
  """uint8 [H, W, 1 or 3] -> [H, W, channels], by Pillow's grey.

  Args:
    pixels: the picture.
    channels: 1 or 3.

  Raises:
    UserError: another number of channels.
  """
  if channels not in (1, 3):
    raise UserError(f'pictures have 1 or 3 channels, not {channels}')
  if channels == pixels.shape[-1]:
    return pixels
  if channels == 3:
    return pixels.repeat(3, axis=-1)
  return np.asarray(Image.fromarray(pixels).convert('L'))[..., None]


def resized(picture: Picture, sides: tuple[int, int]) -> Picture:
  """The picture, cropped to the proportions of a size, and resized to it.

  Args:
    picture: the picture.
    sides: (height, width).
  """
  shape = picture.pixels.shape
  pixels = picture.pixels[..., 0] if shape[-1] == 1 else picture.pixels
  fitted = images.fit(Image.fromarray(pixels), sides, shape[-1])
  alpha = picture.alpha
  if alpha is not None:
    alpha = images.fit(Image.fromarray(alpha), sides, 1)[..., 0]
  return picture._replace(pixels=fitted, alpha=alpha)
