"""report.html: a run on one page, in one self-contained file.

Every part of the page says so if the run has nothing to show yet. Pictures and
plots are embedded; the page runs no scripts and loads nothing.
"""

import datetime

import jax
import jinja2
from markupsafe import Markup

from diffusion_jax import codecs, data, models, runs, samplers
from diffusion_jax.evaluation import breakdown, cards, tables
from diffusion_jax.evaluation.cards import number
from diffusion_jax.reporting import curves, facts, pictures, plots
from diffusion_jax.reporting.facts import Facts
from diffusion_jax.runs import recipe
from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError

THUMBNAIL = 320
STRIP = 6  # most grids drawn during training


def write(workdir) -> list[str]:
  """Writes WORKDIR/report.html atomically.

  Returns:
    a line for each damaged file that is skipped; each is printed on stderr, and
    the page lists them too.

  Raises:
    UserError: there is no run, its config.json is unreadable, or the folder
      cannot be written.
  """
  run = facts.read(workdir)
  runs.usable_folder('workdir', run.workdir)
  page = render(run)
  with files.replacing(run.workdir / 'report.html') as file:
    # Names of files need not be text.
    file.write(page.encode(errors='backslashreplace'))
  for line in run.problems:
    terminal.say(line)
  return run.problems


def update(workdir) -> None:
  """Like `write`, but by process 0 only."""
  distributed.on_first(lambda: write(workdir))


def render(run: Facts) -> str:
  """The page of a run as HTML; adds damaged pictures to the run's problems."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('diffusion_jax.reporting', ''),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {'number': number, 'value': tables.value}
  parts = (
    *(_about, _newest, _samples, _strip, _tables, curves.charts, _cost),
    *(_origin, _starts, _config),
  )
  return environment.get_template('report.html.jinja').render(
    {part.__name__.strip('_'): part(run) for part in parts},
    name=files.resolved(run.workdir).name,
    problems=run.problems,
    colors=plots.COLORS,
    written=datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC'),
  )


# --- numbers ----------------------------------------------------------------


def duration(seconds: float) -> str:
  """The two largest units: '3 min 42 s'."""
  units = (('d', 86400), ('h', 3600), ('min', 60), ('s', 1))
  parts, left = [], round(seconds)
  for name, size in units:
    count, left = divmod(left, size)
    if count or parts or name == 's':
      parts.append(f'{count} {name}')
  return ' '.join(parts[:2])


# --- the parts --------------------------------------------------------------


def _about(run: Facts) -> list[str]:
  """The run in brief: data, image shape, number of parameters."""
  shape = ' × '.join(map(str, runs.image_shape(run.config['data'])))
  about = [run.config['data']['name'], f'{shape} images']
  try:
    return [*about, f'{_num_params(run.config):,} parameters']
  except (TypeError, ValueError) as e:
    run.problems.append(f'the model of config.json cannot be built: {e}')
    return about


def _num_params(config) -> int:
  init = recipe.create(config).init
  # Inside eval_shape nothing touches a device, which a trainer may hold.
  return models.count(jax.eval_shape(lambda: init(jax.random.key(0))))


def _newest(run: Facts) -> list[tuple[str, str, str]]:
  """The newest numbers: (label, number, note)."""
  step = max((row['step'] for row in run.rows + run.starts), default=0)
  tiles = [('Step', number(step), f'of {number(run.config.get("num_steps"))}')]
  for key, label in (('loss', 'Loss'), ('heldout_loss', 'Held-out loss')):
    steps, values = curves.series(run.rows, key)
    if steps:
      tiles.append((label, number(values[-1]), f'at step {steps[-1]:,}'))
  # The card with the most samples at the newest step.
  chosen = sorted(run.cards, key=lambda card: (
    card['subject']['step'], card['protocol'].get('num_samples') or 0,
  ))[-1:]  # fmt: skip
  for key in tables.columns(chosen)[:1]:
    at = f'at {tables.drawing(chosen[0]["subject"], short=True)}'
    tiles.append((tables.head(key), number(chosen[0]['results'][key]), at))
  return tiles


def _samples(run: Facts) -> list[dict]:
  """The newest pictures: samples, their trajectory, a sweep, neighbours."""
  wanted = []
  if run.stores or run.drawn:
    step, grid = run.drawn[-1] if run.drawn else (None, None)
    subject = {**_on_the_way(run), 'step': step}
    if run.stores:
      folder, subject = run.stores[-1]
      grid = folder / 'grid.png'
    way = 'Their trajectory from noise to image; t is the time, x0 the image.'
    wanted += [
      (grid, f'{_shown(run)}: {tables.drawing(subject)}.'),
      (grid.with_name('trajectory.png'), way),
    ]
  sweeps = run.workdir.glob('evaluations/sweeps/*.png')
  for path in sorted(sweeps, key=files.modified)[-1:]:
    wanted.append((path, 'Samplers by network evaluations per sample.'))
  for card in reversed(run.cards):
    path = run.workdir / 'evaluations' / f'{card["name"]}_neighbours.png'
    if path.exists():
      told = 'Samples (framed) and their nearest training images'
      wanted.append((path, f'{told}: {tables.drawing(card["subject"])}.'))
      break
  return _pictures(run, wanted)


def _strip(run: Facts) -> list[dict]:
  """Some grids drawn during training, including the first and the last."""
  count = min(len(run.drawn), STRIP)
  chosen = [
    run.drawn[round(i * (len(run.drawn) - 1) / (count - 1))]
    for i in range(count if count > 1 else 0)
  ]
  wanted = [(path, f'step {step:,}') for step, path in chosen]
  return _pictures(run, wanted, side=THUMBNAIL, most_bytes=0)


def _shown(run) -> str:
  """What the grids of training show."""
  if codecs.reconstructs(run.config):
    return 'Images, each with its reconstruction to the right'
  return 'Samples'


def _on_the_way(run):
  """How training draws its grids, in the format of a sample store."""
  if codecs.reconstructs(run.config):
    return {'ema': True}
  sample = run.config['sample']
  sampler, evaluations = sample.get('sampler'), sample.get('num_steps')
  if sampler in samplers.SAMPLERS and evaluations:
    steps = range(evaluations - 1, -2, -1)  # the count is any grid's
    evaluations = samplers.create(sampler).evaluations(steps)
  how = {'sampler': sampler, 'evaluations': evaluations}
  return {'ema': True, 'seed': run.config.get('seed'), **how}


def _pictures(run, wanted, **how) -> list[dict]:
  """The (path, caption) pairs that exist; damaged ones become problems."""
  shown = []
  for path, caption in wanted:
    try:
      shown.append({**pictures.embedded(path, **how), 'caption': caption})
    except FileNotFoundError:
      pass
    except pictures.DAMAGED as e:
      name = path.relative_to(run.workdir)
      run.problems.append(f'{name} cannot be read ({e}): skipped')
  return shown


def _tables(run: Facts) -> list[dict]:
  """One table for each protocol, the newest first."""
  groups = [group[::-1] for group in cards.grouped(run.cards[::-1]).values()]
  return [
    {
      **tables.table(group)._asdict(),
      'title': tables.title(group[0]['protocol']),
      'protocol': tables.facts(group[0]['protocol']),
      'classes': _classes(group[-1]),
      'by_label': breakdown.of_card(group[-1]),
      'step': group[-1]['subject']['step'],
      'caveats': group[-1].get('details', {}).get('caveats', []),
    }
    for group in groups
  ]


def _classes(card: dict) -> dict | None:
  """The judge's classes of the samples, as bars."""
  details = card.get('details', {})
  named = {
    'samples': ('blue', details.get('class_histogram')),
    'held-out images': ('grey', details.get('heldout_class_histogram')),
  }
  there = {label: pair for label, pair in named.items() if pair[1]}
  if 'samples' not in there:
    return None
  return {
    'title': 'Classes',
    'note': f'at step {card["subject"]["step"]:,}',
    'keys': [(label, color, '') for label, (color, _) in there.items()],
    'svg': Markup(plots.bars('Classes', dict(there.values()))),
  }


