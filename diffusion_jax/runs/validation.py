"""Validation of a config, before any file is written or program compiled."""

import math
import re
from collections.abc import Sequence

from ml_collections import config_dict

from diffusion_jax import codecs, conditioning, models, objectives, runs
from diffusion_jax.models import rules, styles, unet
from diffusion_jax.objectives import laws, weights
from diffusion_jax.process import gaussian, schedules
from diffusion_jax.runs import autoencoder_rules, completion, pairs, upscaled
from diffusion_jax.system.errors import hint
from diffusion_jax.training import averages, optim, sharding

LARGEST_BATCH = 10**8  # XLA aborts where a size overflows

# regex of dotted keys: (the allowed values in words, whether a value is one)
OF_RUN = {
  'num_steps|microbatches|keep_last': ('at least 1', lambda x: x >= 1),
  'steps_per_dispatch': ('at least 1', lambda x: x >= 1),
  'batch_size|sample.num_images': ('at least 1', lambda x: x >= 1),
  'batch_size': (f'at most {LARGEST_BATCH}', lambda x: x <= LARGEST_BATCH),
  'seed': ('below 2**32', lambda x: x < 2**32),
  '.*_every|seed|eval_images': ('not below 0', lambda x: x >= 0),
}
OF_NETWORK = {
  'data.channels': ('1 (grey) or 3 (RGB)', lambda x: x in (1, 3)),
  'model.channels': (
    'an even number, at least 4',
    lambda x: x >= 4 and x % 2 == 0,
  ),
  'model.(num_blocks|patch_size)': ('>= 1', lambda x: x >= 1),
  'model.head_channels': ('0 (as num_heads) or more', lambda x: x >= 0),
  'model.time_scale': ('above 0, finite', lambda x: 0 < x < math.inf),
  'model.dropout|ema.decay|optim.b[12]': ('in [0, 1)', lambda x: 0 <= x < 1),
  'data.augment': ('in [0, 1]', lambda x: 0 <= x <= 1),
  'ema.decays': (
    'different numbers in (0, 1)',
    lambda x: len({*x}) == len(x) and all(0 < y < 1 for y in x),
  ),
  'ema.profiles': (
    f'different numbers above 0, at most {averages.WIDEST}',
    lambda x: len({*x}) == len(x) and all(0 < y <= averages.WIDEST for y in x),
  ),
  'lora.rank': ('0 (none) or more', lambda x: x >= 0),
  'lora.alpha': ('0 (as lora.rank) or more', lambda x: 0 <= x < math.inf),
  'process.num_timesteps': ('at least 2', lambda x: x >= 2),
  'loss.(law_std|gamma|huber|variance_weight)': (
    '0 or more, finite',
    lambda x: 0 <= x < math.inf,
  ),
  'loss.(law_mean|bias)': ('finite', math.isfinite),
  'process.shift|loss.(sigma_data|k)': (
    'above 0, finite',
    lambda x: 0 < x < math.inf,
  ),
  'optim.lr': ('above 0, finite', lambda x: 0 < x < math.inf),
  'optim.eps': ('above 0', lambda x: x > 0),
  'optim.(warmup_steps|clip_norm|decay_from)': (
    '0 (none) or more',
    lambda x: x >= 0,
  ),
  'optim.(weight_decay|end_lr|part_lr.*)': (
    '0 or more, finite',
    lambda x: 0 <= x < math.inf,
  ),
}
NAMES = {
  'codec.name': codecs.CODECS,
  'loss.name': (
    *objectives.OBJECTIVES,
    *objectives.AUTOENCODERS,
    objectives.CONTRASTIVE,
  ),
  'model.name': models.MODELS,
  'model.dtype': ('float32', 'bfloat16'),
  'model.remat': unet.REMAT,
  'model.style': styles.STYLES,
  'conditioning.name': conditioning.CONDITIONERS,
  'loss.prediction': gaussian.PARAMETRISATIONS,
  'process.schedule': schedules.SCHEDULES,
  'loss.level': gaussian.LEVELS,
  'loss.law': laws.LAWS,
  'loss.weight': weights.WEIGHTS,
  'loss.variance': ('fixed', gaussian.LEARNED),
  'sample.variance': (*gaussian.VARIANCES, gaussian.LEARNED),
  'optim.name': optim.OPTIMIZERS,
  'optim.decay': optim.DECAYS,
  'optim.moments_dtype': optim.MOMENTS,
}

