"""The files of ten minutes of a GPU: images as sheets, weights, pictures."""

import io
import json
import math
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from matplotlib.figure import Figure
from PIL import Image

from diffusion_jax.reporting import curves, pictures, plots
from diffusion_jax.reproduction import stages
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError, one_line
from diffusion_jax.weights import inception as weights

SIDE = 10  # images along each side of a sheet
SPLITS = ('train', 'test')
INDEX = 'images.json'
ARRAYS = 'images.npz'
INCEPTION = 'inception.npz'
COMPILED = 'compiled.tar.gz'
MOST_FILES, MOST_BYTES, MOST_IN_ALL = 8, 16 * 2**20, 64 * 2**20
SHOWN = 8  # samples along each side of a grid


def statistics_of(folder: Path, split: str) -> Path:
  """The file of the statistics of a split, which need not exist."""
  return folder / f'{split}_statistics.npz'


# --- images -------------------------------------------------------------------


def write_sheets(folder: Path, images: Mapping[str, np.ndarray]) -> None:
  """Writes images as lossless WebP, 100 on a sheet.

  Args:
    folder: a folder.
    images: split -> uint8 [N, S, S, 3].
  """
  for split, given in images.items():
    for first in range(0, len(given), SIDE * SIDE):
      part = given[first : first + SIDE * SIDE]
      size = part.shape[1]
      sheet = np.zeros((SIDE * SIDE, size, size, 3), np.uint8)
      sheet[: len(part)] = part
      sheet = sheet.reshape(SIDE, SIDE, size, size, 3).swapaxes(1, 2)
      picture = Image.fromarray(sheet.reshape(SIDE * size, SIDE * size, 3))
      name = f'{split}_{first // SIDE**2:04d}.webp'
      picture.save(folder / name, lossless=True, quality=75, method=4)
  size = next(iter(images.values())).shape[1]
  counts = {split: len(given) for split, given in images.items()}
  files.write_json(folder / INDEX, {'size': size, **counts})


def read_index(folder: Path) -> dict[str, int]:
  """The size of the images, and split -> their number.

  Raises:
    UserError: the folder has no images.
  """
  if (folder / ARRAYS).exists():
    with one_line(f'{folder / ARRAYS} cannot be read: ', ': write it again'):
      return _index_of_arrays(folder / ARRAYS)
  if not (folder / INDEX).exists():
    raise UserError(
      f'{folder} has neither {INDEX} nor {ARRAYS}: launch/ten_minutes.sh pack '
      'writes the files'
    )
  with one_line(f'{folder / INDEX} cannot be read: ', ': pack again'):
    found = json.loads((folder / INDEX).read_text())
    found = {key: int(found.get(key, 0)) for key in ('size', *SPLITS)}
  missing = [
    path
    for split in SPLITS
    for path in sheets(folder, split, found[split])
    if path is None
  ]
  if missing:
    raise UserError(f'{folder} lacks {len(missing)} sheets: copy it again')
  return found


def sheets(folder: Path, split: str, count: int) -> list[Path | None]:
  """The sheets of a split, .webp or .png; None for each that is missing."""
  found = []
  for i in range(math.ceil(count / SIDE**2)):
    there = sorted(folder.glob(f'{split}_{i:04d}.*'))
    found.append(there[0] if there else None)
  return found


def read_sheets(folder: Path, split: str, count: int) -> np.ndarray:
  """The images of a split: uint8 [count, S, S, 3]."""
  blocks = []
  for path in sheets(folder, split, count):
    with Image.open(path) as picture:
      sheet = np.asarray(picture.convert('RGB'))
    size = len(sheet) // SIDE
    sheet = sheet.reshape(SIDE, size, SIDE, size, 3).swapaxes(1, 2)
    blocks.append(sheet.reshape(-1, size, size, 3))
  return np.concatenate(blocks)[:count]


def unpacked(folder: Path, work: Path) -> Path:
  """A .npz of the images of a folder, see data/arrays.py."""
  if (folder / ARRAYS).exists():
    return (folder / ARRAYS).absolute()
  index = read_index(folder)
  arrays = {
    f'{split}_images': read_sheets(folder, split, index[split])
    for split in SPLITS
    if index[split]
  }
  np.savez(work / ARRAYS, **arrays)
  return work / ARRAYS


