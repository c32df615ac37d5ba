"""A folder of image files."""

import collections
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from diffusion_jax.data import (
  caption_files,
  identity,
  images,
  layouts,
  looks,
  overviews,
  sources,
)
from diffusion_jax.system.errors import UserError

SUFFIXES = (
  '.png', '.jpg', '.jpeg', '.jpe', '.jfif', '.webp', '.bmp', '.tif', '.tiff',
  '.gif', '.ppm', '.pgm', '.pbm',
)  # fmt: skip
ARCHIVES = ('.zip', '.tar', '.gz', '.tgz', '.xz', '.bz2', '.7z', '.rar')
# What systems add to a folder of a user.
_SYSTEM = (
  'lost+found', '__MACOSX', '@eaDir', '#recycle', '$RECYCLE.BIN',
  'System Volume Information',
)  # fmt: skip
_OTHER_SETS = ('.npy', '.npz')


class Found(NamedTuple):
  """The files of a folder.

  Attributes:
    images: (path relative to the folder, with '/'; size in bytes), sorted.
    labels: the labels of dataset.json, see layouts.py; None without one.
    passed: suffix, or another reason -> number of files passed over.
    links: number of images outside of the folder that links lead to.
    lost: number of images that are links to nothing; they are in `images`.
    captions: the files of captions, see caption_files.py; None without any.
  """

  images: list[tuple[str, int]]
  labels: dict[str, object] | None
  passed: collections.Counter
  links: int
  lost: int
  captions: caption_files.Found | None = None


def create(
  path: str, wanted: sources.Wanted, what: str
) -> sources.Source | None:
  """Opens a folder of image files.

  Files are in the order of their relative path, as a string. What sub-folders
  mean is decided by layouts.py: splits, classes, or neither. Names that start
  with a dot, folders of the system (lost+found, @eaDir and the like), files
  with other suffixes and empty files are passed over.

  Links to files and folders elsewhere are followed. A linked sub-folder whose
  images are already in the set is skipped.

  An image is decoded when it is first read, by the rules of images.py, and
  kept if the set is not too large (sources.keep_in_memory). Reading a damaged
  image raises a UserError that names it.

  Args:
    path: the folder.
    wanted: the requested split, size, channels, classes and bits.
    what: what to call the folder in errors.

  Returns:
    A Source, or None for 'test' without held-out images. Its notes say what
    the sub-folders mean, and what was passed over.

  Raises:
    UserError: the folder is missing, has no images, or has images both beside
      and in folders that look like classes.
  """
  images.check_channels(wanted.channels)
  root = Path(path).expanduser()
  found = files_of(root, what)
  left, seen = _overviews(root, found, wanted)
  names = [name for name, _ in found.images if name not in left]
  beside = layouts.annotations(names, wanted)
  names = [name for name in names if not name.startswith(tuple(beside))]
  layout = layouts.understand(names, found.labels, what, wanted)
  notes = [*layout.notes, *_told(found), *seen, *beside.values()]
  if layout.splits:
    sources.check_split(wanted, what)
    names = layout.splits[wanted.split]
    if wanted.heldout_every:
      notes.append('data.heldout_every is ignored, as the folders hold out')
  else:
    indices = sources.heldout_indices(len(names), wanted)
    if indices is None:
      return None
    names = [names[i] for i in indices]

  def open_fn(index):
    return str(root / names[index]), f'{names[index]!r} in {path!r}'

  rule = images.rule_of(open_fn, len(names), wanted)

  labels = [layout.label_of.get(name, -1) for name in names]
  caption_fn, told = _captions(root, found, names, wanted.captions, what)
  notes += told

  def read(index):
    return images.read(*open_fn(index), rule), labels[index]

  notes += looks.files(open_fn, len(names), rule.channels, wanted)
  called = f'folder {path}, {wanted.split}'
  source = sources.create(
    called, len(names), rule.shape, layout.num_classes, read, notes,
    identity.of_files(root, names, found.images), layout.class_names,
    labels.__getitem__, caption_fn,
  )  # fmt: skip
  return sources.keep_in_memory(source, rule.shape)


def files_of(root: Path, what: str) -> Found:
  """The files of a folder and its sub-folders.

  Args:
    root: the folder.
    what: what to call it in errors.

  Raises:
    UserError: it is missing, cannot be read or has no images.
  """
  if not root.is_dir():
    raise UserError(f'{what} is not a folder{hint(root)}')
  try:
    found = _find(root.resolve())
  except OSError as error:
    raise UserError(
      f'{what} cannot be read: {error.strerror}: {error.filename}'
    ) from error
  if not found.images:
    raise UserError(_no_images(found, what))
  return found


def _captions(root, found, names, asked, what) -> tuple:
  """(index -> captions, which reads all when first called; notes)."""
  if found.captions is None:
    return None, []

  @functools.cache
  def all_captions():
    return caption_files.read(root, found.captions, names, asked, what)

  kind = found.captions.kind
  told = f'captions are in {kind}' + ' beside images' * (kind == 'NAME.txt')
  return lambda index: all_captions().of(index), [told]


