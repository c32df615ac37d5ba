"""Reads the files of a run's folder, skipping those that are damaged.

A report is needed most for a run that went wrong. So only a missing config
stops it: a file that cannot be read is skipped and listed as a problem.
"""

import collections
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from diffusion_jax import runs
from diffusion_jax.evaluation import cards as metric_cards
from diffusion_jax.system import files, jsonl


class Facts(NamedTuple):
  """The contents of a run's folder.

  Attributes:
    workdir: the run's folder.
    config: from config.json.
    rows: from metrics.jsonl, by step.
    starts: from starts.jsonl, in the order of the file.
    cards: from evaluations/*.json, by step and time, each with its 'name'.
    stores: (folder, store.json) of the sample stores that have a grid.png, by
      step and time.
    drawn: (step, file) of the grids drawn during training, by step.
    origin: from init_from.json; None if the run started from random parameters.
    problems: what was skipped and why, one line each.
  """

  workdir: files.Path
  config: dict
  rows: list[dict]
  starts: list[dict]
  cards: list[dict]
  stores: list[tuple[files.Path, dict]]
  drawn: list[tuple[int, files.Path]]
  origin: dict | None
  problems: list[str]


def read(workdir) -> Facts:
  """Reads a run's folder.

  Raises:
    UserError: there is no run, or its config.json is unreadable.
  """
  workdir, problems = files.at(workdir).expanduser(), []
  config = runs.read_config(workdir)

  def whole(path: files.Path, is_well: Callable[[Any], bool]):
    """The file's JSON; None and a line in problems if it is not valid."""
    try:
      return _parsed(path.read_text(), is_well)
    except (OSError, ValueError, RecursionError) as e:
      name = path.relative_to(workdir)
      problems.append(f'{name} cannot be read ({e}): skipped')

  cards = [
    {**card, 'name': path.stem}
    for path in sorted(workdir.glob('evaluations/*.json'))
    if (card := whole(path, _is_of_a_run))
  ]
  cards.sort(key=_age)
  stores = [
    (path.parent, store)
    for path in sorted(workdir.glob('samples/*/store.json'))
    if (path.parent / 'grid.png').exists() and (store := whole(path, _is_drawn))
  ]
  stores.sort(key=lambda x: (x[1]['step'], files.modified(x[0] / 'grid.png')))
  drawn = sorted(
    (int(match[1]), path)
    for path in workdir.glob('samples/train_*.png')
    if (match := re.fullmatch(r'train_(\d+)\.png', path.name))
  )
  rows = _lines(workdir / 'metrics.jsonl', _is_row, problems)
  rows.sort(key=lambda row: row['step'])
  starts = _lines(workdir / 'starts.jsonl', _is_start, problems)
  origin = workdir / 'init_from.json'
  origin = whole(origin, _is_step) if origin.exists() else None
  return Facts(
    workdir, config, rows, starts, cards, stores, drawn, origin, problems
  )


def _parsed(text: str, is_well: Callable[[Any], bool]):
  value = json.loads(text)
  if not is_well(value):
    raise ValueError('it holds something else')
  return value


def _lines(path: files.Path, is_well, problems: list[str]) -> list[dict]:
  """The objects of a JSON lines file; invalid lines become problems."""
  try:
    good, bad = jsonl.parse(path.read_bytes(), is_well)
  except FileNotFoundError:
    return []
  except OSError as e:
    problems.append(f'{path.name} cannot be read ({e.strerror}): skipped')
    return []
  if bad:
    problems.append(f'{path.name} {jsonl.damage(bad)}: skipped')
  return good


def _is_drawn(value) -> bool:
  return metric_cards.is_subject(value) and 'step' in value


def _is_of_a_run(value) -> bool:
  return metric_cards.is_card(value) and _is_drawn(value['subject'])


def _age(card: dict):
  step, time = card['subject']['step'], card.get('time')
  return step, time if isinstance(time, str) else ''


def _is_step(value) -> bool:
  return metric_cards.has(value, step=int) and 'step' in value


def _is_row(value) -> bool:
  return _is_step(value) and all(map(metric_cards.is_number, value.values()))


def _is_start(value) -> bool:
  types = {'num_devices': int, 'device': str, 'versions': dict}
  return _is_step(value) and metric_cards.has(value, **types)


# --- cost -------------------------------------------------------------------


class Cost(NamedTuple):
  """The cost of a run's steps, according to its files.

  Attributes:
    seconds: training time, including evaluations and checkpoints between steps
      but not compilation, nor steps lost when the run was killed; None if no
      rate was logged.
    device_seconds: kind of device -> seconds x devices; the kind is None for
      steps without a recorded start.
    images: number of images seen in training.
  """

  seconds: float | None
  device_seconds: dict[str | None, float]
  images: int


def cost(rows: list[dict], starts: list[dict], batch_size: int) -> Cost:
  """Adds up the cost of metric rows.

  A row covers the steps since the previous row. The first row after a start has
  no rate, because its time includes compilation: it gets the next known rate.
  Rows after the last known rate get that one.

  Args:
    rows: metric rows by step, with 'images_per_sec' if known.
    starts: 'step', 'device' and 'num_devices' of each start; a row belongs to
      the last start at an earlier step.
    batch_size: images per step, over all devices.
  """
  rates = [row.get('images_per_sec') for row in rows]
  last = next(filter(None, reversed(rates)), None)
  if not last:
    return Cost(None, {}, rows[-1]['step'] * batch_size if rows else 0)
  for i in reversed(range(len(rates) - 1)):
    rates[i] = rates[i] or rates[i + 1]

  seconds, before, device_seconds = 0.0, 0, collections.Counter()
  for row, rate in zip(rows, rates, strict=True):
    step = row['step']
    took = (step - before) * batch_size / (rate or last)
    start = next((s for s in reversed(starts) if s['step'] < step), {})
    device_seconds[start.get('device')] += took * start.get('num_devices', 1)
    seconds, before = seconds + took, step
  return Cost(seconds, dict(device_seconds), before * batch_size)
