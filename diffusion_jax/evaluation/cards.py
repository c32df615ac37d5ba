"""Metric cards: a number with all that it depends on, as JSON.

  subject      what was judged: run, step, weights, sampler, grid, seed
  protocol     how: data, counts, the judging network, resize, rounding
  results      name -> number
  details      what is no single number
  environment  versions, revision, devices

Cards stand in one table only where their protocols are equal.
"""

import datetime
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from diffusion_jax import environment, files, runs
from diffusion_jax.errors import UserError

VERSION = 1
PARTS = ('subject', 'protocol', 'results', 'details', 'environment')

# Of the results: the head of its column, and what it means.
HEADS = {
  'frechet': ('Fréchet ↓', 'Fréchet distance to the training images'),
  'frechet_heldout_count': (
    'equal count ↓',
    'Fréchet distance of as many samples as there are held-out images',
  ),
  'frechet_ratio': (
    'ratio ↓',
    'Fréchet distance of samples over that of held-out images, equally many',
  ),
  'confident': (
    'confident ↑',
    'share of images given a class with a probability above 0.8',
  ),
  'smallest_class': ('least class ↑', 'share of the least frequent class'),
  'nearest': (
    'nearest',
    'median distance to the nearest training image, between features',
  ),
  'nearest_share': (
    'near',
    'share of samples nearer to a training image than 95% of the held-out '
    'images are, so that 5% are to be expected',
  ),
}
# Of held-out images: it stands below the samples' number, and is the same on
# all cards of one protocol.
HELDOUT = {
  'frechet_heldout_count': 'frechet_floor',
  'confident': 'confident_heldout',
  'smallest_class': 'smallest_class_heldout',
  'nearest': 'nearest_heldout',
}


def columns(cards: Sequence[dict]) -> list[str]:
  """The results that these cards have, but for those of held-out images."""
  names = dict.fromkeys(name for card in cards for name in card['results'])
  return [name for name in names if name not in HELDOUT.values()]


def head(name: str) -> str:
  """The head of a result's column."""
  return HEADS.get(name, (name,))[0]


def meaning(name: str) -> str:
  """What a result is, for who asks; '' where only its name is known."""
  return HEADS.get(name, ('', ''))[1]


def heldout(card: dict) -> dict:
  """Result -> the held-out images' number of the same kind."""
  results = card['results']
  return {
    name: results[real] for name, real in HELDOUT.items() if real in results
  }


def create(subject: dict, protocol: dict, results: dict, details: dict) -> dict:
  """A card of now, as it reads back from JSON.

  Args:
    subject: what was judged.
    protocol: how.
    results: name -> number.
    details: what is no single number.
  """
  card = {
    'card': VERSION,
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'subject': subject,
    'protocol': protocol,
    'results': results,
    'details': details,
    'environment': environment.describe(),
  }
  return json.loads(json.dumps(card))


def write(path, card: dict) -> None:
  """Writes a card, whole or not at all."""
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  with files.replacing(path) as file:
    file.write(json.dumps(card, indent=2).encode() + b'\n')


def read(path) -> dict:
  """A card.

  Raises:
    UserError: there is none, or the file is something else.
  """
  try:
    card = json.loads(Path(path).read_text())
  except (OSError, ValueError) as e:
    raise UserError(f'{path} is not a metric card ({e})') from e
  if not isinstance(card, dict) or card.get('card') != VERSION:
    raise UserError(f'{path} is not a metric card of version {VERSION}')
  for part in PARTS:
    if not isinstance(card.get(part), dict):
      raise UserError(f'{path} is a damaged metric card: it has no {part!r}')
  return card


def name(subject_name: str, protocol: dict) -> str:
  """The name of a card, without .json; cards of one protocol end alike."""
  digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode())
  return (
    f'{subject_name}_{protocol["features"]}_{protocol["num_samples"]}_'
    f'{digest.hexdigest()[:8]}'
  )


def find(places: Sequence[str]) -> list[Path]:
  """The files of cards: as given, or all of a run or of a folder.

  Raises:
    UserError: there are none.
  """
  found = []
  for place in map(Path, places):
    if place.is_dir():
      inner = place / 'evaluations'
      inside = sorted((inner if inner.is_dir() else place).glob('*.json'))
      if not inside:
        raise UserError(f'{place} holds no metric cards: evaluate first')
      found += inside
    else:
      found.append(place)
  return found


def differences(cards: Sequence[dict]) -> dict:
  """The fields of the protocol that are not the same on all cards.

  Returns:
    {field: values}, nested ones with dots, a value for each card.
  """
  flat = [runs.flatten(card['protocol']) for card in cards]
  fields = sorted(set().union(*flat))
  values = {field: [f.get(field) for f in flat] for field in fields}
  return {k: v for k, v in values.items() if any(x != v[0] for x in v)}


def compare(paths: Sequence[Path]) -> list[dict]:
  """The cards, of one protocol.

  Args:
    paths: of their files.

  Raises:
    UserError: two were measured in different ways; every field that differs is
      named.
  """
  cards = [read(path) for path in paths]
  for path, card in zip(paths, cards, strict=True):
    unlike = differences([cards[0], card])
    if unlike:
      told = '; '.join(
        f'{field}: {_short(a)} and {_short(b)}'
        for field, (a, b) in unlike.items()
      )
      raise UserError(
        f'{paths[0]} and {path} were measured in different ways and are not '
        f'compared ({told})' + _remedy(unlike)
      )
  return cards


def _remedy(unlike):
  if 'features_sha256' in unlike:
    return ': judge both by one network, --features=FILE'
  return ''


def table(cards: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
  """Cards of one protocol as (heads, rows of text).

  A row a card, first who it is, then its results; below them those of the
  held-out images.
  """
  subjects = ('run', 'step', 'weights', 'sampler', 'evaluations', 'seed')
  names = columns(cards)
  rows = []
  for card in cards:
    subject = card['subject']
    who = [
      Path(subject.get('workdir', '?')).name,
      subject.get('step', '?'),
      'EMA' if subject.get('ema') else 'raw',
      *(subject.get(name, '?') for name in subjects[3:]),
    ]
    results = [number(card['results'].get(name)) for name in names]
    rows.append([*map(str, who), *results])
  if real := heldout(cards[0]):
    cells = [number(real[name]) if name in real else '' for name in names]
    rows.append(['held-out images', *[''] * (len(subjects) - 1), *cells])
  return [*subjects, *map(head, names)], rows


def number(value) -> str:
  """Four digits, or a dash."""
  return '-' if value is None else f'{value:.4g}'


def _short(value):
  text = str(value)
  return f'{text[:12]}...' if len(text) > 60 else text
