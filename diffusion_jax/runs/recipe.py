"""The recipe of a run: its config as functions.

  rows --codec--> x0 --process--> xt --network(xt, t, cond)--> prediction
  rows --conditioner--> cond             prediction --objective--> values

Training, sampling, likelihoods and calibration all use a recipe and do not
depend on the kind of data.
"""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax import codecs, conditioning, models, objectives, runs
from diffusion_jax.conditioning import low_resolution, masked, text
from diffusion_jax.models import control, lora, splash
from diffusion_jax.models import doors as doors_of
from diffusion_jax.process import gaussian, schedules
from diffusion_jax.runs import (
  autoencoders,
  frozen,
  kept_parts,
  pairs,
  perceptual,
  rules,
)
from diffusion_jax.samplers import plan
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding


class Adapted(NamedTuple):
  """A network that low-rank changes are trained of (LoRA).

  Attributes:
    parts: name -> network of each part that would be trained without them.
    factor: the factor of the changes.
  """

  parts: dict[str, models.Model]
  factor: float


class Recipe(NamedTuple):
  """The components of a run.

  Parameters are a dict of named parts, {'net': ...} for DDPM. Functions that
  take `params` take all parts, both trained and frozen.

  Attributes:
    parts: name -> network of each trained part.
    frozen: name -> parameters of each part that is not trained, or only their
      shapes.
    origins: name -> where a frozen part comes from, for messages.
    codec: data <-> x0.
    conditioner: rows -> the network's conditioning input.
    schedule: the noise schedule.
    prediction: what the network predicts: a parametrisation, or its name; None
      for a classifier, an autoencoder and a pair of encoders.
    objective: the training objective.
    reconstructs: whether it is an autoencoder: decoded again, x0 is what it
      makes of data.
    controls: the ControlNets that steer the network, see `controlled`.
    adapted: the network that the trained part changes; None if it is trained
      itself.
  """

  parts: dict[str, models.Model]
  frozen: dict[str, Any]
  origins: dict[str, str]
  codec: codecs.Codec
  conditioner: conditioning.Conditioner
  schedule: schedules.Schedule
  prediction: gaussian.Parametrisation | str
  objective: objectives.Objective
  reconstructs: bool = False
  controls: tuple[control.Control, ...] = ()
  adapted: Adapted | None = None

  @property
  def network(self) -> models.Model:
    """The denoising network."""
    return (self.adapted or self).parts[models.NET]

  def whole(self, params, mesh: Mesh):
    """All parts, with low-rank changes in the network, if there are any.

    Args:
      params: all parts.
      mesh: the devices that hold them.
    """
    if not self.adapted:
      return params
    changes = lora.of(params[lora.PART], self.adapted.factor)
    net = lora.merged(params[models.NET], changes)
    where = sharding.shardings({models.NET: net}, mesh)[models.NET]
    net = jax.lax.with_sharding_constraint(net, where)
    return {**params, models.NET: net}

  def init(self, key) -> dict:
    """Initializes the trained parts at random.

    Args:
      key: the random key. The network uses it unchanged, so that adding other
        parts does not change its initial values.
    """
    return {
      name: part.init(
        key
        if name == models.NET
        else jax.random.fold_in(key, zlib.crc32(name.encode()))
      )
      for name, part in self.parts.items()
    }

  def denoiser(self, params, cond: dict, mesh: Mesh) -> gaussian.Denoiser:
    """The network as a denoiser.

    Args:
      params: all parts, see `whole`.
      cond: the conditioning inputs, see `Conditioner`; an array with one row
        is for all examples.
      mesh: the devices that hold the parameters.
    """
    if self.prediction is None:
      told = plan.RECONSTRUCTS if self.reconstructs else plan.CLASSIFIES
      raise UserError(plan.COMPARES if pairs.IMAGE in self.parts else told)
    apply = models.network_fn(self.network)
    given = sharding.gather_fsdp(params.get(control.PART, []), mesh)
    hints = control.hints(self.controls, given, self.codec.shape[:2])

    def network(xt, label):
      # Gathered here, so that a long loop does not keep the gathered copy.
      gathered = {models.NET: sharding.gather_fsdp(params[models.NET], mesh)}
      of_rows = {
        door: jnp.broadcast_to(x, (len(xt), *x.shape[1:]))
        for door, x in cond.items()
      }
      if self.controls:
        of_rows[doors_of.RESIDUALS] = control.residuals(
          self.controls, given, hints, xt, label, of_rows
        )
      with splash.over(mesh):
        return apply(gathered, xt, label, of_rows, None)

    return gaussian.denoiser(network, self.schedule, self.prediction)


