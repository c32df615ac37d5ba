"""Adaptive steps per sample: DPM-Solver-12 (arXiv 2206.00927, appendix C).

Other samplers follow a grid chosen in advance, the same for all samples. Here
each sample has its own lambda = log(alpha / sigma) and tries a step with two
methods that share network evaluations. If they agree to within the tolerance,
the step is accepted; if not, the sample retries with a shorter step. The next
step is as long as the estimated error allows. Easy samples thus need few
network evaluations, and hard samples more.

The two methods are in terms of x0 (DPM-Solver++, arXiv 2211.01095). Over a step
of length h to (alpha', sigma') the probability flow is exactly

  x' = sigma' / sigma x + alpha' (1 - e^-h) x0

if x0 is constant. With x0 from the start of the step this is DDIM, of order 1;
with x0 from its middle, reached by half a DDIM step, it is of order 2. In terms
of eps, as in the paper's appendix, x is multiplied by alpha' / alpha in place
of sigma' / sigma. That factor is above 1 (157 from end to end) and amplifies
earlier errors, while in terms of x0 they decay. The eps form also needed more
evaluations where both were tried. DPM-Solver-23, with three evaluations a step,
needs about as many at the tolerances used for images.

From the paper: the first step has length 0.05; the tolerance of each element is
the larger of `atol` and `rtol` |x|; E is the root mean square of the difference
of the methods divided by the tolerance; a step is accepted if E <= 1; and the
next step is 0.9 E^(-1/2) times as long. Different from the paper: E is computed
per sample, where the authors' code uses the maximum over the batch; |x| is the
larger of x at the start of the step and the order-1 result at its end; and a
step is at most 5 times as long as the previous one, because the two methods can
agree by accident where x0 is clipped.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.process.gaussian import Denoiser, per_example
from diffusion_jax.process.schedules import Schedule
from diffusion_jax.samplers import levels
from diffusion_jax.samplers.solve import Sampler, first_step
from diffusion_jax.system.errors import UserError

FIRST = 0.05  # length of the first step, in lambda
SAFETY, GROWTH = 0.9, 5.0  # factor on the optimal step, and largest growth
FINEST = 1e-6  # smallest tolerance, for float32
LEAST = 3  # evaluations: two for a step, one for clean data


class Took(NamedTuple):
  """The cost of each sample.

  Attributes:
    evaluations: [B] int32, network evaluations, with the last one to clean
      data.
    accepted: [B] int32, accepted steps.
    rejected: [B] int32, rejected steps. Each costs one evaluation, because the
      evaluation at the start of the step is reused.
    finished: [B] bool, whether it reached t = 0 within the budget.
  """

  evaluations: jax.Array
  accepted: jax.Array
  rejected: jax.Array
  finished: jax.Array


class _State(NamedTuple):
  """The state of each sample: x at lam, trying a step to `aim`.

  `begins` is true if the network has not been evaluated at x yet. `x0` is its
  estimate at the last start of a step.
  """

  x: jax.Array
  lam: jax.Array
  aim: jax.Array
  begins: jax.Array
  x0: jax.Array
  took: Took


def adaptive(
  rtol: float = 0.05, atol: float = 0.0078, budget: int = 200
) -> Sampler:
  """DPM-Solver-12 with step sizes chosen per sample, see `solve`.

  Args:
    rtol: relative tolerance of the error of a step.
    atol: absolute tolerance; 0.0078 is one level of an 8-bit image.
    budget: the largest number of network evaluations per sample.

  Raises:
    UserError: an option is out of range.
  """
  _check(rtol, atol, budget)
  run = functools.partial(solve, rtol=rtol, atol=atol, budget=budget)
  return Sampler(None, None, lambda grid: budget, run)


def solve(
  denoiser: Denoiser,
  schedule: Schedule,
  x: jax.Array,
  *,
  rtol: float = 0.05,
  atol: float = 0.0078,
  budget: int = 200,
) -> tuple[jax.Array, Took]:
  """Solves the probability flow from t = T-1 to t = 0, then estimates x0.

  If T-1 is pure noise, the first step, to T-2, is DDIM's.

  Runs a single `lax.while_loop`. Each iteration is one evaluation for each
  unfinished sample, at the start or in the middle of its own step; finished
  samples are evaluated with the others but do not change. The loop ends when
  all samples are finished, or at the budget. A sample unfinished by then gets
  x0 at the lowest noise level where it has started a step, equivalent to a
  single DDIM step from there to clean data.

  A sample depends on its batch only through rounding: if rounding decides
  whether E <= 1, the sample changes by about the tolerance.

  Args:
    denoiser: the model, with its conditioning, clipping and guidance.
    schedule: the noise schedule.
    x: [B, ...] at t = T-1.
    rtol: relative tolerance of the error of a step. The final error of x is
      proportional to the tolerances, and the number of steps to their inverse
      square root.
    atol: absolute tolerance; 0.0078 is one level of an 8-bit image.
    budget: the largest number of network evaluations per sample.

  Returns:
    (x0 [B, ...], Took).

  Raises:
    UserError: an option is out of range.
  """
  _check(rtol, atol, budget)
  start, end = levels.of(schedule, [schedule.last, 0]).lam
  end = jnp.asarray(end, x.dtype)
  if schedule.ends_in_noise:
    x = first_step(denoiser, schedule, x, schedule.last + 1, schedule.last)

  def body(carry):
    turn, state = carry
    going = ~state.took.finished

    def masked(new, old):
      return jnp.where(per_example(going, old), new, old)

    tried = _tried(denoiser, schedule, state, end, rtol, atol)
    return turn + 1, jax.tree.map(masked, tried, state)

  def goes_on(carry):
    turn, state = carry
    return (turn < budget) & ~jnp.all(state.took.finished)

  count = len(x)
  none = jnp.zeros(count, jnp.int32)
  before = none + schedule.ends_in_noise
  lam = jnp.full(count, start, x.dtype)
  state = _State(
    x, lam, jnp.minimum(lam + FIRST, end), jnp.ones(count, bool),
    jnp.zeros_like(x), Took(before, none, none, jnp.zeros(count, bool)),
  )  # fmt: skip
  _, state = jax.lax.while_loop(
    goes_on, body, (int(schedule.ends_in_noise), state)
  )
  return state.x0, state.took


def _tried(denoiser, schedule, state: _State, end, rtol, atol) -> _State:
  """The state after one evaluation per sample, at a step's start or middle."""
  x, lam, aim, begins, x0, took = state
  h = aim - lam

  def moved(estimate, to):
    scale, weight = _step(lam, to)
    return per_example(scale, x) * x + per_example(weight, x) * estimate

  look = jnp.where(begins, lam, lam + h / 2)
  t = schedule.t_of_logsnr(2 * look, x.dtype)
  seen = denoiser(
    moved(x0, look), jnp.clip(t, 0, schedule.num_timesteps - 1)
  ).x0
  # Only meaningful where `seen` is from the middle of the step.
  first, second = moved(x0, aim), moved(seen, aim)
  size = jnp.maximum(jnp.abs(x), jnp.abs(first))
  off = (second - first) / jnp.maximum(atol, rtol * size)
  E = jnp.sqrt(jnp.mean(jnp.square(off), tuple(range(1, x.ndim))))
  accepted = ~begins & (E <= 1)
  rejected = ~begins & ~accepted
  lam = jnp.where(accepted, aim, lam)
  longer = lam + h * jnp.minimum(SAFETY / jnp.sqrt(E), GROWTH)
  return _State(
    jnp.where(per_example(accepted, x), second, x),
    lam,
    jnp.where(begins, aim, jnp.minimum(longer, end)),
    accepted,
    jnp.where(per_example(begins, x), seen, x0),
    Took(
      took.evaluations + 1,
      took.accepted + accepted,
      took.rejected + rejected,
      begins & (lam >= end),
    ),
  )


def _step(lam, to):
  """(sigma' / sigma, alpha' (1 - e^-h)): the weights of x and x0 in a step."""
  sigma, sigma_to = (jnp.sqrt(jax.nn.sigmoid(-2 * at)) for at in (lam, to))
  alpha_to = jnp.sqrt(jax.nn.sigmoid(2 * to))
  return sigma_to / sigma, -alpha_to * jnp.expm1(lam - to)


def _check(rtol, atol, budget):
  if not 0 <= rtol < math.inf:
    raise UserError(f'rtol={rtol}: at least 0')
  if not 0 < atol < math.inf:  # rtol alone fails where x is 0
    raise UserError(f'atol={atol}: above 0')
  if max(rtol, atol) < FINEST:
    raise UserError(
      f'rtol={rtol}, atol={atol}: one of them must be at least {FINEST}; below '
      'it rounding errors exceed the tolerance, and no step is accepted'
    )
  if not (budget >= LEAST and budget % 1 == 0):
    raise UserError(
      f'budget={budget}: a whole number of evaluations, at least {LEAST}: two '
      'for a step and one for clean data'
    )
