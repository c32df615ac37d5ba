"""The cost of sampling at several resolutions; see latent.py."""

import functools
from pathlib import Path

import jax
import numpy as np
import rounds
from ml_collections import ConfigDict

from diffusion_jax.planning import compiled
from diffusion_jax.runs import draw, recipe
from diffusion_jax.samplers import plan
from diffusion_jax.system import terminal
from diffusion_jax.training import sharding

SIZES = (64, 128, 256)
FEW = 2  # steps that are timed; the others take as long


def measured(configs, num_steps: int, batch: int) -> dict:
  """Memory, FLOPs and seconds of sampling, with random weights.

  Args:
    configs: {'wide': in pixels, 'ldm': in latents}, of the smallest size.
    num_steps: steps of a sample.
    batch: samples drawn at once; more if there are more devices.

  Returns:
    {'pixels', 'latents'} -> a list of rows, one for each size.
  """
  found = {'pixels': [], 'latents': []}
  for size in SIZES:
    for name, config in (('pixels', 'wide'), ('latents', 'ldm')):
      terminal.say(f'{name} at {size} pixels')
      found[name].append(
        {'size': size, **_row(configs[config], size, num_steps, batch)}
      )
  return found


def _row(config, size, num_steps, batch) -> dict:
  config = ConfigDict(config.to_dict())
  # The same levels attend, whose maps are of other sizes.
  config.model.attention_resolutions = tuple(
    at * size // config.data.image_size
    for at in config.model.attention_resolutions
  )
  config.data.image_size = size
  made, mesh = recipe.create(config), sharding.make_mesh()
  params = {
    **jax.jit(made.init)(jax.random.key(0)),
    **jax.tree.map(lambda x: np.full(x.shape, 0.01, x.dtype), made.frozen),
  }
  params = jax.device_put(params, sharding.replicated(mesh))
  rows = sharding.padded_indices(batch, mesh)

  def program(steps):
    how = plan.create(
      made.schedule, sampler='ddim', num_steps=steps, clip=config.sample.clip
    )
    fn = jax.jit(draw.drawer(made, mesh, how))
    return compiled.compile(fn, (params, rows), limit=0)

  few, more = program(FEW), program(2 * FEW)
  calls = {
    name: functools.partial(_run, one.program, params, rows)
    for name, one in (('few', few), ('more', more))
  }
  for call in calls.values():
    call()
  times = rounds.alternating(calls, 3)
  a, b = (float(np.min(times[name])) for name in ('few', 'more'))
  step = (b - a) / FEW
  rest = max(a - FEW * step, 0.0)  # the decoder
  flops_a, flops_b = (sum(x.products.values()) for x in (few, more))
  per_step = (flops_b - flops_a) / FEW
  return {
    'peak_bytes': few.total,
    'seconds_per_image': (num_steps * step + rest) / len(rows),
    'flops_per_image': (flops_a + (num_steps - FEW) * per_step) / len(rows),
  }


def _run(program, params, rows):
  jax.block_until_ready(program(params, rows))


def plot(found: dict, path: Path) -> None:
  """Draws seconds, FLOPs and memory over the resolution.

  Args:
    found: from `measured`.
    path: the picture.
  """
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 3), layout='constrained')
  for axes, (key, title, unit) in zip(
    figure.subplots(1, 3),
    (
      ('seconds_per_image', 'seconds an image', 1),
      ('flops_per_image', 'GFLOP an image', 1e9),
      ('peak_bytes', 'peak memory of 16 images, MiB', 2**20),
    ),
    strict=True,
  ):
    for name in ('pixels', 'latents'):
      sizes = [row['size'] for row in found[name]]
      axes.loglog(
        sizes, [row[key] / unit for row in found[name]], 'o-', label=name
      )
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.minorticks_off()
    axes.set_title(title, fontsize=9)
    axes.set_xlabel('pixels a side')
  axes.legend(frameon=False)
  figure.savefig(path, dpi=120)
