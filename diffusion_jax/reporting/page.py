"""report.html: a run on one page, in one file that can be sent to people.

Every part says so where the run has nothing to show yet. Pictures and plots
are inside the file, and there is nothing to run or to load.
"""

import base64
import datetime
import io
import json
import math
from collections.abc import Callable

import jax
import jinja2
from markupsafe import Markup
from PIL import Image

from diffusion_jax import data, models, runs, samplers
from diffusion_jax.evaluation import cards, tables
from diffusion_jax.evaluation.cards import number
from diffusion_jax.reporting import facts, plots
from diffusion_jax.reporting.facts import Facts
from diffusion_jax.runs import recipe
from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError

# A larger picture is embedded smaller: a report is to be sent by mail.
MAX_BYTES = 500_000
MAX_SIDE = 1200
THUMBNAIL = 320
STRIP = 6  # grids drawn on the way

# What Pillow raises for a damaged picture, or for one of too many pixels.
PICTURE_ERRORS = (
  OSError,
  SyntaxError,
  ValueError,
  Image.DecompressionBombError,
)


def write(
  workdir, told: Callable[[str], None] = lambda line: None
) -> files.Path:
  """Writes WORKDIR/report.html, whole or not at all.

  Args:
    workdir: the run's folder.
    told: called with a line for each file that is damaged and left out; the
      page says it too.

  Returns:
    the page's path.

  Raises:
    UserError: there is no run, its config.json is unreadable, or the folder
      cannot be written.
  """
  run = facts.read(workdir)
  runs.usable_folder('workdir', run.workdir)
  page = render(run)
  path = run.workdir / 'report.html'
  with files.replacing(path) as file:
    file.write(page.encode())
  for line in run.problems:
    told(line)
  return path


def update(workdir) -> None:
  """As `write`, by process 0, which tells the lines."""
  distributed.on_first(lambda: write(workdir, terminal.say) and None)


