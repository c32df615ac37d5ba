"""Recognises what a user gives as a set of images.

A folder of a run, a sample store or a file of another tool is easily given in
place of a set of images. Each is read as what it is, or refused with the thing
to give instead.
"""

import functools
from pathlib import Path

import numpy as np

from diffusion_jax.data import Source, sources
from diffusion_jax.evaluation import features, kept, statistics
from diffusion_jax.runs import store
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError, one_line

PICKLES = ('.pkl', '.pickle', '.pt', '.pth', '.ckpt')
IMAGES = ('train_images', 'images', 'arr_0')
STORE = 'store.json'
MAPPED = 64  # parts of a store that stay open


def check(flag: str, text: str) -> None:
  """Raises UserError for what is recognised, but is no set of images.

  Args:
    flag: the name of the flag.
    text: its value.
  """
  path, given = Path(text).expanduser(), f'--{flag}={text}'
  if path.is_file():
    _check_file(path, given)
  elif path.is_dir() and not (path / STORE).is_file():
    _check_folder(path, given)


def _check_file(path, given):
  if path.suffix in PICKLES:
    raise UserError(
      f'{given} is a pickle, which can run code when it is read, so it is not: '
      'load it yourself, and write np.savez(FILE.npz, mu=..., sigma=...)'
    )
  there = kept.names(path)
  if there and not {*there} & {*IMAGES} and not statistics.is_file(path):
    names = ' '.join(', '.join(there[:10]).split())
    raise UserError(
      f'{given} holds {names}: a file of images has images, arr_0 or '
      'train_images, one of statistics mu and sigma, and one of features '
      'pool_3 [N, D]'
    )


def _check_folder(path, given):
  is_run = (path / 'config.json').is_file() and (
    (path / 'checkpoints').is_dir() or (path / 'metrics.jsonl').is_file()
  )
  stores = sorted(path.glob(f'samples/*/{STORE}' if is_run else f'*/{STORE}'))
  what = 'the workdir of a run' if is_run else 'a folder of sample stores'
  if stores:
    raise UserError(
      f'{given} is {what}, not a set of images: give one of its '
      f'{len(stores)} sample stores, such as {stores[-1].parent}'
    )
  if is_run:
    raise UserError(
      f'{given} is {what}, not a set of images, and has no samples: draw some '
      f'with python -m diffusion_jax.sample --workdir={path}'
    )


def store_of(text: str, image_size=None, channels=None) -> Source | None:
  """The samples of a store as a set of images; None if it is no store.

  Args:
    text: any path.
    image_size: (height, width) or their one number; None for any.
    channels: number of channels; None for any.

  Raises:
    UserError: the store has no samples, or samples of another shape.
  """
  path = Path(text).expanduser()
  if not (path / STORE).is_file():
    return None
  parts, count = store.parts(path), 0
  for first, end, _ in parts:  # up to the first gap
    count = max(count, end) if first <= count else count
  if not count:
    whole = path / 'samples.npz'
    give = f'give {whole}, or ' * whole.is_file()
    raise UserError(
      f'{text} is a sample store without samples: {give}draw them first, with '
      'the command that made it'
    )
  owner = np.zeros(count, np.int32)
  for i, (first, end, _) in enumerate(parts):
    owner[first:end] = i

  @functools.lru_cache(MAPPED)
  def part(i):
    file = parts[i][2]
    with one_line(f'{file} is damaged (', '): delete it and sample again'):
      return files.mapped(file)

  def read(index):
    i = owner[index]
    return features.whole(part(i)[index - parts[i][0]]), -1

  shape = read(0)[0].shape
  wanted = (*(sources.sides('image_size', image_size) or shape[:2]),
            channels or shape[2])  # fmt: skip
  if shape != wanted:
    raise UserError(
      f'{text} is a sample store of images of {_shown(shape)}, not '
      f'{_shown(wanted)}, and samples are never resized: give another set'
    )
  rounded = ', rounded to 8 bits' * (part(owner[0]).dtype != np.uint8)
  note = (
    f'{text} is a sample store: its first {count} samples are the set{rounded}'
  )
  return sources.create(f'sample store {text}', count, shape, 0, read, [note])


def _shown(shape) -> str:
  return 'x'.join(map(str, shape))
