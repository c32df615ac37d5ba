"""A profile of chosen training steps, for Perfetto and TensorBoard."""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint

FOLDER = 'profile'  # in the workdir


class Steps(NamedTuple):
  """The profile begins when step `first` is done, and ends with step `last`."""

  first: int
  last: int


def parse(given: str | None) -> Steps | None:
  """'200:210' -> the ten steps after step 200.

  Raises:
    UserError: it is not of this form.
  """
  if given is None:
    return None
  match = re.fullmatch(r'(\d+):(\d+)', given)
  if not match or int(match[1]) >= int(match[2]):
    raise UserError(
      f'--profile={given}: two steps, the second after the first, as 200:210'
    )
  return Steps(*map(int, match.groups()))


def check(given: str | None, workdir, num_steps: int) -> None:
  """Raises UserError unless the run will do these steps.

  Args:
    given: the value of --profile.
    workdir: of the run.
    num_steps: the step to train to.
  """
  if (steps := parse(given)) is None:
    return
  start = distributed.on_first(
    lambda: max(checkpoint.steps(files.at(workdir) / 'checkpoints'), default=0)
  )
  if steps.last > num_steps:
    raise UserError(
      f'--profile={given}: training ends at step {num_steps} (num_steps)'
    )
  if steps.first <= start:  # the first step compiles
    raise UserError(
      f'--profile={given}: training starts from step {start}, and the step '
      f'after it compiles: begin at step {start + 1} or later'
    )


@contextlib.contextmanager
def profiled(
  steps: Steps | None, start: int, workdir, per_call: int = 1
) -> Iterator[Callable[[Callable], Callable]]:
  """Profiles steps of process 0 into the workdir.

  Whole calls are profiled. A run that stops in between keeps what was profiled
  until then, and one that fails keeps none.

  Args:
    steps: which; None = none.
    start: the step that training starts from.
    workdir: of the run.
    per_call: steps in a call of the step function.

  Yields:
    A function that wraps the step function, (state, batch) -> (state, metrics).
  """
  if steps is None or not distributed.is_first():
    yield lambda step_fn: step_fn
    return
  at, begun, running = start, False, contextlib.ExitStack()

  def wrap(step_fn):
    def called(state, batch):
      nonlocal at, begun
      if not begun and at >= steps.first:
        jax.block_until_ready(state)  # so that no earlier step is in it
        running.enter_context(_written(at, lambda: at, workdir))
        begun = True
      state, values = step_fn(state, batch)
      at += per_call - at % per_call
      if begun and at >= steps.last:
        jax.block_until_ready(state)
        running.close()
      return state, values

    return called

  with running:
    yield wrap


@contextlib.contextmanager
def _written(first: int, reached: Callable[[], int], workdir) -> Iterator[None]:
  """Profiles the steps that are done inside.

  Args:
    first: the last step before.
    reached: () -> the last step of them, called at the end.
    workdir: of the run.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # Python's calls would hide everything else
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      yield
    steps = f'{first + 1} to {reached()}'
    # TensorBoard looks for this path.
    place = files.at(workdir) / FOLDER / 'plugins' / 'profile'
    place /= f'steps_{steps.replace(" ", "_")}'
    try:
      files.make(place)
      for path in Path(folder).rglob('*'):
        if path.name.endswith(('.xplane.pb', '.trace.json.gz')):
          name = path.name[path.name.index('.') :]
          with files.replacing(place / f'process_0{name}') as file:
            file.write(path.read_bytes())
    except (OSError, UserError) as e:
      reason = getattr(e, 'strerror', None) or str(e)
      terminal.say(f'the profile cannot be written ({reason}): {place}')
      return
  terminal.say(
    f'profile of steps {steps}: open {place}/process_0.trace.'
    f'json.gz in ui.perfetto.dev, or {files.at(workdir) / FOLDER} in '
    'TensorBoard with xprof'
  )
