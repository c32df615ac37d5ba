"""Bits per dimension of images under a trained network.

There are three protocols: 'bpd', the variational bound, which evaluates the
network at every step of a grid; 'bpd_fast', an estimate of the bound from ten
evaluations per image; 'bpd_ode', the likelihood by the probability flow ODE.
See `process.likelihood` and `process.flow`. The results of each batch are saved
to disk, so an interrupted measurement resumes. An image's noise depends only on
the seed and the image's index.
"""

import hashlib
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.evaluation.batches import Batches, by_steps
from diffusion_jax.guidance import clipping
from diffusion_jax.process import fast_bound, flow, likelihood
from diffusion_jax.process.schedules import Schedule
from diffusion_jax.system.errors import UserError

KINDS = {
  'bpd': 'the variational bound in bits per dimension',
  'bpd_fast': 'an estimate of the bound from a hundredth of the evaluations',
  'bpd_ode': 'the likelihood by the probability flow',
}
# The settings of bpd_ode alone.
OF_FLOW = ('dequantisation', 'divergence', 'tolerance', 'dtype')
DEQUANTISATIONS = ('uniform', 'variational')
EVALUATIONS = 10  # per image, for bpd_fast
MOST_EXACT = 1024  # dimensions

INFINITE = 'no finite likelihood: was training healthy? --clip may help'


class How(NamedTuple):
  """The settings that the numbers depend on, in addition to weights and images.

  Attributes:
    kind: a key of KINDS.
    seed: seed of the noise.
    grid: falling times, the last one -1; for the two bounds.
    variance: variance of p(xs | xt); for the two bounds.
    clip: whether to clip the estimate of x0 to [-1, 1]; for the two bounds.
    dequantisation: one of DEQUANTISATIONS; for the flow.
    divergence: one of `flow.DIVERGENCES`; for the flow.
    tolerance: relative and absolute tolerance of the flow's solver.
    dtype: 'float32' or 'float64'; for the flow.
  """

  kind: str
  seed: int
  grid: list
  variance: str
  clip: bool
  dequantisation: str = 'uniform'
  divergence: str = 'rademacher'
  tolerance: float = 1e-5
  dtype: str = 'float32'

  def protocol(self) -> dict:
    """The settings as written to metric cards."""
    told = {'bits': self.kind, 'seed': self.seed}
    names = ('grid', 'variance', 'clip')
    if self.kind == 'bpd_ode':
      names = OF_FLOW
      told |= {'solver': 'Tsit5', 'starts_at': 0}
    if self.kind != 'bpd_ode' or self.dequantisation == 'variational':
      told['decoder'] = 'Gaussian in 256 bins, tanh approximation'
    if self.kind == 'bpd_fast':
      told['evaluations'] = EVALUATIONS
    return told | {name: getattr(self, name) for name in names}


class Found(NamedTuple):
  """The results for a card.

  Attributes:
    results: name -> number.
    details: name -> anything that is not a single number.
  """

  results: dict
  details: dict


def check(how: How, schedule: Schedule, image_shape) -> None:
  """Checks the settings before anything is measured.

  Args:
    how: the protocol.
    schedule: the run's noise schedule.
    image_shape: (H, W, C).

  Raises:
    UserError: the protocol does not allow an option or the grid.
  """
  if how.kind != 'bpd_ode':
    steps = len(likelihood.prepare(schedule, how.grid, how.variance).t)
    if how.kind == 'bpd_fast' and steps <= EVALUATIONS:
      raise UserError(
        f'bpd_fast takes {EVALUATIONS} evaluations per image, but the grid has '
        f'only {steps} steps: use bpd'
      )
  elif how.divergence == 'exact' and math.prod(image_shape) > MOST_EXACT:
    raise UserError(
      f'divergence=exact is for at most {MOST_EXACT} dimensions, not '
      f'{math.prod(image_shape)}: use rademacher'
    )


def work(how: How) -> int:
  """The work per image, for the progress bar.

  Args:
    how: the protocol.

  Returns:
    the number of network evaluations; 1 for the flow, whose solver is adaptive.
  """
  bound = {'bpd': len(how.grid) - 1, 'bpd_fast': EVALUATIONS}
  return bound.get(how.kind, 1)


def measure(batches: Batches, how: How) -> Found:
  """Measures bits per dimension of a set of 8-bit images, with its error.

  Args:
    batches: the network, and at least 2 images, uint8.
    how: the protocol, checked by `check`.

  Raises:
    UserError: see `check`; or too few images, or other data than images.
  """
  images, trained = batches.images, batches.trained
  if images.count < 2:
    raise UserError(
      f'{images.description}: the standard error needs at least 2 images'
    )
  if trained.codec.levels != 256:
    raise UserError(
      f'{trained.workdir} diffuses in latents, not in 8-bit pixels, so there '
      'are no bits per dimension: use other metrics, such as fid'
    )
  measured = {'bpd': _bound, 'bpd_fast': _fast, 'bpd_ode': _flow}[how.kind]
  return measured(batches, how)


