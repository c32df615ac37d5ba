"""The one scan that runs every sampler that has a grid."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.process import noise
from diffusion_jax.process.gaussian import Denoiser
from diffusion_jax.process.schedules import Schedule
from diffusion_jax.system.errors import UserError


def choose(option: str, value, *allowed) -> None:
  """Raises UserError unless the value of an option is one of those allowed."""
  if value not in allowed:
    raise UserError(f'{option}={value}: {" or ".join(map(str, allowed))}')


def once_a_step(grid) -> int:
  """The evaluations of a sampler that asks the network once in each step."""
  return len(grid) - 1


class Sampler(NamedTuple):
  """A sampler is a pair of functions, and what it costs.

  A row is one evaluation of the network. Where a step of the grid takes
  several, they are several rows, and the network is compiled once. A sampler
  that chooses its steps has a loop of its own in place of the pair.

  Attributes:
    init: (schedule, grid, x) -> (rows, memory). `rows` is a dict of float64
      arrays with one entry a row: the times and all coefficients, worked out
      once, exactly, on the host. Its `ends` is 1 where a row ends a step of
      the grid, and is left out where every row does. `memory` is what rows
      hand on to the next, () where none is needed.
    step: (denoiser, row, x, memory, noise_fn) -> (x, memory): what one row
      does, with one call of the denoiser. `noise_fn()` gives standard normal
      noise of x's shape, the same however often it is called.
    evaluations: grid -> the number of rows; of a loop of its own, the most that
      a sample takes.
    run: (denoiser, schedule, x) -> (x0, `adaptive.Took`), from t = T-1 to clean
      data; None where there is a pair.
  """

  init: Callable | None
  step: Callable | None
  evaluations: Callable = once_a_step
  run: Callable | None = None


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
    grid: times, concrete. They fall where samples are drawn, which end at -1;
      a grid may end above it, with x still noised. For `inversion` they rise. A
      sampler with a loop of its own does not look at them.
    x: [B, ...], at the grid's first time.
    keys: [B] random keys. Example b's noise in row i depends on keys[b] and i
      alone, so a sample does not depend on its batch.
    frames: numbers of steps of the grid (0 = before the first, ascending) at
      which x is kept.

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
  # The row after which step k is done; before the first row: -1.
  last = np.concatenate([[-1], np.flatnonzero(ends)])
  assert len(last) == num_steps + 1
  assert ends[-1]
  # Where a row's result goes among the frames; past their end: nowhere.
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
