"""Conditioning: labels, text or images -> the network's conditioning input."""

from diffusion_jax.conditioning.conditioner import Conditioner
from diffusion_jax.system.errors import one_of


def none() -> Conditioner:
  """No condition: the network's only inputs are xt and t."""
  return Conditioner(lambda params, rows, keys: {})


# name -> (**options) -> Conditioner
CONDITIONERS = {'none': none}


def create(name: str, **options) -> Conditioner:
  """A conditioner by name.

  Args:
    name: a key of CONDITIONERS.
    **options: the conditioner's options.

  Raises:
    UserError: the name is not known.
  """
  one_of('conditioning.name', name, CONDITIONERS)
  return CONDITIONERS[name](**options)
