"""The interface of a method: a sampler that keeps to what is known."""

from collections.abc import Callable
from typing import NamedTuple

from diffusion_jax.process.gaussian import Denoiser
from diffusion_jax.samplers.solve import Sampler


class Editing(NamedTuple):
  """What `samplers.solve` runs for an edit.

  With times `grid`, standard normal `noise` [B, H, W, C] and keys of [B]:

    x = editing.start(noise, grid[0])
    x0 = solve(editing.sampler, editing.denoiser, schedule, grid, x, keys)

  Attributes:
    sampler: its rows and steps.
    denoiser: the model, guided by what is known where the method does that.
    start: (noise, t) -> x at t, a concrete time.
  """

  sampler: Sampler
  denoiser: Denoiser
  start: Callable


def from_noise(noise, t):
  """The start of samplers that begin with noise alone."""
  return noise
