"""Training objectives, with one value per example."""

from diffusion_jax.objectives import classification, denoising
from diffusion_jax.objectives.objective import Objective
from diffusion_jax.system.errors import one_of

# name -> (network_fn, codec, conditioner, schedule, **options) -> Objective
OBJECTIVES = {
  'denoising': denoising.create,
  'classification': classification.create,
}
CLASSIFICATION = 'classification'  # its network gives logits, not a denoiser
# Those of autoencoders, whose `create` has arguments of their own.
DITO = 'dito'
AUTOENCODERS = ('autoencoding', DITO)
CONTRASTIVE = 'contrastive'  # of a pair of encoders, likewise


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
  return OBJECTIVES[one_of('loss.name', name, OBJECTIVES)](*parts, **options)