# --- cost, config, starts ---------------------------------------------------


def _cost(run: Facts) -> list[tuple[str, str, str]]:
  """The cost of the steps so far: (label, number, note)."""
  batch_size = run.config.get('batch_size', 0)
  cost = facts.cost(run.rows, run.starts, batch_size)
  if not cost.images:
    return []
  tiles = []
  if cost.seconds is not None:
    took = duration(cost.seconds)
    tiles.append(('Training time', took, 'without compilation'))
  for kind, seconds in cost.device_seconds.items():
    hours, kind = number(seconds / 3600), kind or 'devices not recorded'
    tiles.append(('Device-hours', hours, kind))
  tiles.append(('Images seen', number(cost.images), f'{batch_size} per step'))
  if size := _num_images(run.config['data']):
    tiles.append(('Epochs', number(cost.images / size), f'of {size:,} images'))
  return tiles


def _num_images(config: dict) -> int | None:
  """The size of the training set; None if it is not on this machine."""
  try:
    return len(data.splits(config)[0])
  except (UserError, KeyError):
    return None


def _origin(run: Facts) -> str:
  """A sentence about the run whose parameters this one started from, or ''."""
  if not (origin := run.origin):
    return ''
  weights = 'raw' if origin.get('ema') is False else 'averaged'
  left = origin.get('left', [])
  return (
    f'Started from the {weights} parameters of {origin.get("workdir")}, step '
    f'{origin["step"]:,}: {origin.get("taken")} arrays copied, '
    f'{len(left) if isinstance(left, list) else left} not.'
  )


def _starts(run: Facts) -> list[dict]:
  """A row for each start, with the versions that changed."""
  rows, before = [], {}
  for start in run.starts:
    versions = start.get('versions', {})
    changed = {k: v for k, v in versions.items() if before.get(k) != v}
    told = ', '.join(f'{name} {v}' for name, v in changed.items() if v)
    rows.append({
      'time': str(start.get('time', '–'))[:19].replace('T', ' '),
      'step': start['step'],
      'devices': f'{start.get("num_devices", "?")} × {start.get("device")}',
      'processes': start.get('num_processes'),
      'revision': start.get('revision') or '–',
      'versions': told or 'the same',
    })  # fmt: skip
    before = versions
  return rows


def _config(run: Facts) -> list[tuple[str, dict]]:
  """The config's groups, with ungrouped values first."""
  groups = {key: x for key, x in run.config.items() if isinstance(x, dict)}
  alone = {key: x for key, x in run.config.items() if key not in groups}
  return [('run', alone), *((key, runs.flatten(groups[key])) for key in groups)]
