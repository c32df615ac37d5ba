"""Judging sets of images: the flags that say how, and what they ask for.

Shared by the binaries that judge. `flags.adopt_module_key_flags(judging)` makes
these flags a binary's own.
"""

import zipfile
from typing import NamedTuple

import numpy as np
from absl import flags

from diffusion_jax import data, runs
from diffusion_jax.cli import command
from diffusion_jax.data import Source
from diffusion_jax.evaluation import (
  bits,
  classifier,
  features,
  inception,
  measure,
  statistics,
)
from diffusion_jax.evaluation.features import Images, Judge
from diffusion_jax.evaluation.statistics import Statistics
from diffusion_jax.models.inception import CONVENTIONS
from diffusion_jax.reporting import pictures
from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import inception as weights

FLAGS = flags.FLAGS
flags.DEFINE_list(
  'metrics', [],
  'With commas: '
  + '; '.join(f'{name}, {what}' for name, what in measure.METRICS.items())
  + '. By default fid, of a run copies, by a classifier classes. Of a run, by '
  'themselves: '
  + '; '.join(f'{name}, {what}' for name, what in bits.KINDS.items())
  + '.',
)  # fmt: skip
flags.DEFINE_string(
  'features', None,
  'What judges: classifier (trained on the data, the default where they have '
  'labels), pixels, inception (of the cache), or a file: Inception weights '
  '(.npz, .pth, .pb) or RUN/evaluations/classifier_*.npz.',
)  # fmt: skip
flags.DEFINE_list(
  'taps', ['2048'],
  f'Where in Inception: {", ".join(inception.DISTANCES)}. The first one '
  'serves the metrics that are no Frechet distances.',
)  # fmt: skip
flags.DEFINE_enum(
  'convention', 'tf1', CONVENTIONS,
  'How images become input of Inception: as in the graph itself, or as in '
  'pytorch-fid.',
)  # fmt: skip
for name, what in (
  ('kid_subsets', 'KID: how many.'),
  ('kid_subset_size', 'KID: images of each set in a subset.'),
  ('kid_seed', 'KID: of the subsets.'),
  ('is_splits', 'Inception Score: parts of the samples.'),
  ('is_seed', 'Inception Score: shuffle first, for sets that stand in order.'),
  ('pr_k', 'Precision and recall: whose distance is the radius.'),
):
  flags.DEFINE_integer(name, getattr(measure.DEFAULTS, name), what)
flags.DEFINE_string(
  'reference', None,
  'What is compared with: a folder of images, a .npz or .npy of them, '
  'tfds:NAME@SPLIT, digits, or a .npz of statistics (mu, sigma). By default '
  "a run's training images.",
)  # fmt: skip
flags.DEFINE_string(
  'data_path', None, "Where the data lie, if not the config's; TFDS's folder."
)
flags.DEFINE_string(
  'cache', None,
  'Folder for features and weights; ~/.cache/diffusion_jax by default. It may '
  'be emptied at any time.',
)  # fmt: skip
flags.DEFINE_bool(
  'download', False,
  'First fetch the published weights of Inception into the cache '
  f'({weights.BYTES / 1e6:.0f} MB from github.com; their hash is checked).',
)  # fmt: skip
flags.DEFINE_string(
  'write_statistics', None,
  "A .npz for the reference's mu and sigma, as other tools read them.",
)  # fmt: skip
flags.DEFINE_integer(
  'neighbours', 20,
  'On the picture: so many samples, those nearest to a training image first.',
)  # fmt: skip
flags.DEFINE_bool('json', False, 'Print the result as JSON.')

NUM_NEAR = 4  # training images beside each sample


class Task(NamedTuple):
  """What samples are judged by, and against what.

  Attributes:
    judge: the network.
    metrics: which.
    options: of the metrics.
    reference: what samples are compared to.
    source: the reference's images by number; None where there are statistics.
    heldout: held-out images, or None.
    protocol: of the card.
  """

  judge: Judge
  metrics: list[str]
  options: measure.Options
  reference: Images | Statistics
  source: Source | None
  heldout: Images | None
  protocol: dict


