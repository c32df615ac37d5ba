"""Runs a task in pieces: finished stages are recorded, the others resume."""

import contextlib
import json
import math
import shlex
import signal
import statistics
import time
from collections.abc import Callable

from diffusion_jax import runs
from diffusion_jax.evaluation import cards, tables
from diffusion_jax.reproduction import cost, health, results, stages
from diffusion_jax.reproduction import task as tasks
from diffusion_jax.system import files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, metrics

RECORD = 'reproduction.json'
MEASURE_SECS = 900.0  # time limit of the measurement
SAY_SECS = 120.0
# Reserved at the end of a call, to save a stage and write results: END_SECS or
# the share END, whichever is less. Shares of a call's time: MEASURING limits
# the measurement; with less than LEAST left, no stage is started.
END_SECS, END = stages.GRACE + 5, 0.25
MEASURING = 0.25
LEAST = 0.05


class Cut(Exception):
  """This call's time is up, or SIGTERM arrived; everything is saved."""


def catch_signals() -> None:
  """Makes SIGTERM raise Cut, and SIGINT KeyboardInterrupt."""

  def cut(*_):
    raise Cut

  signal.signal(signal.SIGTERM, cut)
  # A shell makes background jobs ignore it, and stages inherit that.
  signal.signal(signal.SIGINT, signal.default_int_handler)


