"""What the sub-folders of a set mean: splits, classes, or only a division.

From the names of the images alone, in this order:

1. One folder that holds all images is looked through, at any depth.
2. Folders named `train` and `test` (or `val`, `eval`, `dev`, `heldout`) hold
   the splits; also training, validation, test_set, train2017 and the like.
   Other images are left out. The folders may also be inside of each class. If
   all folders have such a word in their names (trainA, DIV2K_valid_HR), they
   are splits too.
3. A dataset.json of NVIDIA's tools ({"labels": [[NAME, CLASS], ...]}) has the
   labels, and folders are no classes.
4. Folders that only divide the set (shards) are no classes: they are numbered
   as in `_are_shards`.
5. Other folders are classes, in the order of their names. Images beside them
   belong to no class, so that the meaning is unclear: an error.

Before that, `annotations` finds folders of masks and the like.

`classes` = 'folders' skips 3, 4 and `annotations`; 'none' ignores all labels.
"""

import collections
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from diffusion_jax.data import sources
from diffusion_jax.system.errors import UserError

LABELS = 'dataset.json'
CLASSES = ('auto', 'folders', 'none')
_SHOWN = 5  # names in a message
_HELD_OUT = ('test', 'val', 'eval', 'dev', 'heldout', 'holdout')  # best first
_WORD = (
  r'(train|test|val|eval|dev|h[eo]ld[-_ ]?out)(ing|id|idation|uation|elopment)?'
)
_SPLIT = re.compile(
  rf'{_WORD}([-_ ]?(set|data|images?|\d[\dx]*))?', re.IGNORECASE
)
_LIKE_A_SPLIT = re.compile(rf'(?:.*[^a-zA-Z])?(?i:{_WORD})(?![a-z]).*')
_PICTURES = re.compile(r'(jpeg)?images?|imgs?|photos?|pictures?', re.IGNORECASE)
_ANNOTATIONS = re.compile(
  r'masks?|labels?|(annot|segment)ations?\w*|ground[-_ ]?truths?|gt|trimaps?'
  r'|depths?|thumb(nail)?s?',
  re.IGNORECASE,
)
_PART = re.compile(r'(part|shard|chunk|batch)s?[-_ ]?\d+', re.IGNORECASE)


class Layout(NamedTuple):
  """What the names of a set's images mean.

  Attributes:
    splits: 'train' and others -> their images; {} if folders name no splits.
    label_of: image -> label, for images that have one.
    num_classes: number of classes; 0 if the set is unlabelled.
    notes: what was understood, a sentence each.
    class_names: the names of the classes, by label; () if they have none.
  """

  splits: dict[str, list[str]]
  label_of: Mapping[str, int]
  num_classes: int
  notes: list[str]
  class_names: tuple[str, ...] = ()


def understand(
  names: Sequence[str], listed: Mapping[str, object] | None, what: str,
  wanted: sources.Wanted,
) -> Layout:  # fmt: skip
  """Finds the splits and classes of a folder of images.

  Args:
    names: paths of the images relative to the folder, with '/', sorted.
    listed: the labels of dataset.json, see `labels_in`; None without one.
    what: what to call the folder in errors.
    wanted: what was decided by hand: `classes`.

  Raises:
    UserError: images lie both beside and in folders that look like classes.
  """
  splits, depth, notes = _splits(names)
  train = splits.get('train', names)
  used = [name for part in splits.values() for name in part] or names
  depth = _through(train, depth)
  if wanted.classes == 'none':
    return Layout(splits, {}, 0, notes)
  if listed is not None and wanted.classes == 'auto':
    return _labelled(splits, listed, used, LABELS, notes)
  folders, beside = _grouped(train, depth)
  if not folders:
    return Layout(splits, {}, 0, notes)
  if beside and not splits:
    raise UserError(
      f'{what} has images both directly inside ({_shown(beside)}) and in '
      f'sub-folders ({_shown(folders)}): '
      + (
        'put all in sub-folders, one per class, or none, or set '
        'data.classes=none to take all without labels'
        if wanted.has_config
        else f'move those {len(beside)} away, or give one of the sub-folders'
      )
    )
  if wanted.classes == 'auto' and _are_shards(folders):
    remedy = '; data.classes=folders makes them classes' * wanted.has_config
    told = (
      f'{len(folders)} numbered folders ({_shown(folders)}) are taken as parts '
      f'of the set, not as classes{remedy}'
    )
    return Layout(splits, {}, 0, [*notes, told])
  folders, _ = _grouped(used, depth)
  label_of = {
    name: label
    for label, folder in enumerate(sorted(folders))
    for name in folders[folder]
  }
  origin = f'the folders {_shown(folders)}'
  layout = _labelled(splits, label_of, used, origin, notes)
  if layout.num_classes != len(folders):  # its labels are left out
    return layout
  return layout._replace(class_names=tuple(sorted(folders)))


