"""Steps of each sample's own length: DPM-Solver-12 (arXiv 2206.00927, app. C).

The others go down a grid that is chosen beforehand, one for all. Here each
sample has its own lambda = log(alpha / sigma) and tries a step from it by two
methods that share what they see. Where those agree to the tolerance it takes
the step; it tries again, shorter, where they do not; and the next is as long as
the tolerance seems to allow. So what is easy takes few evaluations of the
network, and a hard one takes more.

The two methods are in terms of x0 (DPM-Solver++, arXiv 2211.01095). Over a step
of length h to (alpha', sigma') the probability flow is exactly

  x' = sigma' / sigma x + alpha' (1 - e^-h) x0

for an x0 that does not change. With x0 of the step's start this is DDIM, of
order 1; with x0 of its middle, found by half a step of DDIM, it is of order 2.
In terms of eps, as the appendix has it, x is multiplied by alpha' / alpha in
place of sigma' / sigma: by more than 1, from end to end by 157, and with it all
errors made before; in terms of x0 they fade. It takes more evaluations too,
where both were tried; DPM-Solver-23, which looks three times, about as many at
the tolerances of images.

From the paper: the first step is 0.05 long, the tolerance of a number is the
larger of `atol` and `rtol` |x|, E is the root mean square of what the methods
differ by in terms of it, a step is taken if E <= 1, and the next to be tried is
0.9 E^(-1/2) times as long. Not from it: E is of each sample, where its authors'
code takes the largest of the batch; |x| is the larger of x at the step's start
and, by order 1, at its end; and none is tried that is more than 5 times as long
as that before, as the two methods agree by accident where x0 is clipped.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.process.gaussian import Denoiser, per_example
from diffusion_jax.process.schedules import Schedule
from diffusion_jax.samplers import levels
from diffusion_jax.samplers.solve import Sampler
from diffusion_jax.system.errors import UserError

FIRST = 0.05  # the length of the first step tried, in lambda
SAFETY, GROWTH = 0.9, 5.0  # of the step that would do, and at the most
FINEST = 1e-6  # of tolerances, for float32
LEAST = 3  # evaluations: a step has two, and clean data takes one


class Took(NamedTuple):
  """What each sample took.

  Attributes:
    evaluations: [B] int32, of the network; the last one, to clean data, too.
    accepted: [B] int32, steps taken.
    rejected: [B] int32, steps tried and found too long. Each costs one
      evaluation, as what was seen at the step's start serves again.
    finished: [B] bool, whether it reached t = 0 within the budget.
  """

  evaluations: jax.Array
  accepted: jax.Array
  rejected: jax.Array
  finished: jax.Array


class _State(NamedTuple):
  """Where each sample is: x at lam; a step to `aim` is tried.

  `begins` where the network has not seen x yet. `x0` is what it said of the
  last x that it saw at a step's start.
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
  """DPM-Solver-12, with steps of each sample's own length, see `solve`.

  Args:
    rtol: relative tolerance of the error of a step.
    atol: absolute tolerance; 0.0078 is one level of an 8-bit image.
    budget: evaluations of the network for a sample, at most.

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
  """The probability flow from t = T-1 to t = 0, then x0 of what is there.

  One `lax.while_loop`, each turn of which is one evaluation for each sample
  that is not done, at the start or in the middle of a step of its own; those
  that are done are evaluated with the others, and nothing of them changes. It
  ends with the last of them, or with the budget. Who was not done then gets x0
  of the lowest noise level at which it has begun a step, which is DDIM's single
  step from there to clean data.

  A sample does not depend on its batch, but by rounding: where that decides
  whether E <= 1, the sample changes by about the tolerance.

  Args:
    denoiser: the model, with its conditioning, clipping and guidance.
    schedule: the noise schedule.
    x: [B, ...] at t = T-1.
    rtol: relative tolerance of the error of a step. The error of x at the end
      is proportional to the tolerances, the number of steps to 1 / sqrt(them).
    atol: absolute tolerance; 0.0078 is one level of an 8-bit image.
    budget: evaluations of the network for a sample, at most.

  Returns:
    (x0 [B, ...], Took).

  Raises:
    UserError: an option is out of range.
  """
  _check(rtol, atol, budget)
  last = schedule.num_timesteps - 1
  start, end = levels.of(schedule, [last, 0]).lam
  end = jnp.asarray(end, x.dtype)

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
  lam = jnp.full(count, start, x.dtype)
  state = _State(
    x, lam, jnp.minimum(lam + FIRST, end), jnp.ones(count, bool),
    jnp.zeros_like(x), Took(none, none, none, jnp.zeros(count, bool)),
  )  # fmt: skip
  _, state = jax.lax.while_loop(goes_on, body, (0, state))
  return state.x0, state.took


def _tried(denoiser, schedule, state: _State, end, rtol, atol) -> _State:
  """After one evaluation for each sample, at a step's start or middle."""
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
  # These say something where `seen` is of the middle.
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
  """(sigma' / sigma, alpha' (1 - e^-h)): what x and x0 weigh in a step."""
  sigma, sigma_to = (jnp.sqrt(jax.nn.sigmoid(-2 * at)) for at in (lam, to))
  alpha_to = jnp.sqrt(jax.nn.sigmoid(2 * to))
  return sigma_to / sigma, -alpha_to * jnp.expm1(lam - to)


def _check(rtol, atol, budget):
  if not 0 <= rtol < math.inf:
    raise UserError(f'rtol={rtol}: at least 0')
  if not 0 < atol < math.inf:  # some x is 0, and has no relative error
    raise UserError(f'atol={atol}: above 0')
  if max(rtol, atol) < FINEST:
    raise UserError(
      f'rtol={rtol}, atol={atol}: one of them at least {FINEST}, as the two '
      'methods differ by their rounding below it, and no step is taken'
    )
  if not (budget >= LEAST and budget % 1 == 0):
    raise UserError(
      f'budget={budget}: a whole number of evaluations, at least {LEAST}: two '
      'for a step and one to clean data'
    )
