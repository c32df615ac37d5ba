"""Metric cards: results with everything they depend on, as JSON.

  subject      what was judged: run, step, weights, sampler, grid, seed
  protocol     how: data, counts, the judging network, resize, rounding
  results      name -> number
  details      anything that is not a single number
  environment  versions, revision, devices

Only cards with equal protocols are put into one table.
"""

import datetime
import hashlib
import json
from collections.abc import Sequence

from diffusion_jax import runs
from diffusion_jax.runs.trained import Trained
from diffusion_jax.system import environment, files
from diffusion_jax.system.errors import UserError

VERSION = 1
# Details that are rows of texts (t) and numbers (n).
ROWS = {
  'by_prompt': 'tnnnn',  # prompt, samples, median place, recall at 1 and at 5
  'copied': 'nttn',  # sample, prompt, caption of the nearest image, distance
}

# Names of Frechet distances; FID is the one of Inception's last features.
DISTANCES = {
  'frechet': 'Fréchet',
  'fid': 'FID',
  'sfid': 'sFID',
  'fid_768': 'FID-768',
  'fid_192': 'FID-192',
  'fid_64': 'FID-64',
}


def distance(name: str) -> str:
  """The name of a Frechet distance in a title."""
  return DISTANCES[name] + ' distance' * (name == 'frechet')


def heldout_name(name: str) -> str:
  """The name of the result for held-out images that corresponds to `name`."""
  if name.endswith('_heldout_count'):
    return name.replace('_heldout_count', '_floor')
  return f'{name}_expected' if name == 'nearest_share' else f'{name}_heldout'


def heldout(card: dict) -> dict:
  """Result -> the corresponding number of the held-out images."""
  results = card['results']
  names = {name: heldout_name(name) for name in results}
  return {name: results[x] for name, x in names.items() if x in results}


def subject_of(trained: Trained) -> dict:
  """The part of a card's subject that describes the network."""
  return {
    'workdir': str(trained.workdir),
    'step': trained.step,
    'ema': trained.ema,
    **trained.average,
    'weights_sha256': trained.weights_sha256,
    **trained.about_changes,
  }


def create(subject: dict, protocol: dict, results: dict, details: dict) -> dict:
  """Makes a card with the current time and environment.

  Args:
    subject: what was judged.
    protocol: how it was judged.
    results: name -> number.
    details: anything that is not a single number.

  Returns:
    the card, as it reads back from JSON.
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


def read(path) -> dict:
  """Reads a card.

  Args:
    path: the file.

  Raises:
    UserError: the file does not exist or is not a card.
  """
  try:
    card = json.loads(files.at(path).read_text())
  except (OSError, ValueError, RecursionError) as e:
    raise UserError(f'{path} is not a metric card ({e})') from e
  if not is_card(card):
    raise UserError(f'{path} is not a metric card, or is damaged')
  return card


def is_number(value) -> bool:
  """Whether a value can be printed, added up and plotted."""
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and (value == 0 or 1e-100 < abs(value) < 1e100)
  )


def has(value, **kinds: type) -> bool:
  """Whether a value is a dict whose fields, if present, have these types."""
  return isinstance(value, dict) and all(
    isinstance(value[key], kind) for key, kind in kinds.items() if key in value
  )


def is_subject(value) -> bool:
  return has(value, step=int, ema=bool, sampler=str, workdir=str)


def is_card(value) -> bool:
  match value:
    case {'card': version, 'subject': subject, 'protocol': dict(),
          'results': dict(results)}:  # fmt: skip
      details = value.get('details', {})
      return (
        version == VERSION
        and is_subject(subject)
        and has(details, caveats=list, class_names=list)
        and all(isinstance(line, str) for line in details.get('caveats', ()))
        and all(x is None or is_number(x) for x in results.values())
        and all(
          isinstance(x, list) and all(map(is_number, x))
          for key, x in details.items()
          if key.endswith('class_histogram')
        )
        and all(
          isinstance(x, list) and all(_is_row(row) for row in x)
          for key, x in details.items()
          if key.endswith('confusion')
        )
        and all(map(is_number, _values(details.get('frechet_by_class', {}))))
        and all(
          _are_rows(details.get(name, []), kinds)
          for name, kinds in ROWS.items()
        )
      )
  return False


def _values(of) -> list:
  """The values of {a number as text: value}; [None] for anything else."""
  fine = isinstance(of, dict) and all(key.isdecimal() for key in of)
  return [*of.values()] if fine else [None]


def _are_rows(rows, kinds) -> bool:
  """Whether these are rows of texts (t) and numbers (n)."""
  fits = {'t': lambda x: isinstance(x, str), 'n': is_number}
  return isinstance(rows, list) and all(
    isinstance(row, list)
    and len(row) == len(kinds)
    and all(fits[kind](x) for kind, x in zip(kinds, row, strict=True))
    for row in rows
  )


def _is_row(value) -> bool:
  return isinstance(value, list) and all(map(is_number, value))


def name(subject_name: str, what: str, protocol: dict) -> str:
  """The name of a card, without .json; it ends with a hash of the protocol."""
  digest = hashlib.sha256(_key({'protocol': protocol}).encode())
  return f'{subject_name}_{what}_{digest.hexdigest()[:8]}'


def find(place) -> list[files.Path]:
  """The files of cards: the given file, or all cards of a run or a folder.

  Args:
    place: a file, a run's folder, or a folder of cards.

  Raises:
    UserError: there are no cards.
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
  """The fields of the protocol that differ between cards.

  Returns:
    {field: values}, nested fields joined by dots, one value per card.
  """
  flat = [runs.flatten(card['protocol']) for card in cards]
  fields = sorted(set().union(*flat))
  values = {field: [f.get(field) for f in flat] for field in fields}
  return {k: v for k, v in values.items() if any(x != v[0] for x in v)}