def labels_in(file: Path) -> dict[str, object] | None:
  """The labels of a dataset.json: name of an image -> its label, any JSON.

  Args:
    file: the file.

  Returns:
    {} if it says that there are no labels; None if it is damaged or of another
    kind.
  """
  try:
    labels = json.loads(file.read_bytes())['labels']
    return {name.replace('\\', '/'): label for name, label in labels or ()}
  except (OSError, ValueError, LookupError, TypeError, AttributeError,
          RecursionError):  # fmt: skip
    return None


def annotations(names: Sequence[str], wanted: sources.Wanted) -> dict[str, str]:
  """Folders of masks, labels or thumbnails beside a folder of the images.

  Args:
    names: paths of the images relative to the set's folder, with '/'.
    wanted: what was decided by hand: `classes`.

  Returns:
    Path of such a folder, with '/' at its end -> a note; {} unless all folders
    beside the one of the images are of that kind.
  """
  inside = collections.defaultdict(set)  # folder -> its sub-folders
  for folder in {name.rpartition('/')[0] for name in names}:
    while folder:
      parent, _, last = folder.rpartition('/')
      inside[parent].add(last)
      folder = parent
  left = {}
  remedy = '; data.classes=folders takes it too' * wanted.has_config
  for parent, folders in sorted(inside.items()):
    others = {name for name in folders if _ANNOTATIONS.fullmatch(name)}
    pictures = [*folders - others]
    if len(pictures) == 1 and _PICTURES.fullmatch(pictures[0]):
      for name in sorted(others):
        path = f'{parent}/{name}/'.removeprefix('/')
        left[path] = (
          f'the folder {path!r} beside {pictures[0]!r} is left out{remedy}'
        )
  return {} if wanted.classes == 'folders' else left


def by_words(names: Sequence[str]) -> dict[str, list[str]]:
  """The splits that words in paths of shards name, such as train-000.tar.

  Args:
    names: paths, with '/'.

  Returns:
    'train' and 'test' -> paths, in order; {} unless there are both.
  """
  parts = collections.defaultdict(list)
  for name in names:
    found = (_LIKE_A_SPLIT.fullmatch(part) for part in name.split('/'))
    match = next(filter(None, found), None)
    split = re.sub('[-_ ]', '', match[1]).lower() if match else ''
    parts[split].append(name)
  held = next((split for split in _HELD_OUT if split in parts), None)
  if held is None or 'train' not in parts:
    return {}
  return {'train': parts['train'], 'test': parts[held]}


def _splits(names) -> tuple[dict[str, list[str]], int, list[str]]:
  """Folders that are splits, the depth below them, and notes."""
  depth = _through(names, 0)
  found = [
    (at, below, parts, held)
    for at, below, parts in _divisions(names, depth)
    for held in _HELD_OUT
    if 'train' in parts and held in parts
  ]
  if not found:
    return {}, depth, []
  at, below, parts, held = found[0]
  told = (
    f'{_folders_are(parts["train"], at)} taken for training '
    f'({len(parts["train"])} images), {_folders_are(parts[held], at)} held out '
    f'({len(parts[held])})'
  )
  others = [
    name
    for part in parts
    if part not in ('train', held)
    for name in parts[part]
  ]
  if others:
    told += f'; {len(others)} other images are left out ({_shown(others)})'
  return {'train': parts['train'], 'test': parts[held]}, below, [told]


