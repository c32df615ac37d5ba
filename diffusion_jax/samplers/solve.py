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
      of x's shape, the same for every call in a row; `noise_fn(k)` the k-th of
      several independent ones, k = 0 being the first.
    evaluations: grid -> the number of rows; for `run`, the largest number of
      evaluations per sample.
    run: (denoiser, schedule, x) -> (x0, `adaptive.Took`), from t = T-1 to clean
      data; None if the sampler has init and step.
    from_noise: whether `init` accepts a grid that starts at pure noise, where
      alpha is 0. For other samplers, `solve` takes the first step by DDIM.
  """

  init: Callable | None
  step: Callable | None
  evaluations: Callable = once_a_step
  run: Callable | None = None
  from_noise: bool = False


def starts_at_noise(schedule: schedules.Schedule, grid) -> bool:
  """Whether alpha is 0 at the first time of a grid."""
  if schedule is None or not schedule.ends_in_noise:
    return False
  return bool(grid[0] == schedule.num_timesteps - 1)


def count_evaluations(sampler: Sampler, grid, from_noise: bool = False) -> int:
  """Network evaluations per sample, at most if the sampler chooses its steps.

  Args:
    sampler: the sampler.
    grid: its times.
    from_noise: whether the grid starts at pure noise.
  """
  if not from_noise or sampler.run or sampler.from_noise:
    return sampler.evaluations(grid)
  return 1 + (sampler.evaluations(grid[1:]) if len(grid) > 2 else 0)


def evaluation_times(
  sampler: Sampler, schedule: schedules.Schedule, grid
) -> np.ndarray:
  """The times of all evaluations of a sampler with a grid, in order."""
  grid = np.asarray(grid, np.float64)
  front = grid[:0]
  if starts_at_noise(schedule, grid) and not sampler.from_noise:
    front, grid = grid[:1], grid[1:]
  if len(grid) < 2:
    return front
  rows, _ = sampler.init(schedule, grid, jnp.zeros((1, 1)))
  return np.concatenate([front, rows['t']])


def first_step(denoiser, schedule, x, t, s) -> jax.Array:
  """DDIM's step (arXiv 2010.02502, eq. 12), which is defined for alpha(t) = 0.

  Args:
    denoiser: (xt, t) -> Denoised.
    schedule: the noise schedule.
    x: [B, ...] at t.
    t: the time, concrete.
    s: an earlier time, concrete.
  """
  seen = denoiser(x, jnp.asarray(t, x.dtype))
  log_alpha_bar, variance = schedule.host(s)
  c0, ceps = np.exp(0.5 * log_alpha_bar), np.sqrt(variance)
  return float(c0) * seen.x0 + float(ceps) * seen.eps


def _from_noise(sampler, denoiser, schedule, grid, x, keys, frames):
  """`solve`, with DDIM's step from pure noise in front."""
  start = x
  x = first_step(denoiser, schedule, x, *grid[:2])
  early = [at for frame, at in ((0, start), (1, x)) if frame in frames]
  later = tuple(frame - 1 for frame in frames if frame > 1)
  kept = jnp.stack(early) if early else jnp.zeros((0, *x.shape), x.dtype)
  if len(grid) > 2:
    out = solve(sampler, denoiser, schedule, grid[1:], x, keys, later)
    x, last = out if later else (out, kept[:0])
    kept = jnp.concatenate([kept, last])
  return (x, kept) if frames else x


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
    schedule: the noise schedule; None if the sampler does not use it.
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
  if starts_at_noise(schedule, grid) and not sampler.from_noise:
    return _from_noise(sampler, denoiser, schedule, grid, x, keys, frames)
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

    def noise_fn(k=0):
      return noise.draw(keys, i + k * num_rows, x.shape[1:], x.dtype)

    x, memory = sampler.step(denoiser, row, x, memory, noise_fn)
    if frames:
      kept = kept.at[slot].set(x, mode='drop')
    return (x, memory, kept), None

  inputs = (rows, jnp.arange(num_rows), jnp.asarray(slots[1:]))
  (x, _, kept), _ = jax.lax.scan(body, (x, memory, kept), inputs)
  return (x, kept) if frames else x