def render(run: Facts) -> str:
  """The page of a run; adds damaged pictures to its problems."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('diffusion_jax.reporting', ''),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {'number': number, 'value': tables.value}
  parts = {
    'name': files.resolved(run.workdir).name,
    'about': _about(run),
    'newest': _newest(run),
    'samples': _samples(run),
    'strip': _strip(run),
    'tables': _tables(run.cards),
    'charts': _charts(run),
    'cost': _cost(run),
    'origin': _origin(run.origin),
    'starts': _starts(run.starts),
    'config': _grouped(run.config),
  }
  return environment.get_template('report.html.jinja').render(
    **parts,
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
  """What it is: data, shape, size."""
  shape = ' × '.join(map(str, runs.image_shape(run.config['data'])))
  about = [run.config['data']['name'], f'{shape} images']
  try:
    return [*about, f'{_num_params(run.config):,} parameters']
  except (TypeError, ValueError) as e:
    run.problems.append(f'config.json has no model that can be built: {e}')
    return about


def _num_params(config) -> int:
  init = recipe.create(config).init
  # Within eval_shape nothing touches a device, which a trainer may hold.
  return models.count(jax.eval_shape(lambda: init(jax.random.key(0))))


def _newest(run: Facts) -> list[tuple[str, str, str]]:
  """The newest numbers: (label, number, note)."""
  step = max((row['step'] for row in run.rows + run.starts), default=0)
  tiles = [('Step', number(step), f'of {number(run.config.get("num_steps"))}')]
  for key, label in (('loss', 'Loss'), ('heldout_loss', 'Held-out loss')):
    steps, values = _series(run.rows, key)
    if steps:
      tiles.append((label, number(values[-1]), f'at step {steps[-1]:,}'))
  # Of the newest step, the card of the most samples.
  chosen = sorted(run.cards, key=lambda card: (
    card['subject']['step'], card['protocol'].get('num_samples') or 0,
  ))[-1:]  # fmt: skip
  for card in chosen:
    at = f'at {tables.drawing(card["subject"], short=True)}'
    for key in tables.columns(chosen)[:1]:
      tiles.append((tables.head(key), number(card['results'][key]), at))
  return tiles


def _samples(run: Facts) -> list[dict]:
  """The newest pictures: of samples, of their way, of their neighbours."""
  if run.stores:
    folder, subject = run.stores[-1]
    wanted = [
      (folder / 'grid.png', f'Samples: {tables.drawing(subject)}.'),
      (
        folder / 'trajectory.png',
        'Their way out of the noise; t is the time, x0 the image.',
      ),
    ]
  elif run.drawn:
    step, path = run.drawn[-1]
    wanted = [
      (
        path,
        f'Samples: {tables.drawing({**_on_the_way(run), "step": step})}.',
      )
    ]
  else:
    wanted = []
  sweeps = run.workdir.glob('evaluations/sweeps/*.png')
  for path in sorted(sweeps, key=files.modified)[-1:]:
    told = 'Samplers, by evaluations of the network for a sample.'
    wanted.append((path, told))
  for card in reversed(run.cards):
    path = run.workdir / 'evaluations' / f'{card["name"]}_neighbours.png'
    if path.exists():
      told = 'Samples, framed, and the training images nearest to them'
      wanted.append((path, f'{told}: {tables.drawing(card["subject"])}.'))
      break
  return [
    {**picture, 'caption': caption}
    for path, caption in wanted
    if path.exists() and (picture := _picture(run, path))
  ]


def _strip(run: Facts) -> list[dict]:
  """Some of the grids drawn on the way, the first and the last among them."""
  count = min(len(run.drawn), STRIP)
  chosen = [
    run.drawn[round(i * (len(run.drawn) - 1) / (count - 1))]
    for i in range(count if count > 1 else 0)
  ]
  return [
    {**picture, 'caption': f'step {step:,}'}
    for step, path in chosen
    if (picture := _picture(run, path, THUMBNAIL, max_bytes=0))
  ]


def _on_the_way(run):
  """How training draws its grids, as a sample store tells it."""
  sample = run.config['sample']
  sampler, evaluations = sample.get('sampler'), sample.get('num_steps')
  if sampler in samplers.SAMPLERS and evaluations:
    steps = range(evaluations - 1, -2, -1)  # the count is any grid's
    evaluations = samplers.create(sampler).evaluations(steps)
  return {
    'ema': True, 'seed': run.config.get('seed'),
    'sampler': sampler, 'evaluations': evaluations,
  }  # fmt: skip


def _picture(run, path, side=MAX_SIDE, max_bytes=MAX_BYTES) -> dict | None:
  """src, width, height; None, and a problem, where it is damaged.

  Above max_bytes it is embedded smaller: `side` pixels at most.
  """
  try:
    content, kind = path.read_bytes(), 'png'
    with Image.open(io.BytesIO(content)) as image:
      image.load()  # the whole of it, or it is damaged
      size = image.size
      if len(content) > max_bytes:
        content, kind = min((content, kind), _smaller(image, side), key=_bytes)
  except PICTURE_ERRORS as e:
    run.problems.append(
      f'{path.relative_to(run.workdir)} cannot be read ({e}): left out'
    )
    return None
  code = base64.b64encode(content).decode()
  src = f'data:image/{kind};base64,{code}'
  return {'src': src, 'width': size[0], 'height': size[1]}


def _smaller(image, side) -> tuple[bytes, str]:
  """The smaller of a PNG and a JPEG, and which it is."""
  image = image.convert('RGB')
  image.thumbnail((side, side))
  encoded = []
  for kind in ('png', 'jpeg'):
    file = io.BytesIO()
    image.save(file, format=kind, quality=90)
    encoded.append((file.getvalue(), kind))
  return min(encoded, key=_bytes)


def _bytes(encoded) -> int:
  return len(encoded[0])


def _tables(found: list[dict]) -> list[dict]:
  """One for each protocol, the newest first: only equals stand together."""
  groups = [group[::-1] for group in cards.grouped(found[::-1]).values()]
  return [
    {
      **tables.table(group)._asdict(),
      'title': tables.title(group[0]['protocol']),
      'protocol': tables.facts(group[0]['protocol']),
      'classes': _classes(group[-1]),
      'caveats': group[-1].get('details', {}).get('caveats', []),
    }
    for group in groups
  ]


def _classes(card: dict) -> dict | None:
  """Which classes a judge saw in the samples, as bars."""
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


# --- curves -----------------------------------------------------------------


def _series(rows, name) -> tuple[list, list]:
  """(steps, values) of the rows that have it."""
  there = [row for row in rows if name in row]
  return [row['step'] for row in there], [row[name] for row in there]


def _charts(run: Facts) -> list[dict]:
  """The curves of training; those of which nothing is written are left out."""

  def raw(name, label='', color='blue', style='line'):
    return plots.Line(label, *_series(run.rows, name), color, style)

  def smoothed(name, label, color='blue'):
    steps, values = _series(run.rows, name)
    smooth = plots.smooth(values) if values else []
    return plots.Line(label, steps, smooth, color)

  timesteps = run.config['process']['num_timesteps']
  distance, best, curve = _curve(run.cards)
  first = [math.ceil(q * timesteps / 4) for q in range(5)]
  quarters = [
    smoothed(f'loss_q{q}', f't {first[q - 1]}–{first[q] - 1}', f'q{q}')
    for q in (1, 2, 3, 4)
  ]
  clip = run.config.get('optim', {}).get('clip_norm')
  wanted = (
    (distance, best, True, curve),
    ('Loss', 'smoothed over what was logged', True, (
      raw('loss', style='faint'), smoothed('loss', 'training'),
      raw('heldout_loss', 'held out', 'orange', 'marks'),
    )),
    ('Loss by quarter of t', 'smoothed', True, quarters),
    ('Gradient norm', f'clipped at {clip}' if clip else '', True, (
      raw('grad_norm', style='faint'), smoothed('grad_norm', ''),
    )),
    ('Parameter norm', '', True, (raw('param_norm'),)),
    ('Learning rate', '', False, (raw('learning_rate'),)),
    ('Images per second', 'all devices', False, (
      raw('images_per_sec', style='faint'), smoothed('images_per_sec', ''),
    )),
  )  # fmt: skip
  restarts = sorted({start['step'] for start in run.starts} - {0})
  charts = []
  for title, note, log, drawn in wanted:
    if drawn := [line for line in drawn if len(line.x)]:
      svg = plots.lines(title, drawn, log=log, restarts=restarts)
      charts.append({
        'title': title, 'note': note, 'svg': Markup(svg),
        'keys': [
          (line.label, line.color, number(float(line.y[-1])))
          for line in drawn if line.style != 'faint'
        ],
      })  # fmt: skip
  return charts


def _curve(found) -> tuple[str, str, list]:
  """(title, what is best, lines): the newest card's distance, step by step.

  Without two steps that were judged alike there are no lines.
  """

  def how(card):
    own = ('step', 'weights_sha256', 'workdir')
    subject = {k: v for k, v in card['subject'].items() if k not in own}
    return json.dumps([card['protocol'], subject], sort_keys=True)

  found = [
    card for card in found if set(cards.DISTANCES) & set(card['results'])
  ]
  alike = [card for card in found if how(card) == how(found[-1])]
  names = [n for n in cards.DISTANCES if alike and n in alike[-1]['results']]
  if not names or len({card['subject']['step'] for card in alike}) < 2:
    return '', '', []
  curve = cards.curve(alike, names[0])
  points, best = curve['points'], curve['best']
  lines = [
    plots.Line(
      'samples',
      *([point[key] for point in points] for key in ('step', 'value')),
    ),
    plots.Line('the best', [best['step']], [best['value']], 'orange', 'marks'),
  ]
  told = f'the least is {number(best["value"])}, at step {best["step"]:,}'
  return f'{cards.DISTANCES[names[0]]} by step', told, lines


# --- cost, config, starts ---------------------------------------------------


def _cost(run: Facts) -> list[tuple[str, str, str]]:
  """(label, number, note), of what the steps so far took."""
  batch_size = run.config.get('batch_size', 0)
  cost = facts.cost(run.rows, run.starts, batch_size)
  if not cost.images:
    return []
  tiles = []
  if cost.seconds is not None:
    tiles.append(
      ('Training time', duration(cost.seconds), 'compiling not counted')
    )
  for kind, seconds in cost.device_seconds.items():
    tiles.append(
      ('Device-hours', number(seconds / 3600), kind or 'devices not recorded')
    )
  tiles.append(('Images seen', number(cost.images), f'{batch_size} a step'))
  if size := _num_images(run.config['data']):
    tiles.append(('Epochs', number(cost.images / size), f'of {size:,} images'))
  return tiles


def _num_images(config: dict) -> int | None:
  """The size of the training set; None where it is not on this machine."""
  try:
    source = data.create(
      config['name'], path=config['path'], split=config['train_split'],
      image_size=config['image_size'], channels=config['channels'],
      heldout_every=config['heldout_every'],
    )  # fmt: skip
  except (UserError, KeyError):
    return None
  return len(source) if source else None


def _origin(origin: dict | None) -> str:
  """Whose parameters the run began with, in a sentence."""
  if not origin:
    return ''
  weights = 'raw' if origin.get('ema') is False else 'averaged'
  left = origin.get('left', [])
  return (
    f'It began with the {weights} parameters of {origin.get("workdir")}, step '
    f'{origin["step"]:,}: {origin.get("taken")} arrays taken, '
    f'{len(left) if isinstance(left, list) else left} not.'
  )


def _starts(starts: list[dict]) -> list[dict]:
  """A row for each start; of the versions, what changed with it."""
  rows, before = [], {}
  for start in starts:
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


def _grouped(config: dict) -> list[tuple[str, dict]]:
  """The config's groups, what stands alone first."""
  alone = {k: x for k, x in config.items() if not isinstance(x, dict)}
  groups = [(k, runs.flatten(x)) for k, x in config.items() if k not in alone]
  return [('run', alone), *groups]
