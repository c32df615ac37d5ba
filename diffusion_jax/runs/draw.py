"""From (seed, index) to an image.

A sample is addressed by (run, seed, index): its keys come from seed and index
alone, so its noise is bitwise the same in any batch, on any mesh, in any order.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.guidance import clipping
from diffusion_jax.system.errors import UserError
from diffusion_jax.process import gaussian
from diffusion_jax.process.schedules import Schedule
from diffusion_jax.samplers.solve import Sampler
from diffusion_jax.samplers.solve import solve


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


def to_uint8(x: jax.Array) -> jax.Array:
  """Images as people save them, rounded to the nearest and clipped.

  Args:
    x: [..., H, W, C] in [-1, 1].

  Returns:
    uint8 of the same shape.
  """
  return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def to_float(x: jax.Array) -> jax.Array:
  """Images for judges that take them unrounded; rounded they are `to_uint8`'s.

  Args:
    x: [..., H, W, C] in [-1, 1].

  Returns:
    float32 of the same shape, clipped to [0, 255].
  """
  return jnp.clip((x + 1.0) * 127.5, 0, 255).astype(jnp.float32)


PIXELS = {'uint8': to_uint8, 'float32': to_float}


def drawer(
  apply: Callable,
  schedule: Schedule,
  prediction: str,
  sampler: Sampler,
  grid,
  image_shape: tuple[int, int, int],
  *,
  seed: int,
  clip: bool = True,
  frames: tuple[int, ...] = (),
  dtype: str = 'uint8',
  took: bool = False,
  estimates: bool = False,
) -> Callable:
  """A function that draws samples, to be jitted.

  Args:
    apply: (params, xt, t) -> prediction.
    schedule: the noise schedule.
    prediction: what the network predicts, see `gaussian.from_prediction`.
    sampler: which.
    grid: falling times, see `grid`.
    image_shape: (H, W, C).
    seed: of the samples.
    clip: whether x0 is clipped to [-1, 1] in every step.
    frames: steps at which x is kept, see `solve`.
    dtype: of the pixels: 'uint8' (`to_uint8`) or 'float32' (`to_float`).
    took: whether it says what each sample took; the sampler chooses its steps.
    estimates: whether frames are not x but the estimates of x0 from it, by one
      more evaluation each (arXiv 2006.11239, section 4.3); of clean data, x.

  Returns:
    draw(params, indices [B]) -> dtype [B, H, W, C]; with frames, a pair of that
    and dtype [F, B, H, W, C]; with took, a pair of that and `adaptive.Took`.

  Raises:
    UserError: an unknown dtype.
  """
  if dtype not in PIXELS:
    raise UserError(f'dtype={dtype!r}: one of {", ".join(PIXELS)}')

  def draw(params, indices):
    denoiser = gaussian.denoiser(
      lambda xt, t: apply(params, xt, t), schedule, prediction
    )
    if clip:
      denoiser = clipping.clip_x0(denoiser, schedule)
    first, later = sample_keys(seed, indices)
    x = jax.vmap(lambda key: jax.random.normal(key, image_shape, jnp.float32))(
      first
    )
    if took:
      x0, counts = sampler.run(denoiser, schedule, x)
      return PIXELS[dtype](x0), counts
    out = solve(sampler, denoiser, schedule, grid, x, later, frames)
    if frames and estimates:
      x, kept = out
      # No denoiser knows the noise of clean data, which can only be the last.
      times = jnp.array([grid[k] for k in frames if grid[k] >= 0], x.dtype)
      noised, clean = jnp.split(kept, [len(times)])
      guesses = jax.lax.map(lambda frame: denoiser(*frame).x0, (noised, times))
      out = x, jnp.concatenate([guesses, clean])
    return jax.tree.map(PIXELS[dtype], out)

  return draw
