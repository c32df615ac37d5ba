"""Plots as SVG for a page, which sets their colours and labels.

Colours are names of the page's CSS variables, so one plot works on a light
page, a dark page and paper. The same numbers give the same bytes.
"""

import html
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from diffusion_jax.evaluation import cards
from diffusion_jax.system import files

# CSS variable -> its colour on a light page.
COLORS = {
  'ink': '#22262b',
  'muted': '#6b727b',
  'rule': '#e3e6e9',
  'blue': '#2f6db5',
  'orange': '#c96a1b',
  'grey': '#aab1b9',
  'q1': '#93b8de',
  'q2': '#5b8fc7',
  'q3': '#2c64a0',
  'q4': '#163a66',
}
SIZE = (4.3, 2.3)  # inches; the page scales it
NICE = (1, 2, 5, 10)  # ticks are multiples of these
SMALL = {'size': 7.5, 'color': COLORS['muted']}
CORNER = {'loc': 'right', 'labelpad': 0}  # the place of a label
NUM_POINTS = 400  # most points of a line; more cannot be seen


class Line(NamedTuple):
  """One line of a plot.

  Attributes:
    label: for the page's key.
    x: [N], rising.
    y: [N].
    color: a key of COLORS.
    style: 'line'; 'faint', for data that another line smooths; or 'marks'.
  """

  label: str
  x: Sequence[float]
  y: Sequence[float]
  color: str = 'blue'
  style: str = 'line'


def smooth(y) -> np.ndarray:
  """[N] -> [N]: a moving average over a tenth of all points, at most 101.

  At the ends, the window is cut off.
  """
  y = np.asarray(y, float)
  window = np.ones(2 * min(len(y) // 20, 50) + 1)
  count = np.convolve(np.ones_like(y), window, 'same')
  return np.convolve(y, window, 'same') / count


def thin(x, y):
  """Thins a line to NUM_POINTS: the lowest and highest point of each stretch.

  This keeps spikes, which a mean or every n-th point would lose.
  """
  x, y = np.asarray(x), np.asarray(y)
  if len(x) <= NUM_POINTS:
    return x, y
  parts = np.array_split(np.arange(len(x)), NUM_POINTS // 2)
  ends = [part[[y[part].argmin(), y[part].argmax()]] for part in parts]
  kept = np.unique(ends)
  return x[kept], y[kept]


def lines(
  title: str, drawn: Sequence[Line], *, log=False, restarts: Sequence[int] = ()
) -> str:
  """A plot of values over training steps.

  Args:
    title: the label for screen readers.
    drawn: the lines, in drawing order.
    log: use a logarithmic y axis, if all values are above 0 and span enough.
    restarts: steps at which the run resumed, marked by faint rules.

  Returns:
    an <svg> element.
  """
  figure, axes = _axes()
  for step in restarts:
    axes.axvline(step, color=COLORS['muted'], lw=0.6, ls=(0, (1, 3)), zorder=0)
  styles = {
    'line': {'lw': 1.4},
    'faint': {'lw': 0.7, 'alpha': 0.35},
    'marks': {'lw': 1, 'marker': 'o', 'ms': 3.2, 'mew': 0},
    'many': {'lw': 1},  # many marks would run together
  }
  for _, x, y, color, style in drawn:
    style = 'many' if style == 'marks' and len(x) >= 50 else style
    axes.plot(*thin(x, y), color=COLORS[color], **styles[style])
  values = np.concatenate([np.asarray(line.y, float) for line in drawn])
  if log and 0 < 2 * values.min() < values.max():
    ratio = values.max() / values.min()
    subs = (1, 2, 5) if ratio > 10 else (1, 1.5, 2, 3, 5, 7)
    axes.set_yscale('log')
    log_ticks(axes.yaxis, subs if ratio < 1000 else (1,))
  else:
    axes.yaxis.set_major_locator(ticker.MaxNLocator(4, steps=NICE))
    if not log:
      axes.set_ylim(bottom=0)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=NICE, integer=True))
  axes.set_xlim(left=0)
  axes.set_xlabel('step', **CORNER)
  return _svg(figure, title, repr(drawn))


def bars(title: str, groups: dict[str, Sequence[float]]) -> str:
  """Bars side by side, as an <svg>; groups: color -> share of each class."""
  figure, axes = _axes()
  width = 0.8 / len(groups)
  for i, (color, shares) in enumerate(groups.items()):
    place = np.arange(len(shares)) + (i - (len(groups) - 1) / 2) * width
    axes.bar(place, shares, 0.9 * width, color=COLORS[color])
  axes.yaxis.set_major_locator(ticker.MaxNLocator(4, steps=NICE))
  axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))
  axes.xaxis.set_major_locator(ticker.MaxNLocator(10, steps=NICE, integer=True))
  axes.set_xlabel('class', **CORNER)
  return _svg(figure, title, repr(groups))


