"""The second call of ten minutes of a GPU: training, samples, distances."""

import contextlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import rounds
import ten_files
import ten_parts
from ml_collections import ConfigDict

from diffusion_jax.evaluation import features
from diffusion_jax.evaluation import statistics as gaussians
from diffusion_jax.evaluation.metrics import frechet
from diffusion_jax.models import NET
from diffusion_jax.runs import store, trained
from diffusion_jax.system import terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, metrics

# A short training. Peak rate, warm-up, decay and average are those for a few
# thousand steps of 256 images; the paper's own are for 800,000 of 128.
RECIPE = {
  'batch_size': 256,
  'steps_per_dispatch': 10,
  'log_every': 50,
  'eval_every': 0,
  'sample_every': 0,
  'checkpoint_every': 2000,
  'keep_last': 1,
  'keep_every': 0,
  'data.name': 'arrays',
  'data.on_device': True,
  'model.dtype': 'bfloat16',
  'model.dropout': 0.0,
  'loss.prediction': 'v',
  'optim.lr': 5e-4,
  'optim.warmup_steps': 400,
  'ema.decay': 0.998,
  'sample.variance': 'fixedsmall',
}
# What a rehearsal changes, in both calls.
NARROW = {
  'batch_size': 16,
  'steps_per_dispatch': 1,
  'log_every': 5,
  'checkpoint_every': 100,
  'data.on_device': False,  # or a loop, in which convolutions are slow on a CPU
  'model.channels': 16,
  'model.num_groups': 8,
  'model.num_blocks': 1,
  'model.dtype': 'float32',
  'optim.warmup_steps': 20,
  'ema.decay': 0.95,
}
FOREVER = 10**9  # steps: the clock ends the constant part
LEAST = 120.0  # seconds of the shortest call that leaves a checkpoint
DECAY = 0.3  # share of training with a decaying rate
SLACK = 0.95  # of the speed: it may fall a little
SAVING = 8.0  # seconds that a stopped training takes to save, about
END = 20.0  # seconds for pictures and weights
FIRST = 0.5  # share of the time for both samplers that the first may take


class Asked(NamedTuple):
  """What the call is to do.

  Attributes:
    folder: of the files.
    output: folder of the results.
    work: folder of everything else.
    path: file of the config.
    config: the config.
    index: the number of images of each split.
    train_share: share of the call until training is saved.
    num_samples: of each sampler.
    ode_steps: steps of the ODE solver.
    ancestral_steps: ancestral steps.
  """

  folder: Path
  output: Path
  work: Path
  path: Path
  config: ConfigDict
  index: dict
  train_share: float
  num_samples: int
  ode_steps: int
  ancestral_steps: int

  @property
  def run(self) -> Path:
    return self.work / 'run'

  @property
  def samplers(self) -> dict[str, list[str]]:
    """Name -> flags."""
    ode, ancestral = self.ode_steps, self.ancestral_steps
    return {
      f'unipc, {ode} steps': ['--sampler=unipc', f'--num_steps={ode}'],
      f'ancestral, {ancestral} steps': [
        '--sampler=ancestral', f'--num_steps={ancestral}',
      ],
    }  # fmt: skip


class Enough(Exception):
  """The constant part of training has taken its share."""


def carry_out(
  record: ten_parts.Record, asked: Asked, clock: rounds.Clock
) -> None:
  """Trains, draws, judges, and writes what is left.

  Args:
    record: where everything is kept.
    asked: what to do.
    clock: the time that is left.
  """
  whole = clock.left
  count = asked.index['train']
  record.text['training'] = [f'on {count:,} training images']
  data = []
  record.part(
    'images',
    lambda _: data.append(ten_files.unpacked(asked.folder, asked.work)),
    clock.left,
  )
  if not data:
    return
  flags = [f'--config={asked.path}', f'--config.data.path={data[0]}']
  if not asked.index['test']:
    flags.append('--config.data.heldout_split=')
  train(record, asked, flags, clock, asked.train_share * whole)
  if not _steps(asked):
    return
  source = asked.folder / ten_files.INCEPTION
  ten_files.doubled(source, asked.work / ten_files.INCEPTION)
  judge(record, asked, clock, clock.left - END)
  for name, work in (('pictures', _draw), ('weights', _pack)):
    record.part(name, lambda _, do=work: do(record, asked), clock.left, False)


# --- training -----------------------------------------------------------------


