"""The sets of images that `edit anomaly` reads, and whether they will do.

The flags are those of `anomalies`.
"""

from typing import NamedTuple

import numpy as np
from absl import flags

from diffusion_jax import data, runs
from diffusion_jax.cli import given, run_data
from diffusion_jax.data import Source, folders, identity, sources
from diffusion_jax.data import images as image_files
from diffusion_jax.evaluation import anomalies, features
from diffusion_jax.evaluation.metrics import anomaly
from diffusion_jax.system import files, terminal
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
WORDS = ('heldout', 'train')
ARRAYS = ('.npy', '.npz')
REFERENCE = 'reference'  # of --inliers


class Set(NamedTuple):
  """A set of images.

  Attributes:
    flag: the flag that names it.
    images: the images.
    names: the name of each.
    classes: the name of each image's class; '' where there are none.
    numbers: see `anomalies.numbers_of`.
    sha256: of all images.
  """

  flag: str
  images: features.Images
  names: list[str]
  classes: list[str]
  numbers: np.ndarray
  sha256: str


def open_set(flag: str, config: dict) -> Set:
  """The set of images that a flag names; all of it is read once.

  Args:
    flag: input, reference or inliers.
    config: the run's config.

  Raises:
    UserError: there is no such set, or its images are not of the run's size.
  """
  try:
    return _opened(flag, config)
  except UserError as e:
    # The rule for files names the flag of the binaries that take any size.
    raise UserError(str(e).replace('--image_size=N', '--resize')) from e


def _opened(flag, config) -> Set:
  text, shape = FLAGS[flag].value, runs.image_shape(config['data'])
  source = _source(flag, text, config, shape)
  first = source[0]['image'].shape
  if first != shape:
    there, here = ('x'.join(map(str, x)) for x in (first, shape))
    remedy = (
      '--resize crops them to the centre and resizes them '
      "(Pillow's bicubic), and scores are then those of the resized images"
    )
    if text.endswith(ARRAYS) or text in WORDS:
      remedy = 'only image files are resized: convert them, or give others'
    raise UserError(
      f'--{flag}={text} has images of {there}, and the run takes {here}: '
      f'{remedy}'
    )
  count = len(source)
  if flag == 'reference':
    count = min(count, FLAGS.num_reference)
  images = features.images_of(source, count, source.num_classes > 0)
  chosen = np.arange(count) * len(source) // count
  contents = sources.contents_of(source)
  names = [contents.names[i] if contents.names else f'{i:06d}' for i in chosen]
  classes = [''] * count
  if images.labels is not None:
    known = [*source.class_names]
    known += map(str, range(len(known), source.num_classes))
    classes = [known[i] if i >= 0 else '' for i in images.labels]
  return Set(
    flag, images._replace(labels=None), names, classes,
    anomalies.numbers_of(images), features.sha256_of(images),
  )  # fmt: skip


def _source(flag, text, config, shape) -> Source:
  """The images that a flag names, of the run's channels."""
  if text in WORDS:
    train, heldout = run_data.splits(config)
    source = train if text == 'train' else heldout
    if source is None:
      raise UserError(
        f'--{flag}={text}: the run has no held-out images: give a set of images'
      )
    return source
  given.check(flag, text)
  is_square = shape[0] == shape[1]
  size = shape[:2] if FLAGS.resize or not is_square else None
  wanted = sources.Wanted('train', size, shape[2])
  path = files.at(text).expanduser()
  if path.suffix.lower() in folders.SUFFIXES and path.is_file():
    source = _picture(path, wanted)
  else:
    source = given.store_of(text, size, shape[2]) or data.open_set(
      text, path=FLAGS.data_path or '', image_size=size, channels=shape[2]
    )
  sources.say_notes(source)
  return source


def _picture(path, wanted) -> Source:
  """One image file as a set."""

  def open_fn(index):
    del index
    return str(path), repr(path.name)

  rule = image_files.rule_of(open_fn, 1, wanted)
  whole = [(path.name, path.stat().st_size)]
  return sources.create(
    f'picture {path}', 1, rule.shape, 0,
    lambda i: (image_files.read(*open_fn(i), rule), -1),
    contents=identity.of_files(path.parent, [path.name], whole),
  )  # fmt: skip


def is_normal(scored: Set) -> np.ndarray | None:
  """Which images of the input are normal by --normal; None without it."""
  if not FLAGS.normal:
    return None
  known = sorted({*scored.classes} - {''})
  told = f'--normal={",".join(FLAGS.normal)}'
  if not known:
    raise UserError(
      f'{told}: --input={FLAGS.input} has no labels: leave --normal out, or '
      'give its normal images as --inliers'
    )
  if unknown := [name for name in FLAGS.normal if name not in known]:
    raise UserError(
      f'{told}: --input={FLAGS.input} has no class {unknown[0]}: its classes '
      f'are {", ".join(known[:20])}'
    )
  return np.isin(scored.classes, FLAGS.normal)


def check_counts(sets: dict[str, Set], is_normal) -> None:
  """Raises UserError if there are too few images for what is asked for."""
  count = sets['reference'].images.count
  if count < 3:
    raise UserError(
      f'--reference={FLAGS.reference} has {count} images: give at least 3'
    )
  anomaly.threshold(np.zeros(count), FLAGS.false_alarms)
  normal, odd = None, sets['input'].images.count
  if is_normal is not None:
    normal = int(is_normal.sum())
    odd -= normal
  if 'inliers' in sets:
    normal = sets['inliers'].images.count
  asks = FLAGS.inliers or is_normal is not None
  if asks and min(odd, count if normal is None else normal) < 2:
    raise UserError(
      'the AUROC needs at least 2 normal and 2 other images, and there are '
      f'{count if normal is None else normal} and {odd}'
    )


def notes(sets: dict[str, Set]) -> list[str]:
  """What makes scores smaller than they would be, and is told."""
  told = []
  if FLAGS.reference == 'train':
    told.append(
      'the network was trained on the reference, so errors there are smaller, '
      'and more false alarms are to be expected'
    )
  for flag in sets.keys() - {'reference'}:
    both = np.isin(sets[flag].numbers, sets['reference'].numbers).sum()
    if both:
      told.append(
        f'{both} images of --{flag} are reference images too, so their scores '
        'are smaller'
      )
  for note in told:
    terminal.say(f'note: {note}')
  return told
