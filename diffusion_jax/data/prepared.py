"""Prepared TensorFlow data sets (TFDS), read without TensorFlow.

launch/prepare_data.sh downloads and prepares a set once, with TensorFlow, as
ArrayRecord files. This module reads those files and never downloads anything.
"""

import difflib
import io
import os
import re
import shlex
from collections.abc import Callable

import tensorflow_datasets as tfds

from diffusion_jax.data import (
  caption_files,
  captions,
  identity,
  images,
  looks,
  sources,
)
from diffusion_jax.system.errors import UserError, one_line, quiet

# name or name/config, optionally with a version. No namespace, which would
# access the network, and no keyword arguments.
_NAME = re.compile(r'(\w+)(/[\w.-]+)?(:\d+\.\d+\.\d+)?', re.ASCII)


def create(
  name: str, path: str, wanted: sources.Wanted
) -> sources.Source | None:
  """Opens a prepared set with an 'image', perhaps a 'label' and captions.

  Without a version in the name, the latest prepared version is opened. Images
  are decoded, cropped and resized by the rules of images.py when they are first
  read, and kept if the set is not too large (sources.keep_in_memory). A 'label'
  that is not a class is ignored, and so is every other feature. Captions are a
  feature of text, or a sequence of texts or of features with one.

  Args:
    name: 'tfds:NAME' or 'tfds:NAME/CONFIG', optionally with ':1.2.3'.
    path: TFDS's data_dir; '' for its default.
    wanted: the requested split, size and channels; heldout_every must be 0,
      because split strings can hold out any part.

  Returns:
    A Source, or None for 'test' if the set has no such split.

  Raises:
    UserError: the set is unknown, is not prepared as array_record or has no
      images, or the split is unknown.
  """
  images.check_channels(wanted.channels)
  if wanted.heldout_every:
    raise UserError(
      f'data.heldout_every is {wanted.heldout_every}, but data.name {name!r} '
      "holds images out by its splits, such as 'train[:90%]': set it to 0"
    )
  data_dir = os.path.expanduser(path) or None
  where = data_dir or str(tfds.core.constants.DATA_DIR)
  what = f'split {wanted.split!r} of {name} in {where}'
  with quiet(), one_line(f'{what} cannot be read: '):
    builder = _find(name, data_dir, where)
    needed = _needed(builder, name)
    texts = _captions(builder.info.features, wanted, name)
    if wanted.split == 'test' and 'test' not in builder.info.splits:
      return None
    parser = tfds.features.FeaturesDict(needed)
    records = builder.as_data_source(
      split=wanted.split,
      deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
    )
    num_images = len(records)
    contents = _contents(builder, wanted.split, records)
  if not num_images:
    raise UserError(f'{what} has no images')

  def record_of(index):
    with images.reading(f'{index} of {what}'):
      return parser.deserialize_example_np(
        records[index], decoders={'image': tfds.decode.SkipDecoding()}
      )

  def open_fn(index):
    return io.BytesIO(record_of(index)['image']), f'{index} of {what}'

  rule = images.rule_of(open_fn, num_images, wanted)

  def read(index):
    record = record_of(index)
    file = io.BytesIO(record['image'])
    image = images.read(file, f'{index} of {what}', rule)
    return image, record.get('label', -1)

  record_of(0)  # tfds opens the files only now
  num_classes = (needed['label'].num_classes or 0) if 'label' in needed else 0
  full_name = f'tfds:{builder.info.full_name}, {wanted.split}'
  notes = []
  if 'label' in builder.info.features and 'label' not in needed:
    notes.append('the labels are left out: they are not classes')
  notes += looks.files(open_fn, num_images, rule.channels, wanted)
  source = sources.create(
    full_name, num_images, rule.shape, num_classes, read, notes, contents,
    needed['label'].names if num_classes else (),
    lambda index: record_of(index).get('label', -1),
    texts and _caption_fn(records, *texts, what),
  )  # fmt: skip
  return sources.keep_in_memory(source, rule.shape)


