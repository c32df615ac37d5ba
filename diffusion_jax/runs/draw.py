"""From (seed, index) to a sample.

A sample is addressed by (run, seed, index): its keys come from seed and index
alone, so its noise is bitwise the same in any batch, on any mesh, in any order.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.guidance import clipping
from diffusion_jax.runs.recipe import Recipe
from diffusion_jax.samplers.solve import Sampler, solve
from diffusion_jax.system.errors import UserError


def sample_keys(seed: int, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The random keys of samples: of the noise they begin as, of the sampler's.

  Args:
    seed: of the samples.
    indices: [B] uint32, of the samples.

  Returns:
    (first [B], later [B]): a sample begins as jax.random.normal(first[b],
    image_shape), and `later` goes into `solve`.

  Training has its keys under fold_in(seed, 0), samples have theirs under
  fold_in(seed, 1): split and fold_in of one key give the same children, so two
  users of one root would share noise.
  """
  root = jax.random.fold_in(jax.random.key(seed), 1)

  def keys(index):
    return jax.random.split(jax.random.fold_in(root, index))

  pairs = jax.vmap(keys)(indices)
  return pairs[:, 0], pairs[:, 1]


# Data as people save them, and as they are decoded.
ROUNDED = {
  'uint8': lambda data: jnp.round(data).astype(jnp.uint8),
  'float32': lambda data: data,
}


def drawer(
  recipe: Recipe,
  mesh: Mesh,
  sampler: Sampler,
  grid,
  *,
  seed: int,
  clip: bool = True,
  frames: tuple[int, ...] = (),
  dtype: str | None = None,
  took: bool = False,
  estimates: bool = False,
) -> Callable:
  """A function that draws samples, to be jitted.

  Args:
    recipe: of the run.
    mesh: the devices.
    sampler: which.
    grid: falling times, see `grid`.
    seed: of the samples.
    clip: whether x0 is clipped to the codec's bound in every step, if it has
      one.
    frames: steps at which x is kept, see `solve`.
    dtype: of the data: 'uint8', rounded, or 'float32' as they are decoded; by
      default 'uint8' for images of 8 bits and 'float32' for other data.
    took: whether it says what each sample took; the sampler chooses its steps.
    estimates: whether frames are not x but the estimates of x0 from it, by one
      more evaluation each (arXiv 2006.11239, section 4.3); of clean data, x.

  Returns:
    draw(params, indices [B], rows={}) -> data [B, ...]; `params` holds all
    parts, and `rows` what a condition is made of. With frames, a pair of that
    and [F, B, ...]; with took, a pair of that and `adaptive.Took`.

  Raises:
    UserError: an unknown dtype, or one that the data cannot have.
  """
  codec, schedule = recipe.codec, recipe.schedule
  known = ROUNDED if codec.levels == 256 else {'float32': ROUNDED['float32']}
  dtype = dtype or next(iter(known))
  if dtype not in known:
    raise UserError(f'dtype={dtype!r}: one of {", ".join(known)}')

  def draw(params, indices, rows=None):
    cond = recipe.conditioner.condition(params, rows or {}, None)
    denoiser = recipe.denoiser(params, cond, mesh)
    if clip and codec.bound is not None:
      denoiser = clipping.clip_x0(denoiser, schedule, codec.bound)
    first, later = sample_keys(seed, indices)
    # The last number that `solve` could ever fold in.
    decoding = jax.vmap(lambda key: jax.random.fold_in(key, 2**32 - 1))(later)

    def decode(x0):
      return ROUNDED[dtype](codec.decode(params, x0, decoding))

    x = jax.vmap(lambda key: jax.random.normal(key, codec.shape, jnp.float32))(
      first
    )
    if took:
      x0, counts = sampler.run(denoiser, schedule, x)
      return decode(x0), counts
    out = solve(sampler, denoiser, schedule, grid, x, later, frames)
    if not frames:
      return decode(out)
    x, kept = out
    if estimates:
      # No denoiser knows the noise of clean data, which can only be the last.
      times = jnp.array([grid[k] for k in frames if grid[k] >= 0], x.dtype)
      noised, clean = jnp.split(kept, [len(times)])
      guesses = jax.lax.map(lambda frame: denoiser(*frame).x0, (noised, times))
      kept = jnp.concatenate([guesses, clean])
    return decode(x), jax.vmap(decode)(kept)

  return draw
