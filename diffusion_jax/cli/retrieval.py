"""Judges a pair of encoders: how often it finds the captions of pictures.

`flags.adopt_module_key_flags(retrieval)` makes its flag a binary's own.
"""

import functools

import jax
import numpy as np
from absl import flags

from diffusion_jax.cli import (
  agreeing,
  command,
  declare,
  reconstructions,
  run_data,
)
from diffusion_jax.codecs import pixels
from diffusion_jax.data import captions, jitter
from diffusion_jax.evaluation import agreement, cards, features, tables
from diffusion_jax.reporting import page
from diffusion_jax.runs import averaged
from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
JITTER = ['3', '0.1', '8']
declare.table(
  jitter=(
    JITTER,
    'Runs with loss.name=contrastive: pictures are also judged after random '
    'moves by up to so many pixels, changes of size by up to this share, and '
    'noise of so many levels of 255.',
  ),
)
# Flags that are for samples, and for judges of them.
IDLE = (
  *reconstructions.IDLE,
  *('features', 'metrics', 'taps', 'convention', 'write_statistics'),
  *('neighbours', 'text_judge', 'captions'),
)
STREAM = 4  # of keys: training has 0, samples 1, likelihoods 2, calibration 3
SHAKEN = '_shaken'


def carry_out() -> None:
  """Measures the recall of real pictures, writes a card and reports it.

  Raises:
    UserError: the flags conflict, or there is no such run or image set.
  """
  command.refuse(IDLE, 'a pair of encoders')
  shift, scale, noise = _jitter()
  trained = declare.of_run(declare.network)
  workdir, config = trained.workdir, trained.config
  splits = run_data.splits(config)
  captions.check(*splits)
  encoders = agreement.of_run(trained, min(FLAGS.batch_size, features.BLOCK))
  candidates = agreeing.of_data(config)
  shaken = jax.jit(
    functools.partial(_shaken, shift=shift, scale=scale, noise=noise)
  )
  results, sets = {}, {}
  for source, tail in zip(splits, ('', '_heldout'), strict=True):
    if source is None:
      continue
    count = len(source)
    if FLAGS['num_samples'].present:
      count = min(count, FLAGS.num_samples)
    images, chosen = features.images_of(source, count), _spread(source, count)
    own = [*captions.of(source, chosen)]
    asked = agreement.ask(encoders, candidates, own)
    what = 'judging held-out pictures' if tail else 'judging pictures'
    found = _measured(asked, images, shaken, what)
    results |= {f'{name}{tail}': x for name, x in found.items()}
    sets[tail] = images, asked
  images, asked = sets['']
  protocol = {
    'data': config['data']['name'],
    'split': config['data']['train_split'],
    'judged': 'pictures by their captions',
    **features.facts_of(images),
    'num_heldout': sets['_heldout'][0].count if '_heldout' in sets else 0,
    **{k: asked.protocol[k] for k in ('num_captions', 'captions_sha256')},
    **{'shift': shift, 'scale': scale, 'noise': noise, 'seed': FLAGS.seed},
  }
  details = {'images': images.description}
  card = cards.create(cards.subject_of(trained), protocol, results, details)
  name = cards.name(
    f'step{trained.step}' + averaged.suffix(trained.weights),
    f'pairs_{images.count}', protocol,
  )  # fmt: skip
  path = workdir / 'evaluations' / f'{name}.json'

  def keep():
    files.make(path.parent)
    files.write_json(path, card)

  distributed.on_first(keep)
  terminal.report(
    {**card, 'path': str(path)},
    f'{tables.text(card)}\n\ncard: {path}',
    FLAGS.json,
  )
  page.update(workdir)


def _jitter() -> tuple[float, float, float]:
  """The three numbers of --jitter."""
  told = f'--jitter={",".join(FLAGS.jitter)}'
  try:
    shift, scale, noise = map(float, FLAGS.jitter)
  except ValueError as e:
    raise UserError(f'{told}: three numbers, such as {",".join(JITTER)}') from e
  if not (0 <= shift < 1e4 and 0 <= scale < 1 and 0 <= noise < 1e4):
    raise UserError(
      f'{told}: pixels from 0 on, a share in [0, 1), and levels from 0 on'
    )
  return shift, scale, noise


def _spread(source, count) -> np.ndarray:
  """The images that `features.images_of` takes."""
  return np.arange(count) * len(source) // count


def _shaken(numbers, images, *, shift, scale, noise) -> jax.Array:
  """Pictures after jitter, by the numbers of the images: float32, in [0, 255].

  Args:
    numbers: uint32 [n].
    images: uint8 [n, H, W, C].
    shift: see `jitter.apply`, and so are scale and noise.
    scale: see there.
    noise: see there.
  """
  root = jax.random.fold_in(jax.random.key(FLAGS.seed), STREAM)
  keys = jax.vmap(lambda number: jax.random.fold_in(root, number))(numbers)
  x = jitter.apply(pixels.to_float(images), keys, shift, scale, noise)
  return pixels.from_float(x)


def _measured(asked, images, shaken, what) -> dict:
  """The recall of pictures, plain, after jitter and blank."""

  def moved(numbers, block):
    return np.asarray(shaken(numbers, block))

  ways = {'': agreement.plain, SHAKEN: moved, agreement.BLANK: agreement.blank}
  with terminal.Progress(what, images.count, unit='images') as progress:
    found = agreement.vectors_of(
      asked.encoders, images, [*ways.values()], progress.update
    )
  results = {}
  for tail, vectors in zip(ways, found, strict=True):
    results |= agreement.numbers(asked, vectors, asked.own, tail)
  for k in agreement.FIRST:
    name = f'text_recall_{k}{agreement.CHANCE}'
    results[name] = agreement.chance(asked, asked.own, k)
  return agreement.by_number(results)