def check_flags() -> None:
  """Raises UserError for what is wrong whatever the images are."""
  command.at_least(
    neighbours=0, kid_subsets=2, kid_subset_size=2, kid_seed=0, is_splits=1,
    is_seed=0, pr_k=1,
  )  # fmt: skip
  for flag in ('kid_seed', 'is_seed'):
    if (FLAGS[flag].value or 0) >= 2**32:
      raise UserError(f'--{flag}={FLAGS[flag].value}: below 2**32')
  for metric in FLAGS.metrics:
    if metric in bits.KINDS:
      raise UserError(
        f'--metrics={metric} is of a trained network: use evaluate, with '
        '--workdir'
      )
    if metric not in measure.METRICS:
      known = ', '.join([*measure.METRICS, *bits.KINDS])
      raise UserError(f'--metrics={metric} is not known: use {known}')
  runs.usable_folder('cache', cache())
  if FLAGS.write_statistics:
    runs.usable_file('write_statistics', FLAGS.write_statistics)
  name = FLAGS.features
  is_file = name not in (None, 'classifier', 'pixels', 'inception')
  if is_file and not files.at(name).expanduser().is_file():
    raise UserError(
      f'--features={name}: there is no such file; give classifier, pixels, '
      'inception, or the file of a judge'
    )


def cache() -> files.Path:
  """The folder for features and weights."""
  return files.cache(FLAGS.cache)


def download() -> None:
  """Fetches the published weights into the cache, unless they are there."""

  def obtain():
    with terminal.Progress(
      'downloading', weights.BYTES, unit='bytes'
    ) as progress:
      return weights.obtain(cache(), on_bytes=progress.update)

  # Each host has a cache of its own.
  terminal.say(f'weights of Inception: {distributed.everywhere(obtain)}')


# --- what is compared --------------------------------------------------------


def splits_of(config: dict) -> tuple[Source, Source | None]:
  """A run's training and held-out images, where --data_path has them.

  Args:
    config: the run's.

  Raises:
    UserError: they cannot be read.
  """
  if not config['data']['name']:
    raise UserError(
      'what these weights were trained on is not known: give --reference, or '
      'convert them with --config'
    )
  moved = {} if FLAGS.data_path is None else {'path': FLAGS.data_path}
  try:
    return data.splits({**config['data'], **moved})
  except UserError as e:
    told = ' (--data_path says where the data lie now)'
    raise UserError(f'{e}{told}') from e


def open_set(
  flag: str, image_size: int | None = None, channels: int | None = None
) -> Source | None:
  """The images that a flag names; None where it is a file of statistics.

  Args:
    flag: the name of the flag.
    image_size: what all images are cropped and resized to; None for none.
    channels: 1 or 3; None for those of the first image.

  Raises:
    UserError: there is no such set.
  """
  text = FLAGS[flag].value
  if statistics.is_file(text, alone=_takes_images(FLAGS.metrics)):
    return None
  return data.open_set(
    text, path=FLAGS.data_path or '', image_size=image_size, channels=channels
  )


def set_of(
  flag: str, source: Source | None, judge: Judge, image_shape
) -> Images | Statistics:
  """What is compared, of `open_set`.

  Args:
    flag: the name of the flag.
    source: of `open_set`.
    judge: whose features statistics must be of.
    image_shape: (H, W, C); None where there are no images at all.

  Raises:
    UserError: statistics are damaged, or of other features.
  """
  if source:
    return features.images_of(source)
  return statistics.read(FLAGS[flag].value, judge, image_shape)


