"""The one scan that runs every sampler."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.process.gaussian import Denoiser
from diffusion_jax.process.schedules import Schedule


class Sampler(NamedTuple):
  """A sampler is a pair of functions.

  Attributes:
    init: (schedule, grid, x) -> (rows, memory). `rows` is a dict of float64
      arrays with one entry a step: the times and all coefficients, worked out
      once, exactly, on the host. `memory` is what steps hand on to the next,
      () where a step needs no history.
    step: (denoiser, row, x, memory, noise_fn) -> (x, memory): one update from
      grid time t to s. `noise_fn()` gives standard normal noise of x's shape.
  """

  init: Callable
  step: Callable


def solve(
  sampler: Sampler,
  denoiser: Denoiser,
  schedule: Schedule,
  grid,
  x: jax.Array,
  keys: jax.Array,
  frames: tuple[int, ...] = (),
) -> Any:
  """Runs a sampler along a grid, in one `lax.scan`.

  Args:
    sampler: which.
    denoiser: the model, with its conditioning, clipping and guidance.
    schedule: the noise schedule.
    grid: falling times, the last one -1; concrete.
    x: [B, ...], at the grid's first time.
    keys: [B] random keys. Example b's noise in step i depends on keys[b] and i
      alone, so a sample does not depend on its batch.
    frames: numbers of steps (0 = before the first, ascending) at which x is
      kept.

  Returns:
    x [B, ...] at the grid's end; with frames, (x, [len(frames), B, ...]).
  """
  rows, memory = sampler.init(schedule, np.asarray(grid, np.float64), x)
  rows = {name: jnp.asarray(row, x.dtype) for name, row in rows.items()}
  num_steps = len(grid) - 1
  assert list(frames) == sorted(set(frames) & set(range(num_steps + 1)))
  # Where step i's result goes among the frames; past their end: nowhere.
  slots = np.full(num_steps + 1, len(frames))
  slots[list(frames)] = np.arange(len(frames))
  kept = jnp.zeros((len(frames), *x.shape), x.dtype)
  if frames and frames[0] == 0:
    kept = kept.at[0].set(x)

  def body(carry, inputs):
    x, memory, kept = carry
    row, i, slot = inputs

    def noise():
      def draw(key):
        key = jax.random.fold_in(key, i)
        return jax.random.normal(key, x.shape[1:], x.dtype)

      return jax.vmap(draw)(keys)

    x, memory = sampler.step(denoiser, row, x, memory, noise)
    if frames:
      kept = kept.at[slot].set(x, mode='drop')
    return (x, memory, kept), None

  inputs = (rows, jnp.arange(num_steps), jnp.asarray(slots[1:]))
  (x, _, kept), _ = jax.lax.scan(body, (x, memory, kept), inputs)
  return (x, kept) if frames else x
