"""The ways of diffusers' schedulers through the exact denoiser of a mixture.

`CASES` pairs its schedulers with our samplers; `way_live` runs the first,
`way_golden` reads what tests/golden/make_schedulers.py has kept of them, and
`way_ours` runs the second from the same noise on the same whole times. All
give x after every step of the grid. With B(h) = h diffusers' UniPC gives nan on
its last step, to clean data, as infinity times nothing.
"""

import inspect
import pathlib
from typing import NamedTuple

import mixture
import numpy as np

PATH = pathlib.Path(__file__).parents[1] / 'golden' / 'schedulers.npz'
TOLERANCE = 1e-4  # of max |x|, after each step
T = 1000
SHAPE = (2, 8)


class Case(NamedTuple):
  """A scheduler and the sampler of the same name.

  Attributes:
    scheduler: of diffusers, without 'Scheduler'.
    settings: of it.
    sampler: ours.
    options: its options.
    grid: 'leading', 'trailing', 'to 0': the trailing one, ending at 0, or that
      of Stable Diffusion or SDXL, which also have other betas.
  """

  scheduler: str
  settings: dict
  sampler: str
  options: dict
  grid: str = 'trailing'


PNDM = {'set_alpha_to_one': True}
ODE = {'algorithm_type': 'dpmsolver', 'final_sigmas_type': 'sigma_min'}
BETAS = {'beta_start': 0.00085, 'beta_end': 0.012}  # of Stable Diffusion
STABLE = {'beta_schedule': 'scaled_linear', **BETAS, 'steps_offset': 1}
CASES = {
  'ddim': Case(
    'DDIM', {'clip_sample': False}, 'ddim', {'eta': 0.0}, 'leading'
  ),
  'ddim_eta1': Case(
    'DDIM', {'clip_sample': False}, 'ddim', {'eta': 1.0}, 'leading'
  ),
  'pndm': Case('PNDM', PNDM, 'plms', {}, 'leading'),
  'pndm_skip_prk': Case(
    'PNDM', {**PNDM, 'skip_prk_steps': True},
    'plms', {'variant': 'improved_euler'}, 'leading',
  ),
  'ipndm': Case('IPNDM', {}, 'ipndm', {}),
  'dpm_solver_1': Case(
    'DPMSolverSinglestep', {**ODE, 'solver_order': 1},
    'dpm_solver', {'order': 1}, 'to 0',
  ),
  'dpm_solver_2': Case(
    'DPMSolverSinglestep', {**ODE, 'solver_order': 2},
    'dpm_solver', {'order': 2}, 'to 0',
  ),
  'dpm_solver_3': Case(
    'DPMSolverSinglestep',
    {**ODE, 'solver_order': 3, 'lower_order_final': True},
    'dpm_solver', {'order': 3, 'variant': 'diffusers'}, 'to 0',
  ),
  'dpmpp_2s': Case(
    'DPMSolverSinglestep', {'solver_order': 2, 'lower_order_final': True},
    'dpmpp_2s', {},
  ),
  'dpmpp_2m': Case('DPMSolverMultistep', {}, 'dpmpp_2m', {}),
  'dpmpp_3m': Case(
    'DPMSolverMultistep', {'solver_order': 3},
    'dpmpp_3m', {'variant': 'published'},
  ),
  'dpmpp_2m_sde': Case(
    'DPMSolverMultistep', {'algorithm_type': 'sde-dpmsolver++'},
    'dpmpp_2m_sde', {},
  ),
  **{
    f'unipc_{order}_{kind}': Case(
      'UniPCMultistep',
      {
        'solver_order': order, 'solver_type': kind,
        'timestep_spacing': 'trailing',
      },
      'unipc', {'order': order, 'variant': kind},
    )
    for order, kind in ((1, 'bh2'), (2, 'bh1'), (2, 'bh2'), (3, 'bh2'))
  },
  'heun': Case('HeunDiscrete', {'timestep_spacing': 'linspace'}, 'heun', {}),
  'euler': Case('EulerDiscrete', {}, 'euler', {}),
  'stable_pndm': Case(
    'PNDM', {**STABLE, 'skip_prk_steps': True, 'set_alpha_to_one': False},
    'plms', {'variant': 'improved_euler'}, 'stable_diffusion',
  ),
  'stable_ddim': Case(
    'DDIM', {**STABLE, 'clip_sample': False, 'set_alpha_to_one': False},
    'ddim', {}, 'stable_diffusion',
  ),
  'sdxl_euler': Case(
    'EulerDiscrete', {**STABLE, 'timestep_spacing': 'leading'},
    'euler', {}, 'sdxl',
  ),
}  # fmt: skip
STEPS = (10, 50)
ENDS = {'stable_diffusion': 0, 'sdxl': -1}
KAPPA = ('HeunDiscrete', 'EulerDiscrete')  # in x / alpha


def grid(name: str, steps: int) -> list[int]:
  stride = T // steps
  if name in ENDS:
    return [*(1 + stride * i for i in reversed(range(steps))), ENDS[name]]
  first = T - stride if name == 'leading' else T - 1
  times = list(range(first, first - T, -stride))
  return [*times[:steps], 0 if name == 'to 0' else -1]


