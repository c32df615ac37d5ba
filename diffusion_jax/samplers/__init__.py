"""Samplers: (init, step) pairs, grids, the scan that runs them, the store."""

import inspect
from typing import Literal, NamedTuple, get_args, get_origin

from diffusion_jax.errors import UserError
from diffusion_jax.samplers.adaptive import adaptive
from diffusion_jax.samplers.ancestral import ancestral
from diffusion_jax.samplers.ddim import ddim
from diffusion_jax.samplers.dpm_solver import dpm_solver, dpmpp_2s
from diffusion_jax.samplers.dpm_solver_pp import (
  dpmpp_2m,
  dpmpp_2m_sde,
  dpmpp_3m,
)
from diffusion_jax.samplers.edm import euler, heun
from diffusion_jax.samplers.pndm import ipndm, plms
from diffusion_jax.samplers.predictor_corrector import predictor_corrector
from diffusion_jax.samplers.solve import Sampler, solve
from diffusion_jax.samplers.unipc import unipc

__all__ = [
  'SAMPLERS',
  'Sampler',
  'adaptive',
  'ancestral',
  'create',
  'ddim',
  'dpm_solver',
  'dpmpp_2m',
  'dpmpp_2m_sde',
  'dpmpp_2s',
  'dpmpp_3m',
  'euler',
  'heun',
  'ipndm',
  'options',
  'plms',
  'predictor_corrector',
  'solve',
  'table',
  'unipc',
]

SAMPLERS = {
  'ancestral': ancestral,
  'ddim': ddim,
  'euler': euler,
  'heun': heun,
  'plms': plms,
  'ipndm': ipndm,
  'dpm_solver': dpm_solver,
  'dpmpp_2s': dpmpp_2s,
  'dpmpp_2m': dpmpp_2m,
  'dpmpp_3m': dpmpp_3m,
  'dpmpp_2m_sde': dpmpp_2m_sde,
  'unipc': unipc,
  'predictor_corrector': predictor_corrector,
  'adaptive': adaptive,
}


class About(NamedTuple):
  """A sampler in a line.

  Attributes:
    source: arXiv id.
    order: of convergence in the number of steps, without noise.
    evaluations: for a step of the grid, or of its own.
    noise: when it adds any.
  """

  source: str
  order: str
  evaluations: str
  noise: str


ABOUT = {
  'ancestral': About('2006.11239', '-', '1', 'yes'),
  'ddim': About('2010.02502', '1', '1', 'eta > 0'),
  'euler': About('2206.00364', '1', '1', 'churn > 0'),
  'heun': About('2206.00364', '2', '2', 'churn > 0'),
  'plms': About('2202.09778', '2', '1; 4 in the first 3', 'no'),
  'ipndm': About('2204.13902', '2', '1', 'no'),
  'dpm_solver': About('2206.00927', '1-3', '1', 'no'),
  'dpmpp_2s': About('2211.01095', '2', '1', 'no'),
  'dpmpp_2m': About('2211.01095', '2', '1', 'no'),
  'dpmpp_3m': About('2211.01095', '3', '1', 'no'),
  'dpmpp_2m_sde': About('2211.01095', '-', '1', 'yes'),
  'unipc': About('2302.04867', '2-4', '1', 'no'),
  'predictor_corrector': About('2011.13456', '-', '2', 'yes'),
  'adaptive': About('2206.00927', '2', '2; 1 if rejected', 'no'),
}


def table() -> list[tuple[str, ...]]:
  """A head and a row for each sampler: what --sampler=list shows."""
  rows = [('sampler', 'arXiv', 'order', 'evaluations', 'noise', 'options')]
  for name, about in ABOUT.items():
    taken = inspect.signature(SAMPLERS[name]).parameters.values()
    rows.append((name, *about, ' '.join(map(_shown, taken))))
  return rows


def _shown(option):
  """An option with its default, and what else it may be: order=3|2|1."""
  choices = dict.fromkeys((option.default, *get_args(option.annotation)))
  if get_origin(option.annotation) is not Literal:
    choices = (option.default,)
  return f'{option.name}={"|".join(map(str, choices))}'


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
      takes = f'it takes {", ".join(taken)}' if taken else 'it takes none'
      raise UserError(f'{option}={value}: {name} has no such option; {takes}')
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
