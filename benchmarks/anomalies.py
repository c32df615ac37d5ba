r"""Anomalies among the digits, beside an autoencoder and nearest neighbours.

  python benchmarks/anomalies.py --workdir=runs/digits --folder=runs/anomalies \
    --cifar=tfds:cifar10@test --classes=0,3,6,9 --output=docs/anomalies.json

Two tables of areas under the ROC curve, with their standard errors over images:

  other    held-out digits against their negatives, their pixels in an order
           that is random for each image, one 2x2 block of each inverted, and
           CIFAR-10's images, grey and resized to 8x8 (Pillow's bicubic)
  class    of a run that is trained without one class: held-out digits of the
           other classes against all 180 or so of that class. The runs are
           configs/digits.py, in FOLDER

Of the held-out normal digits every second one is the reference, which our
errors are standardised on, and the others are what anomalies are told from. The
rivals learn from the same training images: an autoencoder of dense layers
(64-64-K-64-64, scikit-learn, Adam, the mean of three seeds), and the distance
to the k-th nearest training image. K and k are those with the best area, which
is in their favour: ours are the defaults of `edit anomaly`. What FOLDER holds
is not measured again.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from sklearn.neural_network import MLPRegressor
from threadpoolctl import threadpool_limits

from diffusion_jax import data, load
from diffusion_jax.cli import command, declare
from diffusion_jax.data import images as image_files
from diffusion_jax.evaluation import anomalies, anomaly_scores, features
from diffusion_jax.evaluation.batches import Batches
from diffusion_jax.evaluation.metrics import anomaly
from diffusion_jax.system import files, terminal

FLAGS = flags.FLAGS
WIDTHS = (4, 8, 16)  # of the autoencoder's middle
NEIGHBOURS = (1, 2, 5, 10)
SEEDS, EPOCHS = 3, 500
BLOCK = 2


def main():
  command.need('folder')
  folder = Path(FLAGS.folder).expanduser().absolute()
  folder.mkdir(parents=True, exist_ok=True)
  train, test = (_digits(split) for split in ('train', 'test'))
  result = {}
  if FLAGS.workdir:
    odd, masks = others(test[0][1::2], FLAGS.cifar)
    sets = {'normal': test[0][1::2], **odd}
    result['other'] = _kept(
      folder / f'other_{FLAGS.bound_draws}.json',
      lambda: _table(
        folder, FLAGS.workdir, train[0], test[0][::2], sets, masks
      ),
    )  # fmt: skip
  for name in FLAGS.classes:
    found = _kept(
      folder / f'without_{name}_{FLAGS.bound_draws}.json',
      lambda left=int(name): _without(folder, left, train, test),
    )
    result.setdefault('class', {}).update(found)
  if FLAGS.output:
    files.write_json(FLAGS.output, result)
  terminal.write('\n\n'.join(map(_text, result.values())))


def _kept(path, measure) -> dict:
  """What a file has, or measures and writes it."""
  if not path.exists():
    files.write_json(path, measure())
  return json.loads(path.read_text())


def _without(folder, left, train, test) -> dict:
  """The table of one class, which a network is trained without."""
  run = folder / f'without_{left}' / 'run'
  kept = [(x[labels != left], labels[labels != left]) for x, labels in
          (train, test)]  # fmt: skip
  _train(run, kept)
  every = [x[labels == left] for x, labels in (train, test)]
  normal = kept[1][0]
  sets = {'normal': normal[1::2], str(left): np.concatenate(every)}
  return _table(folder, run, kept[0][0], normal[::2], sets)


def _digits(split) -> tuple[np.ndarray, np.ndarray]:
  """(images uint8 [N, 8, 8, 1], labels [N])."""
  source = data.create('digits', split=split, image_size=8, channels=1)
  rows = [source[i] for i in range(len(source))]
  return tuple(np.stack([row[k] for row in rows]) for k in ('image', 'label'))


def others(digits, cifar=None) -> tuple[dict, dict]:
  """Makes anomalies of digits.

  Args:
    digits: uint8 [N, 8, 8, 1].
    cifar: CIFAR-10's images, a set by name; None to leave them out.

  Returns:
    (name -> images, name -> which pixels are anomalous, where some are).
  """
  rng = np.random.default_rng(0)
  count = len(digits)
  flat = digits.reshape(count, -1)
  shuffled = rng.permuted(flat, axis=1).reshape(digits.shape)
  mask = np.zeros(digits.shape[:3], bool)
  for one, (top, left) in zip(
    mask, rng.integers(0, 9 - BLOCK, (count, 2)), strict=True
  ):
    one[top : top + BLOCK, left : left + BLOCK] = True
  block = np.where(mask[..., None], 255 - digits, digits)
  found = {'negatives': 255 - digits, 'shuffled': shuffled, 'block': block}
  if cifar:
    source = data.open_set(cifar, path=FLAGS.data_path or '')
    chosen = [source[i]['image'] for i in range(min(count, len(source)))]
    found['CIFAR-10'] = np.stack(
      [image_files.fit(Image.fromarray(x), (8, 8), 1) for x in chosen]
    )
  return found, {'block': mask}


def _train(run: Path, kept) -> None:
  """Trains on the digits of some classes, unless it is done."""
  path = run.parent / 'digits.npz'
  path.parent.mkdir(parents=True, exist_ok=True)
  (images, labels), (other, their) = kept
  np.savez(path, train_images=images, train_labels=labels, test_images=other,
           test_labels=their)  # fmt: skip
  given = [
    '--config=digits', f'--workdir={run}', '--config.data.name=arrays',
    f'--config.data.path={path}',
  ]  # fmt: skip
  subprocess.run([sys.executable, '-m', 'diffusion_jax.train', *given],
                 check=True)  # fmt: skip


def _table(folder, run, train, reference, sets, masks=None) -> dict:
  """Kind of anomaly -> {method: [area, its error]}, and how many images."""
  by_method = _ours(folder, run, reference, sets)
  by_method |= _rivals(train, sets)
  table = {}
  for name in sets.keys() - {'normal'}:
    row = {'images': [len(sets['normal']), len(sets[name])]}
    for method, scores in by_method.items():
      row[method] = best(scores['normal'], scores[name])
    table[name] = row
  for name, mask in (masks or {}).items():
    table[name]['pixels'] = {
      method: _of_pixels(scores['maps'][name], mask)
      for method, scores in by_method.items()
      if 'maps' in scores
    }
  return {name: table[name] for name in sets if name in table}


def best(normal, anomalous) -> dict:
  """The best area of some settings {setting: [runs, N]}, mean over runs."""
  found = {}
  for setting, scores in normal.items():
    pairs = zip(scores, anomalous[setting], strict=True)
    areas = [anomaly.auroc(*pair) for pair in pairs]
    found[setting] = [float(x) for x in np.mean(areas, axis=0)]
  setting = max(found, key=lambda setting: found[setting][0])
  area, error = found[setting]
  return {'auroc': area, 'error': error, 'setting': setting}


def _of_pixels(maps, mask) -> dict:
  """The area over pixels of the best of some settings, see `best`."""
  pixels = {
    setting: ([x[~mask] for x in each], [x[mask] for x in each])
    for setting, each in maps.items()
  }
  normal, odd = (
    {setting: x[k] for setting, x in pixels.items()} for k in range(2)
  )
  return best(normal, odd)


def _ours(folder, run, reference, sets) -> dict:
  """Score -> set -> {'': [1, N]}, and heat maps, by the defaults."""
  trained = load(run)
  times = anomalies.default_times(trained.schedule.num_timesteps)
  how = anomalies.How(
    0, times, times, 10, 'fixedlarge', True, FLAGS.bound_draws
  )
  found, levels = {}, None
  for name, x in {'reference': reference, **sets}.items():
    images = features.Images(len(x), lambda x=x: iter([x]), name, x.__getitem__)
    place = anomalies.place_of(
      folder / 'kept', how, trained, features.sha256_of(images), levels
    )
    found[name] = anomalies.measure(
      Batches(trained, images, place, 128), how, anomalies.numbers_of(images),
      levels,
    )  # fmt: skip
    levels = levels or anomalies.levels_of_pixels(found[name])
  scored, _ = anomaly_scores.judge(found, 'reconstruction', 0.05)
  made = {
    name: {x: {'': one.score(name)[None]} for x, one in scored.items()}
    for name in anomalies.SCORES
  }
  maps = {x: {'': one.maps[None]} for x, one in found.items() if x in sets}
  made['reconstruction']['maps'] = maps
  return made


def _rivals(train, sets) -> dict:
  """Rival -> set -> {setting: [runs, N]}."""

  def flat(images):
    return images.reshape(len(images), -1) / 255

  coder = {'maps': {}}
  for width in WIDTHS:
    runs = []
    for seed in range(SEEDS):
      layers = (64, width, 64)
      net = MLPRegressor(
        hidden_layer_sizes=layers, batch_size=64, max_iter=EPOCHS, tol=0,
        random_state=seed,
      )  # fmt: skip
      with threadpool_limits(1):  # faster than two for products so small
        net.fit(flat(train), flat(train))
      runs.append(net)
    for name, images in sets.items():
      x = flat(images)
      off = np.stack([np.square(net.predict(x) - x) for net in runs])
      coder.setdefault(name, {})[str(width)] = off.mean(-1)
      maps = off.reshape(SEEDS, *images.shape[:3])
      coder['maps'].setdefault(name, {})[str(width)] = maps
  search = NearestNeighbors().fit(flat(train))
  near = {}
  for name, images in sets.items():
    distances, _ = search.kneighbors(flat(images), max(NEIGHBOURS))
    near[name] = {str(k): distances[None, :, k - 1] for k in NEIGHBOURS}
  return {'autoencoder': coder, 'neighbours': near}


def _text(table: dict) -> str:
  """A table of areas and errors, with the rivals' best settings."""
  rows = []
  methods = [x for x in next(iter(table.values())) if x not in
             ('images', 'pixels')]  # fmt: skip
  for name, row in table.items():
    cells = [
      f'{x["auroc"]:.4f} ± {x["error"]:.4f}'
      + (f' ({x["setting"]})' if x['setting'] else '')
      for x in (row[method] for method in methods)
    ]
    rows.append([name, *cells])
  return '\n'.join(terminal.table(['anomalies', *methods], rows))


if __name__ == '__main__':
  declare.table(
    workdir=(str, 'A run of configs/digits.py, for the first table.'),
    folder=(str, 'Folder of the runs without a class, and of what is kept.'),
    cifar=(str, "CIFAR-10's test images, given like --input of edit anomaly."),
    data_path=(str, "TFDS's data_dir."),
    classes=([], 'Classes to leave out of training, with commas between.'),
    bound_draws=(10, "Noises of the bound's terms."),
    output=(str, 'A JSON file to write the tables to.'),
  )
  command.run(main, __doc__)