def _index_of_arrays(path) -> dict[str, int]:
  with zipfile.ZipFile(path) as archive:
    shapes = {}
    for split in SPLITS:
      if f'{split}_images.npy' in archive.namelist():
        with archive.open(f'{split}_images.npy') as member:
          version = np.lib.format.read_magic(member)
          read = getattr(
            np.lib.format, f'read_array_header_{version[0]}_{version[1]}'
          )
          shapes[split] = read(member)[0]
  counts = {split: shape[0] for split, shape in shapes.items()}
  size = shapes['train'][1] if 'train' in shapes else 0
  return {'size': size, **dict.fromkeys(SPLITS, 0), **counts}


# --- Inception ----------------------------------------------------------------


def halve(source: Path, target: Path) -> None:
  """Rounds the arrays of a .npz to float16."""
  with np.load(source) as given:
    arrays = {name: given[name].astype(np.float16) for name in given.files}
  np.savez_compressed(target, **arrays)


def doubled(source: Path, target: Path) -> Path:
  """The same arrays in float32, the dtype that Inception is read in."""
  with one_line(f'{source} cannot be read: ', ': pack again'):
    with np.load(source) as given:
      arrays = {name: given[name].astype(np.float32) for name in given.files}
    np.savez(target, **arrays)
  return target


# --- what is left -------------------------------------------------------------


def draw_curves(path: Path, rows: Sequence[Mapping]) -> None:
  """Plots the loss, the learning rate and the speed against the step."""
  panels = {
    'loss': curves.noisy(rows, 'loss'),
    'learning rate': [curves.raw(rows, 'learning_rate')],
    'images/s': [curves.raw(rows, 'images_per_sec')],
  }
  figure = Figure(figsize=(13, 3.4), layout='constrained')
  axes = figure.subplots(1, len(panels))
  for place, (title, lines) in zip(axes, panels.items(), strict=True):
    for line in lines:
      how = {'alpha': 0.35} if line.style == 'faint' else {}
      place.plot(line.x, line.y, color=plots.COLORS[line.color], **how)
    place.set(xlabel='step', title=title)
    place.grid(color=plots.COLORS['rule'])
    place.spines[['top', 'right']].set_visible(False)
  axes[0].set_yscale('log')
  axes[2].set_ylim(bottom=0)
  figure.savefig(path, dpi=120)


def draw_grids(path: Path, drawn: Sequence[np.ndarray]) -> None:
  """A picture of the first samples of each set, side by side.

  Args:
    path: the file.
    drawn: uint8 [N, H, W, C] of each set.
  """
  blocks = [pictures.grid(x[: SHOWN**2], SHOWN) for x in drawn]
  height = max(map(len, blocks))
  gap = np.full((height, 4 * pictures.gutter(64), 3), 255, np.uint8)
  row = []
  for block in blocks:
    rest = height - len(block)
    row += [np.pad(block, ((0, rest), (0, 0), (0, 0)), constant_values=255)]
    row += [gap]
  pictures.save(path, np.concatenate(row[:-1], axis=1))


def packed(params: Mapping[str, np.ndarray], dtype: str) -> dict:
  """Weights in fewer bytes: name -> array.

  Args:
    params: name -> float32 array.
    dtype: 'float16', or 'int8' for arrays of several axes: a whole number from
      -127 to 127 times `NAME.scale`, one for each of the last axis.
  """
  arrays = {}
  for name, array in params.items():
    if dtype == 'float16' or array.ndim < 2:
      arrays[name] = array.astype(np.float16)
      continue
    axes = tuple(range(array.ndim - 1))
    scale = np.maximum(np.abs(array).max(axes), 1e-12) / 127
    arrays[name] = np.round(array / scale).astype(np.int8)
    arrays[f'{name}.scale'] = scale.astype(np.float32)
  return arrays


def in_parts(arrays: Mapping[str, np.ndarray], most: int) -> list[dict]:
  """Splits arrays, in order, into dicts of at most `most` bytes each.

  An array that is larger has a part of its own.
  """
  parts, room = [], 0
  for name, array in arrays.items():
    if not parts or array.nbytes > room:
      parts, room = [*parts, {}], most
    parts[-1][name] = array
    room -= array.nbytes
  return parts


