"""Training objectives, with one value per example."""

from diffusion_jax.objectives import (
  autoencoding,
  classification,
  denoising,
  dito,
)
from diffusion_jax.objectives.objective import Objective
from diffusion_jax.system.errors import one_of

# name -> (network_fn, codec, conditioner, schedule, **options) -> Objective
OBJECTIVES = {
  'denoising': denoising.create,
  'classification': classification.create,
}
CLASSIFICATION = 'classification'  # its network gives logits, not a denoiser
# Those of autoencoders: name -> create, each with arguments of its own.
DITO = 'dito'
AUTOENCODERS = {'autoencoding': autoencoding.create, DITO: dito.create}


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
  one_of('loss.name', name, {**OBJECTIVES, **AUTOENCODERS})
  return OBJECTIVES[name](*parts, **options)
