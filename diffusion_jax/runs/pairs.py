"""Runs that train a pair of encoders, of pictures and of captions.

Such a run draws nothing. It judges whether pictures show what their captions
say, see `evaluation.agreement`.
"""

import math
from collections.abc import Iterator, Mapping

import jax.numpy as jnp

from diffusion_jax import conditioning, models, objectives, runs
from diffusion_jax.codecs import pixels
from diffusion_jax.conditioning import text
from diffusion_jax.objectives import contrastive
from diffusion_jax.process import schedules
from diffusion_jax.system.errors import UserError

IMAGE, TEXT, TEMPERATURE = (
  contrastive.IMAGE,
  contrastive.TEXT,
  contrastive.TEMPERATURE,
)


def trains(config: Mapping) -> bool:
  """Whether the run of a config trains a pair of encoders."""
  return config['loss']['name'] == objectives.CONTRASTIVE


def pooled_shape(config: Mapping) -> tuple[int, int, int]:
  """(H, W, C) of what the encoder of pictures sees."""
  height, width, channels = runs.image_shape(config['data'])
  pool = max(config['loss']['pool'], 1)
  return max(height // pool, 1), max(width // pool, 1), channels


def create(config: Mapping, frozen: Mapping, origins: Mapping) -> tuple:
  """The fields of the recipe of such a run, see `recipe.Recipe`.

  Args:
    config: the run's config.
    frozen: name -> parameters of each part that is not trained.
    origins: name -> where it comes from.
  """
  shape, loss = runs.image_shape(config['data']), config['loss']
  image = contrastive.pooled(
    models.create(
      image_shape=pooled_shape(config), out_channels=loss['embedding'],
      **config['model'],
    ),
    loss['pool'],
  )  # fmt: skip
  words = text.network(config['conditioning'], loss['embedding'])
  log = math.log(loss['temperature'])
  temperature = models.Model(
    lambda key: {contrastive.LOG: jnp.float32(log)}, None
  )
  objective = contrastive.create(
    image, words, text.ids_of(config['conditioning']),
    **{key: loss[key] for key in ('coldest', 'shift', 'scale', 'noise')},
  )  # fmt: skip
  parts = {IMAGE: image, TEXT: words, TEMPERATURE: temperature}
  return (
    parts, frozen, origins, pixels.create(shape), conditioning.none(),
    schedules.create(**config['process']), None, objective,
  )  # fmt: skip


def check_export(config: Mapping, workdir) -> None:
  """Raises UserError for a run that diffusers has no form for.

  Args:
    config: the run's config.
    workdir: its folder.
  """
  if trains(config):
    raise UserError(
      f'--from={workdir} trains a pair of encoders, for which diffusers has no '
      'form: give another run'
    )


# Keys of config.loss: (the allowed values in words, whether a value is one).
_OF_LOSS = {
  'embedding': ('at least 1', lambda x: x >= 1),
  'coldest': ('above 0, at most 1', lambda x: 0 < x <= 1),
  'shift': ('0 or more, finite', lambda x: 0 <= x < math.inf),
  'scale': ('in [0, 1)', lambda x: 0 <= x < 1),
  'noise': ('0 or more, finite', lambda x: 0 <= x < math.inf),
}


def problems(config: Mapping) -> Iterator[tuple]:
  """Yields (holds, message) pairs for the config of such a run."""
  loss, name = config['loss'], f'with loss.name={objectives.CONTRASTIVE!r}'
  for key, (allowed, fits) in _OF_LOSS.items():
    yield fits(loss[key]), f'loss.{key}={loss[key]}: {allowed}'
  sides = runs.image_shape(config['data'])[:2]
  yield (
    loss['pool'] >= 1 and all(side % loss['pool'] == 0 for side in sides),
    f'loss.pool={loss["pool"]}: at least 1, and a divisor of data.image_size='
    f'{config["data"]["image_size"]}',
  )
  yield (
    loss['coldest'] <= loss['temperature'] <= contrastive.WARMEST,
    f'loss.temperature={loss["temperature"]}: from loss.coldest='
    f'{loss["coldest"]} to {contrastive.WARMEST:g}',
  )
  for group, key, value in (
    ('model', 'name', 'encoder'),
    ('codec', 'name', 'pixels'),
    ('data', 'augment', 0),
  ):
    given = config[group][key]
    yield (
      given == value,
      f'{group}.{key}={given!r}: {name} it must be {value!r}',
    )
  condition = config['conditioning']
  yield (
    condition['name'] == 'text',
    f'conditioning.name={condition["name"]!r}: {name} pictures find their '
    "captions, so it must be 'text'",
  )
  yield (
    not condition.get('drop'),
    f'conditioning.drop={condition.get("drop")}: {name} no caption is dropped, '
    'so it must be 0.0',
  )
  yield (
    config['microbatches'] == 1,
    f'microbatches={config["microbatches"]}: {name} every picture of a batch '
    'is compared with every caption, so it must be 1',
  )
  yield (
    config['batch_size'] > 1,
    f'batch_size={config["batch_size"]}: {name} pictures are compared with '
    'captions of others, so it must be at least 2',
  )
  yield (
    config['sample_every'] == 0,
    f'sample_every={config["sample_every"]}: {name} no samples are drawn, so '
    'it must be 0',
  )
