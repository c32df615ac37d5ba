"""The denoiser of samples: a run's network, with its condition and guidance."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax import runs
from diffusion_jax.guidance import guided
from diffusion_jax.process import gaussian
from diffusion_jax.runs import dataset
from diffusion_jax.runs.recipe import Recipe
from diffusion_jax.samplers import guided as options
from diffusion_jax.system.errors import UserError

GUIDE = 'guide'  # the entry of params that holds all parts of the guide


def denoiser(
  recipe: Recipe,
  params: Mapping,
  rows: Mapping,
  guidance: Mapping,
  mesh: Mesh,
  guide: Recipe | None = None,
) -> gaussian.Denoiser:
  """The denoiser of some examples, guided as a plan says; x0 is not clipped.

  Args:
    recipe: the run's recipe.
    params: all parts; with a guide, all of its parts as the entry GUIDE.
    rows: the data that the condition is computed from, [B, ...] each; without
      them, it is the null condition.
    guidance: see `samplers.guided.chosen`.
    mesh: the devices.
    guide: the recipe of another network that gives u.
  """
  cond = recipe.conditioner.condition(params, rows, None)
  conditional = recipe.denoiser(params, cond, mesh)
  if not guidance:
    return conditional
  schedule = recipe.schedule
  if guide:
    theirs = params[GUIDE]
    other = guide.conditioner.condition(theirs, rows, None)
    u = guided.at_level(
      guide.denoiser(theirs, other, mesh), guide.schedule, schedule
    )
    pair = guided.by_guide(conditional, u)
  else:
    null = recipe.conditioner.condition(params, {}, None)
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


def check(config: Mapping, guide: Mapping, workdir) -> None:
  """Checks that a network may guide another one.

  Args:
    config: the config of the guided run.
    guide: the config of the guide's run.
    workdir: the guide's folder, for the message.

  Raises:
    UserError: they differ in their data, their codec or their classes.
  """
  shapes = [runs.image_shape(one['data']) for one in (config, guide)]
  if shapes[0] != shapes[1]:
    theirs, own = ('x'.join(map(str, shape)) for shape in shapes[::-1])
    raise UserError(
      f'--guide={workdir} makes images of {theirs}, this run of {own}: give a '
      'run of the same data'
    )
  if config['codec'] != guide['codec']:
    raise UserError(
      f'--guide={workdir} has another codec than this run: give a run of the '
      'same codec'
    )
  own, theirs = (
    dataset.num_classes(one['conditioning']) for one in (config, guide)
  )
  if theirs not in (0, own):
    raise UserError(
      f'--guide={workdir} is conditional on {theirs} classes, this run on '
      f'{own or "none"}: give a run of the same classes, or one without'
    )


def facts(guide) -> dict:
  """What a plan says of a guide.

  Args:
    guide: the guide, a `Trained`.
  """
  raw = '_raw' * (not guide.ema)
  return {
    'guide': f'{guide.workdir.name}@{guide.step}{raw}',
    'guide_sha256': guide.weights_sha256,
  }
