"""The denoiser of samples: a run's network, with its condition and guidance."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax import models, runs
from diffusion_jax.conditioning import low_resolution
from diffusion_jax.guidance import guided
from diffusion_jax.guidance.classifier import by_classifier
from diffusion_jax.objectives import (
  CLASSIFICATION,
  CONTRASTIVE,
  classification,
)
from diffusion_jax.process import gaussian
from diffusion_jax.runs import averaged, dataset
from diffusion_jax.runs.recipe import Recipe
from diffusion_jax.samplers import guided as options
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checksum, sharding

# The entries of params that hold all parts of other networks.
GUIDE, CLASSIFIER = 'guide', 'classifier'


def denoiser(
  recipe: Recipe,
  params: Mapping,
  rows: Mapping,
  guidance: Mapping,
  mesh: Mesh,
  guide: Recipe | None = None,
  classifier: Recipe | None = None,
) -> gaussian.Denoiser:
  """The denoiser of some examples, guided as a plan says; x0 is not clipped.

  Args:
    recipe: the run's recipe.
    params: all parts; with a guide, all of its parts as the entry GUIDE.
    rows: the data that the condition is computed from, [B, ...] each; without
      them, it is the null condition. 'negative' [1, length] are the tokens of
      the unconditional model, by default those of the empty caption.
    guidance: see `samplers.guided.chosen`.
    mesh: the devices.
    guide: the recipe of another network that gives u.
    classifier: the recipe of a classifier, with its parts as CLASSIFIER.
  """
  found = _combined(recipe, params, rows, guidance, mesh, guide)
  if not classifier:
    return found
  network = models.network_fn(classifier.network)
  level = guided.same_level(classifier.schedule, recipe.schedule)

  def log_probability(xt, t):
    return classification.log_probability(
      network, params[CLASSIFIER], xt, level(t, xt.dtype), rows['label']
    )

  return by_classifier(
    found, log_probability, recipe.schedule, guidance['classifier_scale']
  )


def _combined(recipe, params, rows, guidance, mesh, guide) -> gaussian.Denoiser:
  """The denoiser without a classifier."""
  # XLA removes the gathers of parts that are not read.
  gathered = sharding.gather_fsdp(params, mesh)
  cond = recipe.conditioner.condition(gathered, rows, None)
  conditional = recipe.denoiser(params, cond, mesh)
  if 'guidance' not in guidance:
    return conditional
  schedule = recipe.schedule
  if guide:
    theirs = params[GUIDE]
    gathered = sharding.gather_fsdp(theirs, mesh)
    other = guide.conditioner.condition(gathered, rows, None)
    u = guided.at_level(
      guide.denoiser(theirs, other, mesh), guide.schedule, schedule
    )
    pair = guided.by_guide(conditional, u)
  else:
    # Both are for the same picture.
    negative = {k: rows[k] for k in low_resolution.ROWS if k in rows}
    if 'negative' in rows:
      negative['tokens'] = rows['negative']
    null = recipe.conditioner.condition(gathered, negative, None)
    u = recipe.denoiser(params, null, mesh)
    pair = guided.classifier_free(
      recipe.denoiser(params, jax.tree.map(_both, cond, null), mesh)
    )
  if options.is_other_alone(guidance):
    return u
  rescale = None
  if share := guidance.get('guidance_rescale'):
    rescale = guided.rescaling(schedule, recipe.prediction, share)
  combine = guided.towards(guidance['guidance'], rescale)
  if limits := options.times_of(schedule, guidance):
    return guided.within(pair, combine, conditional, *limits)
  return guided.always(pair, combine)


def _both(own: jax.Array, null: jax.Array) -> jax.Array:
  """An input with the condition and without it, in turn."""
  return guided.alternate(own, jnp.broadcast_to(null, own.shape))


def check(config: Mapping, guide: Mapping, workdir, flag: str = GUIDE) -> None:
  """Checks that a network may guide another one.

  Args:
    config: the config of the guided run.
    guide: the config of the guide's run.
    workdir: the guide's folder, for the message.
    flag: GUIDE or CLASSIFIER.

  Raises:
    UserError: it is no denoiser, or no classifier, or they differ in their
      data, their codec or their classes.
  """
  given = f'--{flag}={workdir}'
  if guide['loss']['name'] == CONTRASTIVE:
    raise UserError(
      f'{given} has loss.name={CONTRASTIVE}: give it as --text_judge of '
      'evaluate, or give another run'
    )
  if (guide['loss']['name'] == CLASSIFICATION) != (flag == CLASSIFIER):
    other = GUIDE if flag == CLASSIFIER else CLASSIFIER
    raise UserError(
      f'{given} has loss.name={guide["loss"]["name"]}: give it as --{other}, '
      'or give another run'
    )
  shapes = [runs.image_shape(one['data']) for one in (config, guide)]
  if shapes[0] != shapes[1]:
    theirs, own = ('x'.join(map(str, shape)) for shape in shapes[::-1])
    raise UserError(
      f'{given} is for images of {theirs}, this run for {own}: give a run of '
      'the same data'
    )
  kinds = [one['super_resolution'] for one in (config, guide)]
  if kinds[1]['factor'] and kinds[0] != kinds[1]:
    raise UserError(
      f'{given} sharpens other pictures than this run: give a run of the same '
      'super_resolution'
    )
  if _codec(config) != _codec(guide):
    raise UserError(
      f'{given} has another codec than this run: give a run of the same codec'
    )
  own, theirs = (
    dataset.num_classes(one['conditioning']) for one in (config, guide)
  )
  if dataset.has_captions(guide['conditioning']):
    digests = [one['conditioning'].get('sha256') for one in (config, guide)]
    if len({*digests}) > 1:
      raise UserError(
        f'{given} was trained with captions and another tokenizer: give a run '
        'whose conditioning.tokenizer is this run'
      )
  fits = (own, 0) if flag == GUIDE else (own or theirs,)
  if theirs not in fits:
    raise UserError(
      f'{given} knows {theirs} classes, this run {own or "none"}: give a run '
      'of the same classes'
    )


def _codec(config) -> dict:
  """A config's codec, without where it comes from; see `check_latents`."""
  own = ('path', 'step', 'cache', 'decode_rows', 'scale', 'shift')
  return {k: v for k, v in config['codec'].items() if k not in own}


def check_latents(own, other, workdir, flag: str = GUIDE) -> None:
  """Checks that two networks are of the same latents.

  Args:
    own: the parameters of the guided run, all parts.
    other: those of the guide.
    workdir: the guide's folder, for the message.
    flag: GUIDE or CLASSIFIER.

  Raises:
    UserError: their autoencoders, or the scales, are not the same.
  """
  sums = (checksum.of(one.get('codec', {})) for one in (own, other))
  if len({tuple(one.items()) for one in sums}) > 1:
    raise UserError(
      f'--{flag}={workdir} is of other latents than this run: give a run '
      'whose codec.path is this run'
    )


def facts(other, flag: str = GUIDE) -> dict:
  """What a plan says of a guide or a classifier, a `Trained`."""
  which = averaged.suffix(other.weights)
  return {
    flag: f'{other.workdir.name}@{other.step}{which}',
    f'{flag}_sha256': other.weights_sha256,
  }
