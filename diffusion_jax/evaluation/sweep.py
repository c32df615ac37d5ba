"""Samplers against evaluations of the network: which to use of a checkpoint.

Every sampler has the same budgets of evaluations and takes as many steps as fit
into each, so that columns compare what costs the same.
"""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib import ticker
from matplotlib.figure import Figure

from diffusion_jax import samplers
from diffusion_jax.evaluation import cards
from diffusion_jax.samplers import grid as grids
from diffusion_jax.samplers.plan import Plan
from diffusion_jax.system import files, terminal
from diffusion_jax.system.errors import UserError


class Entry(NamedTuple):
  """A row of a sweep.

  Attributes:
    text: as it was given: 'ddim', 'unipc:order=2:grid=logsnr'.
    sampler: a key of SAMPLERS.
    grid: its name.
    clip: whether x0 is clipped; None for the config's.
    options: the sampler's own.
  """

  text: str
  sampler: str
  grid: str
  clip: bool | None
  options: dict


def parse(text: str) -> Entry:
  """A row from NAME:key=value:key=value.

  Args:
    text: keys are grid, clip, and the sampler's options.

  Raises:
    UserError: it is none.
  """
  name, *pairs = text.split(':')
  if name in samplers.ADAPTIVE:
    raise UserError(
      f'--sweep={text}: {name} takes as many evaluations as it needs: leave it '
      'out'
    )
  kinds = {
    **{key: _kind(option) for key, option in samplers.defaults(name).items()},
    'grid': str,
    'clip': bool,
  }
  given = {}
  for pair in pairs:
    key, equals, word = pair.partition('=')
    if not equals or key not in kinds:
      raise UserError(
        f'--sweep={text}: {pair} is not KEY=VALUE with one of '
        f'{", ".join(kinds)}'
      )
    given[key] = _value(text, key, word, kinds[key])
  grid, clip = given.pop('grid', 'uniform'), given.pop('clip', None)
  if grid not in grids.NAMES:
    raise UserError(
      f'--sweep={text}: a grid is one of {", ".join(grids.NAMES)}, of which '
      'each number of steps has its own'
    )
  return Entry(text, name, grid, clip, given)


def _kind(default):
  return float if default is None else type(default)


def _value(text, key, word, kind):
  try:
    if kind is bool:
      return {'true': True, 'false': False}[word]
    return kind(word)
  except (ValueError, KeyError):
    what = {bool: 'true or false', int: 'a whole number', float: 'a number'}
    raise UserError(f'--sweep={text}: {key} is {what[kind]}') from None


def budgets(texts: Sequence[str]) -> list[int]:
  """Numbers of evaluations, rising.

  Raises:
    UserError: a text is no whole number above 0, or there are none.
  """
  if not texts or not all(text.isdecimal() and int(text) for text in texts):
    raise UserError(
      f'--sweep_evaluations={",".join(texts)}: whole numbers above 0, with '
      'commas between them'
    )
  return sorted(set(map(int, texts)))


def longest(
  plan_fn: Callable[[int], Plan], evaluations: int, num_timesteps: int
) -> Plan:
  """The plan of the most steps that asks the network no more often.

  Args:
    plan_fn: number of steps -> plan, or UserError where there is none.
    evaluations: the budget.
    num_timesteps: T, and so the most steps.

  Raises:
    UserError: there is none of any number; why the longest is none.
  """
  errors = []
  for num_steps in range(min(evaluations, num_timesteps), 0, -1):
    try:
      plan = plan_fn(num_steps)
    except UserError as e:
      errors.append(e)
      continue
    if plan.evaluations <= evaluations:
      return plan
  raise errors[0]


def best(cells: Sequence[dict]) -> dict[str, dict]:
  """Budget -> the cell of the least value.

  Args:
    cells: dicts with 'sampler', 'budget', 'evaluations', 'num_steps', 'value'.
  """
  return {
    str(budget): min(
      (cell for cell in cells if cell['budget'] == budget),
      key=lambda cell: cell['value'],
    )
    for budget in dict.fromkeys(cell['budget'] for cell in cells)
  }


def _title(result):
  return cards.DISTANCES[result] + ' distance' * (result == 'frechet')


def text(sweep: dict) -> str:
  """A sweep as a table, the best of each column marked, and named below.

  Args:
    sweep: 'result', 'cells' (see `best`) and 'best'.
  """
  budgets = list(sweep['best'])
  rows, counts = [], set()
  for name in dict.fromkeys(cell['sampler'] for cell in sweep['cells']):
    row = [name]
    for cell in sweep['cells']:
      if cell['sampler'] != name:
        continue
      mark = '*' if cell == sweep['best'][str(cell['budget'])] else ' '
      fewer = cell['evaluations'] != cell['budget']
      counts |= {fewer}
      of = f'({cell["evaluations"]}) ' if fewer else ''
      row.append(f'{of}{cards.number(cell["value"])}{mark}')
    rows.append(row)
  lines = terminal.table(
    ['evaluations', *(f'{budget} ' for budget in budgets)], rows
  )
  title = _title(sweep['result'])
  lines = [f'{title}, by evaluations of the network for a sample', '', *lines]
  if True in counts:
    lines += ['', '(n): as many evaluations, of whole steps']
  lines += [''] + [
    f'the best at {budget}: {cell["sampler"]}, {cards.number(cell["value"])}'
    for budget, cell in sweep['best'].items()
  ]
  return '\n'.join(lines)


def write(path, sweep: dict) -> None:
  """Keeps a sweep as .json, and as a picture beside it.

  Args:
    path: of the .json.
    sweep: see `text`.
  """
  plot(path.with_suffix('.png'), sweep)
  with files.replacing(path) as file:
    file.write(json.dumps(sweep, indent=2).encode() + b'\n')


def plot(path, sweep: dict) -> None:
  """Quality against evaluations, a line for each sampler; a .png.

  The best of each budget stand out.

  Args:
    path: of the file.
    sweep: see `text`.
  """
  figure = Figure(figsize=(7.2, 4.2), layout='constrained')
  axes = figure.subplots()
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(color='#e3e6e9', lw=0.7)
  axes.set_axisbelow(True)
  cells = sweep['cells']
  # The legend stands in the order of the lines' right ends.
  last = {cell['sampler']: cell['value'] for cell in cells}
  colors = matplotlib.colormaps['tab20'].colors
  names = list(last)
  won = {cell['sampler'] for cell in sweep['best'].values()}
  for name in sorted(last, key=last.get, reverse=True):
    i = names.index(name)
    points = [
      (cell['evaluations'], cell['value'])
      for cell in cells
      if cell['sampler'] == name
    ]
    axes.plot(
      *zip(*sorted(points), strict=True), label=name,
      color=colors[i % len(colors)], marker='osD^v'[i // len(colors) % 5],
      **({'lw': 3, 'ms': 7} if name in won else {'lw': 1.1, 'ms': 3.5}),
    )  # fmt: skip
  axes.set_xscale('log')
  axes.set_yscale('log')
  ticks = sorted({cell['budget'] for cell in cells})
  axes.xaxis.set_major_locator(ticker.FixedLocator(ticks))
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.yaxis.set_major_locator(
    ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=12)
  )
  axes.yaxis.set_minor_locator(ticker.NullLocator())
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f'{x:g}'))
  axes.set_xlabel('evaluations of the network for a sample')
  axes.set_ylabel(_title(sweep['result']))
  figure.legend(loc='outside right upper', fontsize=8, frameon=False)
  files.make(path.parent)
  with files.replacing(path) as file:
    figure.savefig(file, format='png', dpi=130)
