"""Varied images: SDEdit from real ones (arXiv 2108.01073).

A real image is noised to a time of the sampler's grid and drawn from there.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.guidance import clipping
from diffusion_jax.process import noise
from diffusion_jax.runs import draw, guided
from diffusion_jax.samplers.plan import Plan
from diffusion_jax.samplers.solve import solve
from diffusion_jax.system import numerics
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

# Numbers that nothing else folds in, see `draw`.
ENCODING, NOISE = 2**32 - 3, 2**32 - 4


def times(plan: Plan, strength: float) -> list:
  """The part of a plan's grid that a strength leaves.

  Args:
    plan: the plan.
    strength: the share of the steps that are taken, in (0, 1].

  Raises:
    UserError: the strength is out of range, or the sampler chooses its own
      steps or needs more of them.
  """
  if not 0 < strength <= 1:
    raise UserError(
      f'strength={strength:g}: above 0, which would leave the image as it is, '
      'and at most 1, which leaves almost nothing of it'
    )
  if plan.adaptive:
    raise UserError(
      f'sampler={plan.sampler} chooses its own steps, from noise on: give '
      'another, such as ddim'
    )
  steps = max(1, round(strength * plan.num_steps))
  if steps < plan.options.get('order', 1):
    raise UserError(
      f'strength={strength:g} leaves {steps} of {plan.num_steps} steps, and '
      f'the sampler needs {plan.options["order"]}: give more steps'
    )
  return plan.grid[plan.num_steps - steps :]


@numerics.fixed()
def drawer(trained, plan: Plan, strength: float) -> Callable:
  """Returns a compiled function that varies real images.

  Its noise depends on the plan's seed and the index of a sample only. It is not
  that of `Trained.sample`, or a new and a varied image of an index, at a high
  strength, would be alike.

  Args:
    trained: the network, a `Trained`.
    plan: the plan, of which only seed, sampler, grid, clipping and guidance are
      taken.
    strength: see `times`.

  Returns:
    rows {'index' uint32 [N], 'image' uint8 [N, H, W, C], and 'label' int32 [N]}
    -> uint8 [M, H, W, C], a global array; only the first N are valid.

  Raises:
    UserError: see `times`. The function raises it for data that are not finite.
  """
  grid, sampler = times(plan, strength), plan.create()
  recipe, mesh = trained.recipe, trained.mesh
  codec, schedule = recipe.codec, recipe.schedule
  others = {name: one.recipe for name, one in trained.guides.items()}

  @jax.jit
  def vary(params, rows):
    rows = {**rows}
    first, later = draw.sample_keys(plan.seed, rows.pop('index'))
    params = recipe.whole(params, mesh)
    coding, decoding, later = (
      jax.vmap(jax.random.fold_in, (0, None))(later, number)
      for number in (ENCODING, draw.DECODING, NOISE)
    )
    gathered = sharding.gather_fsdp(params, mesh)
    x0 = codec.encode(gathered, {'image': rows.pop('image')}, coding)
    eps = noise.draw(first, NOISE, codec.shape, x0.dtype)
    t = jnp.asarray(grid[0], x0.dtype)
    xt = schedule.alpha(t) * x0 + schedule.sigma(t) * eps
    denoiser = guided.denoiser(
      recipe, params, rows, plan.guidance, mesh, **others
    )
    if plan.clip and codec.bound is not None:
      denoiser = clipping.clip_x0(denoiser, schedule, codec.bound)
    x = solve(sampler, denoiser, schedule, grid, xt, later)
    data = draw.in_groups(codec, params, x, decoding, mesh)
    finite = jnp.isfinite(x).all() & jnp.isfinite(data).all()
    return draw.ROUNDED['uint8'](data), finite

  @numerics.fixed()
  def of_rows(rows):
    size = sharding.rounded(len(rows['index']), mesh)
    rows = {name: np.asarray(row) for name, row in rows.items()}
    placed = sharding.put_padded(rows, size, mesh)
    return draw.checked(*vary(trained.all_params, placed))

  return of_rows