# What other projects call them.
ALIASES = {
  **{'epsilon': 'eps', 'noise': 'eps', 'v_prediction': 'v', 'velocity': 'v'},
  **{'sample': 'x0', 'x_start': 'x0', 'start_x': 'x0', 'bf16': 'bfloat16'},
  **{'fp32': 'float32', 'fixed_small': 'fixedsmall', 'beta': 'fixedlarge'},
  **{'none': 'constant', 'ddpm': 'unet', 'linspace': 'linear'},
  **{'improved_ddpm': 'iddpm', 'guided_diffusion': 'adm', 'edm': 'ddpmpp'},
  **{'vit': 'dit', 'transformer': 'dit'},
  **{'class': 'label', 'labels': 'label', 'class_label': 'label'},
  **{'squaredcos_cap_v2': 'cosine', 'quad': 'quadratic', 'karras': 'edm'},
  **{'rectified_flow': 'flow', 'velocity_flow': 'flow', 'rf': 'flow'},
}


def check(config: config_dict.ConfigDict, devices: Sequence) -> list[str]:
  """The problems of a config on these devices, a line each; [] if valid.

  Pure arithmetic: no file is accessed, and nothing is compiled.
  """
  return _lacking(config) or _broken(
    *_limits(config, OF_RUN),
    *_mesh(config, len(devices)),
    *_dispatch(config),
    *_network(config),
    *_masks(config),
  )


def check_network(config: config_dict.ConfigDict) -> list[str]:
  """The problems of a config's network and process, like `check`."""
  return _lacking(config) or _broken(*_network(config))


def _lacking(config):
  if lacking := completion.lacking(config):
    told = f'the config has no {", ".join(lacking)}'
    if made := completion.chosen_by(lacking[0], config):
      # A flag can change the choice, but not the keys that go with it.
      return [f'{told}: write {made} in a config file, which has them']
    return [f'{told}: every run has these keys']
  # After a choice by a flag, the group has the keys of another one.
  return completion.unknown(config)[:1]


def _broken(*rules):
  return [message for holds, message in rules if not holds]


def _network(config):
  """Yields (holds, message) pairs, like all the functions below."""
  flat = runs.flatten(config.to_dict())
  for key in (name for name in NAMES if name in flat):
    known = NAMES[key]
    told = f'{key}={flat[key]!r}: one of {", ".join(known)}'
    told += hint(flat[key], known, ALIASES)
    yield flat[key] in known, told
  yield from _limits(config, OF_NETWORK)
  yield from _conditioning(config.conditioning, config.data.augment)
  yield from _classifier(config)
  yield from _latents(config)
  yield from _lora(config)
  yield from upscaled.problems(config)
  yield from autoencoder_rules.of_autoencoder(config)
  if config.loss.name != 'autoencoding':  # which has no denoising network
    x0 = codecs.x0_shape(runs.image_shape(config.data), config.codec)
    what = 'data.image_size'
    if codecs.is_in_latents(config):
      what = 'the size of the latents'
    if pairs.trains(config):
      x0, what = pairs.pooled_shape(config), 'data.image_size / loss.pool'
    yield from rules.of_network(config.model, x0, what)
  process = config.process
  yield (
    0 < process.beta_start <= process.beta_end < 1,
    f'process.beta_start={process.beta_start}, beta_end={process.beta_end}: '
    '0 < beta_start <= beta_end < 1',
  )
  yield (
    0 < process.sigma_min < process.sigma_max < math.inf,
    f'process.sigma_min={process.sigma_min}, sigma_max={process.sigma_max}: '
    '0 < sigma_min < sigma_max',
  )
  yield from _optim(config.optim)


def _limits(config, limits):
  for key, value in runs.flatten(config.to_dict()).items():
    for pattern, (allowed, fits) in limits.items():
      if re.fullmatch(pattern, key):
        yield fits(value), f'{key}={value}: {allowed}'


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


def _dispatch(config):
  """A dispatch cannot be interrupted to log, evaluate, sample or save."""
  count = max(config.steps_per_dispatch, 1)
  names = ('num_steps', *(key for key in config if key.endswith('_every')))
  for name in names:
    yield (
      config[name] % count == 0,
      f'steps_per_dispatch={count} does not divide {name}={config[name]}: use '
      f'{math.gcd(count, config[name])}, or {name}='
      f'{-(-config[name] // count) * count}',
    )