def _overviews(root, found, wanted) -> tuple[set[str], list[str]]:
  """The pictures to leave out of a set for evaluation, and notes on them."""
  if wanted.has_config:  # a set to train on is read as it is
    return set(), []

  def size_of(name):
    return images.size_of(str(root / name))

  is_resized = wanted.image_size is not None
  large = overviews.find(found.images, size_of, is_resized)
  rest = [name for name, _ in found.images if name not in large]
  beside = overviews.beside(rest, size_of, is_resized)
  told = 'is left out: it is much larger than the others, an overview of them'
  notes = [f'{name!r} {told}' for name in large]
  if beside:
    shown = ', '.join(map(repr, beside[:3])) + ', ...' * (len(beside) > 3)
    notes.append(
      f'{len(beside)} larger pictures beside the folders are left out as '
      f'overviews: {shown}'
    )
  return {*large, *beside}, notes


def _find(root: Path) -> Found:
  """Lists a folder and its sub-folders; OSError if one cannot be read."""
  names, passed = [], collections.Counter()
  labels, links, lost, texts = None, 0, 0, []
  for name, entry, is_outside in _walk(root, '', root, {root}, passed):
    # For links os.path's function: the entry's raises if they form a cycle.
    is_link = entry.is_symlink()
    is_file = os.path.isfile(entry.path) if is_link else entry.is_file()
    if entry.name == layouts.LABELS and is_file:
      own = layouts.labels_in(Path(entry.path))
      if own is not None:
        folder = name.removesuffix(entry.name)
        labels = (labels or {}) | {folder + key: own[key] for key in own}
        continue
    if name.lower().endswith(caption_files.SUFFIXES) and is_file:
      texts.append(name)
    elif not name.lower().endswith(SUFFIXES):
      passed[os.path.splitext(name)[1].lower() or 'without a suffix'] += 1
    elif is_file and not (size := entry.stat().st_size):
      passed['empty'] += 1
    elif is_file or is_link:  # reading a lost one reports it
      names.append((name, size if is_file else 0))
      links += is_file and is_outside
      lost += not is_file
    else:
      passed['no regular file'] += 1
  names.sort()
  captions = caption_files.find(texts, [name for name, _ in names])
  used = captions and {*captions.tables, *captions.beside.values()}
  passed.update(
    os.path.splitext(name)[1].lower()
    for name in texts
    if name not in (used or ())
  )
  return Found(names, labels, passed, links, lost, captions)


def _walk(
  root: Path, folder: str, real: Path, seen: set[Path], passed
) -> Iterator[tuple[str, os.DirEntry, bool]]:
  """The files below `root / folder`: relative path, entry, whether outside.

  Args:
    root: the set's folder, resolved.
    folder: a sub-folder of it, '' or with a '/' at the end.
    real: the same folder, resolved.
    seen: the root and the folders outside of it that were entered; none is
      entered again.
    passed: counts folders that are linked more than once.
  """
  is_outside = not real.is_relative_to(root)
  with os.scandir(root / folder) as entries:
    entries = sorted(entries, key=lambda entry: entry.name)
  for entry in entries:
    name, is_link = f'{folder}{entry.name}', entry.is_symlink()
    if entry.name.startswith('.') or entry.name in _SYSTEM:
      continue
    if not is_link and not entry.is_dir():
      yield name, entry, is_outside
      continue
    target = (
      Path(os.path.realpath(entry.path)) if is_link else real / entry.name
    )
    leads_out = not target.is_relative_to(root)
    if not os.path.isdir(target):
      yield name, entry, leads_out
    elif is_link and not leads_out:
      continue  # its images are in the set already
    elif target in seen:
      passed['folder linked twice'] += 1
    else:
      seen.update({target} if leads_out else ())
      yield from _walk(root, f'{name}/', target, seen, passed)


def _told(found: Found) -> list[str]:
  """Notes on links and on what was passed over."""
  notes = []
  if found.links:
    notes.append(f'{found.links} images are read through links to elsewhere')
  if found.lost:
    notes.append(
      f'{found.lost} images are links that lead nowhere: fetch what they point '
      'to, or remove them'
    )
  if found.passed:
    number = found.passed.total()
    kinds = ', '.join(f'{n} {kind}' for kind, n in found.passed.most_common(6))
    verb = 'file is' if number == 1 else 'files are'
    notes.append(f'{number} {verb} passed over: {kinds}')
  return notes


def _no_images(found: Found, what: str) -> str:
  """The error for a folder without images: what it has, and what to do."""
  kinds = [kind for kind, _ in found.passed.most_common(6)]
  has = ', '.join(f'{found.passed[kind]} {kind}' for kind in kinds)
  message = f'{what} has no images' + f', but {has}' * bool(has)
  if any(kind in ARCHIVES for kind in kinds):
    shards = "; .tar files can be read as data.name 'webdataset'"
    unpack = ': unpack the archive, and give the folder of its images'
    return message + unpack + shards * ('.tar' in kinds)
  if any(kind in _OTHER_SETS for kind in kinds):
    return f'{message}: give the .npy or .npz file itself'
  if 'without a suffix' in kinds:
    message += ' (names need a suffix, such as .png)'
  return f'{message}: need files that end in {", ".join(SUFFIXES)}'


def hint(path: Path) -> str:
  """What to do with a path that is no folder; starts with ': ', or is ''."""
  if path.suffix == '.tar' and path.is_file():
    return ": it is a tar file, of data.name 'webdataset'"
  if path.name.lower().endswith(ARCHIVES):
    return ': unpack the archive, and give the folder of its images'
  if path.suffix in _OTHER_SETS:
    return ": it is an array file, of data.name 'arrays'"
  if path.is_file():
    return ': give the folder that has the file'
  return ': it does not exist'
