"""Notes on the pixels of a set, from a sample of its images."""

import contextlib

import numpy as np

from diffusion_jax.data import images, sources
from diffusion_jax.system.errors import UserError

LOOKED_AT = 64  # images at most
DARK = 64  # no pixel of a normal set is below this in all images


def files(
  open_fn: images.Open, count: int, channels: int, wanted: sources.Wanted
) -> list[str]:
  """Notes on image files: grey and coloured ones, frames, unused range.

  Args:
    open_fn: see `images.Open`.
    count: number of images.
    channels: those that the images are read with.
    wanted: the requested bits, and whether there is a config.
  """
  looked = spread(count)
  heads = list(images.headers(open_fn, looked))
  grey = sum(head.is_grey for head in heads)
  animated = sum(head.is_animated for head in heads)
  facts = [
    (grey * (channels == 3), 'grey, and read as RGB'),
    ((len(heads) - grey) * (channels == 1), 'in colour, and converted to grey'),
    (animated, 'of several frames or pages; the first one is read'),
  ]
  notes = [
    f'{number} of {len(heads)} images looked at are {what}'
    for number, what in facts
    if number
  ]
  if not heads or (wanted.bits and grey == len(heads)):
    return notes
  peaks = set()  # (of 255, as stored)
  for index in looked:
    with contextlib.suppress(UserError):  # reading it will tell
      peak, bits = images.brightest(*open_fn(index))
      peaks.add((peak >> (bits - 8), peak))
      if max(peaks)[0] >= DARK:
        return notes
  has_key = wanted.has_config and grey == len(heads)
  return [*notes, _dark(*max(peaks), len(looked), has_key)] if peaks else notes


def arrays(read_fn, count: int) -> list[str]:
  """Notes on uint8 images: unused range.

  Args:
    read_fn: index -> an image.
    count: number of images.
  """
  peak, looked = 0, spread(count)
  for index in looked:
    peak = max(peak, int(read_fn(index).max()))
    if peak >= DARK:
      return []
  return [_dark(peak, peak, len(looked), False)]


def spread(count: int, at_most: int = LOOKED_AT) -> list[int]:
  """Indices of a sample: evenly spaced, with the first and the last one."""
  chosen = np.linspace(0, count - 1, min(count, at_most))
  return [int(index) for index in chosen]


def _dark(high: int, peak: int, count: int, has_key: bool) -> str:
  """The note on a dark set, from its brightest value: of 255, and as stored."""
  found = f'the brightest value of {count} images looked at is {high} of 255'
  remedy = 'scale them to 0 to 255 if they are not meant to be dark'
  if has_key:
    own = max(peak.bit_length(), 1)
    s = 's' * (own > 1)
    remedy = f'if their samples have {own} bit{s}, set data.bits={own}'
  return f'{found}, so most of the range is unused: {remedy}'
