"""Metric cards as tables for people, in a terminal and on a page.

This module alone defines the names, meanings and number formats of results.
`table` takes any number of cards, `text` one.
"""

import json
import textwrap
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

from diffusion_jax.evaluation import bits, breakdown, cards
from diffusion_jax.evaluation.cards import number
from diffusion_jax.system import terminal

# Result -> (the head of its column, its meaning).
RESULTS = {
  **{
    f'{name}{tail}': (f'{title if not tail else head} ↓', meaning)
    for name, title in cards.DISTANCES.items()
    for tail, head, meaning in (
      ('', '', f'{title} distance to the reference'),
      ('_heldout_count', 'equal count', '  at the held-out count'),
      ('_ratio', 'ratio', '  over that of held-out images'),
    )
  },
  'kid': ('KID ↓', 'KID ± standard error over subsets'),
  'inception_score': ('IS ↑', 'Inception Score ± std over splits'),
  'precision': ('precision ↑', 'precision: samples near real images'),
  'recall': ('recall ↑', 'recall: real images near samples'),
  'density': ('density ↑', 'density of real balls at samples'),
  'coverage': ('coverage ↑', 'coverage: real balls with samples'),
  'confident': ('confident ↑', 'class with probability > 0.8'),
  'smallest_class': ('least class ↑', 'least frequent class'),
  'label_accuracy': ('label ↑', 'classified as the label asked for'),
  **{
    f'text_recall_{k}{tail}': (f'{head}{k}{end}', f'{meaning}')
    for k, name in ((1, 'first'), (5, 'among the first 5'))
    for tail, head, end, meaning in (
      ('', 'R@', ' ↑', f'caption found {name} (95% interval)'),
      ('_shaken', 'shaken R@', ' ↑', '  of pictures after jitter'),
      ('_blank', 'blank R@', '', '  of blank pictures of the mean colour'),
      ('_chance', 'chance R@', '', '  by chance'),
      ('_p', 'p of R@', ' ↓', '  p-value of permuted prompts'),
    )
  },
  'clip_score': ('CLIP score ↑', 'CLIP score ± standard error'),
  'clip_score_blank': ('blank CLIP', '  of blank pictures of the mean colour'),
  'nearest_own': ('own', '  nearest has the prompt as its caption'),
  'identical': ('identical ↓', 'identical to a training image'),
  'nearest': ('nearest', 'nearest training image, median'),
  'nearest_share': ('near', '  nearer than 95% of held-out'),
  'psnr': ('PSNR ↑', 'PSNR to the originals, dB'),
  'psnr_bicubic': ('bicubic PSNR', '  of bicubic interpolation, dB'),
  'ssim': ('SSIM ↑', 'SSIM to the originals'),
  'ssim_bicubic': ('bicubic SSIM', '  of bicubic interpolation'),
  'rms_low': ('low RMS ↓', 'difference to the small picture, levels'),
  'l1': ('L1 ↓', 'absolute error of pixels in [-1, 1]'),
  'perplexity': ('perplexity ↑', 'perplexity of the codes'),
  'codes_used': ('codes used ↑', 'codes that occur'),
  'bpd': ('bits/dim ↓', 'bound in bits/dim ± standard error'),
  'bpd_fast': ('bits/dim ↓', 'estimated bound in bits/dim (95%)'),
  'bpd_ode': ('bits/dim ↓', 'flow in bits/dim ± standard error'),
  'evaluations': ('evaluations', 'network evaluations per image'),
}
SHARES = (
  *('precision', 'recall', 'coverage', 'confident', 'smallest_class'),
  *('identical', 'nearest_share', 'classifier_accuracy', 'label_accuracy'),
  *('codes_used', 'nearest_own'),
)
# Of which 0.07% is a usual number.
SMALL_SHARES = tuple(
  f'text_recall_{k}{tail}'
  for k in (1, 5)
  for tail in ('', '_shaken', '_blank', '_chance')
)
# Suffixes of results that are the spread of another result, or its interval.
SPREADS = ('_error', '_std')
LIMITS = ('_low', '_high')

# The fields of a protocol that are in the title of its table.
TITLE = (
  *('data', 'split', 'num_samples', 'num_reference', 'num_images', 'bits'),
  'judged',
)
LABELS = {'num_heldout': 'held-out images'}
DECODED = 10  # rows of a rate-distortion table


class Cell(NamedTuple):
  """A word, or a number as it is shown and with all of its digits."""

  text: str
  whole: str


class Table(NamedTuple):
  """Cards of one protocol, one row each.

  Attributes:
    heads: the heads of the columns, each with its meaning or ''.
    rows: a list of cells for each card.
    num_subject: number of columns about the subject; the others are results.
    heldout: result cells of the held-out images; [] if there are none.
    same: facts that are the same for all cards: (label, text).
  """

  heads: list[tuple[str, str]]
  rows: list[list[Cell]]
  num_subject: int
  heldout: list[Cell]
  same: list[tuple[str, str]]


