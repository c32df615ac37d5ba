r"""Do generated images help a classifier? Digits, at 10, 50 and all a class.

  python benchmarks/augmentation.py --folder=runs/augmentation \
    --output=docs/augmentation.json

For each number of real training images a class, the generator,
configs/digits_conditional.py, is trained on these images only, and `edit
augment` writes sets of new and of varied images. Then classifiers, which differ
only in what they are trained on, are trained for the same number of steps of
the same batch, and scored on all held-out digits, which nothing else has seen:

  real        the real images
  shifts      moved by up to a pixel
  flips       moved, and half of them mirrored
  new         half of each batch real, the other half new images
  new+shifts  the same, all of them moved
  varied      half of each batch real, the other half varied images
  new alone   new images only

Each is trained with the seeds 0, 1 and 2. What is done is kept in the folder.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rounds
from absl import flags

from diffusion_jax import data
from diffusion_jax.cli import command, declare
from diffusion_jax.codecs.pixels import to_float
from diffusion_jax.configs import digits
from diffusion_jax.evaluation import classifier
from diffusion_jax.system import files, terminal
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
# Real images a class -> steps of the generator; the config has 3000.
STEPS = {'10': 600, '50': 1000, 'all': 2000}
PER_CLASS = 100  # of each set of generated images
HOW = ('--sampler=ddim', '--num_steps=20')
STRENGTH = 0.5
SEEDS, CLASSES = (0, 1, 2), 10
CLASSIFIER_STEPS, BATCH, LEARNING_RATE = 600, 64, 2e-3


class Arm(NamedTuple):
  """What a classifier is trained on.

  Attributes:
    real: share of real images in a batch.
    other: the set of the others: 'new', 'varied' or ''.
    shifts: whether images are moved by up to a pixel.
    flips: whether half of them are mirrored.
  """

  real: float
  other: str = ''
  shifts: bool = False
  flips: bool = False


ARMS = {
  'real': Arm(1),
  'shifts': Arm(1, shifts=True),
  'flips': Arm(1, shifts=True, flips=True),
  'new': Arm(0.5, 'new'),
  'new+shifts': Arm(0.5, 'new', shifts=True),
  'varied': Arm(0.5, 'varied'),
  'new alone': Arm(0, 'new'),
}


class Set(NamedTuple):
  """uint8 images [N, H, W, C] and int32 labels [N]."""

  images: np.ndarray
  labels: np.ndarray


def main():
  folder = Path(FLAGS.folder).expanduser().absolute()
  folder.mkdir(parents=True, exist_ok=True)
  real, heldout = (_read(source) for source in _digits())
  here = rounds.machine()
  result = {'machine': rounds.described(here), 'sizes': {}}
  for name, steps in STEPS.items():
    kept = folder / f'result_{name}.json'
    if not kept.exists():
      files.write_json(kept, _of_size(folder, name, steps, real, heldout))
    result['sizes'][name] = json.loads(kept.read_text())
  if FLAGS.output:
    files.write_json(FLAGS.output, result)
  terminal.report(result, '\n'.join(table(result)), as_json=False)


def _of_size(folder, name, steps, real: Set, heldout: Set) -> dict:
  """Trains generator and classifiers with so many real images a class."""
  count = len(real.labels) if name == 'all' else int(name)
  sets = {'real': first_of_each(real, count)}
  path = folder / f'real_{name}.npz'
  np.savez(path, **sets['real']._asdict())
  workdir = folder / f'run_{name}'
  _run(
    'train', '--config=digits_conditional', f'--workdir={workdir}',
    '--config.data.name=arrays', f'--config.data.path={path}',
    '--config.data.heldout_split=', '--config.sample_every=0',
    f'--config.num_steps={steps}',
  )  # fmt: skip
  facts = {'generator_steps': steps}
  for other, given in (
    ('new', ()), ('varied', ('--from=train', f'--strength={STRENGTH}')),
  ):  # fmt: skip
    made = folder / f'{other}_{name}.npz'
    _run(
      'edit', 'augment', f'--workdir={workdir}', f'--output={made}',
      f'--per_class={PER_CLASS}', *HOW, *given,
    )  # fmt: skip
    told = json.loads(made.with_name(f'{made.name}.json').read_text())
    facts[other] = {
      key: sum(told[key].values())
      for key in ('candidates', 'left_out_near', 'left_out_identical')
    } | {'left_out_expected': told['left_out_expected']}
    with np.load(made) as found:
      sets[other] = Set(found['images'], found['labels'])
  facts['arms'] = {}
  for arm, how in ARMS.items():
    right = [accuracy(one, heldout) for one in train(sets, how, SEEDS)]
    facts['arms'][arm] = right
    terminal.say(f'{name}, {arm}: {right}')
  # A classifier that has seen all real images says whether labels are right.
  (judge,) = train({'real': real}, ARMS['shifts'], SEEDS[:1])
  for other in ('new', 'varied'):
    facts[other]['labels_right'] = accuracy(judge, sets[other])
  return {'real_images': len(sets['real'].labels), **facts}


def _run(binary, *given) -> None:
  command = [sys.executable, '-m', f'diffusion_jax.{binary}', *given]
  if subprocess.run(command).returncode:
    raise UserError(f'{binary} has failed, see above; run again to go on')


def _digits():
  return data.splits(digits.get_config().data)


def _read(source) -> Set:
  images, labels = zip(*map(source.read_fn, range(len(source))), strict=True)
  return Set(np.stack(images), np.array(labels, np.int32))


def first_of_each(given: Set, count: int) -> Set:
  """The first images of each class, in their order."""
  of_class = [np.flatnonzero(given.labels == k)[:count] for k in range(CLASSES)]
  kept = np.sort(np.concatenate(of_class))
  return Set(given.images[kept], given.labels[kept])


# --- the classifier -----------------------------------------------------------


def train(sets: dict[str, Set], arm: Arm, seeds, steps=CLASSIFIER_STEPS):
  """Trains classifiers; returns (network, parameters) of each.

  Args:
    sets: 'real', and the set that the arm names.
    arm: what they are trained on.
    seeds: of parameters, batches and dropout.
    steps: steps of BATCH images.
  """
  shape = sets['real'].images.shape[1:]
  model = classifier.network(shape, CLASSES)
  optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
  parts = [('real', round(BATCH * arm.real))]
  parts.append((arm.other, BATCH - parts[0][1]))
  held = [
    (*map(jnp.asarray, sets[name]), count) for name, count in parts if count
  ]

  @jax.jit
  def step(state, root, number):
    params, moments = state
    keys = jax.random.split(jax.random.fold_in(root, number), 5)
    images, labels = _batch(keys[0], held)
    if arm.shifts:
      images = jax.vmap(shifted)(jax.random.split(keys[1], BATCH), images)
    if arm.flips:
      mirrored = jax.random.bernoulli(keys[2], shape=(BATCH, 1, 1, 1))
      images = jnp.where(mirrored, images[:, :, ::-1], images)

    def loss_fn(params):
      dropout = jax.random.split(keys[3], BATCH)
      _, logits = model.apply(params, images, dropout)
      loss = optax.softmax_cross_entropy_with_integer_labels
      return loss(logits, labels).mean()

    updates, moments = optimizer.update(jax.grad(loss_fn)(params), moments)
    return optax.apply_updates(params, updates), moments

  trained = []
  for seed in seeds:
    init_key, root = jax.random.split(jax.random.key(seed))
    params = model.init(init_key)
    state = params, optimizer.init(params)
    for number in range(steps):
      state = step(state, root, number)
    trained.append((model, state[0]))
  return trained


def _batch(key, held):
  """Images in [-1, 1] and labels, drawn from each set in its number."""
  images, labels = [], []
  for i, (pictures, classes, count) in enumerate(held):
    at = jax.random.randint(
      jax.random.fold_in(key, i), (count,), 0, len(classes)
    )
    images.append(to_float(pictures[at]))
    labels.append(classes[at])
  return jnp.concatenate(images), jnp.concatenate(labels)


def shifted(key, image):
  """An image [H, W, C] moved by -1, 0 or 1 pixels in each direction."""
  by = jax.random.randint(key, (2,), 0, 3)
  padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), 'edge')
  return jax.lax.dynamic_slice(padded, (by[0], by[1], 0), image.shape)


def accuracy(trained, given: Set) -> float:
  """The share of images that a classifier takes for their label's class."""
  model, params = trained
  _, logits = jax.jit(model.apply)(params, to_float(jnp.asarray(given.images)))
  return float((np.argmax(logits, 1) == given.labels).mean())


def table(result) -> list[str]:
  """The result in lines of Markdown."""
  heads = ['trained on', *(f'{name} a class' for name in result['sizes'])]
  rows = []
  for arm in ARMS:
    found = [size['arms'][arm] for size in result['sizes'].values()]
    cells = [
      f'{np.mean(x):.1%} ({min(x):.1%} to {max(x):.1%})' for x in found
    ]  # fmt: skip
    rows.append([arm, *cells])
  lines = (heads, ['---'] * len(heads), *rows)
  return ['| ' + ' | '.join(cells) + ' |' for cells in lines]


if __name__ == '__main__':
  declare.table(
    folder=('runs/augmentation', 'Folder of the trainings and sets.'),
    output=(str, 'JSON file of the result.'),
  )
  command.run(main, __doc__)
