"""What a reproduction leaves: a small folder that can be sent to people."""

from collections.abc import Mapping, Sequence

from matplotlib import ticker
from matplotlib.figure import Figure

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

MOST_BYTES = 30_000_000
TABLE = 'table.md'
GRID = 10  # samples along each side
COPIED = (
  *('config.json', runs.CONVERTED, metrics.ROWS, 'starts.jsonl'),
  'report.html',
)


def judge(
  task: Task,
  step: int,
  judged: Mapping[int, dict],
  scored: dict | None,
  rows: Sequence[dict],
) -> dict:
  """The table, the verdict and the health, as JSON can hold them.

  Args:
    task: what was asked for.
    step: the last one.
    judged: step -> the card of its samples.
    scored: the card of bits per dimension; None = not measured.
    rows: of metrics.jsonl.

  Returns:
    'table', 'verdict', 'reasons', 'checks', 'health' and 'text'.
  """
  card, recipe = judged[step], task.recipe
  results = dict(card['results'])
  shipped = task.shipped or task.config
  reasons = list(task.differences)
  if (task.workdir / 'init_from.json').exists() and not task.origin:
    reasons.append('it began with the parameters of another run')
  if not task.origin and step != task.config['num_steps']:
    reasons.append(f'step {step:,} of {task.config["num_steps"]:,}')

  def unlike(card):
    return table.not_as_published(card, recipe, shipped, task.published_judge)

  reasons += unlike(card)
  if scored and (recipe.imported if task.origin else recipe.own).get('bpd'):
    reasons += table.bits_not_as_published(scored, recipe, shipped)
  if scored:
    results['bpd'] = scored['results']['bpd']
  verdict = table.judge(
    recipe, results, imported=bool(task.origin), reasons=reasons
  )
  lines = table.rows(recipe, [_ours(task, card, scored)])

  findings = []
  if not task.origin and not task.incomparable:
    findings.append(health.loss(rows, recipe.loss))
  if recipe.fid and not task.incomparable:
    findings += [
      health.distance(at, one['results']['fid'], recipe.fid)
      for at, one in sorted(judged.items())
      if not unlike(one)
    ]
  told = health.told(findings)
  if task.incomparable and not task.origin:
    told.append('the loss is compared to none: ' + '; '.join(task.incomparable))
  return {
    'table': lines,
    'verdict': verdict.word,
    'reasons': list(verdict.reasons),
    'checks': [
      {'result': one.result, 'value': one.value, 'band': list(one.band),
       'well': one.well}
      for one in verdict.checks
    ],
    'health': [one.record() for one in findings],
    'text': [*table.text(lines, verdict, recipe), '', *told],
  }  # fmt: skip


def _ours(task: Task, card: dict, scored: dict | None) -> dict:
  results, subject = card['results'], card['subject']
  name = next(n for n in cards.DISTANCES if n in results)
  score = [
    results[key]
    for key in ('inception_score', 'inception_score_std')
    if key in results
  ]
  what = 'imported' if task.origin else 'ours'
  return {
    'system': f'{what}, step {subject["step"]:,}',
    'distance': name,
    'fid': [results[name]],
    'inception_score': score,
    'bits': scored and scored['results']['bpd'],
    'sampler': subject['sampler'],
    'evaluations': subject['evaluations'],
    'source': f'{card["protocol"]["num_samples"]:,} samples',
  }