def task(
  judge: Judge,
  samples: Images | Statistics,
  reference: Images | Statistics,
  source: Source | None,
  heldout: Images | None = None,
  *,
  about: dict,
  usual: list[str],
) -> Task:
  """A task, checked; all images but the samples are read once for their hash.

  Args:
    judge: the network.
    samples: what is to be judged; only its count matters here.
    reference: what samples are compared to.
    source: the reference's images by number.
    heldout: held-out images.
    about: what else the numbers depend on.
    usual: the metrics, where none are asked for.

  Raises:
    UserError: the metrics asked for cannot be had.
  """
  metrics = FLAGS.metrics or usual
  if 'sfid' in metrics and 'spatial' not in judge.taps:
    raise UserError('the metric sfid takes --features=inception')
  options = measure.Options(
    **{name: FLAGS[name].value for name in measure.Options._fields}
  )
  measure.check(
    judge, samples, reference, heldout, metrics=metrics, options=options
  )
  is_images = isinstance(reference, Images)
  digest = (features if is_images else statistics).sha256_of(reference)
  protocol = {
    **about,
    'num_reference': reference.count if is_images else 0,
    'reference_sha256': digest,
    'num_samples': samples.count if isinstance(samples, Images) else 0,
    'heldout_sha256': features.sha256_of(heldout) if heldout else '',
    **measure.protocol_of(judge, metrics, options),
    'num_heldout': heldout.count if heldout else 0,
  }
  return Task(judge, metrics, options, reference, source, heldout, protocol)


def carry_out(
  task: Task, samples: Images | Statistics, batch_size: int, mesh, sample_cache
) -> measure.Measured:
  """Measures, with progress; the reference's statistics go into the cache.

  Args:
    task: what is to be done.
    samples: what is judged.
    batch_size: images that the network takes at once.
    mesh: the devices.
    sample_cache: folder for the features of samples.

  Returns:
    what was measured; its details tell the reference too.
  """
  reference, there, known = task.reference, {}, None
  if isinstance(reference, Images):
    digest = task.protocol['reference_sha256']
    there = statistics.paths(cache(), task.judge, digest)
    known = statistics.kept(there)
    # A folder that only some hosts see would part their ways.
    is_known = all(distributed.gather(known is not None))
    if is_known and not _takes_images(task.metrics):
      reference = known
  sets = (samples, reference, task.heldout)
  total = sum(one.count for one in sets if isinstance(one, Images))
  with terminal.Progress('judging', total, unit='images') as progress:
    measured = measure.measure(
      task.judge, samples, reference, task.heldout,
      metrics=task.metrics, options=task.options, batch_size=batch_size,
      mesh=mesh, cache=cache(), sample_cache=sample_cache, num_near=NUM_NEAR,
      num_reference=task.protocol['num_reference'], on_images=progress.update,
    )  # fmt: skip

  def keep():
    if known is None:
      for tap, path in there.items():
        statistics.write_gaussian(path, measured.statistics[tap])
    if FLAGS.write_statistics:
      statistics.write(FLAGS.write_statistics, measured.statistics)

  distributed.on_first(keep)
  about = task.source.description if task.source else FLAGS.reference
  return measured._replace(details={'reference': about, **measured.details})


def _takes_images(metrics) -> bool:
  """Whether they take the reference's images; statistics are not enough."""
  return bool(set(metrics) - {*measure.OF_STATISTICS, 'is'})


def draw_neighbours(path, measured, sample_fn, source: Source) -> None:
  """A picture of the samples nearest to training images, these first.

  Args:
    path: of the .png.
    measured: of `carry_out`.
    sample_fn: number of a sample -> uint8 [H, W, C].
    source: the training images.
  """
  nearest = measured.nearest
  order = np.argsort(nearest.distances[:, 0], kind='stable')
  rows, labels = [], []
  for i in order[: FLAGS.neighbours]:
    number = int(measured.searched[i])
    real = [source[int(j)]['image'] for j in nearest.indices[i]]
    rows.append(np.stack([sample_fn(number), *real]))
    label = f'number {number}, at {nearest.distances[i, 0]:.3g}'
    if measured.nearer is not None:
      label += f'; {measured.nearer[i]:.0%} of the held-out are nearer'
    labels.append(label)
  files.make(path.parent)
  pictures.save(path, pictures.neighbours(np.stack(rows), labels))


# --- what judges -------------------------------------------------------------


