"""Samplers: (init, step) pairs, time grids, and the scan that runs them."""

import inspect
from collections.abc import Callable
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
from diffusion_jax.samplers.solve import Sampler, solve  # noqa: F401
from diffusion_jax.samplers.unipc import unipc
from diffusion_jax.system.errors import UserError, one_of

# Samplers that need the network's calibration, see `runs.calibration`.
CALIBRATED = ('analytic_ddpm', 'analytic_ddim')
# Samplers that choose their own steps.
ADAPTIVE = ('adaptive',)


class About(NamedTuple):
  """A description of a sampler.

  Attributes:
    create: (options) -> Sampler.
    order: the order of convergence in the number of steps, without noise.
    source: arXiv id.
    what: a one-line description.
    noise: when it adds noise: 'yes', 'no', or a condition.
    evaluations: network evaluations per step.
  """

  create: Callable
  order: str
  source: str
  what: str
  noise: str = 'no'
  evaluations: str = '1'


_ALL = (
  About(ancestral, '-', '2006.11239', "DDPM's own steps, of any length", 'yes'),
  About(ddim, '1', '2010.02502', 'DDIM, deterministic', 'eta > 0'),
  About(
    analytic_ddpm,
    '-',
    '2201.06503',
    'ancestral, with the optimal variance',
    'yes',
  ),
  About(
    analytic_ddim, '-', '2201.06503', 'DDIM, with the optimal variance', 'yes'
  ),
  About(euler, '1', '2206.00364', "Euler in EDM's form", 'churn > 0'),
  About(heun, '2', '2206.00364', "EDM's algorithm 2", 'churn > 0', '2'),
  About(
    plms,
    '2',
    '2202.09778',
    'PNDM: four steps of memory',
    evaluations='1; 4 in the first 3',
  ),
  About(ipndm, '2', '2204.13902', 'PNDM without its Runge-Kutta start'),
  About(dpm_solver, '1-3', '2206.00927', 'DPM-Solver, singlestep, on eps'),
  About(dpmpp_2s, '2', '2211.01095', 'DPM-Solver++, singlestep, on x0'),
  About(dpmpp_2m, '2', '2211.01095', 'DPM-Solver++, a step of memory'),
  About(dpmpp_3m, '3', '2211.01095', 'DPM-Solver++, two steps of memory'),
  About(dpmpp_2m_sde, '-', '2211.01095', 'DPM-Solver++ 2M with noise', 'yes'),
  About(unipc, '2-4', '2302.04867', 'predictor and corrector of one family'),
  About(
    predictor_corrector,
    '-',
    '2011.13456',
    'ancestral and Langevin steps in turn',
    'yes',
    '2',
  ),
  About(
    adaptive,
    '2',
    '2206.00927',
    'step sizes chosen per sample',
    evaluations='2; 1 if rejected',
  ),
)
ABOUT = {about.create.__name__: about for about in _ALL}
SAMPLERS = {name: about.create for name, about in ABOUT.items()}

# What diffusers, k-diffusion and others call them.
ALIASES = {
  **dict.fromkeys(('ddpm', 'euler_a', 'euler_ancestral'), 'ancestral'),
  **dict.fromkeys(('dpm++', 'dpmpp', 'dpm++_2m', 'dpm_solver++'), 'dpmpp_2m'),
  **dict.fromkeys(('dpmsolver++', 'dpmsolver_multistep'), 'dpmpp_2m'),
  **dict.fromkeys(('dpm++_2s', 'dpmsolver_singlestep'), 'dpmpp_2s'),
  **dict.fromkeys(('dpm++_sde', 'dpm++_2m_sde'), 'dpmpp_2m_sde'),
  **dict.fromkeys(('edm', 'k_heun'), 'heun'),
  **dict.fromkeys(('k_euler', 'ode'), 'euler'),
  **dict.fromkeys(('pc', 'langevin'), 'predictor_corrector'),
  **{'pndm': 'plms', 'dpm': 'dpm_solver', 'dpm_solver_2': 'dpm_solver'},
}


def table() -> list[tuple[str, ...]]:
  """The table of --sampler=list: a header, and a row for each sampler."""
  columns = ('order', 'evaluations', 'noise', 'what', 'source')
  rows = [('sampler', *columns[:-1], 'arXiv', 'options')]
  for name, about in ABOUT.items():
    taken = takes(name)
    shown = [_shown(taken[option]) for option in defaults(name)]
    told = (getattr(about, column) for column in columns)
    rows.append((name, *told, ' '.join(shown)))
  return rows


def _shown(option) -> str:
  """An option with its default, then its other choices: order=3|2|1."""
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
  create_fn = SAMPLERS[one_of('sampler', name, SAMPLERS, ALIASES)]
  return dict(inspect.signature(create_fn).parameters)


def defaults(name: str) -> dict:
  """The default values of a sampler's options, without required ones.

  Args:
    name: a key of SAMPLERS.

  Raises:
    UserError: an unknown name.
  """
  return {
    option: parameter.default
    for option, parameter in takes(name).items()
    if parameter.default is not inspect.Parameter.empty
  }


def options(name: str, **given) -> dict:
  """All options of a sampler: the given ones, and defaults of the others.

  Args:
    name: a key of SAMPLERS.
    **given: options of any sampler; None means not given.

  Raises:
    UserError: an unknown name, an option that this sampler does not have, or a
      required option that is not given.
  """
  taken = takes(name)
  given = {option: x for option, x in given.items() if x is not None}
  for option, value in given.items():
    if option not in taken:
      known = f'it takes {", ".join(taken)}' if taken else 'it takes none'
      raise UserError(f'{option}={value}: {name} has no such option; {known}')
  chosen = defaults(name) | given
  for option in taken:
    if option not in chosen:
      raise UserError(f'sampler={name} needs {option}, which is not given')
  return {option: chosen[option] for option in taken}


def create(name: str, **given) -> Sampler:
  """A sampler by name.

  Args:
    name: a key of SAMPLERS.
    **given: its options; None means the default, see `options`.

  Raises:
    UserError: as for `options`, or an option out of range.
  """
  chosen = options(name, **given)
  return SAMPLERS[name](**chosen)
