"""Judging sets of images: the flags that say how, and what they ask for.

Shared by the binaries that judge. `flags.adopt_module_key_flags(judging)` makes
these flags a binary's own.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from absl import flags

from diffusion_jax import data, runs
from diffusion_jax.cli import command, declare, judges, run_data
from diffusion_jax.data import Source
from diffusion_jax.evaluation import bits, cards, features, measure, statistics
from diffusion_jax.evaluation.features import Images, Judge
from diffusion_jax.evaluation.statistics import Statistics
from diffusion_jax.reporting import pictures
from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(judges)
flags.adopt_module_key_flags(run_data)
declare.shared('json')
declare.table(
  metrics=(
    [],
    'With commas: '
    + '; '.join(f'{name}, {what}' for name, what in measure.METRICS.items())
    + '. By default fid, of a run copies, by a classifier classes. Of a run, '
    'by themselves: '
    + '; '.join(f'{name}, {what}' for name, what in bits.KINDS.items())
    + '.',
  ),
  reference=(
    str,
    'What is compared with: a folder of images, a .npz or .npy of them, '
    'tfds:NAME@SPLIT, digits, or a .npz of statistics (mu, sigma). By default '
    "a run's training images.",
  ),
  write_statistics=(str, 'A .npz for mu and sigma of the reference.'),
  neighbours=(20, 'On the picture: so many samples, the nearest ones first.'),
)
for option, what in {
  'kid_subsets': 'KID: how many.',
  'kid_subset_size': 'KID: images of each set in a subset.',
  'kid_seed': 'KID: of the subsets.',
  'is_splits': 'Inception Score: parts of the samples.',
  'is_seed': 'Inception Score: shuffle first, for sets that stand in order.',
  'pr_k': 'Precision and recall: whose distance is the radius.',
}.items():
  default = getattr(measure.DEFAULTS, option)
  declare.table(**{option: (int if default is None else default, what)})


class Task(NamedTuple):
  """What samples are judged by, and against what.

  Attributes:
    measured: of the metrics.
    source: the reference's images by number; None where there are statistics.
    protocol: of the card.
  """

  measured: measure.Task
  source: Source | None
  protocol: dict

  @property
  def result(self) -> str:
    """What the main distance is called."""
    return next(iter(self.measured.judge.taps.values()))

  @property
  def reference(self) -> str:
    """What samples are compared to, in a line."""
    return self.source.description if self.source else FLAGS.reference


def check_flags() -> None:
  """Raises UserError for what is wrong whatever the images are."""
  command.at_least(
    neighbours=0, kid_subsets=2, kid_subset_size=2, is_splits=1, pr_k=1
  )
  command.seeds('kid_seed', 'is_seed')
  for metric in FLAGS.metrics:
    if metric in bits.KINDS:
      raise UserError(
        f'--metrics={metric} is of a trained network: use evaluate, with '
        '--workdir'
      )
    if metric not in measure.METRICS:
      known = ', '.join([*measure.METRICS, *bits.KINDS])
      raise UserError(f'--metrics={metric} is not known: use {known}')
  runs.usable_folder('cache', judges.cache())
  if FLAGS.write_statistics:
    runs.usable_file('write_statistics', FLAGS.write_statistics)
  name = FLAGS.features
  is_file = name not in (None, 'classifier', 'pixels', 'inception')
  if is_file and not files.at(name).expanduser().is_file():
    raise UserError(
      f'--features={name}: there is no such file; give classifier, pixels, '
      'inception, or the file of a judge'
    )


def open_set(
  flag: str,
  image_size: int | tuple[int, int] | None = None,
  channels: int | None = None,
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
  options = {name: FLAGS[name].value for name in measure.Options._fields}
  asked = measure.Task(
    judge, reference, metrics, measure.Options(**options), heldout
  )
  measure.check(asked, samples)
  protocol = {
    **about,
    'num_reference': statistics.count_of(reference),
    'reference_sha256': statistics.sha256_of(reference),
    'num_samples': statistics.count_of(samples),
    'heldout_sha256': features.sha256_of(heldout) if heldout else '',
    **asked.protocol(),
    'num_heldout': heldout.count if heldout else 0,
  }
  return Task(asked, source, protocol)


def carry_out(
  task: Task,
  samples: Images | Statistics,
  subject: dict,
  path,
  sample_fn: Callable[[int], np.ndarray],
  **how,
) -> dict:
  """Measures, with progress; the reference's statistics go into the cache.

  Args:
    task: what is to be done.
    samples: what is judged.
    subject: of the card.
    path: of the card, and of a picture of the neighbours beside it; None
      writes nothing.
    sample_fn: number of a sample -> uint8 [H, W, C].
    **how: batch_size, mesh and sample_cache, see `measure.measure`.

  Returns:
    the metric card; its details tell the reference too.
  """
  asked, there, known = task.measured, {}, None
  if isinstance(asked.reference, Images):
    digest = task.protocol['reference_sha256']
    there = statistics.paths(judges.cache(), asked.judge, digest)
    known = statistics.cached(there)
    # A folder that only some hosts see would part their ways.
    is_known = all(distributed.gather(known is not None))
    if is_known and not _takes_images(asked.metrics):
      asked = asked._replace(reference=known)
  sets = (samples, asked.reference, asked.heldout or {})
  total = sum(map(statistics.count_of, sets))
  with terminal.Progress('judging', total, unit='images') as progress:
    how |= {'cache': judges.cache(), 'on_images': progress.update}
    count = task.protocol['num_reference']
    found = measure.measure(asked, samples, num_reference=count, **how)
  details = {'reference': task.reference, **found.details}
  card = cards.create(subject, task.protocol, found.results, details)

  def keep():
    if known is None:
      for tap, place in there.items():
        statistics.write_gaussian(place, found.statistics[tap])
    if FLAGS.write_statistics:
      statistics.write(FLAGS.write_statistics, found.statistics)
    if path and FLAGS.neighbours and found.nearest:
      picture = path.with_name(f'{path.stem}_neighbours.png')
      _draw_neighbours(picture, found, sample_fn, task.source)
    if path:
      cards.write(path, card)

  distributed.on_first(keep)
  return card


def _takes_images(metrics) -> bool:
  """Whether they take the reference's images; statistics are not enough."""
  return bool(set(metrics) - {*measure.OF_STATISTICS, 'is'})


def _draw_neighbours(path, measured, sample_fn, source):
  """The samples nearest to training images, these first."""
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
