r"""Sampling speed, compared with diffusers and with the bare network.

  pip install '.[parity]'
  python benchmarks/sampling.py
  python benchmarks/sampling.py --config=digits --num_steps=50

One network of random weights is written as a run and, with the code of
`convert`, as a diffusers folder. Each side loads its own and samples with DDIM.

1. images/s of `load(RUN).sample(...)` and of `DDIMPipeline.from_pretrained(
   FOLDER)(...)`, both to float32 NumPy images. First both draw the same images
   from the same noise.
2. The time that a draw adds to the network: its time over that of the same
   number of bare evaluations, called one by one or in one compiled scan.

The compared functions alternate in one process. The first call of each, which
compiles, is not one of the rounds.
"""

import functools
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import rounds
from absl import flags

from diffusion_jax import load, models, runs
from diffusion_jax.cli import command, config_files
from diffusion_jax.runs import draw, validation
from diffusion_jax.samplers import plan
from diffusion_jax.system import files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, sharding
from diffusion_jax.weights import diffusers as folders

FLAGS = flags.FLAGS
command.define_config(
  'The network: a config file, or the name of a shipped config.',
  config_files.shipped_config('cifar10'),
)
flags.DEFINE_list('batch_sizes', ['1', '16'], 'Images drawn at once.')
flags.DEFINE_integer('num_steps', 10, 'Steps of DDIM.')
flags.DEFINE_integer('rounds', 5, 'Number of timed calls of each side.')
flags.DEFINE_string('output', None, 'JSON file for the result.')

HOW = {'sampler': 'ddim', 'grid': 'leading'}  # as diffusers' DDIM
TOLERANCE = 1e-3  # of images in [0, 1]
NOISE = 'diffusers.pipelines.ddim.pipeline_ddim.randn_tensor'


def main():
  sizes, config, how = _checked()
  here = rounds.machine('torch', 'diffusers')
  rounds.warn_if_busy(here)
  with tempfile.TemporaryDirectory() as folder:
    trained, pipeline = both(config, Path(folder))
  terminal.say('comparing images from the same noise')
  result = {
    **here,
    **_torch(pipeline),
    'image_shape': trained.image_shape,
    'model': trained.config['model'],
    'num_steps': how.num_steps,
    'rounds': FLAGS.rounds,
    'difference': difference(trained, pipeline, how, sizes[0]),
    'batches': [],
  }
  for size in sizes:
    terminal.say(f'batch {size}')
    result['batches'].append(measured(trained, pipeline, how, size))
  if FLAGS.output:
    files.write_json(FLAGS.output, result)
  terminal.report(result, '\n'.join(_shown(result)), as_json=False)


def both(config, folder: Path) -> tuple:
  """One network on both sides, each loaded as its users do.

  Args:
    config: the config of the run.
    folder: for the files, which are not needed afterwards.

  Returns:
    (`trained.Trained` on one device, `diffusers.DDIMPipeline`).
  """
  import diffusers
  import torch

  diffusers.logging.set_verbosity_error()
  diffusers.logging.disable_progress_bar()
  run, theirs = folder / 'run', folder / 'diffusers'
  shape = runs.image_shape(config.data)
  params = random_params(models.create(image_shape=shape, **config.model))
  folders.write(theirs, runs.to_plain(config), params)
  checkpoint.save_params(run / 'checkpoints', 0, {models.NET: params})
  runs.write_config(run, config)
  pipeline = diffusers.DDIMPipeline.from_pretrained(theirs)
  pipeline.set_progress_bar_config(disable=True)
  pipeline.to('cuda' if torch.cuda.is_available() else 'cpu')
  return load(run, mesh=sharding.make_mesh(devices=jax.devices()[:1])), pipeline


