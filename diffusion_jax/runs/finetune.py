"""Fine-tuning: a run that starts from the parameters of another run.

The run records their origin in its init_from.json:

  {"workdir": ..., "step": ..., "ema": ..., "taken": number of arrays,
   "left": [{"name": ..., "there": shape or null, "here": shape or null}]}

A run killed before its first checkpoint restarts from the same step of the
other run, even if that has saved more since. A run with a checkpoint resumes
from it and no longer needs the other run.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import jax

from diffusion_jax import runs
from diffusion_jax.models import lora
from diffusion_jax.runs import dataset, kept_parts, low_rank
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint

# If one of these differs, the same parameters mean a different network.
MEANING = (
  *('process.', 'codec.', 'model.num_heads', 'model.num_groups'),
  *('loss.name', 'loss.prediction', 'loss.sigma_data', 'loss.variance'),
  *('model.head_channels', 'model.style', 'model.details', 'model.time_scale'),
)

# Also, if both runs have captions.
OF_CAPTIONS = ('conditioning.sha256', 'conditioning.num_heads')
HARMLESS = ('codec.cache', 'codec.decode_rows')
# Also, if the run takes its autoencoder from the one that it starts from.
OF_ITSELF = ('codec.path', 'codec.step')

SHOWN = 4  # names to show in a line before 'and N more'


class Origin(NamedTuple):
  """The origin of a run's initial parameters.

  Attributes:
    workdir: the other run's folder, absolute.
    step: the step of its checkpoint.
    ema: whether they are the averaged parameters.
  """

  workdir: str
  step: int
  ema: bool


class Begun(NamedTuple):
  """The initial parameters taken from another run.

  Attributes:
    taken: name -> array, the other run's parameters.
    left: {'name', 'there', 'here'} for every other parameter of the two runs:
      its shape in each, None if missing.
  """

  taken: dict
  left: list[dict]


def recorded(workdir) -> Origin | None:
  """Reads init_from.json; None if there is no such file.

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
    raise UserError(
      f'{path} is unreadable ({e}): remove it; a run with a checkpoint resumes '
      'without --init_from'
    ) from e


def find(
  workdir, init_from: str | None, step: int | None, ema: bool
) -> Origin | None:
  """Finds the origin of the initial parameters when a run is started.

  Args:
    workdir: the run's own folder, new or existing.
    init_from: the other run's folder as given by the user; None = not given.
    step: the step of the checkpoint; None = the newest, or the one of an
      earlier start.
    ema: whether to use the averaged or the raw parameters.

  Returns:
    The origin; None if the run starts from random parameters or resumes from
    its own checkpoint.

  Raises:
    UserError: the other run or its checkpoint does not exist, or differs from
      the one that the run in `workdir` started from.
  """
  begun = checkpoint.steps(_checkpoints(workdir))
  if begun and not init_from and step is None and ema:
    return None
  before = recorded(workdir)
  if init_from:
    there = files.resolved(files.at(init_from).expanduser())
    if there == files.resolved(workdir):
      raise UserError(
        f'--init_from={init_from} is the --workdir itself: leave it out to '
        'resume, or start in a new folder'
      )
    if step is None and before and before[::2] == (str(there), ema):
      step = before.step
    if begun and before != (str(there), step, ema):
      raise UserError(
        f'--init_from={init_from}: the run in {workdir} started from '
        f'{describe(before)}: leave --init_from out to resume, or give a new '
        '--workdir'
      )
  elif step is not None or not ema:
    given = '--noinit_ema' if step is None else f'--init_step={step}'
    raise UserError(
      f'{given} needs --init_from, which is missing: give the run to start from'
    )
  elif before:  # an earlier start, killed before a checkpoint, had the flag
    there, step, ema = before
  if begun or not (init_from or before):
    return None
  try:
    runs.read_config(there, '--init_from')
    found = checkpoint.find_step(_checkpoints(there), step, '--init_step')
  except UserError as e:
    if init_from:
      raise
    raise UserError(
      f'{workdir} was started from {describe(before)}, which cannot be read '
      f'({e}): restore it, give another --init_from, or delete '
      f'{workdir}/{runs.INIT}'
    ) from e
  return Origin(str(there), found, ema)


def load(
  origin: Origin | None, abstract, step: int | None = None
) -> tuple[Origin | None, Begun]:
  """Loads the parameters of an origin, see `low_rank.common`.

  Args:
    origin: the origin, or None.
    abstract: the new run's parameters; low-rank changes begin anew.
    step: the step that the user has named, or None: if its checkpoint is
      damaged, the parameters are those of an older one, with a word.

  Returns:
    the origin of the parameters, and the parameters.
  """
  if origin is None or lora.PART in abstract:
    return origin, Begun({}, [])
  folder = _checkpoints(origin.workdir)
  mesh = jax.tree.leaves(abstract)[0].sharding.mesh

  def read(at):
    found = low_rank.common(origin.workdir, at, origin.ema, abstract, mesh)
    return origin._replace(step=at), Begun(*found)

  if step is None:
    return checkpoint.read_newest(folder, read, origin.step)
  return read(origin.step)


def record(workdir, origin: Origin, begun: Begun) -> None:
  """Writes init_from.json.

  Args:
    workdir: the new run's folder.
    origin: the origin of its parameters.
    begun: the result of `load`.
  """
  facts = {**origin._asdict(), 'taken': len(begun.taken), 'left': begun.left}
  files.write_json(files.at(workdir) / runs.INIT, facts)


def describe(origin: Origin | None) -> str:
  if origin is None:
    return 'random parameters'
  kind = 'averaged' if origin.ema else 'raw'
  return f'the {kind} parameters of {origin.workdir}, step {origin.step}'


def told(origin: Origin, begun: Begun, config: dict) -> list[str]:
  """Describes which parameters were taken and which not, with warnings.

  Args:
    origin: the origin of the parameters.
    begun: the result of `load`.
    config: the new run's config.

  Returns:
    Lines to print.
  """
  taken, left = begun
  here = len(taken) + sum(row['here'] is not None for row in left)
  lines = [f'starting from {describe(origin)}: {len(taken)} of {here} arrays']
  if low_rank.is_used(config):
    lines = [f'starting from {describe(origin)}: {low_rank.told(config)}']
  for what, names in (
    ('of another shape, random',
     [r['name'] for r in left if r['there'] and r['here']]),
    ('new, random', [r['name'] for r in left if r['there'] is None]),
    ('unused', [r['name'] for r in left if r['here'] is None]),
  ):  # fmt: skip
    if names:
      lines.append(f'  {len(names)} {what}: {_shortened(names)}')
  there = runs.read_config(origin.workdir)
  meaning = MEANING
  if all(dataset.has_captions(c.get('conditioning')) for c in (there, config)):
    meaning += OF_CAPTIONS
  harmless = HARMLESS
  path = config['codec'].get('path')
  if path and str(files.resolved(kept_parts.place(path))) == origin.workdir:
    harmless += OF_ITSELF
  differ = [
    line
    for key, line in runs.differences(there, config).items()
    if key.startswith(meaning) and key not in harmless
  ]
  if differ:
    lines.append(
      f'  warning: {"; ".join(differ)}: the parameters mean something else here'
    )
  return lines


def _checkpoints(workdir) -> files.Path:
  return files.at(workdir) / 'checkpoints'


def _shortened(names: Sequence[str]) -> str:
  more = len(names) - SHOWN
  return ', '.join(names[:SHOWN]) + (
    f' and {more} more, see {runs.INIT}' if more > 0 else ''
  )
