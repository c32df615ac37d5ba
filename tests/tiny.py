"""A tiny run for the tests: seconds to compile, every part of the real one."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import binaries
import dense_network  # noqa: F401, which adds it
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import models, runs
from diffusion_jax.codecs import pixels
from diffusion_jax.conditioning import none
from diffusion_jax.objectives import denoising
from diffusion_jax.process import schedules
from diffusion_jax.runs import recipe as recipes
from diffusion_jax.system import files
from diffusion_jax.training import (
  checkpoint,
  metrics,
  optim,
  sharding,
  state,
  step,
)

SHAPE = (8, 8, 1)
BATCH = 8


def model(**kwargs):
  arguments = {
    'channels': 8,
    'multipliers': (1, 2),
    'num_blocks': 1,
    'attention_resolutions': (4,),
    'num_groups': 4,
    'dropout': 0.1,
  }
  return models.create('unet', SHAPE, **{**arguments, **kwargs})


def shallow():
  return model(multipliers=(1,), attention_resolutions=())


def wide(**kwargs):
  """64 channels on 8x8 maps: where XLA's gradients go wrong if left alone."""
  return model(
    channels=64, multipliers=(1,), attention_resolutions=(8,), num_groups=8,
    **kwargs,
  )  # fmt: skip


def dense(width=16, dropout=0.1, shape=SHAPE):
  """A hidden layer, for tests of what does not depend on the network."""
  size = int(np.prod(shape))

  def init(key):
    first, second = jax.random.split(key)
    return {
      'in': {'kernel': jax.random.normal(first, (size + 1, width)) / 8},
      'out': {'kernel': jax.random.normal(second, (width, size)) / 8},
    }

  def apply(params, xt, t, keys=None, cond=None):
    time = jnp.broadcast_to(t, len(xt))[:, None] / 1000
    rows = jnp.concatenate([xt.reshape(len(xt), -1), time], axis=1)
    hidden = jnp.tanh(rows @ params['in']['kernel'])
    if keys is not None and dropout:
      hidden *= jax.vmap(
        lambda key: jax.random.bernoulli(key, 1 - dropout, (width,))
      )(keys)
    return (hidden @ params['out']['kernel']).reshape(xt.shape)

  return models.Model(init, apply)


def few_arrays(channels=1, width=64):
  """A network for tests of files: each array of a checkpoint takes its time.

  Its middle is large enough to be split. It cannot be applied.
  """

  def layer(key, *shape):
    bias, kernel = jax.random.split(key)
    return {
      'bias': jax.random.normal(bias, shape[-1:]),
      'kernel': jax.random.normal(kernel, shape),
    }

  def init(key):
    first, middle, last = jax.random.split(key, 3)
    return {
      'conv_in': layer(first, 3, 3, channels, width),
      'middle': layer(middle, 3, 3, width, width),
      'conv_out': layer(last, 3, 3, width, channels),
    }

  return models.Model(init, None)


def recipe(
  network=None, shape=SHAPE, schedule=None, prediction='eps'
) -> recipes.Recipe:
  """DDPM by a network: pixels, no condition."""
  network = network or model()
  schedule = schedule or schedules.linear(1000)
  codec, conditioner = pixels.create(shape), none()
  objective = denoising.create(
    models.network_fn(network), codec, conditioner, schedule, prediction
  )
  return recipes.Recipe(
    {'net': network},
    {},
    {},
    codec,
    conditioner,
    schedule,
    prediction,
    objective,
  )


def images(count=BATCH, seed=0):
  """uint8 [count, 8, 8, 1] and labels."""
  rng = np.random.default_rng(seed)
  return {'image': rng.integers(0, 256, (count, *SHAPE), dtype=np.uint8)}


def program(
  mesh, *, lr=1e-3, warmup=5, clip=1.0, ema=0.9, network=None, **kwargs
):
  """(the abstract state, the jitted step: (state, batch) -> ...) on a mesh."""
  made = recipe(network)
  optimizer = optim.create(lr, warmup, clip)
  abstract = state.abstract_state(made.init, optimizer, mesh)
  step_fn = jax.jit(
    lambda now, batch: step.train_step(
      now,
      {},
      batch,
      key=jax.random.key(1),
      objective=made.objective,
      optimizer=optimizer,
      learning_rate=optim.learning_rate(lr, warmup),
      ema_decay=ema,
      mesh=mesh,
      **kwargs,
    ),
    donate_argnums=0,
    out_shardings=(
      jax.tree.map(lambda leaf: leaf.sharding, abstract),
      sharding.replicated(mesh),
    ),
  )
  return abstract, step_fn


