"""Validation of a config, before any file is written or program compiled."""

import math
from collections.abc import Sequence

from ml_collections import config_dict

from diffusion_jax import models, runs
from diffusion_jax.process import gaussian, schedules
from diffusion_jax.runs import completion
from diffusion_jax.training import optim, sharding

LARGEST_BATCH = 10**8  # XLA aborts where a size overflows
AT_LEAST_1 = (
  *('num_steps', 'batch_size', 'microbatches', 'keep_last'),
  'sample.num_images',
)


def check(config: config_dict.ConfigDict, devices: Sequence) -> list[str]:
  """The problems of a config on these devices, a line each; [] if valid.

  Pure arithmetic: no file is accessed, and nothing is compiled.
  """
  return _lacking(config) or _broken(
    *_counts(config),
    *_mesh(config, len(devices)),
    *_network(config),
  )


def check_network(config: config_dict.ConfigDict) -> list[str]:
  """The problems of a config's network and process, like `check`."""
  return _lacking(config) or _broken(*_network(config))


def _lacking(config):
  lacking = ', '.join(completion.lacking(config))
  return lacking and [f'the config has no {lacking}: every run has these keys']


def _broken(*rules):
  return [message for holds, message in rules if not holds]


def _network(config):
  """Yields (holds, message) pairs, like all the functions below."""
  yield from _model(config.model, config.data)
  yield from _process(config)
  yield from _optim(config.optim)


def _counts(config):
  for key, value in runs.flatten(config.to_dict()).items():
    if key in AT_LEAST_1:
      yield value >= 1, f'{key}={value}: at least 1'
    if key == 'batch_size':
      yield value <= LARGEST_BATCH, f'{key}={value}: at most {LARGEST_BATCH}'
    if key == 'seed':
      yield value < 2**32, f'seed={value}: below 2**32'
    if key.endswith('_every') or key in ('seed', 'eval_images'):
      yield value >= 0, f'{key}={value}: not below 0'


def _mesh(config, num_devices):
  try:
    data, fsdp, _ = sharding.mesh_shape(num_devices, **config.mesh)
  except ValueError as e:
    yield False, str(e)
    return
  batch, pieces = config.batch_size, max(config.microbatches, 1)
  parts = pieces * data * fsdp
  what, sizes = 'mesh data x fsdp', f'{data} x {fsdp}'
  if pieces > 1:
    what, sizes = f'microbatches x {what}', f'{pieces} x {sizes}'
  below = max(batch // parts, 1) * parts
  yield (
    batch % parts == 0,
    f'batch_size={batch} is not a multiple of {what} = {sizes} = {parts}: '
    f'use {below} or {below + parts}',
  )


def _model(model, data):
  size, levels = runs.image_shape(data)[:2], len(model.multipliers)
  halved = 2 ** (levels - 1)
  yield (
    model.name in models.MODELS,
    f'model.name={model.name!r}: one of {", ".join(models.MODELS)}',
  )
  yield levels > 0, 'model.multipliers is empty: give one per level'
  whole = all(isinstance(multiplier, int) for multiplier in model.multipliers)
  yield whole, f'model.multipliers={model.multipliers}: whole numbers'
  if not whole:
    return
  yield (
    all(side > 0 and side % halved == 0 for side in size),
    f'data.image_size={data.image_size}: {levels} model.multipliers halve it '
    f'{levels - 1} times, so it must be a multiple of {halved}',
  )
  yield (
    data.channels in (1, 3),
    f'data.channels={data.channels}: 1 (grey) or 3 (RGB)',
  )
  yield (
    model.channels >= 4 and model.channels % 2 == 0,
    f'model.channels={model.channels}: an even number, at least 4',
  )
  for multiplier in sorted(set(model.multipliers)):
    width = model.channels * multiplier
    for name in ('num_groups', 'num_heads'):
      yield (
        model[name] > 0 and width > 0 and width % model[name] == 0,
        f'model.{name}={model[name]} does not divide {width} channels '
        f'(model.channels={model.channels} x {multiplier})',
      )
  yield model.num_blocks >= 1, f'model.num_blocks={model.num_blocks}: >= 1'
  maps = [min(size) // 2**level for level in range(levels)]
  for resolution in model.attention_resolutions:
    yield (
      resolution in maps,
      f'model.attention_resolutions has {resolution}, but the maps are of size '
      f'{", ".join(map(str, maps))}',
    )
  yield 0 <= model.dropout < 1, f'model.dropout={model.dropout}: in [0, 1)'
  yield (
    model.dtype in ('float32', 'bfloat16'),
    f'model.dtype={model.dtype!r}: float32 or bfloat16',
  )


def _process(config):
  for name, value, known in (
    ('loss.prediction', config.loss.prediction, gaussian.PARAMETRISATIONS),
    ('process.schedule', config.process.schedule, schedules.SCHEDULES),
    ('sample.variance', config.sample.variance, gaussian.VARIANCES),
  ):
    yield value in known, f'{name}={value!r}: one of {", ".join(known)}'
  process = config.process
  yield (
    process.num_timesteps >= 2,
    f'process.num_timesteps={process.num_timesteps}: at least 2',
  )
  yield (
    0 < process.beta_start <= process.beta_end < 1,
    f'process.beta_start={process.beta_start}, beta_end={process.beta_end}: '
    '0 < beta_start <= beta_end < 1',
  )
  yield 0 <= config.ema.decay < 1, f'ema.decay={config.ema.decay}: in [0, 1)'


def _optim(config):
  for key, known in (('name', optim.OPTIMIZERS), ('decay', optim.DECAYS)):
    value = config[key]
    yield value in known, f'optim.{key}={value!r}: one of {", ".join(known)}'
  yield 0 < config.lr < math.inf, f'optim.lr={config.lr}: above 0, finite'
  for key in ('b1', 'b2'):
    yield 0 <= config[key] < 1, f'optim.{key}={config[key]}: in [0, 1)'
  yield config.eps > 0, f'optim.eps={config.eps}: above 0'
  for key in ('warmup_steps', 'clip_norm'):
    yield config[key] >= 0, f'optim.{key}={config[key]}: 0 (none) or more'
  rates = {key: config[key] for key in ('weight_decay', 'end_lr')}
  rates |= {f'part_lr.{part}': lr for part, lr in config.part_lr.items()}
  for key, value in rates.items():
    yield 0 <= value < math.inf, f'optim.{key}={value}: 0 or more, finite'
  yield (
    config.weight_decay == 0 or config.name != 'adam',
    f"optim.weight_decay={config.weight_decay} is for optim.name='adamw'; "
    "with 'adam' it must be 0",
  )
  yield (
    config.decay == 'constant' or config.decay_steps > config.warmup_steps,
    f'optim.decay_steps={config.decay_steps}: above optim.warmup_steps='
    f'{config.warmup_steps}; it is the step at which the decay ends',
  )
