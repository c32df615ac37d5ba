"""Samples along a trajectory: from noise to images, and back.

Where a sampler adds no noise, an image is a function of the noise that it
begins as (arXiv 2010.02502, section 5.3).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.guidance import clipping
from diffusion_jax.runs import draw
from diffusion_jax.runs.trained import Trained
from diffusion_jax.samplers.solve import Sampler, solve
from diffusion_jax.training import sharding


def noises(trained: Trained, seed: int, count: int) -> np.ndarray:
  """What the first samples of a seed begin as.

  Args:
    trained: the network.
    seed: of the samples.
    count: how many.

  Returns:
    float32 [count, H, W, C], bitwise the noise of `Trained.sample`.
  """

  @jax.jit
  def first(indices):
    keys, _ = draw.sample_keys(seed, indices)
    return jax.vmap(
      lambda key: jax.random.normal(key, trained.codec.shape, jnp.float32)
    )(keys)

  return np.asarray(first(np.arange(count, dtype=np.uint32)))


def to_images(trained: Trained, x0: np.ndarray) -> np.ndarray:
  """x0 [N, ...] -> uint8 images [N, H, W, C]."""
  keys = jax.random.split(jax.random.key(0), len(x0))
  return np.asarray(
    draw.ROUNDED['uint8'](trained.codec.decode(trained.params, x0, keys))
  )


def to_x0(trained: Trained, images: np.ndarray) -> np.ndarray:
  """uint8 images [N, H, W, C] -> x0 [N, ...]."""
  keys = jax.random.split(jax.random.key(0), len(images))
  return np.asarray(
    trained.codec.encode(trained.params, {'image': images}, keys)
  )


def carrier(
  trained: Trained, sampler: Sampler, grid, *, clip: bool, batch_size: int
) -> Callable:
  """A function that takes x along a grid, down to images or up to noise.

  Args:
    trained: the network.
    sampler: one that adds no noise.
    grid: times, see `solve`; rising for `ddim_inversion`.
    clip: whether x0 is clipped to [-1, 1] in every step.
    batch_size: examples at once.

  Returns:
    x [N, H, W, C] at the grid's first time -> float32 of the same shape at its
    last, the same on every process. It compiles once for each size of a batch.
  """
  mesh = trained.mesh
  parts = mesh.shape['data'] * mesh.shape['fsdp']

  @jax.jit
  def along(params, x):
    def denoiser(xt, t):
      return trained.compiled.denoise(params, xt, t, {})

    if clip:
      denoiser = clipping.clip_x0(denoiser, trained.schedule)
    keys = jax.random.split(jax.random.key(0), len(x))  # no noise is asked for
    return solve(sampler, denoiser, trained.schedule, grid, x, keys)

  def carry(x):
    size = -(-min(batch_size, len(x)) // parts) * parts
    out = []
    for batch in np.split(x, range(size, len(x), size)):
      # Filled up with repeats, so that one program serves all.
      padded = np.resize(batch, (size, *x.shape[1:])).astype(np.float32)
      ended = along(trained.params, sharding.put_batch(padded, mesh))
      out.append(sharding.to_host(ended)[: len(batch)])
    return np.concatenate(out)

  return carry