def write_weights(
  folder: Path, params: Mapping[str, np.ndarray], count: int, room: int
) -> str:
  """Writes weights as safetensors, in as many digits as fit.

  Args:
    folder: the folder.
    params: name -> float32 array.
    count: the most files.
    room: the most bytes of all files.

  Returns:
    what was written, in words.
  """
  header = 2**17  # more than safetensors writes before the arrays
  for dtype in ('float16', 'int8'):
    parts = in_parts(packed(params, dtype), MOST_BYTES - header)
    sizes = [sum(x.nbytes for x in part.values()) for part in parts]
    fits = max(sizes) <= MOST_BYTES - header and len(parts) <= count
    if fits and sum(sizes) + len(parts) * header <= room:
      for i, part in enumerate(parts):
        path = folder / f'weights_{dtype}_{i + 1}_of_{len(parts)}.safetensors'
        safetensors.numpy.save_file(part, path)
        path.chmod(0o644)
      return f'averaged weights in {dtype}, in parts: {len(parts)}'
  return 'the averaged weights do not fit'


def write_compiled(folder: Path, cache: Path, room: int) -> str:
  """Packs a folder of compiled programs, if they fit; returns what was done."""
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode='w:gz', compresslevel=6) as archive:
    archive.add(cache, '.')
  size = file.getbuffer().nbytes
  if size > min(MOST_BYTES, room):
    return f'the compiled programs do not fit: {size / 2**20:.0f} MiB'
  (folder / COMPILED).write_bytes(file.getbuffer())
  return f'compiled programs, {size / 2**20:.1f} MiB'


def read_compiled(folder: Path, cache: Path) -> None:
  """Unpacks the programs of an earlier call, if there are any."""
  cache.mkdir(parents=True, exist_ok=True)
  if (folder / COMPILED).exists():
    with tarfile.open(folder / COMPILED) as archive:
      archive.extractall(cache, filter='data')


def pack(
  data: Path,
  inception: Path,
  folder: Path,
  most: Mapping[str, int | None],
  tap: str,
  statistics: bool,
) -> None:
  """Writes the files that the calls need.

  Args:
    data: a .npz with train_images and test_images, uint8 [N, S, S, 3].
    inception: Inception weights, float32.
    folder: a new or an empty folder.
    most: split -> most images.
    tap: the layer of the statistics.
    statistics: whether to write those of both splits, in place of the images
      that are held out.

  Raises:
    UserError: a file is missing or holds something else.
  """
  if folder.exists() and (there := files.entries(folder) - {'wheels'}):
    raise UserError(f'{folder} holds {min(there)}: give a new folder')
  for path in (data, inception):
    if not path.is_file():
      raise UserError(f'{path}: there is no such file')
  images = {}
  with (
    one_line(f'{data} cannot be read: ', ': write it with np.savez'),
    np.load(data) as given,
  ):
    for split in SPLITS:
      if f'{split}_images' in given.files:
        images[split] = given[f'{split}_images'][: most[split]]
  for split, x in images.items():
    is_square = x.ndim == 4 and x.shape[1:] == (*x.shape[1:2] * 2, 3)
    if x.dtype != np.uint8 or not is_square:
      raise UserError(
        f'{data} has {split}_images of {x.dtype} {list(x.shape)}: need uint8 '
        '[N, S, S, 3]'
      )
  if 'train' not in images:
    raise UserError(f'{data} has no train_images')
  weights.read(inception, [tap])
  folder.mkdir(parents=True, exist_ok=True)
  halve(inception, folder / INCEPTION)
  if statistics:
    _write_statistics(folder, images, tap)
    images.pop('test', None)
  write_sheets(folder, images)


def _write_statistics(folder, images, tap) -> None:
  with tempfile.TemporaryDirectory() as work:
    judge = doubled(folder / INCEPTION, Path(work) / INCEPTION)
    for split, given in images.items():
      path = Path(work) / f'{split}.npz'
      np.savez(path, images=given)
      stages.run(
        ['-m', 'diffusion_jax.fid', f'--samples={path}', f'--reference={path}',
         f'--features={judge}', f'--taps={tap}', '--metrics=fid',
         f'--write_statistics={statistics_of(folder, split)}', '--json'],
      )  # fmt: skip
