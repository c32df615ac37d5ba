"""Doing a task in pieces: what has ended is on record, the rest goes on."""

import contextlib
import json
import shlex
import signal
import statistics
import time
from collections.abc import Callable

from diffusion_jax import runs
from diffusion_jax.evaluation import cards, tables
from diffusion_jax.reporting import facts
from diffusion_jax.reproduction import cost, health, results, stages
from diffusion_jax.reproduction import task as tasks
from diffusion_jax.reproduction.task import Task
from diffusion_jax.system import files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, metrics

RECORD = 'reproduction.json'
MEASURED = 'measured.json'
MEASURE_SECS = 900.0  # a large network on a small machine: it goes unmeasured
LOOK_SECS = 20.0  # at the metrics, while training
SAY_SECS = 120.0
# Of a call's time: what is kept for a stage to save in and for the results, at
# most; what measuring may take; and with less left, no stage is begun.
END_SECS, END = stages.GRACE + 5, 0.25
MEASURING = 0.25
LEAST = 0.05

# What the devices are, which the process that waits does not ask itself.
PROBE = (
  'import json; from diffusion_jax import environment; '
  'print(json.dumps(environment.describe()))'
)


class Cut(Exception):
  """This call's time is up, or it was told to stop; all is kept."""


class Pieces:
  """The record of a task, and the stage at work.

  Attributes:
    task: what is asked for.
    record: as it is on disk: 'stages', each with its name, command, the seconds
      of every piece, whether it has ended, and its result; 'files', which the
      folder has by it.
    signals: that come to this process.

  Args:
    start: of this call, of time.monotonic().
  """

  def __init__(self, task: Task, signals: stages.Signals, start: float):
    self.task, self.signals = task, signals
    # Results may be of an earlier protocol: what holds, is found again.
    self.record = {
      'workdir': str(files.resolved(task.workdir)), 'stages': [], 'files': [],
    }  # fmt: skip
    before = read(task.directory / RECORD) or {}
    self.record |= {k: before[k] for k in ('stages', 'files') if k in before}
    self._measured = read(task.directory / MEASURED)
    self._start = start
    self._watched = None  # the state of health that was told last

  # --- the record -------------------------------------------------------------

  def begin(self) -> None:
    """Lets go of a verdict, which may be of another protocol."""
    if self.record['stages']:
      self.keep(done=False)
    if results.TABLE in self.record['files']:
      (self.task.directory / results.TABLE).unlink(missing_ok=True)

  def keep(self, **changes) -> None:
    """Writes the record, once there is a run; until then it is in memory.

    Training wants a new folder empty.
    """
    self.record |= changes
    task = self.task
    inside = files.resolved(task.workdir) in files.parents(
      files.resolved(task.directory)
    )
    if inside and not (task.workdir / 'config.json').exists():
      return
    files.make(task.directory)
    _write(task.directory / RECORD, self.record)
    if self._measured:
      _write(task.directory / MEASURED, self._measured)

  def entry(self, name: str, command: list[str]) -> dict:
    """The record of a stage; training goes on with another command too."""
    key = 'name' if name == 'train' else 'command'
    wanted = {'name': name, 'command': command}
    for one in self.record['stages']:
      if one[key] == wanted[key]:
        one['command'] = command
        return one
    self.record['stages'].append(
      {**wanted, 'seconds': [], 'ended': False, 'result': None}
    )
    return self.record['stages'][-1]

  # --- stages -----------------------------------------------------------------

  def left(self) -> float | None:
    """Seconds of this call for work; None = no limit."""
    if not self.task.minutes:
      return None
    whole = 60 * self.task.minutes
    until = whole - min(END_SECS, END * whole)
    return until - (time.monotonic() - self._start)

  def stage(
    self,
    name: str,
    command: list[str],
    *,
    stop: int = signal.SIGINT,
    limit: float | None = None,
    watch: Callable[[], None] = lambda: None,
  ) -> dict | None:
    """Runs a stage for as long as this call and its own limit let it.

    Returns:
      its result; None where its own limit cut it.

    Raises:
      Cut: the call's limit or a signal did, or it was not begun.
      Failed: it failed.
    """
    left, whole = self.left(), 60 * self.task.minutes
    if self.signals.name or (left is not None and left < LEAST * whole):
      raise Cut
    limits = [x for x in (left, limit) if x is not None]
    entry = self.entry(name, command)
    terminal.say(f'\n$ python {shlex.join(command)}')
    try:
      outcome = stages.run(
        command, self.signals, stop=stop, watch=watch, every=LOOK_SECS,
        deadline=time.monotonic() + min(limits) if limits else None,
      )  # fmt: skip
    except stages.Failed as e:
      entry['seconds'].append(round(e.seconds, 1))
      self.keep()
      raise
    entry['seconds'].append(round(outcome.seconds, 1))
    entry['ended'] = outcome.result is not None
    if outcome.result is None:
      self.keep()
      left = self.left()
      if self.signals.name or (left is not None and left <= 0):
        raise Cut
    return outcome.result

  def judged(self, name: str, command: list[str]) -> list[dict]:
    """The cards of an evaluation, made now or on record."""
    entry = self.entry(name, command)
    if entry['ended']:
      with contextlib.suppress(UserError, TypeError):
        return [cards.read(path) for path in entry['result']]
    result = self.stage(name, command)
    if result is None:  # only the call's limit could
      raise Cut
    made = result.get('cards', [result])
    entry['result'] = [card['path'] for card in made]
    self.keep()
    for card in made:
      terminal.say(tables.text(card))
    return [cards.read(path) for path in entry['result']]

  # --- rates ------------------------------------------------------------------

  def measure(self) -> None:
    """Times this machine, unless that is on record or training has a rate."""
    task = self.task
    if not task.measure or self._trained_at():
      return
    if known := self._known():
      if 'train' not in known:  # it took too long
        return
      here = self.stage('devices', ['-c', PROBE]) or {}
      if _device(here) == _device(known['environment']):
        return
    limit = MEASURE_SECS
    if task.minutes:
      limit = min(limit, MEASURING * 60 * task.minutes)
    found = self.stage('measure', tasks.measure(task), limit=limit)
    self._measured = {'key': self._key(), 'environment': {}}
    if found is None:
      terminal.say(f'not measured: it took more than {limit / 60:.2g} minutes')
    else:
      self._measured |= {
        'environment': found['environment'], **found['measured']
      }  # fmt: skip
    self.keep()

  def _known(self) -> dict:
    """What is on record of this network; {} = nothing."""
    known = self._measured or {}
    return known if known.get('key') == self._key() else {}

  def _key(self) -> dict:
    """What the rates depend on, but for the devices."""
    config = self.task.config
    names = ('model', 'batch_size', 'microbatches', 'mesh')
    return {name: config[name] for name in names} | {
      'shape': [config['data'][k] for k in ('image_size', 'channels')]
    }

  def _trained_at(self) -> float | None:
    """Images a second of the newest rows."""
    rows = metrics.read(self.task.workdir / metrics.ROWS)
    rates = [r['images_per_sec'] for r in rows[-50:] if 'images_per_sec' in r]
    return statistics.median(rates) if rates else None

  def images_per_sec(self) -> float | None:
    """Of training, as it was; before it has a rate, as it was measured."""
    known = self._known().get('train') or {}
    return self._trained_at() or known.get('images_per_sec')

  def rates(self) -> dict:
    """What was measured; None = it was not."""
    sample = self._known().get('sample')
    return {
      'images_per_sec': self.images_per_sec(),
      'evaluations_per_sec': sample and 1 / sample['seconds_per_evaluation'],
    }

  def hardware(self) -> list[dict]:
    """What each start of training ran on; [] where nothing was trained."""
    with contextlib.suppress(UserError):
      return facts.read(self.task.workdir).starts
    return []

  # --- what is done -----------------------------------------------------------

  def train(self) -> int:
    """Trains on, or imports; returns the last step.

    Raises:
      Cut: there is more to train.
    """
    task, directory = self.task, self.task.workdir / 'checkpoints'
    command = tasks.train(task)
    if task.origin:
      entry = self.entry('import', command)
      # The run itself says whether it came in, not the record of it.
      entry['ended'] = bool(runs.converted_from(task.workdir))
      if not entry['ended']:
        entry['result'] = self.stage('import', command)
        self.keep()
      return checkpoint.find_step(directory, None)
    entry, limit = self.entry('train', command), 60 * task.train_minutes
    while True:
      at = (checkpoint.steps(directory) or [0])[-1]
      left = limit - sum(entry['seconds'])
      over = bool(limit) and left < 1
      entry['ended'] = over or at >= task.config['num_steps']
      if entry['ended']:
        if not at:
          raise UserError(
            f'--train_minutes={task.train_minutes:g} were over before the '
            'first step was: give more'
          )
        entry['result'] = {'step': at}
        self.keep()
        return at
      # In place of its result, what it has kept is looked at: it may have been
      # stopped, by its limit or by whoever can, at any step.
      try:
        self.stage(
          'train', command, stop=signal.SIGTERM, limit=left if limit else None,
          watch=self._watcher(),
        )  # fmt: skip
      except stages.Failed as e:
        found = health.ended(e.told)
        if found:
          for line in health.told([found]):
            terminal.say(line)
          self.keep(health=[found.record()])
        raise
      after = (checkpoint.steps(directory) or [0])[-1]
      if after < task.config['num_steps'] and not limit:
        raise Cut

  def _watcher(self) -> Callable[[], None]:
    """Says now and then how training is, beside the known curve."""
    task, said = self.task, [time.monotonic(), 0]
    comparable = not task.incomparable
    if not comparable:
      terminal.say(
        f'the loss is compared to none: {"; ".join(task.incomparable)}'
      )

    def watch():
      rows = metrics.read(task.workdir / metrics.ROWS)
      if not rows or rows[-1]['step'] == said[1]:
        return
      at = rows[-1]['step']
      found = health.loss(rows, task.recipe.loss if comparable else ())
      news = found.suspects and found.state != self._watched
      if not news and said[1] and time.monotonic() - said[0] < SAY_SECS:
        return
      said[:] = time.monotonic(), at
      told = [found.told]
      rate = self.images_per_sec()
      if rate:
        images = (task.config['num_steps'] - at) * task.config['batch_size']
        told.append(f'{rate:,.4g} images/s')
        if not task.train_minutes:
          told.append(f'{images / rate / 3600:.2f} hours of training left')
      terminal.say('; '.join(told))
      if news:
        for line in health.told([found])[1:]:
          terminal.say(line)
      self._watched = found.state

    return watch


