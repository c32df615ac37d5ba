"""Fine-tuning: a run that begins with the parameters of another run.

Which is a fact of the run, in its init_from.json:

  {"workdir": ..., "step": ..., "ema": ..., "taken": number of arrays,
   "left": [{"name": ..., "there": shape or null, "here": shape or null}]}

A start that is killed before its first checkpoint begins from the same step
again, whatever the other run has saved since; one that has a checkpoint goes on
from that, and asks the other run for nothing.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

from diffusion_jax import runs
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint

# The same parameters mean another network where one of these differs.
MEANING = ('process.', 'loss.', 'model.num_heads', 'model.num_groups')

SHOWN = 4  # names in a line, before it says how many more there are


class Origin(NamedTuple):
  """Whose parameters a run begins with.

  Attributes:
    workdir: the other run's, absolute.
    step: of its checkpoint.
    ema: whether they are the averaged ones.
  """

  workdir: str
  step: int
  ema: bool


class Begun(NamedTuple):
  """What a run begins with.

  Attributes:
    taken: name -> array, the other run's parameters.
    left: for every other parameter of the two {'name', 'there', 'here'}, its
      shape in each, None where it has none.
  """

  taken: dict
  left: list[dict]


def recorded(workdir) -> Origin | None:
  """What init_from.json says; None where there is none.

  Raises:
    UserError: the file is damaged.
  """
  path = files.at(workdir) / runs.INIT
  if not path.exists():
    return None
  try:
    facts = json.loads(path.read_text())
    origin = Origin(*(facts[name] for name in Origin._fields))
    if list(map(type, origin)) != [str, int, bool]:
      raise ValueError('it holds something else')
    return origin
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise UserError(f'{path} is unreadable ({e}): give a new workdir') from e


def find(
  workdir, init_from: str | None, step: int | None, ema: bool
) -> Origin | None:
  """Where a start of a run takes its first parameters from.

  Args:
    workdir: the run's own folder, new or not.
    init_from: the other run's folder as the user gave it; None = not given.
    step: of the checkpoint; None = the newest, or that of an earlier start.
    ema: the averaged parameters, or the raw ones.

  Returns:
    The origin; None where the run begins with random parameters, or has a
    checkpoint of its own to go on from.

  Raises:
    UserError: the other run or its checkpoint does not exist, or is not what
      the run in `workdir` began with.
  """
  begun = checkpoint.steps(_checkpoints(workdir))
  if begun and not init_from and step is None and ema:
    return None
  before = recorded(workdir)
  if init_from:
    there = files.resolved(files.at(init_from).expanduser())
    if there == files.resolved(workdir):
      raise UserError(
        f'--init_from={init_from} is the --workdir itself: leave it out to go '
        'on, or begin in a new folder'
      )
    if step is None and before and before[::2] == (str(there), ema):
      step = before.step
    if begun and before != (str(there), step, ema):
      raise UserError(
        f'--init_from={init_from}: the run in {workdir} began with '
        f'{describe(before)}: leave --init_from out to go on, or give a new '
        '--workdir'
      )
  elif step is not None or not ema:
    given = '--noinit_ema' if step is None else f'--init_step={step}'
    raise UserError(
      f'{given} says what to take of --init_from, which is missing: name the '
      'run to begin from'
    )
  elif before:  # a start that was killed early had the flag
    there, step, ema = before
  if begun or not (init_from or before):
    return None
  runs.read_config(there, 'init_from')
  found = checkpoint.find_step(_checkpoints(there), step, 'init_step')
  return Origin(str(there), found, ema)


def load(origin: Origin | None, abstract) -> Begun:
  """`checkpoint.load_common` of an origin; nothing is written."""
  if origin is None:
    return Begun({}, [])
  return Begun(
    *checkpoint.load_common(
      _checkpoints(origin.workdir), origin.step, abstract, ema=origin.ema
    )
  )


def record(workdir, origin: Origin, begun: Begun) -> None:
  """Writes init_from.json.

  Args:
    workdir: of the new run.
    origin: where its parameters come from.
    begun: as of `load`.
  """
  facts = {**origin._asdict(), 'taken': len(begun.taken), 'left': begun.left}
  with files.replacing(files.at(workdir) / runs.INIT) as file:
    file.write(json.dumps(facts, indent=2).encode() + b'\n')


def describe(origin: Origin | None) -> str:
  if origin is None:
    return 'random parameters'
  kind = 'averaged' if origin.ema else 'raw'
  return f'the {kind} parameters of {origin.workdir}, step {origin.step}'


def told(origin: Origin, begun: Begun, config: dict) -> list[str]:
  """What was taken, what was not, and what may surprise: a line each.

  Args:
    origin: whose parameters.
    begun: as of `load`.
    config: the new run's.
  """
  taken, left = begun
  here = len(taken) + sum(row['here'] is not None for row in left)
  lines = [f'beginning with {describe(origin)}: {len(taken)} of {here} arrays']
  for what, names in (
    ('of another shape, begun at random',
     [r['name'] for r in left if r['there'] and r['here']]),
    ('new, begun at random', [r['name'] for r in left if r['there'] is None]),
    ('unused', [r['name'] for r in left if r['here'] is None]),
  ):  # fmt: skip
    if names:
      lines.append(f'  {len(names)} {what}: {_shortened(names)}')
  differ = runs.differences(runs.read_config(origin.workdir), config)
  differ = [line for key, line in differ.items() if key.startswith(MEANING)]
  if differ:
    lines.append(
      f'  warning: {"; ".join(differ)}: the network meant something else there'
    )
  return lines


def _checkpoints(workdir) -> files.Path:
  return files.at(workdir) / 'checkpoints'


def _shortened(names: Sequence[str]) -> str:
  more = len(names) - SHOWN
  return ', '.join(names[:SHOWN]) + (
    f' and {more} more, see {runs.INIT}' if more > 0 else ''
  )