def judge_of(
  source: Source | None, heldout: Source | None, image_shape, folder=None
) -> Judge:
  """The network that --features asks for, trained if need be.

  Args:
    source: the training images, or None.
    heldout: on which a classifier is tried, or None.
    image_shape: (H, W, C) of what it is to judge; None where there are only
      statistics, which need no network.
    folder: where classifiers of these data are kept; None where there is none.

  Raises:
    UserError: there is no such network, or it is not for such images.
  """
  labelled = source and source.num_classes and folder
  name = FLAGS.features or ('classifier' if labelled else 'pixels')
  if image_shape is None:
    protocol = {'features': 'of the files'}
    return Judge(None, {}, {'statistics': 'frechet'}, '', protocol, {})
  if name == 'pixels':
    return features.pixels(image_shape)
  if _is_inception(name):
    return _inception(name)
  path = files.at(name).expanduser()
  if name == 'classifier':
    path = _train_classifier(folder, source, image_shape)
  judge = classifier.load(path, image_shape)
  num_classes = source.num_classes if source else 0
  if num_classes not in (0, judge.protocol['num_classes']):
    raise UserError(
      f'--features={name} judges {judge.protocol["num_classes"]} classes, and '
      f'the data have {num_classes}: give another'
    )
  right = classifier.accuracy(judge, heldout) if heldout else None
  return judge._replace(details={**judge.details, 'classifier_accuracy': right})


def _is_inception(name) -> bool:
  """Whether a value of --features means Inception."""
  path = files.at(name or '')
  if name == 'inception' or path.suffix in ('.pth', '.pb'):
    return True
  try:
    with (
      path.expanduser().open('rb') as file,
      zipfile.ZipFile(file) as archive,
    ):
      return f'{classifier.FACTS}.npy' not in archive.namelist()
  except (OSError, zipfile.BadZipFile, ValueError):
    return False


def _taps() -> list[str]:
  more = ['spatial'] if 'sfid' in FLAGS.metrics else []
  taps = list(dict.fromkeys([*FLAGS.taps, *more]))
  if not taps:
    raise UserError(f'--taps is empty: use {", ".join(inception.DISTANCES)}')
  return taps


def _inception(name) -> Judge:
  path = files.at(name).expanduser()
  if name == 'inception':
    path = cache() / weights.NAME
    if not path.exists():
      raise UserError(
        f'--features=inception: {path} is not there; --download fetches it, or '
        'give a file of the weights'
      )
  elif path.suffix in ('.pth', '.pb'):
    path = distributed.everywhere(lambda: _converted(path))
  return inception.load(
    path, taps=_taps(), logits='is' in FLAGS.metrics,
    convention=FLAGS.convention,
  )  # fmt: skip


def _converted(path) -> files.Path:
  """A published file as one of ours, in the cache."""
  target = cache() / f'inception_{weights.checked(path)[:16]}.npz'
  if not target.exists():
    weights.convert(path, target)
  return target


def _train_classifier(folder, source, image_shape):
  """The file of the classifier of these data, trained unless it is there."""
  if folder is None:
    raise UserError(
      '--features=classifier is for a run: give the file of one, or another'
    )
  if not (source and source.num_classes):
    what = source.description if source else 'there are only statistics'
    raise UserError(f'--features=classifier: {what}; give --features=pixels')
  for what, value, most in (
    ('pixels', max(image_shape), classifier.LARGEST),
    ('classes', source.num_classes, classifier.MOST_CLASSES),
  ):
    if value > most:
      raise UserError(
        f'--features=classifier is for at most {most} {what}, not {value}: '
        'give --features=pixels'
      )

  def train():
    digest = classifier.fingerprint(source)
    path = folder / f'classifier_{digest[:8]}.npz'
    if not path.exists():
      terminal.say(f'training a classifier on {source.description}, once')
      with terminal.Progress('classifier', classifier.NUM_STEPS) as progress:
        classifier.train(path, source, on_step=progress.update)
    return str(path)

  return files.at(distributed.on_first(train))