def collect(
  task: Task,
  step: int,
  judged: Mapping[int, dict],
  scored: dict | None,
  found: Mapping,
  before: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
  """Fills the folder; of what it holds already, only `before` is touched.

  Args:
    task: what was asked for.
    step: the last one.
    judged: step -> the card of its samples.
    scored: the card of bits per dimension, or None.
    found: of `judge`.
    before: names of files that it put there earlier.

  Returns:
    (names of the files, what was left out, being too large).
  """
  folder = files.make(task.directory)
  names = []

  def path_of(name):
    names.append(name)
    return folder / name

  for card in [*judged.values(), *([scored] if scored else [])]:
    what = 'bits' if 'bits' in card['protocol'] else 'samples'
    name = f'step{card["subject"]["step"]}_{what}.json'
    cards.write(path_of(name), card)
  page = table.markdown(found['text'], f'{task.name}: ours beside the others')
  _put(path_of(TABLE), page.encode())
  rows = metrics.read(task.workdir / metrics.ROWS)
  draw_curves(path_of('curves.png'), rows, task.recipe, judged)
  draw_samples(path_of('samples.png'), task, step)
  left, room = [], MOST_BYTES - size(folder, names)
  for name in COPIED:
    source = task.workdir / name
    if not source.exists():
      continue
    data = source.read_bytes()
    # The record itself is written last, and small.
    if len(data) > room - 1_000_000:
      left.append(f'{source}, {len(data) / 1e6:.0f} MB')
      continue
    _put(path_of(name), data)
    room -= len(data)
  for name in set(before) - set(names):  # of an earlier protocol
    (folder / name).unlink(missing_ok=True)
  # Samples may be gone, and their picture still there.
  return [name for name in names if (folder / name).exists()], left


def size(folder, names: Sequence[str]) -> int:
  """Bytes of those files in a folder that are there."""
  paths = [files.at(folder) / name for name in names]
  return sum(
    path.stat().st_size if not files.in_bucket(path) else path.stat().length
    for path in paths
    if path.exists()
  )


def _put(path, data: bytes) -> None:
  with files.replacing(path) as file:
    file.write(data)


# --- pictures ---------------------------------------------------------------


def draw_samples(path, task: Task, step: int) -> None:
  """A grid of the first samples that were judged; none where they are gone."""
  count = min(GRID * GRID, task.num_samples)
  try:
    images = store.load(tasks.store(task, step), count)
  except UserError:
    return
  pictures.save(path, pictures.grid(features.whole(images), GRID))


def draw_curves(
  path, rows: Sequence[dict], recipe: Recipe, judged: Mapping[int, dict]
) -> None:
  """The loss over steps, and the distances beside it, as a .png.

  Args:
    path: of the file.
    rows: of metrics.jsonl.
    recipe: whose healthy run is drawn too.
    judged: step -> the card of its samples; distances take two of them.
  """
  names = [
    name
    for name in cards.DISTANCES
    if all(name in card['results'] for card in judged.values())
  ]
  distances = bool(names) and len(judged) > 1
  if not rows and not distances:
    return
  figure = Figure(figsize=(4.8 * (bool(rows) + distances), 3.6),
                  layout='constrained')  # fmt: skip
  panels = list(figure.subplots(1, bool(rows) + distances, squeeze=False)[0])
  healthy = recipe.curve
  if rows:
    axes = panels.pop(0)
    steps, loss = _series(rows, 'loss')
    axes.plot(*plots.thin(steps, loss), color=plots.COLORS['blue'], lw=0.6,
              alpha=0.35)  # fmt: skip
    _line(axes, steps, plots.smooth(loss), 'blue', 'training, smoothed')
    if any('heldout_loss' in row for row in rows):
      _line(axes, *_series(rows, 'heldout_loss'), 'grey', 'held out')
    if recipe.loss:
      _marks(axes, recipe.loss, healthy)
    _finish(axes, 'loss')
  if distances:
    axes = panels.pop(0)
    steps = sorted(judged)
    values = [judged[step]['results'][names[0]] for step in steps]
    title = cards.DISTANCES[names[0]]
    _line(axes, steps, values, 'blue', 'samples', marker='o')
    floor = cards.heldout(judged[steps[0]]).get(f'{names[0]}_heldout_count')
    if floor:
      axes.axhline(floor, color=plots.COLORS['grey'], lw=1, ls='--',
                   label='held-out images')  # fmt: skip
    if recipe.fid and names[0] == 'fid':
      _marks(axes, recipe.fid, healthy)
    count = judged[steps[0]]['protocol']['num_samples']
    _finish(axes, f'{title} of {count:,} samples')
  with files.replacing(path) as file:
    figure.savefig(file, format='png', dpi=150)


def _series(rows, name) -> tuple[list, list]:
  there = [row for row in rows if name in row]
  return [row['step'] for row in there], [row[name] for row in there]


def _line(axes, x, y, color, label, marker=''):
  axes.plot(x, y, color=plots.COLORS[color], lw=1.4, label=label, ms=4,
            marker=marker)  # fmt: skip


def _marks(axes, curve, label):
  axes.plot(*zip(*curve, strict=True), 'o', color=plots.COLORS['orange'], ms=5,
            mfc='none', label=label)  # fmt: skip


def _finish(axes, what):
  axes.set(xscale='log', yscale='log', xlabel='training step', ylabel=what)
  # Less than a decade has no tick of its own.
  for axis in (axes.xaxis, axes.yaxis):
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high < 300 * low else (1,)
    axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(ticker.FuncFormatter(plots.short))
    axis.set_minor_locator(ticker.NullLocator())
  axes.grid(color=plots.COLORS['rule'], lw=0.7)
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False, fontsize=8)