def run(
  mesh, *, lr=1e-3, warmup=5, clip=1.0, ema=0.9, network=None, batch=BATCH
):
  """(state, jitted step, batch) on a mesh."""
  optimizer = optim.create(lr, warmup, clip)
  init = recipe(network).init
  start = state.create(jax.random.key(0), init, optimizer, mesh)
  _, step_fn = program(
    mesh, lr=lr, warmup=warmup, clip=clip, ema=ema, network=network
  )
  return start, step_fn, sharding.put_batch(images(batch), mesh)


def random_arrays(abstract):
  """Parameters as NumPy's arrays."""
  rng = np.random.default_rng(0)

  def draw(name, leaf):
    width = max(np.prod(leaf.shape[:-1]), 100)
    values = rng.standard_normal(leaf.shape) / np.sqrt(width)
    return (name.endswith('scale') + values).astype(leaf.dtype)

  leaves, structure = jax.tree.flatten(abstract)
  return structure.unflatten(map(draw, models.names(abstract), leaves))


def random_state(abstract):
  """Where it lies, at step 0, without compiling an initialisation.

  No parameter is zero: a layer that starts at zero hides what is upstream.
  """
  params = random_arrays(abstract.params)
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
  return jax.device_put(
    zeros._replace(
      params=params,
      ema_params=abstract.ema_params and params,
      averages=dict.fromkeys(zeros.averages, params),
    ),
    jax.tree.map(lambda leaf: leaf.sharding, abstract),
  )


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


# The digits' config, made small, of a network that is small too.
CONFIG = {
  'num_steps': 30,
  'batch_size': 16,
  'log_every': 1,
  'eval_every': 10,
  'eval_images': 20,
  'sample_every': 15,
  'checkpoint_every': 5,
  'keep_last': 2,
  'keep_every': 10,
  'model.name': 'dense',
  'model.channels': 8,
  'model.dropout': 0.1,
  'optim.lr': 1e-2,
  'optim.warmup_steps': 5,
  'sample.num_steps': 3,
  'sample.num_images': 9,
}
# The smallest U-Net, for what depends on the network.
UNET = {
  'model.name': 'unet',
  'model.channels': 8,
  'model.num_groups': 4,
  'model.num_blocks': 1,
  'model.multipliers': '(1,)',
  'model.attention_resolutions': '()',
}


def flags(workdir, **changes):
  return [
    '--config=configs/digits.py',
    f'--workdir={workdir}',
    *(
      f'--config.{key}={value}' for key, value in {**CONFIG, **changes}.items()
    ),
  ]


def train(workdir, **changes):
  result = binaries.run('train', *flags(workdir, **changes))
  assert result.code == 0, result.err
  return result


# A run with labels, which learns nothing.
LABELLED = {
  'num_steps': 3, 'checkpoint_every': 3, 'sample_every': 0, 'eval_every': 0,
  'conditioning.name': 'label', 'conditioning.num_classes': 10,
}  # fmt: skip


def labelled(workdir) -> Path:
  """A copy of a run with labels, which the session trains once."""
  return _copied('labelled', LABELLED, workdir)


def trained(workdir, **changes) -> Path:
  """A copy of a finished run, which the session trains once.

  Args:
    workdir: the copy's.
    **changes: of its config, to what the same weights go with.
  """
  _copied('run', {}, workdir)
  if changes:
    place = Path(workdir, 'config.json')
    config = ConfigDict(json.loads(place.read_text()))
    config.update_from_flattened_dict(changes)
    place.write_text(config.to_json())
  return Path(workdir)


def _copied(name, how, workdir) -> Path:
  made = Path(os.environ['DIFFUSION_JAX_TEST_SESSION'], name)
  with made.with_suffix('.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # of the workers, the first one trains
    if not made.exists():
      # Compiled alike whichever module asks first: all share its numbers.
      plain = {binaries.OPTIONS: 'True'}
      unfinished = made.with_suffix('.unfinished')
      result = binaries.run('train', *flags(unfinished, **how), **plain)
      assert result.code == 0, result.err
      unfinished.rename(made)
  shutil.copytree(made, workdir)
  return Path(workdir)


def losses(workdir) -> dict:
  """step -> loss; no step may be there twice."""
  rows = metrics.read(workdir / 'metrics.jsonl')
  assert len({row['step'] for row in rows}) == len(rows)
  return {row['step']: row['loss'] for row in rows}


def final_state(workdir):
  """All of the newest checkpoint, as NumPy."""
  folder = files.at(workdir) / 'checkpoints'
  newest = checkpoint.steps(folder)[-1]
  config = runs.read_config(workdir)
  abstract = state.abstract_state(
    recipes.create(config).init, optim.create(**config['optim']), one_device()
  )
  with checkpoint.Checkpoints(folder) as kept:
    return jax.device_get(kept.restore(newest, abstract))
