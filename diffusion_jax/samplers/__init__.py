"""Samplers: (init, step) pairs, grids, the scan that runs them, the store."""

import inspect
from typing import Literal, NamedTuple, get_args, get_origin

from diffusion_jax.samplers.adaptive import adaptive
from diffusion_jax.samplers.analytic import analytic_ddim, analytic_ddpm
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
from diffusion_jax.system.errors import UserError

__all__ = [
  'ADAPTIVE',
  'CALIBRATED',
  'SAMPLERS',
  'Sampler',
  'adaptive',
  'analytic_ddim',
  'analytic_ddpm',
  'ancestral',
  'create',
  'ddim',
  'defaults',
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
  'takes',
  'unipc',
]

SAMPLERS = {
  'ancestral': ancestral,
  'ddim': ddim,
  'analytic_ddpm': analytic_ddpm,
  'analytic_ddim': analytic_ddim,
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


# Those that take the network's calibration, see `calibration`.
CALIBRATED = ('analytic_ddpm', 'analytic_ddim')
# Those that choose their own steps.
ADAPTIVE = ('adaptive',)


class About(NamedTuple):
  """A sampler in a line.

  Attributes:
    order: of convergence in the number of steps, without noise.
    evaluations: for a step of the grid, or of its own.
    noise: when it adds any.
    what: it is.
    source: arXiv id.
  """

  order: str
  evaluations: str
  noise: str
  what: str
  source: str


ABOUT = {
  'ancestral': About(
    '-', '1', 'yes', "DDPM's own steps, of any length", '2006.11239'
  ),
  'ddim': About('1', '1', 'eta > 0', 'DDIM, deterministic', '2010.02502'),
  'analytic_ddpm': About(
    '-', '1', 'yes', 'ancestral, of the optimal variance', '2201.06503'
  ),
  'analytic_ddim': About(
    '-', '1', 'yes', 'DDIM, of the optimal variance', '2201.06503'
  ),
  'euler': About('1', '1', 'churn > 0', "Euler's in EDM's form", '2206.00364'),
  'heun': About('2', '2', 'churn > 0', "EDM's algorithm 2", '2206.00364'),
  'plms': About(
    '2', '1; 4 in the first 3', 'no', 'PNDM: four steps of memory', '2202.09778'
  ),
  'ipndm': About(
    '2', '1', 'no', 'PNDM without its Runge-Kutta start', '2204.13902'
  ),
  'dpm_solver': About(
    '1-3', '1', 'no', 'DPM-Solver, singlestep, on eps', '2206.00927'
  ),
  'dpmpp_2s': About(
    '2', '1', 'no', 'DPM-Solver++, singlestep, on x0', '2211.01095'
  ),
  'dpmpp_2m': About(
    '2', '1', 'no', 'DPM-Solver++, a step of memory', '2211.01095'
  ),
  'dpmpp_3m': About(
    '3', '1', 'no', 'DPM-Solver++, two steps of memory', '2211.01095'
  ),
  'dpmpp_2m_sde': About(
    '-', '1', 'yes', 'DPM-Solver++ 2M with noise', '2211.01095'
  ),
  'unipc': About(
    '2-4', '1', 'no', 'predictor and corrector of one family', '2302.04867'
  ),
  'predictor_corrector': About(
    '-', '2', 'yes', 'ancestral and Langevin steps in turn', '2011.13456'
  ),
  'adaptive': About(
    '2',
    '2; 1 if rejected',
    'no',
    "steps of each sample's own length",
    '2206.00927',
  ),
}


def table() -> list[tuple[str, ...]]:
  """A head and a row for each sampler: what --sampler=list shows."""
  rows = [('sampler', *About._fields[:3], 'what', 'arXiv', 'options')]
  for name, about in ABOUT.items():
    taken = takes(name).values()
    shown = [_shown(option) for option in taken if not _is_needed(option)]
    rows.append((name, *about, ' '.join(shown)))
  return rows


def _is_needed(option) -> bool:
  return option.default is inspect.Parameter.empty


def _shown(option) -> str:
  """An option with its default, and what else it may be: order=3|2|1."""
  choices = dict.fromkeys((option.default, *get_args(option.annotation)))
  if get_origin(option.annotation) is not Literal:
    choices = (option.default,)
  return f'{option.name}={"|".join(map(str, choices))}'


def takes(name: str) -> dict[str, inspect.Parameter]:
  """The options of a sampler.

  Args:
    name: a key of SAMPLERS.

  Raises:
    UserError: an unknown name.
  """
  if name not in SAMPLERS:
    raise UserError(
      f'sampler={name} is not known: use one of {", ".join(SAMPLERS)}'
    )
  return dict(inspect.signature(SAMPLERS[name]).parameters)


def defaults(name: str) -> dict:
  """The options of a sampler that have a default, with it.

  Args:
    name: a key of SAMPLERS.

  Raises:
    UserError: an unknown name.
  """
  return {
    option: parameter.default
    for option, parameter in takes(name).items()
    if not _is_needed(parameter)
  }


def options(name: str, **given) -> dict:
  """All options of a sampler: those given, and the others' defaults.

  Args:
    name: a key of SAMPLERS.
    **given: options of any sampler; None is not given.

  Raises:
    UserError: an unknown name, an option that is not this sampler's, or one
      without a default that is not given.
  """
  taken = takes(name)
  for option, value in given.items():
    if value is not None and option not in taken:
      known = f'it takes {", ".join(taken)}' if taken else 'it takes none'
      raise UserError(f'{option}={value}: {name} has no such option; {known}')
  for option, parameter in taken.items():
    if _is_needed(parameter) and given.get(option) is None:
      raise UserError(f'sampler={name} takes {option}, which is not given')
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
