"""The results of a reproduction: a small folder that can be sent to people."""

import io
import json
from collections.abc import Mapping, Sequence

from matplotlib import ticker
from matplotlib.figure import Figure
from PIL import Image

from diffusion_jax import runs
from diffusion_jax.evaluation import cards, features
from diffusion_jax.reporting import pictures, plots
from diffusion_jax.reproduction import health, table
from diffusion_jax.reproduction import task as tasks
from diffusion_jax.reproduction.published import Recipe
from diffusion_jax.reproduction.task import Task
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


def judge(task: Task, step: int, made: Sequence[dict]) -> dict:
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
  card = judged[step]
  results = {**card['results'], **(scored['results'] if scored else {})}
  shipped = task.shipped or task.config
  bands = recipe.imported if task.origin else recipe.own
  reasons = list(task.differences)
  if (task.workdir / runs.INIT).exists() and not task.origin:
    reasons.append('the run started from the parameters of another run')
  if not task.origin and step != task.config['num_steps']:
    reasons.append(f'step {step:,} of {task.config["num_steps"]:,}')

  def unlike(card):
    return table.samples_unlike(card, recipe, shipped, task.published_judge)

  reasons += unlike(card)
  if scored and 'bpd' in bands:
    reasons += table.bits_unlike(scored, recipe, shipped)
  verdict = table.judge(bands, results, reasons)
  lines = table.rows(recipe, table.row_of(card, scored, bool(task.origin)))

  findings, incomparable = [], task.incomparable
  if not (task.origin or incomparable):
    rows = metrics.read(task.workdir / metrics.ROWS)
    findings.append(health.loss(rows, recipe.loss))
  if recipe.fid and not incomparable:
    findings += [
      health.distance(at, one['results']['fid'], recipe.fid)
      for at, one in sorted(judged.items())
      if not unlike(one)
    ]
  told = health.told(findings)
  if incomparable and not task.origin:
    told.append(f'the loss cannot be compared: {"; ".join(incomparable)}')
  return {
    'table': [line._asdict() for line in lines],
    **verdict,
    'health': [one.record() for one in findings],
    'text': [*table.text(lines, verdict, recipe), '', *told],
  }


def collect(
  task: Task,
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
  """Step -> the card of its samples."""
  return {card['subject']['step']: card for card in made if not _bits(card)}


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
  rows: Sequence[dict], recipe: Recipe, judged: Mapping[int, dict]
) -> dict[str, list[tuple]]:
  """The curves to plot: the loss and, with several steps judged, distances.

  Args:
    rows: rows of metrics.jsonl.
    recipe: the recipe, whose healthy run is plotted too.
    judged: step -> the card of its samples.

  Returns:
    title -> [(label, [(step, value)], a key of plots.COLORS, one of STYLES)].
  """
  shown = {}

  def series(name):
    return [(row['step'], row[name]) for row in rows if name in row]

  if loss := series('loss'):
    steps, values = zip(*loss, strict=True)
    smooth = list(zip(steps, plots.smooth(values), strict=True))
    shown['loss'] = [
      (None, loss, 'blue', 'faint'),
      ('training, smoothed', smooth, 'blue', 'line'),
      ('held out', series('heldout_loss'), 'grey', 'line'),
      (recipe.curve, recipe.loss, 'orange', 'marks'),
    ]
  found = [judged[step] for step in sorted(judged)]
  for name in cards.DISTANCES:
    of = [(one['subject']['step'], one['results'].get(name)) for one in found]
    if len(found) < 2 or None in dict(of).values():
      continue
    real = cards.heldout(found[0]).get(f'{name}_heldout_count')
    count = found[0]['protocol']['num_samples']
    shown[f'{table.title(name)} of {count:,} samples'] = [
      ('samples', of, 'blue', 'points'),
      (
        'held-out images',
        [(at, real) for at, _ in of if real],
        'grey',
        'dashed',
      ),
      (recipe.curve, recipe.fid if name == 'fid' else (), 'orange', 'marks'),
    ]
  return shown


def _drawn(shown) -> bytes:
  """The panels as a PNG; b'' if there are none."""
  if not shown:
    return b''
  figure = Figure(figsize=(4.8 * len(shown), 3.6), layout='constrained')
  panels = figure.subplots(1, len(shown), squeeze=False)[0]
  for axes, (title, lines) in zip(panels, shown.items(), strict=True):
    for label, curve, color, style in lines:
      if curve:
        x, y = plots.thin(*zip(*curve, strict=True))
        axes.plot(x, y, label=label, color=plots.COLORS[color], **STYLES[style])
    axes.set(xscale='log', yscale='log', xlabel='training step', ylabel=title)
    for axis in (axes.xaxis, axes.yaxis):  # matplotlib's own labels overlap
      low, high = axis.get_view_interval()
      subs = (1, 2, 5) if high < 300 * low else (1,)
      axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=12))
      axis.set_major_formatter(plots.short)
      axis.set_minor_locator(ticker.NullLocator())
    axes.grid(color=plots.COLORS['rule'], lw=0.7)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
  file = io.BytesIO()
  figure.savefig(file, format='png', dpi=150)
  return file.getvalue()
