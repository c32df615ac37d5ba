"""Judging a run's checkpoints as they come, and keeping the best.

What was judged is told by the cards, so a follower that was killed goes on. The
best checkpoint so far is held, and all that have come and are not judged yet:
the trainer does not delete them, however old they become.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from diffusion_jax import runs
from diffusion_jax.evaluation import cards
from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, held


def wait_for_first(workdir, poll_secs: float) -> None:
  """Returns once a run has a checkpoint; it need not have begun."""

  def is_there():
    return distributed.on_first(
      lambda: (
        (workdir / 'config.json').exists()
        and bool(checkpoint.steps(workdir / 'checkpoints'))
      )
    )

  if not is_there():
    with terminal.waiting(f'waiting for a first checkpoint in {workdir}'):
      while not is_there():
        time.sleep(poll_secs)


def follow(
  workdir,
  read: Callable[[int], Any],
  judge: Callable[[Any], dict],
  card_path: Callable[[int], files.Path],
  *,
  result: str,
  poll_secs: float,
) -> dict:
  """Judges each checkpoint, oldest first, until the run has ended.

  It has ended when a checkpoint of its config's num_steps is judged.

  Args:
    workdir: the run's folder.
    read: step -> the checkpoint, or UserError where it is gone.
    judge: checkpoint -> its card, which it has written to `card_path`.
    card_path: step -> the file of its card.
    result: of the cards' results, the one whose least makes the best.
    poll_secs: between looks.

  Returns:
    the curve, see `curve_of`, which is kept in evaluations/curves too.

  Raises:
    UserError: a checkpoint that is there cannot be read.
  """
  directory = workdir / 'checkpoints'
  name = card_path(0).stem.removeprefix('step0_')
  path = workdir / 'evaluations' / 'curves' / f'{name}.json'
  known, missed, lock, written = set(), set(), threading.Lock(), [None]

  def look() -> dict:
    """What there is to do; holds it, and keeps the curve."""
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
        cards.write(path, curve)
        written[0] = curve
      last = int(runs.read_config(workdir)['num_steps'])
      ended = not new and max(judged | missed, default=0) >= last
      return {'curve': curve, 'new': new, 'ended': ended}

  while True:
    seen = distributed.on_first(look)
    curve = seen['curve']
    if seen['ended']:
      return curve
    if not seen['new']:
      newest = max((point['step'] for point in curve['points']), default=0)
      with terminal.waiting(
        f'waiting for a checkpoint after step {newest}', 600
      ):
        while not (seen['new'] or seen['ended']):
          time.sleep(poll_secs)
          seen = distributed.on_first(look)
      continue
    step = seen['new'][0]
    try:
      found = distributed.everywhere(lambda step=step: read(step))
    except UserError:
      if step in distributed.on_first(lambda: checkpoint.steps(directory)):
        raise
      continue  # deleted in between, which the next look tells
    with _repeating(look, poll_secs):
      value = judge(found)['results'][result]
    best, told = curve['best'], 'the best so far'
    if best and best['value'] <= value:
      told = f'the best is {cards.number(best["value"])} of step {best["step"]}'
    terminal.say(f'step {step}: {result} {cards.number(value)}, {told}')


@contextlib.contextmanager
def _repeating(look: Callable[[], dict], seconds: float) -> Iterator[None]:
  """Looks now and then meanwhile, for what comes is to be held."""
  done = threading.Event()

  def repeat():
    while not done.wait(seconds):
      try:
        look()
      except (OSError, UserError) as e:
        terminal.say(f'new checkpoints cannot be held for now ({e})')

  thread = threading.Thread(target=repeat, daemon=True)
  if distributed.is_first():
    thread.start()
  try:
    yield
  finally:
    done.set()
    if thread.is_alive():
      thread.join()


def curve_of(workdir, card_path, result: str) -> dict:
  """What the cards of a run tell, step by step.

  Args:
    workdir: the run's folder.
    card_path: step -> the file of its card.
    result: of the cards' results.

  Returns:
    as of `cards.curve`.
  """
  found = []
  for path in sorted((workdir / 'evaluations').glob('*.json')):
    with contextlib.suppress(UserError):  # the report tells of a damaged one
      found.append({**cards.read(path), 'name': path.stem})
  return cards.curve(
    [
      card
      for card in found
      if 'step' in card['subject']
      and card_path(card['subject']['step']).stem == card['name']
    ],
    result,
  )


def text(curve: dict) -> str:
  """The curve as a table, with the best marked.

  Args:
    curve: of `curve_of`.
  """
  rows = [
    [str(point['step']), cards.number(point['value'])
     + (' *' if point == curve['best'] else '  ')]
    for point in curve['points']
  ]  # fmt: skip
  lines = terminal.table(['step', f'{curve["result"]}  '], rows)
  best = curve['best']
  if best:
    lines += ['', f'* the least, at step {best["step"]}: --step={best["step"]}']
  return '\n'.join(lines)