def _classifier(config):
  if pairs.trains(config):
    yield from pairs.problems(config)
    return
  classifies = config.loss.name == objectives.CLASSIFICATION
  yield (
    (config.model.name == 'encoder') == classifies,
    f'loss.name={config.loss.name!r} with model.name={config.model.name!r}: '
    "loss.name='classification' and model.name='encoder' go together",
  )
  if not classifies:
    return
  yield (
    config.conditioning.name == 'label',
    f'conditioning.name={config.conditioning.name!r}: '
    "loss.name='classification' learns labels, so it must be 'label'",
  )
  yield (
    config.sample_every == 0,
    f'sample_every={config.sample_every}: a classifier draws no samples, so '
    'with loss.name=classification it must be 0',
  )


def _masks(config):
  cache = config.conditioning.get('cache')
  yield (
    not (cache and config.data.on_device),
    f'conditioning.cache={cache} with data.on_device=True: encoded captions '
    'are read from files: set one of them only',
  )
  channels = config.conditioning.get('channels')
  yield (
    not channels,
    f'conditioning.channels={channels}: a network that inpaints can be sampled '
    'from, but not trained, for data have no masks',
  )


def _lora(config):
  if config.lora.rank == 0:
    return
  denoises = config.loss.name == 'denoising' and not codecs.reconstructs(config)
  yield (
    denoises,
    f'lora.rank={config.lora.rank} with loss.name={config.loss.name!r}: LoRA '
    "changes denoising networks: set loss.name='denoising', or lora.rank=0",
  )
  yield (
    config.lora.layers and all(config.lora.layers),
    f"lora.layers={config.lora.layers}: at least one, such as ('attention',)",
  )


def _latents(config):
  codec = config.codec
  if not codecs.is_in_latents(config):
    return
  yield (
    not config.sample.clip,
    'sample.clip=True: latents have no bound to clip to, so with '
    "codec.name='latents' it must be False",
  )
  yield codec.decode_rows >= 1, f'codec.decode_rows={codec.decode_rows}: >= 1'
  yield (
    0 <= codec.scale < math.inf and math.isfinite(codec.shift),
    f'codec.scale={codec.scale}, codec.shift={codec.shift}: finite, the scale '
    'above 0, or 0 to measure it',
  )
  yield (
    not (codec.cache and config.data.augment),
    f'codec.cache={codec.cache} with data.augment={config.data.augment}: '
    'cached latents are of images that are not transformed: set '
    "data.augment=0.0, or codec.cache=''",
  )


OF_CONDITION = {
  'label': (
    ('num_classes', lambda x: x >= 1, 'the number of classes of the data'),
    ('drop', lambda x: 0 <= x < 1, 'in [0, 1)'),
  ),
  'text': (
    (
      'vocabulary',
      lambda x: x >= 515,
      'at least 515, of bytes and special ids',
    ),
    (
      'length',
      lambda x: x == 0 or x >= 3,
      '0 (as long as needed), or 3 and more',
    ),
    ('width', lambda x: x >= 1, '1 or more'),
    ('num_layers', lambda x: x >= 1, '1 or more'),
    ('num_heads', lambda x: x >= 1, '1 or more'),
    ('drop', lambda x: 0 <= x < 1, 'in [0, 1)'),
  ),
  'frozen_text': (('drop', lambda x: 0 <= x < 1, 'in [0, 1)'),),
}


def _conditioning(condition, augment):
  for key, fits, allowed in OF_CONDITION.get(condition.name, ()):
    value = condition.get(key)
    yield (
      value is not None and fits(value),
      f'conditioning.{key}={value}: {allowed}, for conditioning.name='
      f'{condition.name!r}',
    )
  if condition.name == 'text':
    yield (
      condition.width % condition.num_heads == 0,
      f'conditioning.num_heads={condition.num_heads} does not divide '
      f'conditioning.width={condition.width}',
    )
  for key in ('pooled', 'size_features'):
    yield (
      not (condition.get(key) and augment),
      f'data.augment={augment} with conditioning.{key}={condition.get(key)}: '
      'the network would be told of both by the same input, so it must be 0',
    )


def _optim(config):
  yield (
    config.weight_decay == 0 or config.name == 'adamw',
    f"optim.weight_decay={config.weight_decay} is for optim.name='adamw'; "
    f'with {config.name!r} it must be 0',
  )
  for name in ('warmup_steps', 'decay_from'):
    yield (
      config.decay == 'constant' or config.decay_steps > config[name],
      f'optim.decay_steps={config.decay_steps}: above optim.{name}='
      f'{config[name]}; it is the step at which the decay ends',
    )
