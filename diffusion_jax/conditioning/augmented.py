"""The augmentation of images as a condition, beside another one."""

import jax.numpy as jnp

from diffusion_jax.conditioning.conditioner import Conditioner
from diffusion_jax.data.augment import SIZE


def create(conditioner: Conditioner) -> Conditioner:
  """Adds the door 'vector': how each image was transformed, see `augment`.

  It is zero for held-out images and samples, and never dropped.

  Args:
    conditioner: the other condition, which has no vector.
  """

  def condition(params, rows, keys):
    cond = conditioner.condition(params, rows, keys)
    count = max([1, *(len(x) for x in cond.values())])
    none = jnp.zeros((count, SIZE), jnp.float32)
    return {**cond, 'vector': rows.get('augment', none)}

  doors = {**conditioner.doors, 'vector': SIZE}
  return conditioner._replace(condition=condition, doors=doors)
