"""The scan that runs every sampler with a grid."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.process import gaussian, noise, schedules


def once_a_step(grid) -> int:
  """The evaluations of a sampler with one evaluation per step."""
  return len(grid) - 1


class Sampler(NamedTuple):
  """A sampler: a pair of functions and their cost.

  A row is one evaluation of the network. A step of the grid with several
  evaluations has several rows, and the network is compiled only once. A sampler
  that chooses its own steps has its own loop, `run`, in place of the pair.

  Attributes:
    init: (schedule, grid, x) -> (rows, memory). `rows` is a dict of float64
      arrays with one entry per row: the times and all coefficients, computed on
      the host. Its entry `ends` is 1 if a row ends a step of the grid, and is
      omitted if every row does. `memory` is state passed from row to row, () if
      none is needed.
    step: (denoiser, row, x, memory, noise_fn) -> (x, memory): computes one row,
      with one call of the denoiser. `noise_fn()` returns standard normal noise
      of x's shape, the same for every call in a row.
    evaluations: grid -> the number of rows; for `run`, the largest number of
      evaluations per sample.
    run: (denoiser, schedule, x) -> (x0, `adaptive.Took`), from t = T-1 to clean
      data; None if the sampler has init and step.
  """

  init: Callable | None
  step: Callable | None
  evaluations: Callable = once_a_step
  run: Callable | None = None


def solve(
  sampler: Sampler,
  denoiser: gaussian.Denoiser,
  schedule: schedules.Schedule,
  grid,
  x: jax.Array,
  keys: jax.Array,
  frames: tuple[int, ...] = (),
) -> Any:
  """Runs a sampler along a grid, in one `lax.scan`.

  Args:
    sampler: the sampler.
    denoiser: the model, with its conditioning, clipping and guidance.
    schedule: the noise schedule.
    grid: concrete times. Decreasing to draw samples, ending at -1, or earlier
      to keep x noised; increasing for `inversion`. Ignored by a sampler with
      its own loop.
    x: [B, ...], at the grid's first time.
    keys: [B] random keys. The noise of example b in row i depends only on
      keys[b] and i, so a sample does not depend on its batch.
    frames: ascending step numbers of the grid (0 = before the first step) at
      which to keep x.

  Returns:
    x [B, ...] at the grid's end; with frames, (x, [len(frames), B, ...]).
  """
  if sampler.run:
    assert not frames
    return sampler.run(denoiser, schedule, x)[0]
  rows, memory = sampler.init(schedule, np.asarray(grid, np.float64), x)
  ends = rows.get('ends', np.ones(len(rows['t'])))
  rows = {name: jnp.asarray(row, x.dtype) for name, row in rows.items()}
  num_steps, num_rows = len(grid) - 1, len(rows['t'])
  assert list(frames) == sorted(set(frames) & set(range(num_steps + 1)))
  # The last row of step k; -1 for k = 0, before the first row.
  last = np.concatenate([[-1], np.flatnonzero(ends)])
  assert len(last) == num_steps + 1
  assert ends[-1]
  # The frame that a row's result is kept in; past the end if in none.
  slots = np.full(num_rows + 1, len(frames))
  slots[1 + last[list(frames)]] = np.arange(len(frames))
  kept = jnp.zeros((len(frames), *x.shape), x.dtype)
  if frames and frames[0] == 0:
    kept = kept.at[0].set(x)

  def body(carry, inputs):
    x, memory, kept = carry
    row, i, slot = inputs

    def noise_fn():
      return noise.draw(keys, i, x.shape[1:], x.dtype)

    x, memory = sampler.step(denoiser, row, x, memory, noise_fn)
    if frames:
      kept = kept.at[slot].set(x, mode='drop')
    return (x, memory, kept), None

  inputs = (rows, jnp.arange(num_rows), jnp.asarray(slots[1:]))
  (x, _, kept), _ = jax.lax.scan(body, (x, memory, kept), inputs)
  return (x, kept) if frames else x