def grouped(cards: Sequence[dict]) -> dict[str, list[dict]]:
  """Groups cards by protocol, in the order of their first cards."""
  groups = {}
  for card in cards:
    groups.setdefault(_key(card), []).append(card)
  return groups


def compare(places: Sequence[str]) -> list[list[dict]]:
  """Groups cards by protocol, one group per table.

  Only protocols that occur in all places are kept.

  Args:
    places: files of cards, or folders, see `find`.

  Raises:
    UserError: the places have no protocol in common; the message names every
      field that differs.
  """
  found = [grouped([read(path) for path in find(place)]) for place in places]
  common = [key for key in found[0] if all(key in groups for groups in found)]
  if common:
    return [[c for groups in found for c in groups[key]] for key in common]
  # The first place and one that differs from it, each with its first card.
  (place, one), *others = [
    (place, next(iter(groups.values()))[0])
    for place, groups in zip(places, found, strict=True)
  ]
  other, card = next(x for x in others if _key(x[1]) != _key(one))
  unlike = differences([one, card])
  is_judge = 'features_sha256' in unlike
  remedy = ': judge both with one network, --features=FILE' if is_judge else ''
  told = '; '.join(
    f'{field}: {_short(a)} and {_short(b)}' for field, (a, b) in unlike.items()
  )
  raise UserError(
    f'{place} and {other} were measured in different ways and cannot be '
    f'compared ({told})' + remedy
  )


def curve(cards: Sequence[dict], result: str) -> dict:
  """A result as a function of the training step.

  Args:
    cards: the cards, each with its 'name', which is the file's without .json.
    result: the name of the result.

  Returns:
    {'result', 'points': [{'step', 'value', 'card'}] by step, 'best': the first
    point with the smallest value, or None}.
  """
  points = [
    {'step': x['subject']['step'], 'value': value, 'card': f'{x["name"]}.json'}
    for x in sorted(cards, key=lambda card: card['subject']['step'])
    if (value := x['results'].get(result)) is not None
  ]
  best = min(points, key=lambda point: point['value'], default=None)
  return {'result': result, 'points': points, 'best': best}


def _key(card):
  return json.dumps(card['protocol'], sort_keys=True)


def number(x) -> str:
  """A number with four significant digits; integers in full; '–' for None."""
  if not is_number(x):
    return '–' if x is None else str(x)
  if isinstance(x, int):
    return f'{x:,}'
  if abs(x) >= 1000:
    return f'{float(f"{x:.4g}"):,.0f}'
  return f'{x:#.4g}'


def _short(value):
  text = str(value)
  return f'{text[:12]}...' if len(text) > 60 else text
