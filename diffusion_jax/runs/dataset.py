"""The images that a run is trained on, as it remembers them in data.json:

  {"train": identity, "heldout": identity or null, "heldout_split": its name,
   "labels": of a run with labels as its condition, see data/labels.py,
   "captions": {"train", "heldout", "examples": some of the training images'},
   of a run with captions as its condition, see data/captions.py}

See data/identity.py for an identity. Data that change in the middle of a run
would change the order of all images, and which ones are held out; data that
differ between hosts would be trained on as a mixture of both.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from diffusion_jax.data import captions, identity, labels, sources
from diffusion_jax.data.sources import Source
from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import saved

DATA = 'data.json'
EXAMPLES = 64  # captions of training images that are kept
CAPTIONED = ('text', 'frozen_text')  # names of conditions
ACCEPT = 'accept it with --accept_data'

Splits = tuple[Source, Source | None]


class Known(NamedTuple):
  """What a start has found out about its images.

  Attributes:
    facts: the content of data.json.
    change: how the images differ from the run's, if that is accepted, or ''.
  """

  facts: dict
  change: str = ''


def check(
  workdir,
  splits: Splits,
  heldout_split: str,
  accept: bool,
  conditioning: Mapping | None = None,
) -> Known:
  """Compares images with those of the other hosts, and with those of the run.

  Call it in all processes. Nothing is written.

  Args:
    workdir: the run's folder, new or existing.
    splits: the training images and the held-out ones, if any.
    heldout_split: the name of the split that is held out. Images of another
      split than that of the run are not compared.
    accept: whether images may differ from those of the run, and held-out images
      may be training images.
    conditioning: the config's; with labels or captions, the images must have
      them.

  Raises:
    UserError: in all processes; images or captions differ, held-out images are
      training images, or labels or captions are missing or out of range.
  """
  classes = num_classes(conditioning)
  if classes:
    distributed.everywhere(lambda: labels.check(*splits, classes))
  facts = distributed.everywhere(lambda: _facts(splits, heldout_split))
  if has_captions(conditioning):
    facts['captions'] = distributed.everywhere(lambda: _captions(splits))
  _same_on_all_hosts(distributed.gather(facts))

  def compare():
    begun = saved.newest(files.at(workdir) / 'checkpoints') > 0
    then = read(workdir) if begun else None
    change = _change(then or facts, facts, splits)
    if change and not accept:
      raise UserError(f'{change}: restore them, or {ACCEPT}')
    if change:
      terminal.say(f'{change}: accepted')
    if then is None and begun:
      terminal.say(
        f'the run has no whole {DATA}: the images found now are taken as its '
        'own'
      )
    if then is None or change:
      _check_heldout(splits, accept)
    if classes:
      known = None if change else read_labels(workdir, classes)
      facts['labels'] = known or labels.describe(splits[0], classes)
    return [facts, change]

  return Known(*distributed.on_first(compare))


def check_known(
  workdir, splits: Splits, heldout_split: str, accept: bool
) -> None:
  """Compares images with those of a run, if it remembers any.

  Call it in all processes.

  Args:
    workdir: the run's folder.
    splits: the training and held-out images.
    heldout_split: the name of the held-out split.
    accept: whether to go on with other images.

  Raises:
    UserError: they differ, and `accept` is false.
  """

  def compare():
    then = read(workdir)
    told = then and _change(then, _facts(splits, heldout_split), splits)
    if told and not accept:
      raise UserError(
        f'{told}: give the folder of the images of the run with --data_path, '
        f'or {ACCEPT}'
      )

  distributed.everywhere(compare)


def read(workdir) -> dict | None:
  """Reads data.json; None, with a word if it is damaged, if there is none."""
  path = files.at(workdir) / DATA
  if not path.exists():
    return None
  try:
    facts = json.loads(path.read_text())
    for name in ('train', 'heldout'):
      if facts[name] is not None or name == 'train':
        identity.difference(facts[name], facts[name], '', '')
    return {'heldout_split': '', **facts}
  except (ValueError, LookupError, TypeError, AttributeError) as e:
    terminal.say_once(f'{path} is damaged ({e!r}) and is left out')
    return None


def num_classes(conditioning: Mapping | None) -> int:
  """The number of classes of a config's condition; 0 if it has no labels."""
  if not conditioning or conditioning['name'] != 'label':
    return 0
  return conditioning['num_classes']


def has_captions(conditioning: Mapping | None) -> bool:
  """Whether a config's condition is captions."""
  return bool(conditioning) and conditioning['name'] in CAPTIONED