def rate_distortion(path, rate: Sequence[float], rmse: Sequence[float]) -> None:
  """Writes a rate-distortion plot as a .png.

  Args:
    path: the file.
    rate: [K] bits per dimension.
    rmse: [K] distortion, on the scale 0 .. 255.
  """
  figure, axes = _axes()
  axes.plot(rate, rmse, color=COLORS['blue'], lw=1.4)
  axes.set(xlim=(0, None), ylim=(0, None))
  axes.set_xlabel('rate, bits per dimension', **CORNER)
  axes.set_title('distortion: RMSE of 255', loc='left', **SMALL)
  _save(figure, path)


def sweep(path, told: dict) -> None:
  """Writes a plot of distance by evaluations, a line per sampler, as a .png.

  The best sampler of each budget is highlighted.

  Args:
    path: the file.
    told: see `evaluation.sweep.text`.
  """
  figure, axes = _axes((7.2, 4.2))
  # The legend is in the order of the lines' right ends.
  curves, colors = {}, matplotlib.colormaps['tab20'].colors
  for cell in told['cells']:
    point = (cell['evaluations'], cell['value'])
    curves.setdefault(cell['sampler'], []).append(point)
  won = {cell['sampler'] for cell in told['best'].values()}
  for name in sorted(curves, key=lambda x: curves[x][-1][1], reverse=True):
    i = list(curves).index(name)
    axes.plot(
      *zip(*sorted(curves[name]), strict=True),
      label=name,
      color=colors[i % len(colors)],
      marker='osD^v'[i // len(colors) % 5],
      **({'lw': 3, 'ms': 7} if name in won else {'lw': 1.1, 'ms': 3.5}),
    )
  axes.set(xscale='log', yscale='log')
  log_ticks(axes.yaxis, (1, 1.5, 2, 3, 5, 7))
  axes.xaxis.set_major_locator(ticker.FixedLocator([*map(int, told['best'])]))
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.xaxis.set_major_formatter(short)
  axes.set_xlabel('network evaluations per sample')
  axes.set_ylabel(cards.distance(told['result']))
  figure.legend(loc='outside right upper', fontsize=8, frameon=False)
  _save(figure, path)


def _axes(size=SIZE):
  figure = Figure(figsize=size, layout='constrained')
  axes = figure.subplots()
  axes.margins(x=0.01)
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.spines['bottom'].set_color(COLORS['rule'])
  axes.grid(axis='y', color=COLORS['rule'], lw=0.7)
  axes.set_axisbelow(True)
  axes.tick_params(length=0, labelsize=7.5, labelcolor=COLORS['muted'], pad=4)
  for axis in (axes.xaxis, axes.yaxis):
    axis.label.set(**SMALL)
    axis.set_major_formatter(short)
  return figure, axes


def log_ticks(axis, subs: Sequence[float]) -> None:
  """Puts the ticks of a logarithmic axis at subs times powers of ten."""
  axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=12))
  axis.set_minor_locator(ticker.NullLocator())
  axis.set_major_formatter(short)


def _save(figure, path):
  files.make(path.parent)
  with files.replacing(path) as file:
    figure.savefig(file, format='png', dpi=200)


def short(value: float, _=None) -> str:
  """12000 -> '12k', to save space."""
  for size, letter in ((1e6, 'M'), (1e3, 'k')):
    if abs(value) >= max(size, 1e4):
      return f'{value / size:g}{letter}'
  return f'{value:,g}'


def _svg(figure: Figure, title: str, salt: str) -> str:
  file = io.StringIO()
  # The salt makes ids unique within a page of many plots.
  with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': salt}):
    figure.savefig(
      file, format='svg', transparent=True,
      metadata=dict.fromkeys(('Date', 'Creator', 'Format', 'Type')),
    )  # fmt: skip
  svg = file.getvalue()
  svg = svg[svg.index('<svg') :]
  label = f' role="img" aria-label="{html.escape(title)}"'
  for found, wanted in (
    (r'<style.*?</style>', ''),  # would apply to the whole page
    (r'<g id="[^"]*"', '<g'),
    (r' font-family: [^;"]*;', ''),  # use the page's font
    (r' width="\S*pt" height="\S*pt"', lambda _: label),
  ):
    svg = re.sub(found, wanted, svg)
  for name, color in COLORS.items():
    svg = svg.replace(color, f'var(--{name})')
  return svg
