"""What is asked for, and the command line of each stage."""

import dataclasses
import math
from collections.abc import Mapping

from diffusion_jax.reproduction import published, table
from diffusion_jax.reproduction.cost import Work
from diffusion_jax.reproduction.published import Recipe
from diffusion_jax.system import files


@dataclasses.dataclass(frozen=True)
class Task:
  """A reproduction, as its command line asks for it; all of it is checked.

  Attributes:
    name: of the config, see `published.find`.
    config: the run's, plain.
    shipped: the recipe that is shipped under this name; None = there is none.
    config_flags: the flags that give the config.
    workdir: of the run.
    directory: of the results.
    origin: what is imported in place of training; None = trained.
    by_inception: whether that judges.
    published_judge: whether its weights are known to be those of 2015-12-05.
    judging: flags that go to evaluation as they are.
    metrics: that evaluation takes of samples.
    num_samples: that are judged.
    sampler: 'ancestral' or 'ddim'.
    sampling_steps: of each sample.
    evaluations: of the network, for each.
    bits: whether bits per dimension are measured too.
    measure: whether this machine is measured before anything is known of it.
    minutes: that a call works; 0 = no limit.
    train_minutes: that training takes in all; 0 = to the config's num_steps.
    curve: how many earlier checkpoints are judged.
  """

  name: str
  config: Mapping
  shipped: Mapping | None
  config_flags: tuple[str, ...]
  workdir: files.Path
  directory: files.Path
  origin: str | None
  by_inception: bool
  published_judge: bool
  judging: tuple[str, ...]
  metrics: tuple[str, ...]
  num_samples: int
  sampler: str
  sampling_steps: int
  evaluations: int
  bits: bool
  measure: bool
  minutes: float
  train_minutes: float
  curve: int

  @property
  def most_training(self) -> float:
    """Hours that training may take."""
    return self.train_minutes / 60 or math.inf

  @property
  def recipe(self) -> Recipe:
    """What is published of it."""
    return published.find(self.name)

  @property
  def differences(self) -> list[str]:
    """What of the config is not the recipe."""
    return self._differences(
      table.FREE_IF_IMPORTED if self.origin else table.FREE
    )

  @property
  def incomparable(self) -> list[str]:
    """Why the loss cannot be compared to the healthy run's; [] = it can."""
    if not self.recipe.loss:
      return [f'no curve of {self.name} is on record']
    return self._differences(table.FREE_FOR_LOSS)

  def _differences(self, free) -> list[str]:
    if self.shipped is None:
      return [f'{self.name} is no shipped recipe']
    return table.differences(self.shipped, self.config, free)


def _binary(name: str, *flags: str) -> list[str]:
  return ['-m', f'diffusion_jax.{name}', *flags, '--json']


def measure(task: Task) -> list[str]:
  """Times a step and an evaluation on this machine."""
  # Two steps of sampling are enough, for any that the config asks for.
  key = '--config.sample.num_steps='
  given = [flag for flag in task.config_flags if not flag.startswith(key)]
  batch = f'--sample_batch_size={min(task.num_samples, 256)}'
  return _binary('preflight', *given, f'{key}2', batch, '--measure')


def train(task: Task) -> list[str]:
  """Trains, or imports."""
  where = str(task.workdir)
  if task.origin:
    return _binary(
      'convert', f'--from={task.origin}', f'--to={where}', *task.config_flags
    )
  return _binary('train', *task.config_flags, f'--workdir={where}')


def evaluate(task: Task, step: int | str) -> list[str]:
  """Draws samples of a checkpoint, and judges them."""
  return _binary(
    'evaluate', f'--workdir={task.workdir}', f'--step={step}',
    f'--num_samples={task.num_samples}', f'--sampler={task.sampler}',
    f'--num_steps={task.sampling_steps}',
    f'--metrics={",".join(task.metrics)}', f'--output={store(task, step)}',
    *task.judging,
  )  # fmt: skip


def bits(task: Task, step: int | str) -> list[str]:
  """Bits per dimension of the held-out images, by the bound."""
  moved = [flag for flag in task.judging if flag.startswith('--data_path=')]
  return _binary(
    'evaluate', f'--workdir={task.workdir}', f'--step={step}',
    '--metrics=bpd', *moved,
  )  # fmt: skip


def store(task: Task, step: int | str) -> files.Path:
  """The samples' folder."""
  name = f'reproduction_step{step}_{task.sampler}{task.sampling_steps}'
  return task.workdir / 'samples' / name


def earlier(steps: list[int], count: int) -> list[int]:
  """Checkpoints to judge beside the last, spread over training.

  Args:
    steps: that have a checkpoint, by step.
    count: how many; fewer where there are not as many.

  Returns:
    those nearest to the even ones, by step.
  """
  last, chosen = steps[-1], set()
  there = [step for step in steps[:-1] if step > 0]
  for i in range(1, count + 1):
    left = [step for step in there if step not in chosen]
    if left:
      wanted = last * i / (count + 1)
      chosen.add(min(left, key=lambda step: abs(step - wanted)))
  return sorted(chosen)


def work(task: Task, flops: tuple[float, float]) -> Work:
  """All that is to be computed, from the beginning.

  Args:
    task: what is asked for.
    flops: of `cost.flops_of`.
  """
  config, recipe, stores = task.config, task.recipe, 1 + task.curve
  heldout = recipe.num_heldout or 0
  # The reference and the floor are looked at once.
  seen = (recipe.num_train or 0) + min(heldout, task.num_samples)
  return Work(
    0 if task.origin else config['num_steps'] * config['batch_size'],
    stores * task.num_samples * task.evaluations,
    task.bits * heldout * config['process']['num_timesteps'],
    stores * task.num_samples + seen if task.by_inception else 0,
    *flops,
  )