def _denoiser(trained, params, cond, clip):
  """The network, which computes in float32 whatever the dtype of xt."""

  def denoise(xt, t):
    seen = trained.compiled.denoise(
      params, xt.astype(jnp.float32), jnp.asarray(t, jnp.float32), cond
    )
    return jax.tree.map(lambda x: x.astype(xt.dtype), seen)

  return clipping.clip_x0(denoise, trained.schedule) if clip else denoise


def _program(batches, how, fn):
  """Compiles fn(denoiser, x0, keys, *rest) to take (images, numbers, *rest)."""

  def given(params, cond, *rest):
    return fn(_denoiser(batches.trained, params, cond, how.clip), *rest)

  return batches.program(given, seed=how.seed, stream=2, dtype=how.dtype)


def _bound(batches, how) -> Found:
  schedule = batches.trained.schedule
  steps = likelihood.prepare(schedule, how.grid, how.variance)
  count = len(steps.t)

  def terms(denoiser, x0, keys, which):
    return likelihood.terms(denoiser, steps, x0, keys, which)

  def prior(denoiser, x0, keys):
    return likelihood.prior(schedule, x0, how.grid[0])

  some = by_steps(_program(batches, how, terms), count)
  first = _program(batches, how, prior)

  def compute(images, numbers, tell):
    bits, mse = some(images, numbers, tell)
    return {'prior': first(images, numbers), 'bits': bits, 'mse': mse}

  table = likelihood.Table(**batches.each('bound', compute, count, INFINITE))
  total = np.asarray(table.total, np.float64)
  # The rate is linear in the bits, so the mean bits give the mean rate.
  mean = jax.tree.map(
    lambda x: np.mean(x, axis=-1, keepdims=True, dtype=np.float64), table
  )
  rate, rmse = jax.device_get(likelihood.rate_distortion(mean))
  return Found(
    {'bpd': total.mean(), 'bpd_error': _error(total)},
    {
      'prior': float(mean.prior[0]),
      'between': float(mean.bits[:-1].sum()),
      'decoder': float(mean.bits[-1, 0]),
      'evaluations': count,
      'times': [float(t) for t in steps.t],
      'bits_of_steps': mean.bits[:, 0].tolist(),
      'rate': rate.tolist(),
      'rmse': rmse.tolist(),
    },
  )


def _error(values):
  return values.std(ddof=1) / np.sqrt(len(values))


def _fast(batches, how) -> Found:
  schedule = batches.trained.schedule
  steps = likelihood.prepare(schedule, how.grid, how.variance)

  def pilot(denoiser, x0, keys):
    return fast_bound.pilot(denoiser, steps, x0, keys)

  def sampled(denoiser, *given):
    given = (*given, EVALUATIONS - 2)
    return fast_bound.sampled(denoiser, schedule, steps, *given)

  try_fn, sample_fn = (_program(batches, how, fn) for fn in (pilot, sampled))

  def first(images, numbers, tell):
    which, bits = try_fn(images, numbers)
    tell(1)
    return {'which': which, 'bits': bits}

  tried = batches.each('pilot', first, 1, INFINITE)
  probabilities = fast_bound.proposal(**tried, num_steps=len(steps.t))
  digest = hashlib.sha256(probabilities.tobytes()).hexdigest()[:8]

  def second(images, numbers, tell):
    found = sample_fn(images, numbers, probabilities)
    tell(EVALUATIONS - 1)
    return {'bits': found}

  found = batches.each(f'sampled_{digest}', second, EVALUATIONS - 1, INFINITE)
  mean, low, high = fast_bound.interval(found['bits'])
  return Found(
    {'bpd_fast': mean, 'bpd_fast_error': (high - low) / 2},
    {'low': low, 'high': high, 'evaluations': EVALUATIONS},
  )


def _flow(batches, how) -> Found:
  bits_of = {'uniform': flow.dequantised, 'variational': flow.variational}
  solver = {'divergence': how.divergence}
  solver |= {'rtol': how.tolerance, 'atol': how.tolerance}
  schedule = batches.trained.schedule

  def some(params, cond, x0, keys):
    denoiser = _denoiser(batches.trained, params, cond, clip=False)
    found = bits_of[how.dequantisation](denoiser, schedule, x0, keys, **solver)
    return found._asdict()

  def likelihoods(params, cond, x0, keys):
    if not cond:
      return some(params, cond, x0, keys)
    cond = jax.tree.map(
      lambda c: jnp.broadcast_to(c, (len(x0), *c.shape[1:])), cond
    )

    # The solver evaluates one example at a time, with its own condition.
    def one(*example):
      alone = jax.tree.map(lambda x: x[None], example)
      return jax.tree.map(lambda x: x[0], some(params, *alone))

    return jax.vmap(one)(cond, x0, keys)

  solve = batches.program(likelihoods, seed=how.seed, stream=2, dtype=how.dtype)

  def compute(images, numbers, tell):
    with jax.enable_x64(how.dtype == 'float64'):
      found = solve(images, numbers)
    tell(1)
    return found

  remedy = 'no finite likelihood: give the solver a larger --tolerance'
  found = batches.each('flow', compute, 1, remedy)
  bits = np.asarray(found['bits'], np.float64)
  return Found(
    {
      'bpd_ode': bits.mean(),
      'bpd_ode_error': _error(bits),
      'evaluations': found['evaluations'].mean(),
    },
    {'most_evaluations': int(found['evaluations'].max())},
  )
