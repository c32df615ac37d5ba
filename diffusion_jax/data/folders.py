"""A folder of image files."""

import os
from collections.abc import Iterator
from pathlib import Path

from diffusion_jax.data import images, sources
from diffusion_jax.system.errors import UserError

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')


def create(
  path: str, wanted: sources.Wanted, what: str
) -> sources.Source | None:
  """Opens a folder of png, jpg, jpeg, webp and bmp files.

  Files are in the order of their relative path, as a string. With images
  directly inside the folder, the set is unlabelled. Otherwise every sub-folder
  that holds images, at any depth, is a class, labelled in the order of its
  name. Names that start with a dot and files with other suffixes are skipped.

  A symbolic link that leads out of the folder is refused. A linked sub-folder
  inside it is skipped, because its images are already in the set.

  An image is decoded when it is first read, by the rules of images.py, and
  kept if the set is not too large (sources.keep_in_memory). Reading a damaged
  image raises a UserError that names it.

  Args:
    path: the folder.
    wanted: the requested split, size and channels.
    what: what to call the folder in errors.

  Returns:
    A Source, or None for 'test' with heldout_every = 0.

  Raises:
    UserError: the folder is missing, has no images, has images both directly
      inside and in sub-folders, or has links that lead out of it.
  """
  images.check_channels(wanted.channels)
  root = Path(path).expanduser()
  if not root.is_dir():
    raise UserError(f'{what} is not a folder')
  try:
    names = sorted(_image_names(root.resolve(), ''))
  except OSError as error:
    raise UserError(f'{what} cannot be read: {error.strerror}') from error
  if not names:
    raise UserError(
      f'{what} has no images: need files that end in {", ".join(SUFFIXES)}'
    )
  classes = sorted({name.split('/')[0] for name in names if '/' in name})
  if classes and any('/' not in name for name in names):
    raise UserError(
      f'{what} has images both directly inside and in sub-folders '
      f'({classes[0]!r}): put all in sub-folders, one per class, or none'
    )
  label_of = {name: i for i, name in enumerate(classes)}

  indices = sources.heldout_indices(len(names), wanted)
  if indices is None:
    return None
  names = [names[i] for i in indices]

  def file_of(index):
    return str(root / names[index]), f'{names[index]!r} in {path!r}'

  rule = images.rule_of(*file_of(0), wanted.image_size, wanted.channels)

  def read(index):
    label = label_of.get(names[index].split('/')[0], -1)
    return images.read(*file_of(index), rule), label

  name = f'folder {path}, {wanted.split}'
  source = sources.create(name, len(names), rule.shape, len(classes), read)
  return sources.keep_in_memory(source, rule.shape)


def _image_names(root: Path, folder: str) -> Iterator[str]:
  """Paths of the images in `root / folder`, relative to root, with '/'."""
  with os.scandir(root / folder) as entries:
    for entry in entries:
      name = f'{folder}{entry.name}'
      is_image = entry.name.lower().endswith(SUFFIXES)
      if entry.name.startswith('.'):
        continue
      if entry.is_symlink():
        # os.path's functions: the others raise if links form a cycle.
        is_folder = os.path.isdir(entry.path)
        if not (is_image or is_folder):
          continue
        if not Path(os.path.realpath(entry.path)).is_relative_to(root):
          raise UserError(
            f'{name!r} in {str(root)!r} is a link that leads out of the '
            'folder: copy the images into it, or give their folder instead'
          )
        if not is_folder:
          yield name
      elif entry.is_dir():
        yield from _image_names(root, f'{name}/')
      elif is_image and entry.is_file():
        yield name