def noise(name: str, steps: int) -> np.ndarray:
  """float32 [1 + steps, *SHAPE]: the start, then each step's."""
  generator = np.random.Generator(np.random.PCG64([steps, *name.encode()]))
  return generator.standard_normal((1 + steps, *SHAPE)).astype(np.float32)


def _levels(t, stable=False):
  """(alpha, sigma) of whole times in float64."""
  betas = np.linspace(1e-4, 0.02, T)
  if stable:
    betas = np.linspace(*np.sqrt([*BETAS.values()]), T) ** 2
  log = np.cumsum(np.log1p(-betas))
  log = np.concatenate([log, [0.0]])[np.asarray(t)]  # -1 is the last
  return np.exp(0.5 * log), np.sqrt(-np.expm1(log))


def way_live(name: str, steps: int) -> np.ndarray:
  """float32 [steps, *SHAPE]: x after each step of diffusers' scheduler."""
  import diffusers
  import torch

  case = CASES[name]
  times = grid(case.grid, steps)
  start, *later = noise(name, steps)
  settings = {'beta_start': 1e-4, 'beta_end': 0.02, **case.settings}
  if case.scheduler == 'IPNDM':
    settings = case.settings
  scheduler = getattr(diffusers, f'{case.scheduler}Scheduler')(**settings)
  stable = case.grid in ENDS
  takes = inspect.signature(scheduler.set_timesteps).parameters
  if 'timesteps' in takes and not stable:
    scheduler.set_timesteps(timesteps=times[:-1])
  else:
    scheduler.set_timesteps(steps)
  if hasattr(scheduler, 'set_begin_index'):
    scheduler.set_begin_index(0)
  asked = scheduler.timesteps
  if case.scheduler == 'IPNDM':
    # It has a schedule and a prediction of its own.
    alpha, sigma = map(torch.from_numpy, _levels(times))
    scheduler.alphas, scheduler.betas = alpha, sigma
  x = torch.from_numpy(start.copy())
  if case.scheduler in KAPPA:
    x = x / _levels(times[0], stable)[0]
  way = []
  for i, t in enumerate(asked):
    given = x.numpy().astype(np.float64)
    time = times[i] if case.scheduler == 'IPNDM' else int(t)
    alpha, sigma = _levels(time, stable)
    if case.scheduler in KAPPA:
      given = scheduler.scale_model_input(x, t).numpy().astype(np.float64)
    eps = (given - alpha * mixture.x0(given, alpha, sigma)) / sigma
    if case.scheduler == 'IPNDM':
      eps = (eps - sigma * given) / alpha
    if case.scheduler != 'IPNDM':
      eps = eps.astype(np.float32)
    noisy = {}
    if name in ('ddim_eta1', 'dpmpp_2m_sde'):
      noisy['variance_noise'] = torch.from_numpy(later[i])
    if name == 'ddim_eta1':
      noisy['eta'] = 1.0
    x = scheduler.step(torch.from_numpy(eps), t, x, **noisy).prev_sample
    way.append(x.numpy())
  way = np.stack(way)[_ends(name, steps, len(asked))]
  if case.scheduler in KAPPA:
    way = way * _levels(times[1:], stable)[0][:, None, None]
  return way.astype(np.float32)


def _ends(name, steps, calls) -> list[int]:
  """After which of its calls diffusers has come to each time of the grid."""
  extra = calls - steps
  if name == 'pndm':
    return [3, 7, 11, *range(12, calls)]
  if name == 'heun':
    return [*range(1, calls, 2), calls - 1]
  return list(range(extra, calls))


def way_golden(name: str, steps: int) -> np.ndarray:
  with np.load(PATH) as file:
    return file[f'{name}_{steps}']


def way_ours(name: str, steps: int, **options) -> np.ndarray:
  """As `way_live`, by our sampler in float32; options instead of the case's."""
  import jax
  import jax.numpy as jnp

  from diffusion_jax import samplers
  from diffusion_jax.process import gaussian, schedules

  case = CASES[name]
  schedule = schedules.linear(T)
  if case.grid in ENDS:
    schedule = schedules.scaled_linear(T, **BETAS)
  sampler = samplers.create(case.sampler, **{**case.options, **options})
  start, *later = noise(name, steps)
  later = jnp.asarray(np.array(later))

  def denoise(xt, t):
    alpha, sigma = schedule.alpha(t, xt.dtype), schedule.sigma(t, xt.dtype)
    x0 = mixture.x0(xt, alpha, sigma, jnp)
    return gaussian.Denoised(x0, (xt - alpha * x0) / sigma)

  # The sampler itself, with noise that is given in place of drawn.
  def init(schedule, grid, x):
    rows, memory = sampler.init(schedule, grid, x)
    return {**rows, 'number': np.arange(len(rows['t']))}, memory

  def step(denoiser, row, x, memory, _):
    number = jnp.minimum(row['number'].astype(int), steps - 1)
    return sampler.step(denoiser, row, x, memory, lambda: later[number])

  keys = jax.random.split(jax.random.key(0), SHAPE[0])  # of no use
  _, way = samplers.solve(
    samplers.Sampler(init, step), denoise, schedule, grid(case.grid, steps),
    jnp.asarray(start), keys, tuple(range(1, steps + 1)),
  )  # fmt: skip
  return np.asarray(way)
