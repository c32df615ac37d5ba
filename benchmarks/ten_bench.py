"""The first call of ten minutes of a GPU: benchmarks of the training step."""

import json
from pathlib import Path

import rounds
import ten_parts

from diffusion_jax.models import layers
from diffusion_jax.system import terminal

BENCHMARK = Path(__file__).with_name('train_step.py')
RECIPE = {'batch_size': 256, 'model.dtype': 'bfloat16'}
LEAST = 45.0  # seconds that one benchmark needs, at least
END = 5.0  # seconds for what comes after the last benchmark
# Of the time that is left, for compiled PyTorch: what follows needs the rest.
PYTORCH = 0.6
# Flags that print more than the table: the ratio, and operations.
MORE = ('--vs=diffusers', '--profile')
LARGEST = ('norm', 'attention', 'upsampling')  # measures tested singly
HEADS = ('', 'side', 'ms', 'images/s', 'utilisation', 'memory', 'compiled in')


def parts() -> list[tuple[str, list[str], bool]]:
  """(name, flags of the benchmark, whether it is due), the best first."""

  def plain(*names):
    return [f'--config.model.plain={names!r}']

  return [
    ('all measures', [], True),
    ('beside compiled PyTorch', [MORE[0]], True),
    ('profile', [MORE[1], '--rounds=1'], True),
    ('no measure', plain(*layers.MEASURES), True),
    *((f'all but {name}', plain(name), False) for name in LARGEST),
  ]


def carry_out(
  record: ten_parts.Record,
  config: Path,
  work: Path,
  clock: rounds.Clock,
  rehearse: bool,
) -> None:
  """Runs the benchmarks one after the other, as far as the clock allows.

  Args:
    record: where they are kept.
    config: the file of the config.
    work: a folder.
    clock: the time that is left.
    rehearse: whether few short rounds are enough.
  """
  few = ['--rounds=3', '--secs=0.05'] if rehearse else ['--rounds=5']
  rows = record.result['rows'] = []
  for i, (name, more, due) in enumerate(parts()):
    left = clock.left - END
    # Not worth starting: it would not even be compiled.
    left = left if i == 0 or left > LEAST / 3 else 0
    left *= PYTORCH if MORE[0] in more else 1

    def measure(found, i=i, name=name, more=more, left=left):
      path = work / f'{i}.json'
      told = ten_parts.run(
        [BENCHMARK, f'--config={config}', *few, *more, f'--json={path}',
         f'--minutes={left / 60:.3f}'],
        left, parse=str,
      )  # fmt: skip
      if told is None:
        found['how'] = ten_parts.CUT
      kept = {'rows': []}
      if path.exists():  # written row by row
        kept = json.loads(path.read_text())
      rate = kept.get('matrix_rate')
      rows.extend(
        {'name': name, **row, 'matrix_rate': rate} for row in kept['rows']
      )
      record.text['a training step'] = _table(rows)
      if told and {*MORE} & {*more}:
        there = sum(len(row['sides']) for row in kept['rows'])
        record.text[name] = told.strip().splitlines()[2 + there :]
      terminal.say(told or '')

    record.part(name, measure, left, due)


def _lines(row) -> list[list[str]]:
  found = []
  for side, values in row['sides'].items():
    memory = values['bytes']
    found.append([
      row['name'], side, rounds.spread(values['seconds'], 1e3),
      rounds.figures(values['images_per_sec']), f'{values["utilisation"]:.1%}',
      f'{memory / 2**30:.2f} GiB' if memory else '-',
      f'{values["compile_seconds"]:.1f} s',
    ])  # fmt: skip
  return found


def _table(rows) -> list[str]:
  lines = [line for row in rows for line in _lines(row)]
  return [line.rstrip() for line in terminal.table(HEADS, lines)]
