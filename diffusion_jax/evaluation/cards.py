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
from pathlib import PurePath

from diffusion_jax import runs
from diffusion_jax.system import environment, files
from diffusion_jax.system.errors import UserError

VERSION = 1

# What Frechet distances are called; FID is that of Inception's last features.
DISTANCES = {
  'frechet': 'Fréchet',
  'fid': 'FID',
  'sfid': 'sFID',
  'fid_768': 'FID-768',
  'fid_192': 'FID-192',
  'fid_64': 'FID-64',
}

# Of the results: the head of its column, and what it means.
HEADS = {
  **{
    key: pair
    for name, title in DISTANCES.items()
    for key, pair in {
      name: (f'{title} ↓', 'Fréchet distance to the reference'),
      f'{name}_heldout_count': (
        'equal count ↓',
        'Fréchet distance of as many samples as there are held-out images',
      ),
      f'{name}_ratio': (
        'ratio ↓',
        'Fréchet distance of samples over that of held-out images, equally '
        'many',
      ),
    }.items()
  },
  'kid': ('KID ↓', 'squared MMD between features, unbiased, over subsets'),
  'kid_error': ('KID ±', 'standard error over the subsets'),
  'inception_score': ('IS ↑', 'Inception Score, mean over the splits'),
  'inception_score_std': ('IS ±', 'standard deviation over the splits'),
  'precision': ('precision ↑', 'share of samples near to real images'),
  'recall': ('recall ↑', 'share of real images near to samples'),
  'density': ('density ↑', 'real balls around a sample, over k'),
  'coverage': ('coverage ↑', 'share of real balls with a sample inside'),
  'confident': (
    'confident ↑',
    'share of images given a class with a probability above 0.8',
  ),
  'smallest_class': ('least class ↑', 'share of the least frequent class'),
  'identical': ('identical ↓', 'share of images that are a training image'),
  'nearest': (
    'nearest',
    'median distance to the nearest training image, between features',
  ),
  'nearest_share': (
    'near',
    'share of samples nearer to a training image than 95% of the held-out '
    'images are; below it, what is expected of images that are not copied',
  ),
  'bpd': ('bits/dim ↓', 'the variational bound'),
  'bpd_error': ('±', 'standard error over the images'),
  'bpd_fast': ('bits/dim ↓', 'the bound, estimated'),
  'bpd_fast_error': ('±', 'half of the 95% interval'),
  'bpd_ode': ('bits/dim ↓', 'by the probability flow'),
  'bpd_ode_error': ('±', 'standard error over the images'),
  'evaluations': ('evaluations', 'of the network, for an image'),
}
# Of held-out images: it stands below the samples' number, and is the same on
# all cards of one protocol.
HELDOUT = {
  **{f'{name}_heldout_count': f'{name}_floor' for name in DISTANCES},
  **{
    name: f'{name}_heldout'
    for name in (
      *('kid', 'kid_error', 'inception_score', 'inception_score_std'),
      *('confident', 'smallest_class', 'identical', 'nearest'),
    )
  },
  'nearest_share': 'nearest_share_expected',
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
  files.make(files.at(path).parent)
  with files.replacing(path) as file:
    file.write(json.dumps(card, indent=2).encode() + b'\n')


def read(path) -> dict:
  """A card.

  Args:
    path: of its file.

  Raises:
    UserError: there is none, or the file is something else.
  """
  try:
    card = json.loads(files.at(path).read_text())
  except (OSError, ValueError, RecursionError) as e:
    raise UserError(f'{path} is not a metric card ({e})') from e
  if not is_card(card):
    raise UserError(f'{path} is not a metric card, or is a damaged one')
  return card


def is_number(value) -> bool:
  """Whether it can be printed, added up and plotted."""
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and (value == 0 or 1e-100 < abs(value) < 1e100)
  )


def is_subject(value) -> bool:
  return (
    isinstance(value, dict)
    and isinstance(value.get('step', 0), int)
    and isinstance(value.get('ema', True), bool)
    and all(isinstance(value.get(k, ''), str) for k in ('sampler', 'workdir'))
  )


def is_card(value) -> bool:
  if not isinstance(value, dict) or value.get('card') != VERSION:
    return False
  details = value.get('details', {})
  return (
    all(isinstance(value.get(k), dict) for k in ('protocol', 'results'))
    and is_subject(value.get('subject'))
    and isinstance(details, dict)
    and isinstance(details.get('caveats', []), list)
    and all(isinstance(line, str) for line in details.get('caveats', []))
    and all(v is None or is_number(v) for v in value['results'].values())
    and all(
      isinstance(v, list) and all(map(is_number, v))
      for k, v in details.items()
      if k.endswith('class_histogram')
    )
  )


