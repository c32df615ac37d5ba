"""A network's error at each time, from one pass over data on all devices.

It determines the optimal variances (`samplers.analytic`) and the optimal grids
(`samplers.grid.optimal`). An image's noise depends only on the seed and the
image's index. The results of each batch are saved to disk, so an interrupted
pass resumes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.evaluation.batches import Batches, chunks
from diffusion_jax.evaluation.features import Images
from diffusion_jax.process import gaussian
from diffusion_jax.process.gaussian import Denoiser
from diffusion_jax.process.schedules import Schedule
from diffusion_jax.runs.calibration import Calibration
from diffusion_jax.runs.trained import Trained
from diffusion_jax.training import sharding


def scored(
  denoiser: Denoiser, schedule: Schedule, x0, keys, which
) -> dict[str, jax.Array]:
  """Squared errors of each image; `Calibration` is their mean over images.

  Args:
    denoiser: (xt, t) -> (x0, eps), not clipped.
    schedule: the noise schedule.
    x0: [B, ...] data in [-1, 1].
    keys: [B] random keys.
    which: [k] integer times.

  Returns:
    'mse' and 'clipped_mse', [k, B], means over dimensions.
  """

  def one(t):
    def draw(key):
      key = jax.random.fold_in(key, t)
      return jax.random.normal(key, x0.shape[1:], x0.dtype)

    def off(estimate):
      return jnp.mean(jnp.square(x0 - estimate), axis=tuple(range(1, x0.ndim)))

    times = jnp.broadcast_to(t, x0.shape[:1])
    xt = gaussian.q_sample(schedule, x0, times, jax.vmap(draw)(keys))
    estimate = denoiser(xt, times).x0
    return {'mse': off(estimate), 'clipped_mse': off(jnp.clip(estimate, -1, 1))}

  return jax.lax.map(one, jnp.asarray(which))


def measure(
  trained: Trained,
  images: Images,
  seed: int,
  folder,
  batch_size: int,
  on_work: Callable[[int], None] = lambda count: None,
) -> Calibration:
  """Mean errors over a set of 8-bit images, each at all times of the schedule.

  Args:
    trained: the network.
    images: uint8 images.
    seed: seed of the noise, in [0, 2**32).
    folder: folder for the results of each batch.
    batch_size: images per batch, over all devices.
    on_work: called with the number of evaluations just done.

  Raises:
    UserError: the network's output is not finite.
  """
  schedule = trained.schedule
  num_timesteps = schedule.num_timesteps

  @jax.jit
  def some(params, images, numbers, which):
    # Training uses 0, sampling 1, likelihoods 2: see `samplers.draw`.
    root = jax.random.fold_in(jax.random.key(seed), 3)
    keys = jax.vmap(lambda number: jax.random.fold_in(root, number))(numbers)

    def denoiser(xt, t):
      return trained.compiled.denoise(params, xt, t, {})

    x0 = trained.codec.encode(params, {'image': images}, keys)
    return scored(denoiser, schedule, x0, keys, which)

  def compute(images, numbers, tell):
    found = []
    for which in chunks(num_timesteps):
      part = some(trained.params, images, numbers, which)
      found.append(jax.tree.map(sharding.to_host, part))
      tell(len(which))
    return {
      name: np.concatenate([part[name] for part in found]) for name in found[0]
    }

  batches = Batches(
    trained.mesh, images, folder, batch_size, on_work,
    'network outputs that are not finite: was training healthy?',
  )  # fmt: skip
  found = {
    name: values.mean(axis=-1, dtype=np.float64).tolist()
    for name, values in batches.each('errors', compute, num_timesteps).items()
  }
  return Calibration(**found, weights_sha256=trained.weights_sha256)
