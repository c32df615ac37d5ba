"""The task, and the command line of each of its stages."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from diffusion_jax import runs
from diffusion_jax.reproduction import published
from diffusion_jax.system import files

# Keys that may differ from a shipped config without changing the result, except
# for noise. Not data.heldout_every: it takes images away from training.
FREE = (
  *('seed', 'microbatches', 'mesh', 'keep_last', 'eval_images', 'data.path'),
  *('data.heldout_split', 'model.dtype'),
)
# In addition, for imported weights: how their authors trained them.
FREE_IF_IMPORTED = (
  *(*FREE, 'num_steps', 'batch_size', 'optim', 'ema', 'data.flip'),
  'model.dropout',
)
# Keys that do not change the loss at a step after the warm-up.
FREE_FOR_LOSS = (*FREE, 'num_steps', 'data.name', 'ema', 'optim.warmup_steps')


@dataclasses.dataclass(frozen=True)
class Task:
  """A reproduction, as specified by a checked command line.

  Attributes:
    name: name of the config, see `published.find`.
    config: the run's config, as a plain dict.
    shipped: the shipped recipe of this name, or None.
    config_flags: the flags that specify the config.
    workdir: folder of the run.
    directory: folder of the results.
    origin: weights to import instead of training, or None.
    by_inception: whether Inception judges the samples.
    published_judge: whether its weights are known to be those of 2015-12-05.
    judging: flags that are passed on to evaluation.
    metrics: metrics of the samples.
    num_samples: number of samples to judge.
    sampler: the sampler.
    sampling_steps: sampling steps.
    guidance: weight of the samples' guidance; None = the config's.
    evaluations: network evaluations per sample, of one row each.
    bits: whether to measure bits per dimension.
    measure: whether to measure this machine if no rate is known.
    minutes: time limit of a call; 0 = none.
    train_minutes: time limit of training over all calls; 0 = none.
    curve: number of earlier checkpoints to judge.
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
  guidance: float | None
  evaluations: int
  bits: bool
  measure: bool
  minutes: float
  train_minutes: float
  curve: int

  @property
  def is_inside(self) -> bool:
    """Whether the results are inside the run's folder."""
    results = files.resolved(self.directory)
    return files.resolved(self.workdir) in files.parents(results)

  @property
  def most_training(self) -> float:
    """Time limit of training, in hours."""
    return self.train_minutes / 60 or math.inf

  @property
  def recipe(self) -> published.Recipe:
    """The published recipe."""
    return published.find(self.name)

  @property
  def differences(self) -> list[str]:
    """The differences of the config from the recipe."""
    return self._differences(FREE_IF_IMPORTED if self.origin else FREE)

  @property
  def incomparable(self) -> list[str]:
    """Reasons why the loss cannot be compared with the healthy run's."""
    if not self.recipe.loss:
      return [f'no published curve of {self.name} is known']
    return self._differences(FREE_FOR_LOSS)

  def _differences(self, free) -> list[str]:
    """A line for each key that differs and is not one of `free`."""
    if self.shipped is None:
      return [f'{self.name} is not a shipped recipe']
    there, here = runs.flatten(self.shipped), runs.flatten(self.config)
    return [
      f'{key}: {there.get(key)} in the recipe, {here.get(key)} here'
      for key in runs.differences(self.shipped, self.config)
      if not (
        (key.endswith('_every') and '.' not in key)
        or (key.startswith('sample.') and key != 'sample.variance')
        or any(key == name or key.startswith(f'{name}.') for name in free)
      )
    ]


def _binary(name: str, *flags: str) -> list[str]:
  return ['-m', f'diffusion_jax.{name}', *flags, '--json']


def measure(task: Task) -> list[str]:
  """The command that times a training step and a network evaluation."""
  # Two sampling steps are enough for any sampler.
  key = '--config.sample.num_steps='
  given = [flag for flag in task.config_flags if not flag.startswith(key)]
  batch = f'--sample_batch_size={min(task.num_samples, 256)}'
  return _binary('preflight', *given, f'{key}2', batch, '--measure')


def train(task: Task) -> list[str]:
  """The command that trains or imports."""
  if task.origin:
    places = (f'--from={task.origin}', f'--to={task.workdir}')
    return _binary('convert', *places, *task.config_flags)
  return _binary('train', *task.config_flags, f'--workdir={task.workdir}')


def judgements(
  task: Task,
  step: int | str = 'LAST',
  others: Sequence[int | str] = ('EARLIER',),
) -> list[tuple[str, str, list[str]]]:
  """The stages after training: (name in the record, what it makes, command).

  Args:
    task: the task.
    step: step of the last checkpoint; by default a placeholder.
    others: steps of earlier checkpoints, if the task has any.
  """
  each = [(step, 'samples and their distance')]
  each += [(at, 'earlier checkpoints') for at in others if task.curve]
  made = [
    (f'evaluate step {at}', what, evaluate(task, at)) for at, what in each
  ]
  if task.bits:
    made.insert(1, ('bits', 'bits per dimension', bits(task, step)))
  return made


def evaluate(task: Task, step: int | str) -> list[str]:
  """The command that draws and judges samples of a checkpoint."""
  return _binary(
    'evaluate', f'--workdir={task.workdir}', f'--step={step}',
    f'--num_samples={task.num_samples}', f'--sampler={task.sampler}',
    f'--num_steps={task.sampling_steps}',
    f'--metrics={",".join(task.metrics)}', f'--output={store(task, step)}',
    *_guidance(task), *task.judging,
  )  # fmt: skip


def _guidance(task: Task) -> list[str]:
  return [] if task.guidance is None else [f'--guidance={task.guidance:g}']


def bits(task: Task, step: int | str) -> list[str]:
  """The command that bounds the bits per dimension of the held-out images."""
  moved = [flag for flag in task.judging if flag.startswith('--data_path=')]
  return _binary(
    'evaluate', f'--workdir={task.workdir}', f'--step={step}',
    '--metrics=bpd', *moved,
  )  # fmt: skip


def store(task: Task, step: int | str) -> files.Path:
  """The folder of the samples."""
  name = f'reproduction_step{step}_{task.sampler}{task.sampling_steps}'
  name += ''.join(_guidance(task)).replace('--guidance=', '_guidance')
  return task.workdir / 'samples' / name


def earlier(steps: list[int], count: int) -> list[int]:
  """Checkpoints to judge in addition to the last, spread over training.

  Args:
    steps: sorted steps that have a checkpoint.
    count: number of checkpoints; fewer if there are not enough.

  Returns:
    sorted steps, those nearest to even spacing.
  """
  *there, last = steps
  left = [step for step in there if step > 0]
  chosen = []
  for i in range(1, min(count, len(left)) + 1):
    wanted = last * i / (count + 1)
    chosen.append(min(left, key=lambda step: abs(step - wanted)))
    left.remove(chosen[-1])
  return sorted(chosen)
