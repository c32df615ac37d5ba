"""Judges a run's checkpoints as they appear, and keeps the best.

The cards record what has been judged, so a killed follower resumes. It holds
the best checkpoint so far and all that are not judged yet: the trainer does not
delete these, however old they become.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from diffusion_jax import runs
from diffusion_jax.evaluation import cards
from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, held, saved


def wait_for_first(workdir, poll_secs: float) -> None:
  """Waits until a run has a checkpoint; it need not have started.

  Raises:
    UserError: the run has lost its checkpoints.
  """
  config, directory = workdir / 'config.json', workdir / 'checkpoints'

  def look():
    saved.check(directory)
    return config.exists() and bool(checkpoint.steps(directory))

  def is_there():
    return distributed.on_first(look)

  if not is_there():
    with terminal.waiting(f'waiting for the first checkpoint in {workdir}'):
      while not is_there():
        time.sleep(poll_secs)


def follow(
  workdir,
  read: Callable[[int], Any],
  judge: Callable[[Any], dict],
  card_path: Callable[[int], files.Path],
  result: str,
  poll_secs: float,
) -> dict:
  """Judges each checkpoint, oldest first, until the run ends.

  The run has ended when the checkpoint of its config's num_steps is judged.

  Args:
    workdir: the run's folder.
    read: step -> the checkpoint; raises UserError if it is gone.
    judge: checkpoint -> its card, after writing it to `card_path`.
    card_path: step -> the file of its card.
    result: the result of the cards whose smallest value is the best.
    poll_secs: seconds between checks for new checkpoints.

  Returns:
    the curve, see `curve_of`, which is also written to evaluations/curves.

  Raises:
    UserError: an existing checkpoint cannot be read.
  """
  directory = workdir / 'checkpoints'
  name = card_path(0).stem.removeprefix('step0_')
  path = workdir / 'evaluations' / 'curves' / f'{name}.json'
  known, missed, lock, written = set(), set(), threading.Lock(), [None]

  def look() -> tuple[dict, list[int], bool]:
    """Holds new checkpoints, and writes the curve: (it, those, all judged)."""
    with lock:
      curve = curve_of(workdir, card_path, result)
      judged = {point['step'] for point in curve['points']}
      there = set(checkpoint.steps(directory)) - {0}
      for step in sorted(known - there - judged - missed):
        terminal.say(f'checkpoint {step} was deleted before it was judged')
        missed.add(step)
      known.update(there)
      new = sorted(there - judged - missed)
      best = [curve['best']['step']] if curve['best'] else []
      held.hold(directory, [*best, *new], by=name)
      if curve != written[0]:
        files.write_json(path, curve)
        written[0] = curve
      last = int(runs.read_config(workdir)['num_steps'])
      ended = not new and max(judged | missed, default=0) >= last
      return curve, new, ended

  while True:
    curve, new, ended = distributed.on_first(look)
    if ended:
      return curve
    if not new:
      newest = max((point['step'] for point in curve['points']), default=0)
      title = f'waiting for a checkpoint after step {newest}'
      with terminal.waiting(title, 600):
        while not (new or ended):
          time.sleep(poll_secs)
          _, new, ended = distributed.on_first(look)
      continue
    step = new[0]
    try:
      found = distributed.everywhere(lambda step=step: read(step))
    except UserError:
      if step in distributed.on_first(lambda: checkpoint.steps(directory)):
        raise
      continue  # deleted in between, which the next look reports
    with terminal.repeating(lambda: _hold(look), poll_secs):
      value = judge(found)['results'][result]
    best, told = curve['best'], 'the best so far'
    if best and best['value'] <= value:
      told = f'the best is {cards.number(best["value"])} at step {best["step"]}'
    terminal.say(f'step {step}: {result} {cards.number(value)}, {told}')


def _hold(look):
  """Holds new checkpoints while one is judged."""
  try:
    look()
  except (OSError, UserError) as e:
    terminal.say(f'new checkpoints cannot be held for now ({e})')


def curve_of(workdir, card_path, result: str) -> dict:
  """A result of a run's cards as a function of the step.

  Args:
    workdir: the run's folder.
    card_path: step -> the file of its card.
    result: the name of the result.

  Returns:
    see `cards.curve`.
  """
  found = []
  for path in sorted((workdir / 'evaluations').glob('*.json')):
    with contextlib.suppress(UserError):  # the report names damaged cards
      card = cards.read(path)
      step = card['subject'].get('step')
      if step is not None and card_path(step).stem == path.stem:
        found.append({**card, 'name': path.stem})
  return cards.curve(found, result)


def text(curve: dict) -> str:
  """The curve as a table, with the best point marked.

  Args:
    curve: a result of `curve_of`.
  """
  rows = [
    [str(point['step']), cards.number(point['value'])
     + (' *' if point == curve['best'] else '  ')]
    for point in curve['points']
  ]  # fmt: skip
  lines = terminal.table(['step', f'{curve["result"]}  '], rows)
  best = curve['best']
  if best:
    lines += ['', f'* the best, at step {best["step"]}: --step={best["step"]}']
  return '\n'.join(lines)