def columns(found: Sequence[dict]) -> list[str]:
  """The results of cards, except spreads and those of held-out images."""
  names = dict.fromkeys(name for card in found for name in card['results'])
  beside = {cards.heldout_name(name) for name in names}
  beside |= {name + tail for name in names for tail in (*SPREADS, *LIMITS)}
  return [name for name in names if name not in beside]


def head(name: str) -> str:
  """The head of a result's column."""
  return RESULTS.get(name, (name,))[0]


def value(x) -> str:
  """A value of a config or a protocol, as a user types it."""
  if isinstance(x, list):
    return ', '.join(map(value, x))
  return x if isinstance(x, str) else json.dumps(x)


def how(subject: dict) -> dict:
  """The facts of a subject, under labels for people."""
  known = ('step', 'ema', 'sampler', 'evaluations', 'seed', 'grid', 'workdir')
  grid, evaluations = subject.get('grid'), subject.get('evaluations')
  steps = len(grid) - 1 if isinstance(grid, list) else None
  workdir = subject.get('workdir')
  told = {
    'run': PurePath(workdir).name if workdir else None,
    'step': subject.get('step'),
    'sampler': subject.get('sampler'),
    'steps': steps,
    'evaluations': evaluations if evaluations != steps else None,
    'weights': {True: 'averaged', False: 'raw'}.get(subject.get('ema')),
    **{
      key: value(x)
      for key, x in subject.items()
      if (isinstance(x, str | int | float) or key == 'guidance_interval')
      and not (key in known or key.endswith('sha256'))
    },
    'label': _asked(subject.get('label')),
    'prompts': _asked(subject.get('prompts')),
    'seed': subject.get('seed'),
    # Two samplers of one name may differ only in the grid.
    'grid': _grid(grid) if steps and all(map(cards.is_number, grid)) else None,
  }
  return {key: x for key, x in told.items() if x is not None}


def _asked(label) -> str | None:
  """The labels or prompts that samples get in turn; None if as in the data."""
  if not isinstance(label, list):
    return None
  return value(label) if len(label) <= 10 else f'{len(label)} in turn'


def _grid(times) -> str:
  return ' '.join(f'{x:.4g}' for x in times[:3]) + ' ..'


def drawing(subject: dict, short: bool = False) -> str:
  """Like `how`, in one line: how samples were drawn."""
  told = how(subject)
  steps, step = told.pop('steps', '?'), told.pop('step', None)
  parts = [] if step is None else [f'step {step:,}']
  if 'sampler' in told:
    evaluations = told.pop('evaluations', steps)
    parts += [told.pop('sampler'), f'{evaluations} evaluations']
  if not short:
    parts += [f'{k} {x}' for k, x in told.items() if k not in ('run', 'grid')]
  return ', '.join(parts)


def title(protocol: dict) -> str:
  """The title of the cards of a protocol."""
  there = (value(protocol[k]) for k in ('data', 'split') if k in protocol)
  data = ', '.join(there)
  if 'num_images' in protocol:
    what = bits.KINDS.get(protocol.get('bits'), protocol.get('judged', ''))
    return f'{number(protocol["num_images"])} images of {data}: {what}'
  count, reference = (
    number(protocol[key]) if cards.is_number(protocol.get(key)) else 'some'
    for key in ('num_samples', 'num_reference')
  )
  of = f' of {data}' * (data not in ('images', 'statistics'))
  return f'{count} samples against {reference} images{of}'


def facts(protocol: dict) -> list[tuple[str, Cell]]:
  """The (label, cell) pairs of a protocol that are not in its title."""
  told = []
  for key, x in protocol.items():
    label = key.removeprefix('num_').replace('_', ' ')
    if x in ('', None):
      continue
    if key.endswith('_sha256') and isinstance(x, str):
      told.append((label, Cell(x[:8], x)))
    elif key == 'grid':
      told.append((label, Cell(_grid(x), value(x))))
    elif key not in TITLE:
      text = value(x) if isinstance(x, list | bool) else number(x)
      told.append((LABELS.get(key, label), Cell(text, '')))
  return told


