"""Samplers: (init, step) pairs, grids, the scan that runs them, the store."""

import inspect

from diffusion_jax.errors import UserError
from diffusion_jax.samplers.ancestral import ancestral
from diffusion_jax.samplers.ddim import ddim
from diffusion_jax.samplers.solve import Sampler, solve

__all__ = [
  'SAMPLERS',
  'Sampler',
  'ancestral',
  'create',
  'ddim',
  'options',
  'solve',
]

SAMPLERS = {'ancestral': ancestral, 'ddim': ddim}


def options(name: str, **given) -> dict:
  """All options of a sampler: those given, and the others' defaults.

  Args:
    name: a key of SAMPLERS.
    **given: options of any sampler; None is not given.

  Raises:
    UserError: an unknown name, or an option that is not this sampler's.
  """
  if name not in SAMPLERS:
    raise UserError(
      f'sampler={name} is not known: use one of {", ".join(SAMPLERS)}'
    )
  taken = inspect.signature(SAMPLERS[name]).parameters
  for option, value in given.items():
    if value is not None and option not in taken:
      raise UserError(
        f'{option}={value}: {name} has no such option; it takes '
        f'{", ".join(taken)}'
      )
  return {
    option: parameter.default if given.get(option) is None else given[option]
    for option, parameter in taken.items()
  }


def create(name: str, **given) -> Sampler:
  """A sampler by name.

  Args:
    name: a key of SAMPLERS.
    **given: its options; None leaves the default, see `options`.

  Raises:
    UserError: as `options`, or an option out of range.
  """
  chosen = options(name, **given)
  return SAMPLERS[name](**chosen)
