"""Samplers: (init, step) pairs, grids, the scan that runs them, the store."""

from diffusion_jax.errors import UserError
from diffusion_jax.samplers.ancestral import ancestral
from diffusion_jax.samplers.ddim import ddim
from diffusion_jax.samplers.solve import Sampler, solve

__all__ = ['SAMPLERS', 'Sampler', 'ancestral', 'create', 'ddim', 'solve']

# Name -> (its function, the options that it takes).
SAMPLERS = {'ancestral': (ancestral, ('variance',)), 'ddim': (ddim, ('eta',))}


def create(name: str, **options) -> Sampler:
  """A sampler by name.

  Args:
    name: a key of SAMPLERS.
    **options: of any sampler; those that this one does not take must be None.

  Raises:
    UserError: an unknown name or an option that is not this sampler's.
  """
  if name not in SAMPLERS:
    raise UserError(
      f'--sampler={name} is not known: use one of {", ".join(SAMPLERS)}'
    )
  function, taken = SAMPLERS[name]
  given = {k: v for k, v in options.items() if v is not None}
  for option, value in given.items():
    if option not in taken:
      raise UserError(
        f'--{option}={value}: {name} has no such option; it takes '
        f'{", ".join("--" + o for o in taken)}'
      )
  eta = given.get('eta', 0.0)
  if not 0 <= eta <= 1:
    raise UserError(f'--eta={eta}: between 0 (deterministic) and 1')
  return function(**given)
