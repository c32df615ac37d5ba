"""Times the programs of a run on the devices of this machine."""

import time
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import config_dict

from diffusion_jax.planning import chips
from diffusion_jax.planning.compiled import Compiled
from diffusion_jax.runs import programs, upscaled
from diffusion_jax.system import distributed, terminal
from diffusion_jax.training import sharding

SECS = 2.0  # for each program; a longer program runs once


def measure(
  config: config_dict.ConfigDict,
  mesh: jax.sharding.Mesh,
  program: programs.Programs,
  train: Compiled,
  sample: Compiled | None,
  count: int,
) -> dict:
  """Times both programs with random images and new parameters.

  Args:
    config: the run's config.
    mesh: the devices.
    program: the config's functions on the mesh.
    train: the compiled training step.
    sample: the compiled sampling program, or None.
    count: images per sampling batch.

  Returns:
    'train' and 'sample', as JSON.
  """
  peak = chips.peak(mesh.devices.flat[0].device_kind)

  def share(found, seconds):  # of the peak; None if that is not known
    return peak and sum(found.products.values()) / seconds / mesh.size / peak

  shapes = programs.rows(config, program.recipe, config.batch_size)
  rows = {name: np.zeros(*x) for name, x in shapes.items()}
  if 'image' in shapes:
    shape, _ = shapes['image']
    rows['image'] = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  batch = sharding.put_batch(rows, mesh)
  now = [program.create_state(mesh)]
  frozen = jax.tree.map(
    lambda x: jax.device_put(np.full(x.shape, 0.01, x.dtype), x.sharding),
    program.frozen,
  )

  def step():
    now[0], values = train.program(now[0], frozen, batch)
    return values

  seconds, steps = _timed('the training step', step)
  found = {
    'train': {
      'seconds_per_step': seconds,
      'steps': steps,
      'images_per_sec': config.batch_size / seconds,
      'share_of_peak': share(train, seconds),
    }
  }
  if sample:
    indices = sharding.padded_indices(count, mesh)
    params = {**frozen, **now[0].averaged}
    texts = {
      name: jax.device_put(np.zeros(*x), sharding.replicated(mesh))
      for name, x in programs.prompts(config, program.recipe).items()
    }
    pictures = {
      name: np.zeros(*x)
      for name, x in upscaled.of_drawing(config, count).items()
    }
    pictures = sharding.put_batch(pictures, mesh) if pictures else None
    seconds, calls = _timed(
      'the sampling program',
      lambda: sample.program(params, indices, pictures, texts),
    )
    evaluations = count * program.plan.rows
    found['sample'] = {
      'seconds_per_evaluation': seconds / evaluations,  # of one image
      'evaluations': calls * evaluations,
      'batch_size': count,
      'share_of_peak': share(sample, seconds),
    }
  return found


def _timed(what: str, call: Callable) -> tuple[float, int]:
  """(seconds per call, calls), after a warm-up call unless that takes long."""

  def seconds(count):
    start = time.monotonic()
    for _ in range(count):
      values = call()
      if jax.default_backend() == 'cpu':
        # Two runs at once on several devices of a CPU can block each other.
        jax.block_until_ready(values)
    jax.block_until_ready(values)
    # All processes must choose the same count.
    return max(distributed.gather(time.monotonic() - start)) / count

  with terminal.waiting(f'measuring {what}'):
    first = seconds(1)
    if first > SECS:
      return first, 1
    count = max(1, min(int(SECS / seconds(1)), 1000))
    return seconds(count), count