def _divisions(names, depth):
  """Ways to divide a set: depth of the folders, depth below, split -> images.

  Images of no split are those of ''.
  """
  yield depth, depth + 1, _parted(names, depth, _SPLIT)
  parts = _parted(names, depth, _LIKE_A_SPLIT)
  if '' not in parts:
    yield depth, depth + 1, parts
  parts = _parted(names, depth + 1, _SPLIT)  # within each class
  train, _ = _grouped(parts.get('train', []), depth)
  folders, beside = _grouped(names, depth)
  if not beside and train.keys() == folders.keys():
    yield depth + 1, depth, parts


def _parted(names, at, pattern) -> dict[str, list[str]]:
  parts = collections.defaultdict(list)
  for name in names:
    folder, *rest = name.split('/')[at:] or ['']  # '' of those above
    match = pattern.fullmatch(folder) if rest else None
    split = re.sub('[-_ ]', '', match[1]).lower() if match else ''
    parts[split].append(name)
  return dict(parts)


def _folders_are(names, at) -> str:
  found = {name.split('/')[at] for name in names}
  return f'the folder{"s" * (len(found) > 1)} {_shown(found)} ' + (
    'are' if len(found) > 1 else 'is'
  )


def _grouped(names, depth) -> tuple[dict[str, list[str]], list[str]]:
  """Folder at a depth -> its images; and the images beside the folders."""
  folders, beside = collections.defaultdict(list), []
  for name in names:
    head, *rest = name.split('/')[depth:]
    (folders[head] if rest else beside).append(name)
  return folders, beside


def _through(names: Sequence[str], depth: int) -> int:
  """The depth below the folders that hold all images, at least `depth`."""
  ends = [name.split('/')[:-1] for name in (names[0], names[-1])]  # sorted
  pairs = zip(*ends, strict=False)
  shared = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
  return max(len(list(shared)), depth)


def _are_shards(folders: Mapping[str, Sequence[str]]) -> bool:
  """Whether folders only divide a set: 00000, 00001, ..., or part-0, part-1.

  Numbers are shards if all have the same width, of five digits or more than
  the largest of them needs, and either the file names go on from folder to
  folder or all folders but the last hold the same number of images. So the
  classes 0 to 9, 01 to 10, or 000 to 199, stay classes, and wide numbers do if
  each folder of another size numbers its images anew.

  Args:
    folders: name -> its images, sorted.
  """
  names = sorted(folders)
  if all(_PART.fullmatch(name) for name in names):
    return True
  widths = {len(name) for name in names}
  if len(widths) > 1 or not all(map(str.isdecimal, names)):
    return False
  if len(names[0]) < min(5, 1 + len(str(int(names[-1])))):
    return False
  *sizes, last = (len(folders[name]) for name in names)
  if len(set(sizes)) == 1 and last <= sizes[0]:
    return True
  files = [[_number(name) for name in folders[folder]] for folder in names]
  pairs = itertools.pairwise(files)
  return all(max(one) < min(other) for one, other in pairs)


def _number(name: str) -> tuple[int, str]:
  """A key that orders file names by the number at their end."""
  stem = name.rpartition('/')[2].rpartition('.')[0]
  return len(stem), stem


def _labelled(splits, found, used, origin, notes) -> Layout:
  """A labelled set if every image has a class, otherwise an unlabelled one."""
  if not found:
    told = f'{origin} has no labels, so folders are not classes either'
    return Layout(splits, {}, 0, [*notes, told])
  label_of = {name: found[name] for name in used if name in found}
  wrong = [
    name
    for name, label in label_of.items()
    if type(label) is not int or not 0 <= label < 2**31
  ]
  if wrong or len(label_of) < len(used):
    why = (
      f'that of {wrong[0]!r} is {label_of[wrong[0]]}, not a class (0, 1, ...)'
      if wrong
      else f'{len(used) - len(label_of)} of {len(used)} images have none'
    )
    told = f'the labels of {origin} are left out: {why}'
    return Layout(splits, {}, 0, [*notes, told])
  count = max(label_of.values()) + 1
  told = f'the labels are those of {origin}: {count} classes'
  return Layout(splits, label_of, count, [*notes, told])


def _shown(names) -> str:
  """The first names, in order."""
  shown = ', '.join(map(repr, sorted(names)[:_SHOWN]))
  return shown + ', ...' * (len(names) > _SHOWN)
