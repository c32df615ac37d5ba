"""Sampling trajectories: from noise to images, and back.

With a sampler that adds no noise, an image is a function of its initial noise
(arXiv 2010.02502, section 5.3).
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import numpy as np

from diffusion_jax.guidance import clipping
from diffusion_jax.process import noise
from diffusion_jax.runs import draw, guided
from diffusion_jax.runs.trained import Trained
from diffusion_jax.samplers.solve import Sampler, solve
from diffusion_jax.training import sharding


def noises(trained: Trained, seed: int, count: int) -> np.ndarray:
  """The initial noise of the first samples of a seed.

  Args:
    trained: the network.
    seed: the seed of the samples.
    count: the number of samples.

  Returns:
    float32 [count, H, W, C], bitwise the noise used by `Trained.sample`.
  """

  @jax.jit
  def first(indices):
    keys, _ = draw.sample_keys(seed, indices)
    return noise.normal(keys, trained.codec.shape, np.float32)

  return np.asarray(first(np.arange(count, dtype=np.uint32)))


def to_images(trained: Trained, x0: np.ndarray) -> np.ndarray:
  """x0 [N, ...] -> uint8 images [N, H, W, C].

  Raises:
    UserError: x0 is not finite.
  """
  keys = jax.random.split(jax.random.key(0), len(x0))
  data = draw.checked(
    trained.codec.decode(trained.params, x0, keys), np.isfinite(x0).all()
  )
  return np.asarray(draw.ROUNDED['uint8'](data))


def to_x0(trained: Trained, images: np.ndarray) -> np.ndarray:
  """uint8 images [N, H, W, C] -> x0 [N, ...]."""
  keys = jax.random.split(jax.random.key(0), len(images))
  return np.asarray(
    trained.codec.encode(trained.params, {'image': images}, keys)
  )


def carrier(
  trained: Trained,
  sampler: Sampler,
  grid,
  *,
  clip: bool,
  batch_size: int,
  label: int | np.ndarray | None = None,
  guidance: Mapping = MappingProxyType({}),
) -> Callable:
  """Returns a function that moves x along a grid, to images or to noise.

  Args:
    trained: the network.
    sampler: a sampler that adds no noise.
    grid: times, see `solve`; increasing for `ddim_inversion`.
    clip: whether to clip x0 to [-1, 1] in every step.
    batch_size: examples processed at once.
    label: the label of all examples, or that of each, [N]; None for the null
      condition.
    guidance: see `samplers.guided.chosen`.

  Returns:
    x [N, H, W, C] at the grid's first time -> float32 of the same shape at its
    last time, the same in every process. It compiles once per batch size.
  """

  @jax.jit
  def along(params, rows):
    x, *label = rows
    rows = {'label': label[0]} if label else {}
    others = {name: one.recipe for name, one in trained.guides.items()}
    denoiser = guided.denoiser(
      trained.recipe, params, rows, guidance, trained.mesh, **others
    )
    if clip:
      denoiser = clipping.clip_x0(denoiser, trained.schedule)
    keys = jax.random.split(jax.random.key(0), len(x))  # unused: no noise
    return solve(sampler, denoiser, trained.schedule, grid, x, keys)

  def carry(x):
    size = sharding.rounded(min(batch_size, len(x)), trained.mesh)
    rows = [np.asarray(x, np.float32)]
    if label is not None:
      rows += [np.broadcast_to(np.int32(label), len(x))]
    return sharding.in_batches(
      functools.partial(along, trained.all_params), rows, size, trained.mesh
    )

  return carry
