r"""Latent diffusion against diffusion in pixels, at equal training time.

  python benchmarks/latent.py --autoencoder=runs/emoji_autoencoder \
    --folder=runs/latent --features=INCEPTION --output=docs/latent.json

Both are trained on the same images, with networks of equal size and as many
levels: emoji_ldm in the latents of the autoencoder, emoji_pixels as long as the
autoencoder and emoji_ldm together. Of the two shapes of emoji_pixels the one
with the larger held-out loss after MINUTES minutes is dropped. Parts, each of
which is kept in the folder and is not repeated:

  plan      seconds of a training step of each, from which the steps follow
  train     the trainings; the folder has their runs
  speed     seconds an image and XLA's peak memory of the compiled sampler, at
            16 images with the decoder
  distance  the 768-d Frechet distance of 1,000 samples to the training images;
            and of the reconstructions of 1,000 training images, the floor
  cost      memory, FLOPs and seconds of sampling at 64, 128 and 256 pixels,
            with random weights, as a plot

--parts chooses some. Time is planned in steps, so the trainings themselves may
be interrupted, and run beside other work; plan and speed need a quiet machine.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import latent_cost
import numpy as np
import rounds
from absl import flags

from diffusion_jax import data, load, runs
from diffusion_jax.cli import command, config_files, declare
from diffusion_jax.planning import compiled
from diffusion_jax.runs import frozen, programs, recipe, trajectories
from diffusion_jax.system import files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import metrics, sharding

FLAGS = flags.FLAGS
PARTS = ('plan', 'train', 'speed', 'distance', 'cost')
MINUTES = 5  # after which the worse shape is dropped
ROUNDS, BATCH, SAMPLES = 5, 16, 1000
HOW = {'sampler': 'ddim', 'num_steps': 20}
SHAPES = ('wide', 'deep')


def main():
  command.need('autoencoder', 'folder')
  parts = rounds.words('parts', FLAGS.parts or PARTS, PARTS)
  if 'distance' in parts:
    command.need('features')
  folder = Path(FLAGS.folder).expanduser().absolute()
  folder.mkdir(parents=True, exist_ok=True)
  configs = {name: _config(name) for name in ('ldm', *SHAPES)}
  here = rounds.machine()
  if {'plan', 'speed', 'cost'} & {*parts}:
    rounds.warn_if_busy(here)
  do = {
    'plan': lambda: plan(configs),
    'train': lambda: train(folder, configs, _kept(folder, 'plan')),
    'speed': lambda: speed(_networks(folder)),
    'distance': lambda: distance(folder, _networks(folder)),
    'cost': lambda: latent_cost.measured(configs, HOW['num_steps'], BATCH),
  }
  for name in parts:
    if not (folder / f'{name}.json').exists():
      terminal.say(f'part {name}')
      found = {'machine': rounds.described(here), **do[name]()}
      files.write_json(folder / f'{name}.json', found)
  result = {name: _kept(folder, name, must=False) for name in PARTS}
  if FLAGS.output:
    files.write_json(FLAGS.output, result)
    if result['cost']:
      latent_cost.plot(result['cost'], Path(FLAGS.output).with_suffix('.png'))
  terminal.report(result, '\n'.join(_shown(result)), as_json=False)


def _kept(folder, name, must=True) -> dict:
  path = folder / f'{name}.json'
  if path.exists():
    return json.loads(path.read_text())
  if must:
    raise UserError(f'{path} is missing: do the part {name} before')
  return {}


def _config(name: str):
  """The config of a training, with the data of --data."""
  kind = 'ldm' if name == 'ldm' else 'pixels'
  path = config_files.shipped_config(f'emoji_{kind}')
  config = config_files.load(path + f':{name}' * (kind == 'pixels'))
  for item in FLAGS.data or ():
    key, _, value = item.partition('=')
    if isinstance(config.data[key], bool):
      raise UserError(f'--data={item}: {key} is as the configs say')
    config.data[key] = type(config.data[key])(value)
  if name == 'ldm':
    config.codec.path = _autoencoder()
    frozen.complete(config)
  return config


def _autoencoder() -> str:
  return str(Path(FLAGS.autoencoder).expanduser().absolute())


def _count(number: int) -> int:
  return max(2, round(FLAGS.scale * number))


# --- plan ---------------------------------------------------------------------


def plan(configs) -> dict:
  """Seconds of a step of each training, and the steps of those in pixels."""
  own = runs.read_config(_autoencoder())
  calls = {'autoencoder': _step(own)}
  calls |= {name: _step(config) for name, config in configs.items()}
  for call in calls.values():
    call()
  times = rounds.alternating(calls, ROUNDS)
  seconds = {name: float(np.median(x)) for name, x in times.items()}
  steps = {'autoencoder': own['num_steps'], 'ldm': configs['ldm'].num_steps}
  whole = sum(steps[name] * seconds[name] for name in steps)
  for name in SHAPES:
    steps[name] = int(whole / seconds[name])
    steps[f'{name}, first'] = int(60 * MINUTES / seconds[name])
  return {'seconds_per_step': seconds, 'steps': steps, 'seconds': whole}


def _step(config) -> Callable:
  """A training step with random images, which returns when it is done."""
  mesh = sharding.make_mesh()
  parts = frozen.load(config, mesh)
  program = programs.create(config, mesh, recipe.create(config, parts))
  shape = (config['batch_size'], *runs.image_shape(config['data']))
  images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  batch = sharding.put_batch({'image': images}, mesh)
  state = [program.create_state(mesh)]

  def call():
    state[0], found = program.step_fn(state[0], program.frozen, batch)
    jax.block_until_ready(found)

  return call


# --- train --------------------------------------------------------------------


def train(folder, configs, planned) -> dict:
  """Trains all; returns which shape in pixels was kept, and the losses."""
  steps = planned['steps']
  _train(folder, 'ldm', configs['ldm'], steps['ldm'])
  for name in SHAPES:
    _train(folder, name, configs[name], steps[f'{name}, first'])
  losses = {name: _heldout(folder / name) for name in SHAPES}
  best = min(losses, key=losses.get)
  _train(folder, best, configs[best], steps[best])
  return {'shape': best, 'first_losses': losses}


def _train(folder, name, config, steps) -> None:
  """Trains a run to a step, at which it is evaluated and saved."""
  steps = _count(steps)
  path = folder / f'{name}.py'
  path.write_text(config_files.source(config))
  _run(
    'train',
    f'--config={path}',
    f'--workdir={folder / name}',
    '--config.sample_every=0',
    *(f'--config.{key}={steps}' for key in ('num_steps', 'eval_every')),
  )


def _run(binary, *given) -> None:
  command = [sys.executable, '-m', f'diffusion_jax.{binary}', *given]
  if subprocess.run(command).returncode:
    raise UserError(f'{binary} has failed, see above; run again to go on')


def _heldout(workdir) -> float:
  rows = metrics.read(workdir / 'metrics.jsonl')
  return [row['heldout_loss'] for row in rows if 'heldout_loss' in row][-1]


def _networks(folder) -> dict:
  """{'pixels', 'latents'}: the trained networks."""
  shape = _kept(folder, 'train')['shape']
  return {'pixels': load(folder / shape), 'latents': load(folder / 'ldm')}


# --- speed --------------------------------------------------------------------


def speed(networks) -> dict:
  """Seconds an image, and the memory of the compiled sampler."""
  calls, found = {}, {}
  indices = np.arange(BATCH, dtype=np.uint32)
  for name, one in networks.items():
    draw = one.compiled.drawer(json.dumps(one.plan(**HOW)))
    rows = sharding.padded_indices(indices, one.mesh)
    program = compiled.compile(draw, (one.params, rows), limit=0)
    found[name] = {
      'peak_bytes': program.total,
      'parameters': sum(x.size for x in jax.tree.leaves(one.params['net'])),
    }
    calls[name] = functools.partial(_drawn, program.program, one.params, rows)
  for call in calls.values():
    call()
  for name, times in rounds.alternating(calls, ROUNDS).items():
    images = -(-BATCH // jax.device_count()) * jax.device_count()
    found[name]['seconds_per_image'] = rounds.quartiles(times / images)
  return found


def _drawn(program, params, rows):
  jax.block_until_ready(program(params, rows))


# --- distance -----------------------------------------------------------------


def distance(folder, networks) -> dict:
  """The distances of samples and of reconstructions to the training images."""
  count, config = _count(SAMPLES), networks['latents'].config
  train, _ = data.splits(config['data'])
  chosen = np.arange(min(count, len(train))) * len(train) // count
  images = np.stack([train[int(i)]['image'] for i in chosen])
  reference = folder / 'train.npy'
  np.save(reference, np.stack([train[i]['image'] for i in range(len(train))]))
  floor = folder / 'floor.npy'
  np.save(floor, _reconstructed(networks['latents'], images))
  sets = {'floor': floor}
  for name, one in networks.items():
    sets[name] = folder / f'{name}_samples'
    # A store, so that an interrupted job goes on.
    _run(
      'sample',
      *(f'--{flag}={value}' for flag, value in HOW.items()),
      f'--workdir={one.workdir}',
      f'--output={sets[name]}',
      f'--num_samples={count}',
      f'--batch_size={BATCH}',
    )
  found = {name: _frechet(path, reference) for name, path in sets.items()}
  return {'samples': count, **found}


def _reconstructed(trained, images) -> np.ndarray:
  parts = np.split(images, range(BATCH, len(images), BATCH))
  return np.concatenate(
    [
      trajectories.to_images(trained, trajectories.to_x0(trained, part))
      for part in parts
    ]
  )


def _frechet(samples, reference) -> float:
  """The distance of two sets by `diffusion_jax.fid`."""
  card = Path(f'{samples}.json')
  _run(
    'fid',
    f'--samples={samples}',
    f'--reference={reference}',
    f'--features={FLAGS.features}',
    *('--taps=768', '--metrics=fid', f'--card={card}'),
  )
  results = json.loads(card.read_text())['results']
  return next(value for key, value in results.items() if 'fid' in key)


# --- what is shown ------------------------------------------------------------


def _shown(result) -> list[str]:
  lines = []
  if plan := result['plan']:
    steps = ', '.join(f'{name} {n}' for name, n in plan['steps'].items())
    lines.append(
      f'steps: {steps}; {plan["seconds"] / 60:.1f} minutes each side'
    )
  if train := result['train']:
    lines.append(f'shape in pixels: {train["shape"]}, {train["first_losses"]}')
  if speed := result['speed']:
    lines += [
      f'{name}: {rounds.spread(one["seconds_per_image"])} s an image, peak '
      f'{one["peak_bytes"] / 2**20:.0f} MiB'
      for name, one in speed.items()
      if name != 'machine'
    ]
    pair = [
      [x['seconds_per_image']['median'], x['peak_bytes']]
      for x in (speed['pixels'], speed['latents'])
    ]
    faster, less = (a / b for a, b in zip(*pair, strict=True))
    lines.append(f'latents: {faster:.2f} times as fast, memory 1/{less:.2f}')
  if found := result['distance']:
    told = [f'{k} {x:.4f}' for k, x in found.items() if isinstance(x, float)]
    lines.append(f'distance: {", ".join(told)}')
  return lines or [f'nothing has been measured yet; parts: {", ".join(PARTS)}']


if __name__ == '__main__':
  # Not where it is imported: binaries have flags of these names.
  declare.table(
    autoencoder=(str, 'Workdir of a finished autoencoder.'),
    folder=(str, 'Folder of the trainings and of what is measured.'),
    data=(list, 'Data keys of all configs, such as name=arrays,path=FILE.'),
    features=(str, 'Inception weights, a .npz, at least up to mixed_7.'),
    parts=(list, 'The parts to do; by default all.'),
    output=(str, 'JSON file of the result; a plot is written beside it.'),
    scale=(1.0, 'Factor on all numbers of steps and samples, for a rehearsal.'),
  )
  command.run(main, __doc__)