def read_labels(workdir, classes: int) -> dict | None:
  """The labels of a run's training images, see `labels.describe`.

  Args:
    workdir: the run's folder.
    classes: the number of classes of the run.

  Returns:
    None if data.json is missing or damaged, or has no labels.
  """
  match (read(workdir) or {}).get('labels'):
    case {'counts': list(counts), 'names': list(names)} as found if (
      len(counts) == classes
      and all(type(count) is int and count >= 0 for count in counts)
      and sum(counts) > 0
      and all(isinstance(name, str) for name in names)
    ):
      return found
  return None


def write(workdir, known: Known) -> None:
  """Writes data.json, if it has changed."""
  path = files.at(workdir) / DATA
  if known.facts != read(workdir):
    files.write_json(path, known.facts)


def _facts(splits, heldout_split) -> dict:
  train, heldout = splits
  return {
    'train': train.identity,
    'heldout': heldout and heldout.identity,
    'heldout_split': heldout_split if heldout else '',
  }


def _captions(splits) -> dict:
  captions.check(*splits)
  train, heldout = (source and captions.describe(source) for source in splits)
  if train['empty']:
    number = f'{train["empty"]:,} of {train["captions"]:,}'
    terminal.say(f'{number} captions are empty: they train without words')
  count = min(len(splits[0]), EXAMPLES)
  chosen = np.arange(count) * len(splits[0]) // count
  examples = [texts[0] for texts in captions.of(splits[0], chosen)]
  return {'train': train, 'heldout': heldout, 'examples': examples}


def _same_on_all_hosts(every: list[dict]) -> None:
  for index, there in enumerate(every[1:], 1):
    told = _difference(every[0], there, 'in process 0', f'in process {index}')
    if there['heldout_split'] != every[0]['heldout_split']:
      told = f'only one of processes 0 and {index} has held-out images'
    told = told or _other_captions(
      every[0], there, 'in process 0', f'in process {index}'
    )
    if told:
      raise UserError(
        f'the images are not the same on all hosts: {told}: copy the same '
        'images to all of them'
      )


def _change(then: dict, now: dict, splits: Splits) -> str:
  """How the images differ from those of the run, in a sentence; or ''."""
  names = frozenset(
    name
    for source in splits
    if source and source.contents
    for name in source.contents.names
  )
  told = _difference(then, now, 'then', 'now', names) or _other_captions(
    then, now, 'then', 'now'
  )
  return told and f'the images are not those of the run: {told}'


def _difference(a: dict, b: dict, in_a, in_b, names=()) -> str:
  """How the images of two data.json differ, in a phrase; '' if they do not.

  All images first: one that is missing may move others between the splits.
  """
  kinds = ['train']
  if a['heldout'] and b['heldout'] and a['heldout_split'] == b['heldout_split']:
    kinds.append('heldout')
  whole = [identity.together([facts[k] for k in kinds]) for facts in (a, b)]
  return identity.difference(*whole, in_a, in_b, names)


def _other_captions(a: dict, b: dict, in_a: str, in_b: str) -> str:
  """How the captions of two data.json differ, in a phrase; '' if they do not.

  Those of held-out images only matter if both hold out the same images.
  """
  kinds = ['train']
  if a['heldout_split'] == b['heldout_split']:
    kinds.append('heldout')
  if not (a.get('captions') and b.get('captions')):
    return ''
  for kind in kinds:
    one, other = a['captions'][kind], b['captions'][kind]
    if one and other and one != other:
      counts = [f'{x["captions"]:,}' for x in (one, other)]
      if counts[0] == counts[1]:
        return f'some of {counts[0]} captions are others {in_a} than {in_b}'
      return f'{counts[0]} captions {in_a}, {counts[1]} {in_b}'
  return ''


def _check_heldout(splits, accept: bool) -> None:
  """Raises UserError if held-out images are training images.

  One in ten of those looked at is too many. Fewer are duplicates within the
  set, as in many sets from the web, and get a word.
  """
  train, heldout = splits
  if heldout is None:
    return
  contents = (sources.contents_of(part, False) for part in (heldout, train))
  found, looked_for, example = identity.shared(*contents)
  if not found:
    return
  told = (
    f'{found:,} of {looked_for:,} held-out images are also training images '
    f'({example})'
  )
  if 10 * found >= looked_for and not accept:
    raise UserError(
      f'{told}: hold out others (data.heldout_split, data.heldout_every), or '
      f'{ACCEPT}'
    )
  terminal.say(told)