def table(found: Sequence[dict]) -> Table:
  """Cards of one protocol as a table.

  Args:
    found: the cards, at least one.
  """
  told = [{**how(card['subject']), **_details(card)} for card in found]
  usual = [k for k in ('step', 'sampler', 'steps', 'seed') if k in told[0]]
  same = {
    key: x
    for key, x in told[0].items()
    if key not in usual and all(row.get(key) == x for row in told)
  }
  more = (key for row in told for key in row if key not in same)
  keys = list(dict.fromkeys([*usual, *more]))
  names = columns(found)
  rows = [
    [_cell(key, row.get(key)) for key in keys]
    + [result(card, name) for name in names]
    for row, card in zip(told, found, strict=True)
  ]
  heads = [(_label(key).capitalize(), '') for key in keys]
  heads += [RESULTS.get(name, (name, '')) for name in names]
  last, there = found[-1], names if cards.heldout(found[-1]) else []
  real = [result(last, name, real=True) for name in there]
  alike = [(_label(key), _cell(key, x).text) for key, x in same.items()]
  return Table(heads, rows, len(keys), real, alike)


def _label(key) -> str:
  return key.replace('_', ' ')


def _details(card) -> dict:
  """The details that are numbers."""
  details = card.get('details', {})
  return {key: x for key, x in details.items() if cards.is_number(x)}


def _cell(key, x) -> Cell:
  if not cards.is_number(x):
    return Cell(number(x), '')
  if key in SMALL_SHARES:
    return Cell(f'{x:.2%}', str(x))
  return Cell(f'{x:.1%}' if key in SHARES else number(x), str(x))


def result(card, name, real=False) -> Cell:
  """A result with its spread, or the same for the held-out images."""
  results, tail = card['results'], '_heldout' if real else ''
  x = results.get(cards.heldout_name(name) if real else name)
  if real and x is None:
    return Cell('', '')
  cell = _cell(name, x)
  for end in SPREADS:
    if spread := results.get(f'{name}{end}{tail}'):
      cell = Cell(f'{cell.text} ± {spread:.2g}', f'{x} ± {spread}')
  low, high = (results.get(f'{name}{end}{tail}') for end in LIMITS)
  if cards.is_number(low) and cards.is_number(high):
    cell = Cell(
      f'{cell.text} ({low:.1%} to {high:.1%})', f'{x} ({low}, {high})'
    )
  return cell


def lines(found: Sequence[dict]) -> list[str]:
  """Cards of one protocol as text: a title and a table."""
  made = table(found)
  rows = [[cell.text for cell in row] for row in made.rows]
  if made.heldout:
    blank = [''] * (made.num_subject - 1)
    real = [cell.text for cell in made.heldout]
    rows.append(['held-out images', *blank, *real])
  told = terminal.table([head for head, _ in made.heads], rows)
  if made.same:
    told += ['', 'all: ' + ', '.join(map(' '.join, made.same))]
  return [*_about(found[0]), '', *told]


def _about(card) -> list[str]:
  protocol = card['protocol']
  told = [
    f'{label} {cell.text}'
    for label, cell in facts(protocol)
    if not label.endswith('sha256')
  ]
  return [title(protocol), *textwrap.wrap('; '.join(told), 79)]


def text(card: dict) -> str:
  """One card as text: subject, protocol, results and caveats."""
  details = card['details']
  about = [k for k in ('reference', 'images', 'judge') if k in details]
  told = [drawing(card['subject']), *(f'{k}: {details[k]}' for k in about)]
  rows = [
    [RESULTS.get(name, ('', name))[1], result(card, name).text,
     result(card, name, real=True).text]
    for name in columns([card])
  ]  # fmt: skip
  rows += [[_label(k), _cell(k, x).text, ''] for k, x in _details(card).items()]
  real = 'held-out' * bool(cards.heldout(card))
  what = 'images' if 'num_images' in card['protocol'] else 'samples'
  told += [*_about(card), '', *terminal.table(['', what, real], rows)]
  if len(details.get('class_histogram', ())) in range(1, breakdown.SHOWN + 1):
    told += ['', *_classes(details)]
  for heads, cells in breakdown.of_card(card):
    told += ['', *terminal.table(heads, cells)]
  if 'rate' in details:
    told += ['', *_decoded(details)]
  if caveats := details.get('caveats'):
    told += ['', *(f'note: {caveat}' for caveat in caveats)]
  return '\n'.join(told)


def _classes(details):
  named = {
    'samples': details['class_histogram'],
    'held-out': details.get('heldout_class_histogram'),
  }
  rows = [[what, *(f'{x:.1%}' for x in of)] for what, of in named.items() if of]
  heads = ['class', *map(str, range(len(named['samples'])))]
  return terminal.table(heads, rows)


def _decoded(details):
  """Distortion by rate, as in table 4 of arXiv 2006.11239."""
  count = len(details['rate'])
  steps = sorted({-(-i * count // DECODED) for i in range(1, DECODED + 1)})
  rows = [
    [str(n), *(f'{details[key][n - 1]:.5f}' for key in ('rate', 'rmse'))]
    for n in reversed(steps)
  ]
  return terminal.table(['steps', 'bits/dim', 'RMSE of 255'], rows)