def train(
  record: ten_parts.Record,
  asked: Asked,
  flags: Sequence[str],
  clock: rounds.Clock,
  seconds: float,
) -> None:
  """Trains at a constant rate, and then with as many steps of decay as fit.

  Args:
    record: where it is kept.
    asked: what to do.
    flags: of `train`.
    clock: the time that is left.
    seconds: for all of it, saving included.
  """
  begin = time.monotonic()
  end = begin + seconds - SAVING
  command = ['-m', 'diffusion_jax.train', *flags, f'--workdir={asked.run}',
             '--json']  # fmt: skip
  count, size = asked.config.steps_per_dispatch, asked.config.batch_size
  seen = []  # when training was first seen to have made steps

  def watch():
    now = time.monotonic()
    if not seen and _rows(asked):
      seen.append(now)
    if seen and over(begin, seen[0], now, end):
      raise Enough

  def constant(_):
    last = FOREVER // count * count
    with contextlib.suppress(Enough):
      ten_parts.run(
        [*command, f'--config.num_steps={last}'],
        end - time.monotonic(), watch=watch,
      )  # fmt: skip
    _tell(record, asked)
    if not _steps(asked):
      raise UserError('it was stopped before its first step')

  record.part('training, constant rate', constant, clock.left)
  at, rate = _steps(asked), rate_of(_rows(asked))
  start_up = seen[0] - begin if seen else seconds
  steps = decaying(end - time.monotonic() - start_up, rate / size, count)
  record.result['rate'] = {
    'images_per_sec': rate, 'start_up_seconds': start_up,
    'constant_steps': at, 'decaying_steps': steps,
  }  # fmt: skip

  def decay(found):
    last = at + steps
    ended = ten_parts.run(
      [*command, f'--config.num_steps={last}', '--config.optim.decay=linear',
       f'--config.optim.decay_from={at}', f'--config.optim.decay_steps={last}'],
      end - time.monotonic(),
    )  # fmt: skip
    if ended is None:
      found |= {'how': ten_parts.CUT, 'why': f'at step {_steps(asked):,}'}
    _tell(record, asked)

  name = 'training, decaying rate'
  record.part(name, decay, clock.left * bool(at and steps))


def over(begin: float, first: float, now: float, end: float) -> bool:
  """Whether the constant part has had its share of the time for steps.

  What is left of the time has to hold another start, which takes as long as the
  first at most, and then DECAY of all steps.

  Args:
    begin: when the part began.
    first: when its first steps were done.
    now: the time.
    end: when training ends.
  """
  rest = end - now - SAVING - (first - begin)
  return rest <= DECAY / (1 - DECAY) * (now - first)


