"""Bits per dimension of images under a trained network.

Three protocols: 'bpd', the variational bound, which asks the network at every
step of a grid; 'bpd_fast', an estimate of it from ten evaluations an image;
'bpd_ode', the likelihood by the probability flow. See `process.likelihood` and
`process.flow`. What is found of a batch of images is kept on disk, so that what
was interrupted goes on; an image's noise depends on the seed and its number.
"""

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.evaluation.batches import Batches, chunks
from diffusion_jax.evaluation.features import Images
from diffusion_jax.guidance import clipping
from diffusion_jax.process import fast_bound, flow, likelihood
from diffusion_jax.process.gaussian import Denoised
from diffusion_jax.process.schedules import Schedule
from diffusion_jax.runs.trained import Trained
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

KINDS = {
  'bpd': 'the variational bound in bits per dimension',
  'bpd_fast': 'an estimate of it from a hundredth of the evaluations',
  'bpd_ode': 'the likelihood by the probability flow',
}
DEQUANTISATIONS = ('uniform', 'variational')
EVALUATIONS = 10  # of an image, for bpd_fast
MOST_EXACT = 1024  # dimensions


class How(NamedTuple):
  """What the numbers depend on, beside the weights and the images.

  Attributes:
    kind: a key of KINDS.
    seed: of the noise.
    grid: falling times, the last one -1; of the two bounds.
    variance: of p(xs | xt); of the two bounds.
    clip: whether the estimate of x0 is clipped to [-1, 1]; of the two bounds.
    dequantisation: one of DEQUANTISATIONS; of the flow.
    divergence: one of `flow.DIVERGENCES`; of the flow.
    tolerance: relative and absolute, of the flow's solver.
    dtype: of the flow, 'float32' or 'float64'.
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
    """As it stands on metric cards."""
    told = {'bits': self.kind, 'seed': self.seed}
    if self.kind == 'bpd_ode':
      names = ('dequantisation', 'divergence', 'tolerance', 'dtype')
      told |= {'solver': 'Tsit5', 'starts_at': 0}
    else:
      names = ('grid', 'variance', 'clip')
    if self.kind != 'bpd_ode' or self.dequantisation == 'variational':
      told['decoder'] = 'Gaussian in 256 bins, tanh approximation'
    if self.kind == 'bpd_fast':
      told['evaluations'] = EVALUATIONS
    return told | {name: getattr(self, name) for name in names}


class Found(NamedTuple):
  """What goes on a card.

  Attributes:
    results: name -> number.
    details: name -> what is no single number.
  """

  results: dict
  details: dict


def check(how: How, schedule: Schedule, image_shape) -> None:
  """Finds out beforehand what cannot be measured.

  Args:
    how: the protocol.
    schedule: of the run.
    image_shape: (H, W, C).

  Raises:
    UserError: an option or a grid that this protocol cannot have.
  """
  if how.kind != 'bpd_ode':
    steps = len(likelihood.prepare(schedule, how.grid, how.variance).t)
    if how.kind == 'bpd_fast' and steps <= EVALUATIONS:
      raise UserError(
        f'bpd_fast takes {EVALUATIONS} evaluations an image and the grid has '
        f'{steps} steps: ask for bpd'
      )
  elif how.dequantisation not in DEQUANTISATIONS:
    raise UserError(
      f'dequantisation={how.dequantisation}: one of '
      f'{", ".join(DEQUANTISATIONS)}'
    )
  elif how.divergence == 'exact' and math.prod(image_shape) > MOST_EXACT:
    raise UserError(
      f'divergence=exact is for at most {MOST_EXACT} dimensions, not '
      f'{math.prod(image_shape)}: use rademacher'
    )


def work(how: How) -> int:
  """What an image takes, for a measure of progress.

  Args:
    how: the protocol.

  Returns:
    evaluations of the network; 1 for the flow, whose solver has its own way.
  """
  return {'bpd': len(how.grid) - 1, 'bpd_fast': EVALUATIONS, 'bpd_ode': 1}[
    how.kind
  ]


def measure(
  trained: Trained,
  images: Images,
  how: How,
  folder,
  batch_size: int,
  on_work: Callable[[int], None] = lambda count: None,
) -> Found:
  """Bits per dimension of a set of 8-bit images, with its error.

  Args:
    trained: the network.
    images: at least 2, uint8.
    how: the protocol.
    folder: where what is found is kept, batch by batch.
    batch_size: images at once, over all devices.
    on_work: called with how much of `work` is done.

  Raises:
    UserError: see `fast_bound.estimate` and `flow.density`.
  """
  if images.count < 2:
    raise UserError(f'{images.description}: an error takes two images or more')
  if trained.codec.levels != 256:
    raise UserError(
      f'{trained.workdir} diffuses something other than pixels of 8 bits, '
      'which has no bits per dimension of images: use other metrics, such as '
      'fid'
    )
  check(how, trained.schedule, trained.image_shape)
  remedy = 'was the training healthy? --clip may help'
  if how.kind == 'bpd_ode':
    remedy = 'give the solver a larger --tolerance'
  batches = Batches(
    trained.mesh, images, folder, batch_size, on_work,
    f'no finite likelihood: {remedy}',
  )  # fmt: skip
  return {'bpd': _bound, 'bpd_fast': _fast, 'bpd_ode': _flow}[how.kind](
    trained, batches, how
  )


def _given(trained, params, how: How, images, numbers):
  """x0, and a key for each image."""
  # Training has 0, samples have 1: see `runs.draw`.
  root = jax.random.fold_in(jax.random.key(how.seed), 2)
  keys = jax.vmap(lambda number: jax.random.fold_in(root, number))(numbers)
  rows = {'image': images.astype(how.dtype)}
  return trained.codec.encode(params, rows, keys), keys


def _denoiser(trained, params, clip):
  """The network; its own arithmetic is float32 whatever xt is."""

  def denoise(xt, t):
    x0, eps = trained.compiled.denoise(
      params, xt.astype(jnp.float32), jnp.asarray(t, jnp.float32), {}
    )
    return Denoised(x0.astype(xt.dtype), eps.astype(xt.dtype))

  return clipping.clip_x0(denoise, trained.schedule) if clip else denoise


def _program(trained, how, fn):
  """fn(denoiser, x0, keys, *rest), of (images, numbers, *rest); compiled."""

  @jax.jit
  def run(params, images, numbers, *rest):
    x0, keys = _given(trained, params, how, images, numbers)
    clip = how.clip and how.kind != 'bpd_ode'
    return fn(_denoiser(trained, params, clip), x0, keys, *rest)

  def call(*given):
    return jax.tree.map(sharding.to_host, run(trained.params, *given))

  return call


def _bound(trained, batches, how) -> Found:
  steps = likelihood.prepare(trained.schedule, how.grid, how.variance)
  count = len(steps.t)

  def terms(denoiser, x0, keys, which):
    return likelihood.terms(denoiser, steps, x0, keys, which)

  def prior(denoiser, x0, keys):
    return likelihood.prior(trained.schedule, x0, how.grid[0])

  some, first = (_program(trained, how, fn) for fn in (terms, prior))

  def compute(images, numbers, tell):
    found = []
    for which in chunks(count):
      found.append(some(images, numbers, which))
      tell(len(which))
    bits, mse = map(np.concatenate, zip(*found, strict=True))
    return {'prior': first(images, numbers), 'bits': bits, 'mse': mse}

  table = likelihood.Table(**batches.each('bound', compute, count))
  total = np.asarray(table.total, np.float64)
  # A rate is linear in the bits, so that of the mean image is the mean rate.
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


def _fast(trained, batches, how) -> Found:
  steps = likelihood.prepare(trained.schedule, how.grid, how.variance)

  def pilot(denoiser, x0, keys):
    return fast_bound.pilot(denoiser, steps, x0, keys)

  def sampled(denoiser, *given):
    given = (*given, EVALUATIONS - 2)
    return fast_bound.sampled(denoiser, trained.schedule, steps, *given)

  try_fn, sample_fn = (_program(trained, how, fn) for fn in (pilot, sampled))

  def first(images, numbers, tell):
    which, bits = try_fn(images, numbers)
    tell(1)
    return {'which': which, 'bits': bits}

  tried = batches.each('pilot', first, 1)
  probabilities = fast_bound.proposal(**tried, num_steps=len(steps.t))
  digest = hashlib.sha256(probabilities.tobytes()).hexdigest()[:8]

  def second(images, numbers, tell):
    found = sample_fn(images, numbers, probabilities)
    tell(EVALUATIONS - 1)
    return {'bits': found}

  values = batches.each(f'sampled_{digest}', second, EVALUATIONS - 1)['bits']
  mean, low, high = fast_bound.interval(values)
  return Found(
    {'bpd_fast': mean, 'bpd_fast_error': (high - low) / 2},
    {'low': low, 'high': high, 'evaluations': EVALUATIONS},
  )


def _flow(trained, batches, how) -> Found:
  bits_of = {'uniform': flow.dequantised, 'variational': flow.variational}
  solver = {'divergence': how.divergence}
  solver |= {'rtol': how.tolerance, 'atol': how.tolerance}

  def likelihoods(denoiser, x0, keys):
    solve = bits_of[how.dequantisation]
    return solve(denoiser, trained.schedule, x0, keys, **solver)._asdict()

  solve = _program(trained, how, likelihoods)

  def compute(images, numbers, tell):
    with jax.enable_x64(how.dtype == 'float64'):
      found = solve(images, numbers)
    tell(1)
    return found

  found = batches.each('flow', compute, 1)
  bits = np.asarray(found['bits'], np.float64)
  return Found(
    {
      'bpd_ode': bits.mean(),
      'bpd_ode_error': _error(bits),
      'evaluations': found['evaluations'].mean(),
    },
    {'most_evaluations': int(found['evaluations'].max())},
  )
