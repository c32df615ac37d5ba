"""The results of a reproduction: a small folder that can be sent to people."""

import io
import json
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from PIL import Image

from diffusion_jax import runs
from diffusion_jax.evaluation import cards, features
from diffusion_jax.reporting import curves as training
from diffusion_jax.reporting import pictures, plots
from diffusion_jax.reporting.plots import Line
from diffusion_jax.reproduction import health, published, table
from diffusion_jax.reproduction import task as tasks
from diffusion_jax.runs import store
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import metrics

MOST_BYTES = 29_000_000  # excluding the record, which is written last
TABLE = 'table.md'
GRID = 10  # samples along each side
COPIED = (
  *('config.json', runs.CONVERTED, metrics.ROWS, 'starts.jsonl'),
  'report.html',
)
STYLES = {
  'line': {'lw': 1.4},
  'faint': {'lw': 0.6, 'alpha': 0.35},
  'dashed': {'lw': 1, 'ls': '--'},
  'points': {'lw': 1.4, 'marker': 'o', 'ms': 4},
  'marks': {'lw': 0, 'marker': 'o', 'ms': 5, 'mfc': 'none'},
}


def judge(task: tasks.Task, step: int, made: Sequence[dict]) -> dict:
  """The table, the verdict and the health, as JSON.

  Args:
    task: the task.
    step: the last step.
    made: the cards of samples, and of bits per dimension if measured.

  Returns:
    'table', 'verdict', 'reasons', 'checks', 'health' and 'text'.
  """
  scored = next(filter(_bits, made), None)
  judged, recipe = _judged(made), task.recipe
  verdict = table.judge(task, step, judged[step], scored)
  lines = table.rows(task, judged[step], scored)

  findings, incomparable = [], task.incomparable
  if not (task.origin or incomparable):
    rows = metrics.read(task.workdir / metrics.ROWS)
    findings.append(health.loss(rows, recipe.loss))
  if recipe.fid and not incomparable:
    findings += [
      health.distance(at, one['results']['fid'], recipe.fid)
      for at, one in sorted(judged.items())
      if not table.samples_unlike(task, one)
    ]
  told = health.told(findings)
  if incomparable and not task.origin:
    told.append(f'the loss cannot be compared: {"; ".join(incomparable)}')
  return {
    'table': [line._asdict() for line in lines],
    **verdict,
    'health': [one.record() for one in findings],
    'text': [*table.text(task, lines, verdict), '', *told],
  }


def collect(
  task: tasks.Task,
  step: int,
  made: Sequence[dict],
  found: Mapping,
  before: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
  """Fills the folder; of existing files it changes only those in `before`.

  Args:
    task: the task.
    step: the last step.
    made: the cards.
    found: the result of `judge`.
    before: names of files that an earlier call wrote.

  Returns:
    (names of the files, files that were too large to copy).
  """
  folder = files.make(task.directory)
  rows = metrics.read(task.workdir / metrics.ROWS)
  page = [f'# {task.name}: ours and published', '', '```', *found['text'],
          '```', '']  # fmt: skip
  copied = {name: task.workdir / name for name in COPIED}
  contents = {
    **{_name(card): json.dumps(card, indent=2).encode() for card in made},
    TABLE: '\n'.join(page).encode(),
    'curves.png': _drawn(curves(rows, task.recipe, _judged(made))),
    'samples.png': _grid(task, step),
    **{k: path.read_bytes() for k, path in copied.items() if path.exists()},
  }
  names, left, room = [], [], MOST_BYTES
  for name, content in contents.items():
    if not content:  # samples may be gone while their picture still exists
      names += [name] * (folder / name).exists()
    elif len(content) > room:
      left.append(f'{task.workdir / name}, {len(content) / 1e6:.0f} MB')
    else:
      with files.replacing(folder / name) as file:
        file.write(content)
      names.append(name)
      room -= len(content)
  for name in set(before) - set(names):  # from an earlier protocol
    (folder / name).unlink(missing_ok=True)
  return names, left


def _bits(card) -> bool:
  return 'bits' in card['protocol']


def _judged(made) -> dict[int, dict]:
  """Step -> the card of its samples, by step."""
  judged = {card['subject']['step']: card for card in made if not _bits(card)}
  return dict(sorted(judged.items()))


def _name(card) -> str:
  what = 'bits' if _bits(card) else 'samples'
  return f'step{card["subject"]["step"]}_{what}.json'


# --- pictures ---------------------------------------------------------------


def _grid(task, step) -> bytes:
  """A PNG of the first judged samples; b'' if they are gone."""
  try:
    count = min(GRID * GRID, task.num_samples)
    images = store.load(tasks.store(task, step), count)
  except UserError:
    return b''
  picture = pictures.grid(features.whole(images), GRID)
  file = io.BytesIO()
  Image.fromarray(picture).save(file, 'png')
  return file.getvalue()


def curves(
  rows: Sequence[dict], recipe: published.Recipe, judged: Mapping[int, dict]
) -> dict[str, list[Line]]:
  """The curves to plot: the loss and, with several steps judged, distances.

  Args:
    rows: rows of metrics.jsonl.
    recipe: the recipe, whose healthy run is plotted too.
    judged: step -> the card of its samples, by step.

  Returns:
    title -> lines, whose styles are keys of STYLES.
  """

  def healthy(curve):
    steps, values = ([point[i] for point in curve] for i in (0, 1))
    return Line(recipe.curve, steps, values, 'orange', 'marks')

  shown, steps = {}, [*judged]
  loss = training.noisy(rows, 'loss', 'training, smoothed')
  if loss[0].x:
    shown['loss'] = [
      *loss,
      training.raw(rows, 'heldout_loss', 'held out', 'grey'),
      healthy(recipe.loss),
    ]
  for name in cards.DISTANCES:
    values = [card['results'].get(name) for card in judged.values()]
    if len(steps) < 2 or None in values:
      continue
    first = judged[steps[0]]
    real = cards.heldout(first).get(f'{name}_heldout_count')
    there = steps if real else []
    count = first['protocol']['num_samples']
    shown[f'{table.title(name)} of {count:,} samples'] = [
      Line('samples', steps, values, 'blue', 'points'),
      Line('held-out images', there, [real] * len(there), 'grey', 'dashed'),
      healthy(recipe.fid if name == 'fid' else ()),
    ]
  return shown


def _drawn(shown) -> bytes:
  """The panels as a PNG; b'' if there are none."""
  if not shown:
    return b''
  figure = Figure(figsize=(4.8 * len(shown), 3.6), layout='constrained')
  panels = figure.subplots(1, len(shown), squeeze=False)[0]
  for axes, (title, lines) in zip(panels, shown.items(), strict=True):
    for label, x, y, color, style in lines:
      if x:
        look = {'color': plots.COLORS[color], **STYLES[style]}
        axes.plot(*plots.thin(x, y), label=label, **look)
    axes.set(xscale='log', yscale='log', xlabel='training step', ylabel=title)
    for axis in (axes.xaxis, axes.yaxis):  # matplotlib's own labels overlap
      low, high = axis.get_view_interval()
      plots.log_ticks(axis, (1, 2, 5) if high < 300 * low else (1,))
    axes.grid(color=plots.COLORS['rule'], lw=0.7)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
  file = io.BytesIO()
  figure.savefig(file, format='png', dpi=150)
  return file.getvalue()