def hours_left(pieces: Pieces, work: cost.Work) -> cost.Hours | None:
  """At the measured rates, for what is not done yet.

  Args:
    pieces: what is done.
    work: all of it.
  """
  task, rates = pieces.task, pieces.rates()
  at = (checkpoint.steps(task.workdir / 'checkpoints') or [0])[-1]
  stores = 1 + task.curve
  ended = [one['name'] for one in pieces.record['stages'] if one['ended']]
  drawn = sum(name.startswith('evaluate') for name in ended)
  rest = work._replace(
    images=max(work.images - at * task.config['batch_size'], 0),
    drawn=work.drawn * max(stores - drawn, 0) // stores,
    scored=0 if 'bits' in ended else work.scored,
  )
  # All of training's time, less what it has had.
  spent = [one['seconds'] for one in pieces.record['stages']
           if one['name'] == 'train']  # fmt: skip
  most = max(task.most_training - sum(sum(s) for s in spent) / 3600, 0)
  return cost.measured(rest, **rates, most=most)


def _device(environment: dict) -> tuple:
  return environment.get('device'), environment.get('num_devices')


def read(path) -> dict | None:
  """A file of JSON; None where it is not there, or damaged."""
  try:
    value = json.loads(path.read_text())
  except (OSError, ValueError):
    return None
  return value if isinstance(value, dict) else None


def _write(path, value: dict) -> None:
  with files.replacing(path) as file:
    file.write(json.dumps(value, indent=2).encode() + b'\n')