def create(config: Mapping, parts: kept_parts.Frozen | None = None) -> Recipe:
  """Makes the recipe of a config; nothing is compiled or allocated.

  Args:
    config: a run's config, validated.
    parts: the frozen parts, those that are there; None for all their shapes.

  Raises:
    UserError: an unknown name, or a condition that the network does not accept.
  """
  given = {**frozen.abstract(config), **perceptual.abstract(config)}, {}
  if parts is not None:
    given = parts.params, parts.origins
  if config['loss']['name'] in objectives.AUTOENCODERS:
    return Recipe(*autoencoders.create(config, *given), reconstructs=True)
  if pairs.trains(config):
    return Recipe(*pairs.create(config, *given))
  codec = codecs.create(
    image_shape=runs.image_shape(config['data']), **config['codec']
  )
  conditioner = conditioning.create(
    augment=config['data'].get('augment', 0.0),
    image_shape=runs.image_shape(config['data']),
    **config['conditioning'],
  )
  if config['conditioning'].get('channels'):
    shape = runs.image_shape(config['data'])
    conditioner = masked.create(conditioner, codec, shape)
  if config['super_resolution']['factor']:
    conditioner = low_resolution.create(
      conditioner, codec, **config['super_resolution']
    )
  classes, learned = None, config['loss']['variance'] == gaussian.LEARNED
  if config['loss']['name'] == objectives.CLASSIFICATION:
    classes = config['conditioning']['num_classes']
    conditioner = conditioning.none()
  network = models.create(
    image_shape=codec.shape, doors=conditioner.doors,
    out_channels=classes or codec.shape[-1] * (2 if learned else 1),
    **config['model'],
  )  # fmt: skip
  schedule = schedules.create(**config['process'])
  rules.check(config, schedule)
  loss = dict(config['loss'])
  prediction = gaussian.parametrisation(
    loss.pop('prediction'), loss['sigma_data'], loss.pop('level')
  )
  changed = config['lora']['rank'] > 0
  network_fn = models.network_fn(network)
  if changed:
    network_fn = lora.network_fn(network, factor(config))
  objective = objectives.create(
    loss.pop('name'), network_fn, codec, conditioner, schedule, prediction,
    step_variance=config['sample'].get('variance', 'fixedlarge'),
    **loss,
  )  # fmt: skip
  parts = {models.NET: network}
  if config['conditioning']['name'] == text.PART and not classes:
    parts[text.PART] = text.network(config['conditioning'])
  made = Recipe(
    parts, *given, codec, conditioner, schedule,
    None if classes else prediction, objective,
  )  # fmt: skip
  return _adapted(made, config) if changed else made


def factor(config: Mapping) -> float:
  """The factor of a config's low-rank changes."""
  return (config['lora']['alpha'] or config['lora']['rank']) / (
    config['lora']['rank']
  )


def _adapted(made: Recipe, config: Mapping) -> Recipe:
  """A recipe that trains low-rank changes in place of the network."""
  key, options = jax.random.key(0), config['lora']
  shapes = {n: jax.eval_shape(part.init, key) for n, part in made.parts.items()}
  net = shapes[models.NET]
  layers = lora.chosen(net, options['layers'], options['rank'])
  return made._replace(
    parts={lora.PART: lora.create(net, layers, options['rank'])},
    frozen={**shapes, **made.frozen},
    adapted=Adapted(made.parts, factor(config)),
  )
