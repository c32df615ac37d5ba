"""Abstract arguments of the programs that are compiled to plan a run.

They are `jax.ShapeDtypeStruct`s with shardings, and allocate nothing.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusion_jax import runs
from diffusion_jax.models import inception
from diffusion_jax.runs import upscaled
from diffusion_jax.runs.programs import Programs, prompts, rows
from diffusion_jax.training import sharding

TAPS = ('2048',)  # of Inception, the features of FID


def of_step(
  config: Mapping, mesh: jax.sharding.Mesh, program: Programs, batch_size: int
) -> tuple:
  """(state, frozen parts, batch) of the training step.

  Args:
    config: the run's config.
    mesh: the devices.
    program: the run's programs.
    batch_size: rows of the batch, over all devices.
  """
  shapes = rows(config, program.recipe, batch_size)
  where = sharding.batch_sharding(mesh)
  return program.abstract, program.frozen, _arrays(shapes, where)


def of_drawing(
  config: Mapping, mesh: jax.sharding.Mesh, program: Programs, count: int
) -> tuple:
  """(parameters, indices, pictures, prompts) of the sampling program.

  Args:
    config: the run's config.
    mesh: the devices.
    program: the run's programs.
    count: samples at once, over all devices.
  """
  where = sharding.batch_sharding(mesh)
  indices = jax.ShapeDtypeStruct((count,), jnp.uint32, sharding=where)
  pictures = _arrays(upscaled.of_drawing(config, count), where) or None
  texts = prompts(config, program.recipe)
  params = {**program.frozen, **program.abstract.averaged}
  return params, indices, pictures, _arrays(texts, sharding.replicated(mesh))


def of_judging(config: Mapping, mesh: jax.sharding.Mesh, count: int) -> tuple:
  """(parameters, images) of Inception, with the same weights on all devices.

  Args:
    config: the run's config.
    mesh: the devices.
    count: images at once, over all devices.
  """
  everywhere = sharding.replicated(mesh)
  weights = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
    inception.parameters(TAPS),
  )
  shape = (count, *runs.image_shape(config['data']))
  where = sharding.batch_sharding(mesh)
  return weights, jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=where)


def _arrays(shapes: Mapping, where: jax.sharding.Sharding) -> dict:
  return {
    name: jax.ShapeDtypeStruct(*x, sharding=where) for name, x in shapes.items()
  }