def name(subject_name: str, what: str, protocol: dict) -> str:
  """The name of a card, without .json; cards of one protocol end alike."""
  digest = hashlib.sha256(_key({'protocol': protocol}).encode())
  return f'{subject_name}_{what}_{digest.hexdigest()[:8]}'


def find(place) -> list[files.Path]:
  """The files of cards: the one given, or all of a run or of a folder.

  Args:
    place: a file, a run's folder, or a folder of cards.

  Raises:
    UserError: there are none.
  """
  place = files.at(place).expanduser()
  if not place.is_dir():
    return [place]
  inner = place / 'evaluations'
  found = sorted((inner if inner.is_dir() else place).glob('*.json'))
  if not found:
    raise UserError(f'{place} holds no metric cards: evaluate first')
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


def compare(places: Sequence[str]) -> list[list[dict]]:
  """Cards in groups of one protocol, which stand in one table each.

  Of a run's folder, those cards are taken of whose protocol all the other
  places have some.

  Args:
    places: files of cards, or folders, see `find`.

  Raises:
    UserError: the places have no protocol in common; every field that differs
      is named.
  """
  found = [[read(path) for path in find(place)] for place in places]
  keys = [[_key(card) for card in cards] for cards in found]
  common = [
    key for key in dict.fromkeys(keys[0]) if all(key in k for k in keys)
  ]
  if not common:
    first = found[0][0]
    place, other = next(
      (place, cards[0])
      for place, cards in zip(places, found, strict=True)
      if cards[0]['protocol'] != first['protocol']
    )
    unlike = differences([first, other])
    told = '; '.join(
      f'{field}: {_short(a)} and {_short(b)}'
      for field, (a, b) in unlike.items()
    )
    raise UserError(
      f'{places[0]} and {place} were measured in different ways and are not '
      f'compared ({told})' + _remedy(unlike)
    )
  return [
    [card for cards in found for card in cards if _key(card) == key]
    for key in common
  ]


def _key(card):
  return json.dumps(card['protocol'], sort_keys=True)


def _remedy(unlike):
  if 'features_sha256' in unlike:
    return ': judge both by one network, --features=FILE'
  return ''


def table(cards: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
  """Cards of one protocol as (heads, rows of text).

  A row a card, first who it is, then its results; below them those of the
  held-out images.
  """
  names = columns(cards)
  who = [_who(card['subject']) for card in cards]
  always = ('run', 'step', 'weights')
  if any('sampler' in card['subject'] for card in cards):
    always = (*always, 'sampler', 'evaluations')
  subjects = [
    field
    for field in dict.fromkeys(f for told in who for f in told)
    if field in always or len({told.get(field) for told in who}) > 1
  ]
  rows = [
    [
      *(told.get(field, '') for field in subjects),
      *(number(card['results'].get(name)) for name in names),
    ]
    for told, card in zip(who, cards, strict=True)
  ]
  if real := heldout(cards[0]):
    cells = [number(real[name]) if name in real else '' for name in names]
    rows.append(['held-out images', *[''] * (len(subjects) - 1), *cells])
  return [*subjects, *map(head, names)], rows


def _who(subject):
  """field -> text: what was judged, as people tell one from another."""
  told = {
    'run': PurePath(subject.get('workdir', '?')).name,
    'step': subject.get('step', ''),
    'weights': {True: 'EMA', False: 'raw'}.get(subject.get('ema'), ''),
    'sampler': subject.get('sampler', '?'),
    'evaluations': subject.get('evaluations', '?'),
  }
  for name, value in subject.items():
    if name not in ('workdir', 'ema', 'weights_sha256', *told):
      if isinstance(value, list) and all(map(is_number, value)):  # the grid
        value = brief(value)
      told[name] = value
  return {name: str(value) for name, value in told.items()}


def brief(grid) -> str:
  """The first times of a grid."""
  return ' '.join(f'{x:.4g}' for x in grid[:3]) + ' ..'


def number(value) -> str:
  """Four digits, or a dash."""
  return '-' if value is None else f'{value:.4g}'


def _short(value):
  text = str(value)
  return f'{text[:12]}...' if len(text) > 60 else text
