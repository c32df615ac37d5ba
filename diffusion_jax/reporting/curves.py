"""The curves of the report: training metrics, and the distance by step."""

import json
import math

from markupsafe import Markup

from diffusion_jax.evaluation import cards
from diffusion_jax.reporting import facts, plots
from diffusion_jax.reporting.plots import Line


def series(rows, name) -> tuple[list, list]:
  """(steps, values) of the rows that have a metric."""
  there = [row for row in rows if name in row]
  return [row['step'] for row in there], [row[name] for row in there]


def raw(rows, name, label='', color='blue', style='line') -> Line:
  """A metric as it was logged.

  Args:
    rows: the logged rows.
    name: the metric.
    label: the line's label.
    color: a key of `plots.COLORS`.
    style: see `plots.Line`.
  """
  return Line(label, *series(rows, name), color, style)


def _smoothed(rows, name, label='', color='blue') -> Line:
  """A metric, smoothed over the logged steps."""
  steps, values = series(rows, name)
  return Line(label, steps, plots.smooth(values) if values else [], color)


def noisy(rows, name, label='') -> list[Line]:
  """A metric as it was logged, faintly, and smoothed."""
  return [raw(rows, name, style='faint'), _smoothed(rows, name, label)]


def charts(run: facts.Facts) -> list[dict]:
  """The curves of training, except those without data."""
  rows = run.rows
  timesteps = run.config['process']['num_timesteps']
  distance, best, curve = _curve(run.cards)
  first = [math.ceil(q * timesteps / 4) for q in range(5)]
  quarters = [
    _smoothed(rows, f'loss_q{q}', f't {first[q - 1]}–{first[q] - 1}', f'q{q}')
    for q in (1, 2, 3, 4)
  ]
  clip = run.config.get('optim', {}).get('clip_norm')
  wanted = (
    (distance, best, True, curve),
    ('Loss', 'smoothed over logged steps', True, (
      *noisy(rows, 'loss', 'training'),
      raw(rows, 'heldout_loss', 'held out', 'orange', 'marks'),
    )),
    ('Loss by quarter of t', 'smoothed', True, quarters),
    ('Gradient norm', f'clipped at {clip}' if clip else '', True,
     noisy(rows, 'grad_norm')),
    ('Parameter norm', '', True, [raw(rows, 'param_norm')]),
    ('Learning rate', '', False, [raw(rows, 'learning_rate')]),
    ('Images per second', 'all devices', False,
     noisy(rows, 'images_per_sec')),
  )  # fmt: skip
  restarts = sorted({start['step'] for start in run.starts} - {0})
  made = []
  for title, note, log, drawn in wanted:
    if drawn := [line for line in drawn if len(line.x)]:
      svg = plots.lines(title, drawn, log=log, restarts=restarts)
      made.append({
        'title': title, 'note': note, 'svg': Markup(svg),
        'keys': [
          (line.label, line.color, cards.number(float(line.y[-1])))
          for line in drawn if line.style != 'faint'
        ],
      })  # fmt: skip
  return made


def _curve(found) -> tuple[str, str, list]:
  """(title, note on the best, lines): the newest card's distance by step.

  There are no lines unless two steps were judged in the same way.
  """

  def how(card):
    own = ('step', 'weights_sha256', 'workdir', 'ema_error', 'ema_averages')
    subject = {k: v for k, v in card['subject'].items() if k not in own}
    return json.dumps([card['protocol'], subject], sort_keys=True)

  found = [card for card in found if cards.DISTANCES.keys() & card['results']]
  alike = [card for card in found if how(card) == how(found[-1])]
  names = [n for n in cards.DISTANCES if alike and n in alike[-1]['results']]
  if not names or len({card['subject']['step'] for card in alike}) < 2:
    return '', '', []
  curve = cards.curve(alike, names[0])
  points, best = curve['points'], curve['best']
  steps, values = ([point[k] for point in points] for k in ('step', 'value'))
  lines = [
    Line('samples', steps, values),
    Line('best', [best['step']], [best['value']], 'orange', 'marks'),
  ]
  told = f'the best is {cards.number(best["value"])}, at step {best["step"]:,}'
  return f'{cards.DISTANCES[names[0]]} by step', told, lines
