"""Training objectives, with one value per example."""

from diffusion_jax.objectives import denoising
from diffusion_jax.objectives.objective import Objective
from diffusion_jax.system.errors import UserError

# name -> (network_fn, codec, conditioner, schedule, **options) -> Objective
OBJECTIVES = {'denoising': denoising.create}


def create(name: str, *parts, **options) -> Objective:
  """An objective by name.

  Args:
    name: a key of OBJECTIVES.
    *parts: network_fn, codec, conditioner and schedule, see
      `denoising.create`.
    **options: the objective's options.

  Raises:
    UserError: the name is not known.
  """
  if name not in OBJECTIVES:
    raise UserError(f'loss.name={name!r}: one of {", ".join(OBJECTIVES)}')
  return OBJECTIVES[name](*parts, **options)