def rate_of(rows: Sequence[dict]) -> float:
  """Images per second in the newer half of the rows; 0 if there are none."""
  rates = [row['images_per_sec'] for row in rows if 'images_per_sec' in row]
  return statistics.median(rates[len(rates) // 2 :]) if rates else 0.0


def decaying(seconds: float, rate: float, count: int) -> int:
  """The number of steps that fit, a multiple of the steps of a dispatch.

  Args:
    seconds: the time for them.
    rate: steps per second.
    count: steps of a dispatch.
  """
  return int(SLACK * max(seconds, 0) * rate) // count * count


def _rows(asked: Asked) -> list[dict]:
  return metrics.read(asked.run / metrics.ROWS)


def _steps(asked: Asked) -> int:
  """The step of the last checkpoint, or 0."""
  return (checkpoint.steps(asked.run / 'checkpoints') or [0])[-1]


def _tell(record: ten_parts.Record, asked: Asked) -> None:
  """Keeps the rows, and says how far training came."""
  rows, size = _rows(asked), asked.config.batch_size
  record.result['training'] = rows
  at, count = _steps(asked), asked.index['train']
  lines = [
    f'on {count:,} training images',
    f'{at:,} steps of {size} images, {at * size / 1e6:.3f} M images, '
    f'{at * size / count:.1f} epochs',
  ]
  if rows:
    loss = statistics.mean(r['loss'] for r in rows[-10:] if 'loss' in r)
    rate = rate_of(rows)
    lines.append(f'{rate:,.1f} images/s; mean loss of the last rows {loss:.4f}')
  record.text['training'] = lines


# --- samples ------------------------------------------------------------------


def judge(
  record: ten_parts.Record, asked: Asked, clock: rounds.Clock, seconds: float
) -> None:
  """Draws samples with each sampler, and compares them with the images.

  Args:
    record: where everything is kept.
    asked: what to do.
    clock: the time that is left.
    seconds: for both samplers.
  """
  train, test = (
    ten_files.statistics_of(asked.folder, split) for split in ten_files.SPLITS
  )
  made = asked.work / 'reference.npz'
  given = [f'--reference={train}'] if train.exists() else []
  record.result['cards'] = {}
  reference = train if train.exists() else made
  for i, (name, flags) in enumerate(asked.samplers.items()):
    left = FIRST * seconds if i == 0 else clock.left - END
    command = [
      '-m', 'diffusion_jax.evaluate', f'--workdir={asked.run}', *flags,
      f'--num_samples={asked.num_samples}', '--metrics=fid', '--taps=768',
      f'--features={asked.work / ten_files.INCEPTION}', '--batch_size=500',
      f'--output={_store(asked, i)}', f'--cache={asked.work / "cache"}',
      f'--write_statistics={made}', *given, '--json',
    ]  # fmt: skip

    def evaluate(found, i=i, name=name, command=command, left=left):
      card = ten_parts.run(command, left)
      if card is None:
        drawn = _drawn(asked, i)
        why = f'{drawn:,} samples are drawn, and not judged'
        found |= {'how': ten_parts.CUT, 'why': why}
        return
      record.result['cards'][name] = card
      record.result['heldout'] = _floor(record, asked, reference, test)
      record.text['FID-768 to the training images'] = _table(record)

    record.part(name, evaluate, left)


def _store(asked: Asked, i: int) -> Path:
  return asked.work / 'samples' / f'{i}'


def _drawn(asked: Asked, i: int) -> int:
  path = _store(asked, i)
  return store.drawn(path) if path.exists() else 0


def _floor(record, asked: Asked, reference: Path, test: Path) -> dict:
  """The distance of the held-out images, and their number; {} = unknown."""
  if test.exists() and reference.exists():
    sets = [gaussians.read_gaussian(path) for path in (test, reference)]
    count = gaussians.origin(test).get('mu', {}).get('num_images')
    return {'distance': frechet.distance(*sets), 'count': count}
  for card in record.result['cards'].values():
    if (x := card['results'].get('fid_768_floor')) is not None:
      count = min(asked.num_samples, asked.index['test'])
      return {'distance': x, 'count': count}
  return {}


def _table(record) -> list[str]:
  """A row for each sampler, at equal counts too where they differ."""
  floor, rows = record.result['heldout'], []
  for name, card in record.result['cards'].items():
    evaluations = str(card['subject']['evaluations'])
    count, results = card['protocol']['num_samples'], card['results']
    there = {count: results['fid_768']}
    if 'fid_768_heldout_count' in results:
      there[floor['count']] = results['fid_768_heldout_count']
    for count, distance in there.items():
      rows.append([name, f'{count:,}', evaluations, f'{distance:.4f}'])
  if floor:
    count = f'{floor["count"]:,}' if floor['count'] else '?'
    rows.append(['held-out images', count, '-', f'{floor["distance"]:.4f}'])
  heads = ('', 'images', 'evaluations', 'distance')
  return [line.rstrip() for line in terminal.table(heads, rows)]


# --- what is left -------------------------------------------------------------


def _draw(record, asked: Asked) -> None:
  ten_files.draw_curves(asked.output / 'curves.png', _rows(asked))
  drawn, names = [], []
  for i, name in enumerate(asked.samplers):
    if count := min(_drawn(asked, i), ten_files.SHOWN**2):
      drawn.append(features.whole(store.load(_store(asked, i), count)))
      names.append(name)
  if drawn:
    ten_files.draw_grids(asked.output / 'grid.png', drawn)
    told = f'grid.png: {"; ".join(names)}, from left to right'
    record.text['files'] = ['curves.png', told]


def _pack(record, asked: Asked) -> None:
  found = trained.load(asked.run)
  leaves, _ = jax.tree.flatten_with_path(jax.device_get(found.params[NET]))
  params = {
    '.'.join(str(getattr(k, 'key', k)) for k in path): leaf
    for path, leaf in leaves
  }
  there = [x.stat().st_size for x in asked.output.iterdir()]
  told = ten_files.write_weights(
    asked.output, params, ten_files.MOST_FILES - len(there),
    ten_files.MOST_IN_ALL - sum(there),
  )  # fmt: skip
  record.text['files'] = [*record.text.get('files', []), told]