def random_params(model: models.Model) -> dict:
  """Initial values plus noise: the last layer of a new network is almost zero
  and would hide differences."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: leaf + 0.02 * rng.standard_normal(leaf.shape, np.float32),
    jax.jit(model.init)(jax.random.key(0)),
  )


def ours(trained, how, size: int) -> np.ndarray:
  """Images [size, H, W, C] in [0, 255], as users call it."""
  return trained.sample(
    size, batch_size=size, dtype='float32', num_steps=how.num_steps, **HOW
  )


def theirs(pipeline, how, size: int, **options) -> np.ndarray:
  """Images [size, H, W, C] in [0, 1], as users call it."""
  return pipeline(
    size, num_inference_steps=how.num_steps, output_type='np', **options
  ).images


def difference(trained, pipeline, how, size: int) -> float:
  """The largest difference of images in [0, 1] drawn from the same noise.

  Raises:
    RuntimeError: it is too large: the two sides do not do the same work.
  """
  import torch

  first, _ = draw.sample_keys(how.seed, jnp.arange(size, dtype=jnp.uint32))
  noise = [jax.random.normal(key, trained.image_shape) for key in first]
  noise = torch.from_numpy(np.stack(noise).transpose(0, 3, 1, 2).copy())
  # By default GPUs round products to 10 bits, too few for a comparison.
  with (
    jax.default_matmul_precision('highest'),
    torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    mock.patch(NOISE, return_value=noise.to(pipeline.device)),
  ):
    # By default diffusers clips x0 and keeps the old eps.
    images = theirs(pipeline, how, size, use_clipped_model_output=True)
    largest = float(np.abs(ours(trained, how, size) / 255 - images).max())
  if not largest < TOLERANCE:
    raise RuntimeError(f'images differ by {largest:.1e} from the same noise')
  return largest


def measured(trained, pipeline, how, size: int) -> dict:
  """Both comparisons at one batch size: medians and spread."""
  drawer, indices = trained.drawer(how, dtype='float32'), np.arange(size)
  calls = {
    'ours': functools.partial(ours, trained, how, size),
    'diffusers': functools.partial(theirs, pipeline, how, size),
    'draw': lambda: jax.block_until_ready(drawer(indices)),
    **network_alone(trained, how, size),
  }
  first = rounds.alternating(calls, 1)
  seconds = rounds.alternating(calls, FLAGS.rounds)
  alone, drawn = ('one by one', 'one scan'), seconds['draw']
  return {
    'batch_size': size,
    'compile_seconds': float(first['ours'][0] - np.median(seconds['ours'])),
    'images_per_sec': {
      name: _summary(size / seconds[name]) for name in ('ours', 'diffusers')
    },
    'seconds': {name: _summary(seconds[name]) for name in ('draw', *alone)},
    # Of the two times of a round: a slowdown of a whole round cancels.
    'ratios': {
      'ours / diffusers': _summary(seconds['diffusers'] / seconds['ours']),
      **{f'draw / {name}': _summary(drawn / seconds[name]) for name in alone},
    },
  }


def network_alone(trained, how, size: int) -> dict:
  """Calls with the same number of bare network evaluations as a draw."""
  params, apply = trained.params[models.NET], trained.model.apply
  x = jax.random.normal(jax.random.key(0), (size, *trained.image_shape))
  times = [jnp.full(size, t, jnp.float32) for t in how.grid[:-1]]
  once = jax.jit(apply)

  # Each takes the output of the one before, as in a draw: none overlap.
  def one_by_one():
    out = functools.reduce(lambda x, t: once(params, x, t), times, x)
    return jax.block_until_ready(out)

  @jax.jit
  def scan(params, x, times):
    return jax.lax.scan(lambda x, t: (apply(params, x, t), None), x, times)[0]

  return {
    'one by one': one_by_one,
    'one scan': lambda: jax.block_until_ready(
      scan(params, x, jnp.stack(times))
    ),
  }


def _summary(values) -> dict:
  return {
    name: float(getattr(np, name)(values)) for name in ('median', 'min', 'max')
  }


def _checked() -> tuple:
  command.at_least(rounds=1)
  rounds.need('torch', 'diffusers')
  sizes = rounds.numbers('batch_sizes', FLAGS.batch_sizes)
  config = FLAGS.config.copy_and_resolve_references()
  if wrong := validation.check_network(config):
    raise UserError(wrong[0])
  if config.model.dtype != 'float32':
    raise UserError(
      f'--config.model.dtype={config.model.dtype}: float32, as of the pipeline'
    )
  if FLAGS.output:
    runs.usable_file('output', FLAGS.output)
  how = plan.for_run(runs.to_plain(config), num_steps=FLAGS.num_steps, **HOW)
  return sizes, config, how


def _torch(pipeline) -> dict:
  import torch

  return {
    'torch_threads': torch.get_num_threads(),
    'torch_device': str(pipeline.device),
  }


def _shown(result):
  yield (
    '{device} and {torch_device}; {cpu}, {cpu_cores} cores, load {load_before} '
    'before; jax {versions[jax]}, torch {versions[torch]}, diffusers '
    '{versions[diffusers]}'
  ).format(**result)
  batches = result['batches']
  rows = [
    (f'{name}{unit}', *(rounds.spread(batch[kind][name]) for batch in batches))
    for kind, unit in (('images_per_sec', ', images/s'), ('ratios', ''))
    for name in batches[0][kind]
  ]
  compiled = [f'{batch["compile_seconds"]:.1f} s' for batch in batches]
  heads = [f'batch {batch["batch_size"]}' for batch in batches]
  yield from terminal.table(
    [f'{result["num_steps"]} steps, {result["rounds"]} rounds', *heads],
    [*rows, ('compilation', *compiled)],
  )


if __name__ == '__main__':
  command.run(main, __doc__)