def _contents(builder, split: str, records) -> identity.Contents:
  """The encoded records of a split, and where they lie in the set's files."""
  return identity.Contents(
    len(records),
    lambda index: records[index],
    f'tfds:{builder.info.full_name}',
    spans=[
      (os.path.basename(part.filename), part.skip, part.skip + part.take)
      for part in builder.info.splits[split].file_instructions
    ],
  )


def _needed(builder, name: str) -> dict:
  """The features to parse: the image, still encoded, and a class label."""
  features = dict(builder.info.features.items())
  image, label = features.get('image'), features.get('label')
  if not isinstance(image, tfds.features.Image) or image.np_dtype.kind != 'u':
    raise UserError(
      f"{name} has the features {', '.join(features)}: needs 'image', an "
      'image of unsigned integers'
    )
  is_class = isinstance(label, tfds.features.ClassLabel)
  return {'image': image, **({'label': label} if is_class else {})}


def _caption_fn(records, path, needed, what: str) -> Callable:
  """index -> captions, from `_captions`' path and features."""
  parser = tfds.features.FeaturesDict(needed)

  def captions_of(index):
    with images.reading(f'{index} of {what}'):
      value = parser.deserialize_example_np(records[index])
      for key in path:
        value = value[key]
      parts = [value] if isinstance(value, bytes) else value
      where = f'caption of {index} of {what}'
      texts = (caption_files.decoded(x, where).strip() for x in parts)
      return tuple(filter(None, texts)) or ('',)

  return captions_of


def _captions(features, wanted: sources.Wanted, name: str) -> tuple | None:
  """The path of the captions' feature, and what to parse; None without."""
  found = {}
  for key, feature in features.items():
    # A sequence of features with several columns, such as that of COCO.
    inner = getattr(feature, 'feature', feature)
    if isinstance(inner, tfds.features.Text):
      found[key] = (key,), {key: feature}
    elif isinstance(inner, tfds.features.FeaturesDict):
      column = captions.column(inner, captions.AUTO, name)
      if column and isinstance(inner[column], tfds.features.Text):
        part = tfds.features.Sequence({column: inner[column]})
        found[key] = (key, column), {key: part}
  key = captions.column(found, wanted.captions, name)
  return found[key] if key else None


def _find(name: str, data_dir: str | None, where: str):
  """The builder of a set prepared as array_record; UserError if there is none.

  The set is found by its files. `tfds.builder` would load the code that
  prepares the set, which often needs TensorFlow and knows only one version.
  """
  match = _NAME.fullmatch(name.removeprefix('tfds:'))
  if not match:
    raise UserError(
      f'{name!r} is not a data set of TFDS: use tfds:NAME or '
      'tfds:NAME/CONFIG, such as tfds:cifar10'
    )
  base, config, version = match.groups('')
  full_name = f'{base}{config}{version or ":*.*.*"}'
  try:
    builder = tfds.core.read_only_builder.builder_from_files(
      full_name, data_dir=data_dir
    )
  except tfds.core.DatasetNotFoundError:
    builder = None
  if builder and builder.is_prepared():
    formats = {f.value for f in builder.info.available_file_formats()}
    if 'array_record' not in formats:  # the others have no random access
      raise UserError(
        f'{name} in {where} is prepared as {", ".join(formats)}, need '
        'array_record: run bash launch/prepare_data.sh '
        f'{name.removeprefix("tfds:")} with another DATA_DIR, and read that one'
      )
    return builder

  known = tfds.list_builders(with_community_datasets=False)
  if base not in known:
    near = difflib.get_close_matches(base, known, 1)
    hint = f'; did you mean tfds:{near[0]}?' if near else ''
    raise UserError(
      f'{name!r} is neither prepared in {where} nor known to TFDS{hint}'
    )
  directory = f' {shlex.quote(data_dir)}' if data_dir else ''
  raise UserError(
    f'{name} is not prepared in {where}: run bash launch/prepare_data.sh '
    f'{match.group(0)}{directory}'
  )