class Pieces:
  """The record of a task, and the means to run its stages.

  Attributes:
    task: the task.
    whole: its whole computation.
    record: the record as on disk: 'stages', each with its name, command, the
      seconds of every piece, whether it has ended, and its result; 'files',
      the files that it wrote to the folder.

  Args:
    start: start of this call, in terms of time.monotonic().
  """

  def __init__(self, task: tasks.Task, whole: cost.Work, start: float):
    self.task, self.whole, self._start = task, whole, start
    # Results may be from an earlier protocol: they are computed again.
    before = read(task.directory / RECORD) or {}
    self.record = {
      'workdir': str(files.resolved(task.workdir)),
      'stages': before.get('stages', []),
      'files': before.get('files', []),
    }

  # --- the record -------------------------------------------------------------

  def begin(self) -> None:
    """Removes an earlier verdict, which may be from another protocol."""
    if self.record['stages']:
      self.keep(done=False)
    if results.TABLE in self.record['files']:
      (self.task.directory / results.TABLE).unlink(missing_ok=True)

  def keep(self, **changes) -> None:
    """Updates the record, and writes it once the workdir holds a run.

    Until then it stays in memory, because training needs an empty folder.
    """
    self.record |= changes
    is_run = (self.task.workdir / 'config.json').exists()
    if is_run or not self.task.is_inside:
      files.write_json(self.task.directory / RECORD, self.record)

  def entry(self, name: str, command: list[str]) -> dict:
    """The record of a stage; training resumes even with a changed command."""
    for one in self.record['stages']:
      if one['command'] == command or name == one['name'] == 'train':
        one['command'] = command
        return one
    new = {'name': name, 'command': command, 'seconds': [], 'ended': False,
           'result': None}  # fmt: skip
    self.record['stages'].append(new)
    return new

  # --- stages -----------------------------------------------------------------

  def left(self) -> float:
    """Seconds left in this call for work."""
    whole = 60 * self.task.minutes or math.inf
    return whole - min(END_SECS, END * whole) - (time.monotonic() - self._start)

  def stage(
    self,
    name: str,
    command: list[str],
    limit: float = math.inf,
    **how,
  ) -> dict | None:
    """Runs a stage within the limits of this call and its own.

    Args:
      name: its name in the record.
      command: arguments for Python.
      limit: its own limit in seconds.
      **how: stop and watch, see `stages.run`.

    Returns:
      its result; None if its own limit stopped it.

    Raises:
      Cut: the call's limit stopped it, or left no time to start it.
      Failed: it failed.
    """
    if self.left() < LEAST * 60 * self.task.minutes:
      raise Cut
    terminal.say(f'\n$ python {shlex.join(command)}')
    entry, result, start = self.entry(name, command), None, time.monotonic()
    try:
      deadline = start + min(self.left(), limit)
      result = stages.run(command, deadline=deadline, **how)
    finally:
      entry['seconds'].append(round(time.monotonic() - start, 1))
      entry['ended'] = result is not None
      self.keep()
    if result is None and self.left() <= 0:
      raise Cut
    return result

  def judged(self, name: str, command: list[str]) -> list[dict]:
    """The cards of an evaluation, from the record or from running it."""
    entry = self.entry(name, command)
    if entry['ended']:
      with contextlib.suppress(UserError, TypeError):
        return [cards.read(path) for path in entry['result']]
    result = self.stage(name, command)
    if result is None:  # only the call's limit can stop it
      raise Cut
    made = result.get('cards', [result])
    entry['result'] = [card['path'] for card in made]
    self.keep()
    for card in made:
      terminal.say(tables.text(card))
    return [cards.read(path) for path in entry['result']]

  # --- rates ------------------------------------------------------------------

  def measure(self) -> None:
    """Measures this machine's rates, unless they are known already."""
    task, command = self.task, tasks.measure(self.task)
    if not task.measure or self._trained_at() or self._measured() is not None:
      return
    limit = min(MEASURE_SECS, MEASURING * 60 * task.minutes or math.inf)
    result = {}
    if found := self.stage('measure', command, limit=limit):
      result = {'environment': found['environment'], **found['measured']}
    else:
      terminal.say(f'not measured: it took more than {limit / 60:.2g} minutes')
    self.entry('measure', command)['result'] = result
    self.keep()

  def _measured(self) -> dict | None:
    """The measurement; {} if it took too long, None if it was not tried."""
    command = tasks.measure(self.task)
    done = (x for x in self.record['stages'] if x['command'] == command)
    return next(done, {'result': None})['result']

  def _trained_at(self) -> float | None:
    """Images per second in the newest rows."""
    rows = metrics.read(self.task.workdir / metrics.ROWS)
    rates = [r['images_per_sec'] for r in rows[-50:] if 'images_per_sec' in r]
    return statistics.median(rates) if rates else None

  def rates(self) -> dict:
    """Measured rates, preferably training's own; None = not measured."""
    known = self._measured() or {}
    train, sample = known.get('train', {}), known.get('sample')
    return {
      'images_per_sec': self._trained_at() or train.get('images_per_sec'),
      'evaluations_per_sec': sample and 1 / sample['seconds_per_evaluation'],
    }

  # --- what is done -----------------------------------------------------------

  def at(self) -> int:
    """The step of the last checkpoint, or 0."""
    return (checkpoint.steps(self.task.workdir / 'checkpoints') or [0])[-1]

  def train(self) -> int:
    """Trains or imports; returns the last step.

    Raises:
      Cut: training is not finished.
    """
    task, command = self.task, tasks.train(self.task)
    if task.origin:
      # Whether it was imported is read from the run, not from the record.
      if not runs.converted_from(task.workdir):
        self.stage('import', command)
      return checkpoint.find_step(task.workdir / 'checkpoints', None)
    entry, last = self.entry('train', command), task.config['num_steps']
    limit, watch = 60 * task.train_minutes or math.inf, self._watcher()
    while True:
      at, left = self.at(), limit - sum(entry['seconds'])
      if at >= last or left < 1:
        break
      # The checkpoints show how far it came, not its result: its limit or a
      # signal may have stopped it at any step.
      how = {'stop': signal.SIGTERM, 'limit': left, 'watch': watch}
      try:
        self.stage('train', command, **how)
      except stages.Failed as e:
        if not (found := health.ended(e.told)):
          raise
        terminal.say('\n'.join(health.told([found])))
        self.keep(done=False, health=[found.record()])
        raise UserError(e.told) from e
      if limit == math.inf and self.at() < last:
        raise Cut
    if not at:
      raise UserError(
        f'--train_minutes={task.train_minutes:g} ended before the first step: '
        'give more'
      )
    entry |= {'ended': True, 'result': {'step': at}}
    self.keep()
    return at

  def _watcher(self) -> Callable[[], None]:
    """A function that prints how training compares with the known curve."""
    task, why = self.task, self.task.incomparable
    said = {'step': 0, 'time': -math.inf, 'state': ''}
    if why:
      terminal.say(f'the loss cannot be compared: {"; ".join(why)}')

    def watch():
      rows, now = metrics.read(task.workdir / metrics.ROWS), time.monotonic()
      at = rows[-1]['step'] if rows else 0
      found = health.loss(rows, () if why else task.recipe.loss)
      news = found.suspects and found.state != said['state']
      if at == said['step'] or not (news or now - said['time'] >= SAY_SECS):
        return
      said.update(step=at, time=now, state=found.state)
      told = [found.told]
      if rate := self.rates()['images_per_sec']:
        images = (task.config['num_steps'] - at) * task.config['batch_size']
        told.append(f'{rate:,.4g} images/s')
        if not task.train_minutes:
          told.append(f'{images / rate / 3600:.2f} hours of training left')
      causes = health.told([found])[1:] if news else []
      terminal.say('\n'.join(['; '.join(told), *causes]))

    return watch

  def say_measured(self) -> None:
    """Prints the measured rates, and the hours left at these rates."""
    task, whole, done = self.task, self.whole, self.record['stages']
    stores = 1 + task.curve
    ended = [one['name'] for one in done if one['ended']]
    drawn = sum(name.startswith('evaluate') for name in ended)
    rest = whole._replace(
      images=max(whole.images - self.at() * task.config['batch_size'], 0),
      drawn=whole.drawn * max(stores - drawn, 0) // stores,
      scored=0 if 'bits' in ended else whole.scored,
    )
    spent = sum(sum(x['seconds']) for x in done if x['name'] == 'train')
    most, rates = max(task.most_training - spent / 3600, 0), self.rates()
    if told := [
      f'{value:,.4g} {name.replace("_per_sec", "/s")}'
      for name, value in rates.items()
      if value
    ]:
      terminal.say(f'measured here: {", ".join(told)}')
    if left := cost.hours(rest, **rates, most=most):
      terminal.say(
        f'left at these rates: {left.training:.2f} h of training, '
        f'{left.drawing:.2f} h of drawing, {left.bits:.2f} h of bits; judging '
        'and compiling not counted'
      )

  def conclude(self, left: list[str], step: int | None, made: list[dict]):
    """Records what this call did, and fills the folder once there are cards.

    Args:
      left: what is left to do.
      step: the last step, if there are cards.
      made: the cards.
    """
    task, found = self.task, {}
    if made:
      found = results.judge(task, step, made)
      written = results.collect(task, step, made, found, self.record['files'])
      found = {'files': written[0], 'left_out': written[1], **found}
    hours = {
      name: cost.estimate(task, self.whole, peak)._asdict()
      for name, peak in cost.PLACES.items()
    }
    self.keep(
      done=not left,
      left=left,
      config=task.name,
      differences=task.differences,
      hardware=[card['environment'] for card in made],
      rates=self.rates(),
      cost={**self.whole._asdict(), 'hours_estimated': hours},
      **found,
    )


def read(path) -> dict | None:
  """The object in a JSON file; None if the file is missing or damaged."""
  with contextlib.suppress(OSError, ValueError):
    value = json.loads(path.read_text())
    return value if isinstance(value, dict) else None
  return None
