"""Data: sources of images, and the pipeline from a source to the devices.

  create(name, ...)      opens a data set as a `Source` with random access
  splits(config)         opens a run's training and held-out images
  open_set(text)         opens a set to evaluate, without a config
  pipeline.batches(...)  training batches as global arrays, from any step on
  pipeline.heldout(...)  one ordered pass for evaluation, as NumPy batches

TensorFlow is never imported: launch/prepare_data.sh is the one place that
needs it.
"""

import difflib
from collections.abc import Mapping

from diffusion_jax.data import broken, layouts, pipeline, sets, sources
from diffusion_jax.data.sets import open_set
from diffusion_jax.data.sources import Source
from diffusion_jax.system.errors import UserError, one_of

__all__ = ['Source', 'create', 'not_held_out', 'open_set', 'pipeline', 'splits']


def create(
  name: str,
  *,
  path: str = '',
  split: str = 'train',
  image_size: int | tuple[int, int],
  channels: int,
  heldout_every: int = 0,
  classes: str = 'auto',
  bits: int = 0,
  captions: str = 'auto',
) -> Source | None:
  """Opens a data set.

  Args:
    name: the kind of set:
      'digits'     scikit-learn's 8x8 digits, embedded: nothing to download;
      'emoji'      1,382 emoji of 64x64, drawn from a font, see emoji.py;
      'arrays'     one .npy or .npz file, see arrays.py;
      'folder'     a folder of image files, see folders.py;
      'webdataset' shards of images and captions in tar files, see shards.py;
      'tfds:NAME'  a prepared TensorFlow data set such as 'tfds:cifar10' or
                   'tfds:lsun/church_outdoor', see prepared.py.
    path: the file or folder; for TFDS the data_dir, '' for TFDS's default; for
      'emoji' the font, '' for an installed one.
    split: 'train', 'test' or, of sets without test images of their own, 'all';
      for TFDS any of its split strings.
    image_size: the images' size in pixels: one number for squares, or (height,
      width).
    channels: 1 (grey) or 3 (RGB); 'arrays' accepts any number.
    heldout_every: for 'arrays' and 'folder': every n-th image is 'test' and the
      others are 'train'; 0 holds out none. Ignored if the set has its own test
      images.
    classes: for 'folder', what its sub-folders mean: 'folders' = classes,
      'none' = nothing, 'auto' = as in layouts.py.
    bits: for image files, bits of a grey sample, up to 16; 0 = as the file
      says.
    captions: the column of captions, see captions.py; 'auto' looks for one.

  Returns:
    A `Source`, or None for split 'test' if no images are held out.

  Raises:
    UserError: an unknown name or split, a size that the set does not have, or
      files that are missing, damaged or of the wrong kind.
  """
  return _create(
    '', name, path, split, image_size, channels, heldout_every, classes, bits,
    captions,
  )  # fmt: skip


def _create(
  prefix, name, path, split, image_size, channels, heldout_every=0,
  classes='auto', bits=0, captions='auto',
) -> Source | None:  # fmt: skip
  """Like `create`; errors name the arguments with a prefix."""
  image_size = sources.sides(f'{prefix}image_size', image_size)
  if channels < 1:
    raise UserError(f'{prefix}channels is {channels}: use 1 (grey) or 3 (RGB)')
  if heldout_every < 0 or heldout_every == 1:
    raise UserError(
      f'{prefix}heldout_every is {heldout_every}: use 0 (no held-out images) '
      'or 2 and more (every n-th image)'
    )
  one_of(f'{prefix}classes', classes, layouts.CLASSES)
  one_of(f'{prefix}bits', bits, range(17))
  sources.check_local(path, f'{prefix}path={path}')
  is_tfds = name.startswith('tfds:')
  if name not in sets.KINDS and not is_tfds:
    near = difflib.get_close_matches(name, sets.KINDS, 1)
    hint = f'; did you mean {near[0]}?' if near else ''
    raise UserError(
      f'{prefix}name {name!r} is not known: use {", ".join(sets.KINDS)} or '
      f'tfds:NAME{hint}'
    )
  if name == 'digits' and path:
    raise UserError(
      f'{prefix}path={path}: the digits are embedded and have no path; for '
      f'other images set {prefix}name to arrays, folder or tfds:NAME'
    )
  if not path and name not in sets.NAMED and not is_tfds:
    raise UserError(
      f'{prefix}path is empty: {prefix}name {name!r} needs a path'
    )
  wanted = sources.Wanted(
    split, image_size, channels, heldout_every, classes, bits, captions,
    has_config=True,
  )  # fmt: skip
  what = f'{prefix}path {path!r}' if path else f'{prefix}name {name!r}'
  return sets.open_kind(name, path, wanted, what)


def splits(config: Mapping) -> tuple[Source, Source | None]:
  """Opens the training images and the held-out ones; None if none are held out.

  Args:
    config: a run's `data`: name, path, train_split, heldout_split ('' for
      none), heldout_every, image_size, channels, and optionally classes, bits,
      captions and skip_broken.

  Raises:
    UserError: as for `create`, or if there are no training images or the first
      image is damaged.
  """
  train, heldout = opened = both(config)
  if config.get('skip_broken'):
    train, heldout = (one and broken.left_out(one) for one in opened)
  train[0]  # fails early if the first image is damaged
  return train, heldout


def both(config: Mapping) -> tuple[Source, Source | None]:
  """Like `splits`, but reads no image and leaves none out.

  Raises:
    UserError: as for `create`, or if there are no training images.
  """
  keys = (
    *('path', 'image_size', 'channels', 'heldout_every', 'classes', 'bits'),
    'captions',
  )
  taken = {'path': '', **{key: config[key] for key in keys if key in config}}
  train, heldout = (
    _create('data.', config['name'], split=split, **taken) if split else None
    for split in (config['train_split'], config['heldout_split'])
  )
  if train is None:
    raise UserError(
      f'data.train_split={config["train_split"]!r} of {config["name"]} holds '
      'no images: name the split to train on'
    )
  return train, heldout


def not_held_out(config: Mapping) -> str:
  """Why a run has no held-out images, and how to have some, for its log.

  Args:
    config: the run's `data`.
  """
  if not config['heldout_split']:
    return "data.heldout_split is empty ('test' is usual)"
  remedy = 'data.heldout_every=10 would hold out every tenth image'
  if config['name'].startswith('tfds:'):
    remedy = (
      "data.train_split='train[:90%]' and data.heldout_split='train[90%:]' "
      'would hold out a tenth'
    )
  return f'no images are held out ({remedy})'
