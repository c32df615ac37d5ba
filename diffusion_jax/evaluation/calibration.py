"""A network's error at each time, from one pass over data on all devices.

It determines the optimal variances (`samplers.analytic`) and the optimal grids
(`samplers.grid.optimal`). An image's noise depends only on the seed and the
image's index. The results of each batch are saved to disk, so an interrupted
pass resumes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.evaluation.batches import Batches, by_steps
from diffusion_jax.process import gaussian, schedules
from diffusion_jax.runs.calibration import Calibration


def scored(
  denoiser: gaussian.Denoiser, schedule: schedules.Schedule, x0, keys, which
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


def measure(batches: Batches, seed: int) -> Calibration:
  """Mean errors over a set of 8-bit images, each at all times of the schedule.

  Args:
    batches: the network and the images.
    seed: seed of the noise, in [0, 2**32).

  Raises:
    UserError: the network's output is not finite.
  """
  trained = batches.trained
  count = trained.schedule.num_timesteps

  def some(params, cond, x0, keys, which):
    def denoiser(xt, t):
      return trained.compiled.denoise(params, xt, t, cond)

    return scored(denoiser, trained.schedule, x0, keys, which)

  program = batches.program(some, seed=seed, stream=3, dtype='uint8')
  values = batches.each(
    'errors',
    by_steps(program, count),
    count,
    'network outputs that are not finite: was training healthy?',
  )
  found = {
    name: x.mean(axis=-1, dtype=np.float64).tolist()
    for name, x in values.items()
  }
  return Calibration(**found, weights_sha256=trained.weights_sha256)
