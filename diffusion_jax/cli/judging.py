"""Judges sets of images: the flags for it, and the steps they select.

Shared by the binaries that judge images.
`flags.adopt_module_key_flags(judging)` makes these flags a binary's own.
"""

from collections.abc import Callable

import numpy as np
from absl import flags

from diffusion_jax import data, runs
from diffusion_jax.cli import command, declare, given, judges, run_data
from diffusion_jax.data import sources
from diffusion_jax.evaluation import (
  bits,
  breakdown,
  cards,
  features,
  measure,
  statistics,
)
from diffusion_jax.evaluation.features import Images, Judge
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
    'Metrics, separated by commas: '
    + '; '.join(f'{name}, {what}' for name, what in measure.METRICS.items())
    + '. By default fid; for a run also copies; with a classifier also '
    'classes. For a run, not together with the others: '
    + '; '.join(f'{name}, {what}' for name, what in bits.KINDS.items())
    + '.',
  ),
  reference=(
    str,
    'The images to compare with: a folder of images, a .npz or .npy of them, '
    'a sample store, tfds:NAME@SPLIT, digits, or a .npz of statistics (mu, '
    'sigma) or of features (pool_3). For a run, by default its training '
    'images.',
  ),
  write_statistics=(
    str,
    "A .npz file to write the reference's mu and sigma to.",
  ),
  neighbours=(
    20,
    'Number of samples on the picture of nearest neighbours, nearest first.',
  ),
)
for option, what in {
  'kid_subsets': 'KID: number of subsets.',
  'kid_subset_size': 'KID: images per subset, from each set.',
  'kid_seed': 'KID: seed of the subsets.',
  'is_splits': 'Inception Score: number of splits of the samples.',
  'is_seed': 'Inception Score: seed to shuffle samples that are in some order '
  'before the split; by default they are not shuffled.',
  'pr_k': 'Precision and recall: which nearest neighbour sets the radius.',
}.items():
  default = getattr(measure.DEFAULTS, option)
  declare.table(**{option: (int if default is None else default, what)})


def check_flags() -> None:
  """Raises UserError for mistakes that do not depend on the images."""
  command.at_least(
    neighbours=0, kid_subsets=2, kid_subset_size=2, is_splits=1, pr_k=1
  )
  command.seeds('kid_seed', 'is_seed')
  for metric in FLAGS.metrics:
    if metric in bits.KINDS:
      raise UserError(
        f'--metrics={metric} needs a trained network: use evaluate with '
        '--workdir'
      )
    if metric not in measure.METRICS:
      known = ', '.join([*measure.METRICS, *bits.KINDS])
      raise UserError(f'--metrics={metric} is not known: use {known}')
  if FLAGS.write_statistics:
    runs.usable_file('write_statistics', FLAGS.write_statistics)
  name = FLAGS.features
  is_file = name not in (None, 'classifier', 'pixels', 'inception')
  if is_file and not files.at(name).expanduser().is_file():
    raise UserError(
      f'--features={name}: there is no such file; give classifier, pixels, '
      "inception, or the file of a judge's weights"
    )


def open_set(
  flag: str,
  image_size: int | tuple[int, int] | None = None,
  channels: int | None = None,
) -> data.Source | None:
  """The images that a flag names; None if it names a file of statistics.

  Args:
    flag: the name of the flag.
    image_size: size to crop and resize all images to; None to leave them.
    channels: 1 or 3; None for 1 if all images are grey, otherwise 3.

  Raises:
    UserError: there is no such set.
  """
  text = FLAGS[flag].value
  given.check(flag, text)
  if statistics.is_file(text, alone=_takes_images(FLAGS.metrics)):
    return None
  source = given.store_of(text, image_size, channels) or data.open_set(
    text, path=FLAGS.data_path or '', image_size=image_size, channels=channels
  )
  sources.say_notes(source)
  return source


def set_of(
  flag: str, source: data.Source | None, judge: Judge, image_shape,
  labelled: bool = False,
) -> statistics.Set:  # fmt: skip
  """The images of `open_set`, or the statistics that the flag names.

  Args:
    flag: the name of the flag.
    source: the result of `open_set`.
    judge: the network; statistics must be of its features.
    image_shape: (H, W, C); None if there are no images at all.
    labelled: whether the labels of images matter.

  Raises:
    UserError: statistics are damaged or of other features.
  """
  if source:
    return features.images_of(source, labelled=labelled)
  return statistics.read(FLAGS[flag].value, judge, image_shape)


def _origins(task: measure.Task, samples: statistics.Set) -> dict[str, dict]:
  """Flag -> what the statistics that it names were made with."""
  sets = {'samples': samples, 'reference': task.reference}
  return {
    flag: statistics.origin(FLAGS[flag].value)
    for flag, given in sets.items()
    if not isinstance(given, Images)
  }


def _unknown(flag: str, judge: Judge) -> str:
  """A caveat about statistics that do not say what they were made with."""
  told = (
    f'{FLAGS[flag].value} does not say which network and convention it was '
    'made with'
  )
  if not judge.apply:
    return f'{told}; the same as those of the other file are assumed'
  facts = judge.about(next(iter(judge.taps)))
  convention = f', convention {x}' if (x := facts.get('convention')) else ''
  return f'{told}; {facts["features"]}{convention} is assumed'


def task(
  judge: Judge,
  samples: statistics.Set,
  reference: statistics.Set,
  heldout: Images | None = None,
  *,
  about: dict,
  usual: list[str],
) -> measure.Task:
  """Makes and checks a task; reads all images but the samples for their hash.

  Args:
    judge: the network.
    samples: the set to judge; only its count matters here.
    reference: the set to compare with.
    heldout: held-out images.
    about: other facts that the numbers depend on, for the protocol.
    usual: the default metrics.

  Raises:
    UserError: a metric is not possible.
  """
  metrics = FLAGS.metrics or usual
  if 'sfid' in metrics and 'spatial' not in judge.taps:
    raise UserError('the metric sfid needs --features=inception')
  if not judge.apply:  # two files, which must be of one network
    path, other = FLAGS.samples, FLAGS.reference
    there, here = map(statistics.origin, (path, other))
    statistics.check_alike(path, there, here)
  options = measure.Options(*(FLAGS[x].value for x in measure.Options._fields))
  asked = measure.Task(judge, reference, metrics, options, heldout)
  measure.check(asked, samples)
  about = {
    **about,
    'num_reference': statistics.count_of(reference),
    'reference_sha256': statistics.sha256_of(reference),
    'num_samples': statistics.count_of(samples),
    'heldout_sha256': features.sha256_of(heldout) if heldout else '',
  }
  return asked._replace(about=about)


def described(flag: str, given: statistics.Set) -> str:
  """One line about a set; for statistics, the value of the flag."""
  return given.description if isinstance(given, Images) else FLAGS[flag].value


def carry_out(
  task: measure.Task, samples: statistics.Set, subject: dict, path, **how
) -> dict:
  """Measures with a progress bar, and caches the reference's statistics.

  Args:
    task: the task.
    samples: the set to judge.
    subject: the subject for the card.
    path: file of the card; a picture of the nearest neighbours is written next
      to it. None writes nothing.
    **how: batch_size, mesh and sample_cache, see `measure.measure`.

  Returns:
    the metric card, with the reference in its details.
  """
  there, known = {}, None
  cache = judges.cache() if task.judge.keys else None
  if cache and isinstance(task.reference, Images):
    digest = task.about['reference_sha256']
    there = statistics.paths(cache, task.judge, digest)
    known = statistics.cached(there)
  # All hosts must take the same branch, even if only some see the folder.
  is_known = all(distributed.gather(known is not None))
  used = known if is_known and not _takes_images(task.metrics) else None
  sets = (samples, task.heldout or {}, used or task.reference)
  total = sum(map(statistics.count_of, sets))
  with terminal.Progress(
    'judging', total, unit='images', kept=_kept(task.judge, cache, **how)
  ) as progress:
    how |= {'cache': cache, 'on_images': progress.update}
    found = measure.measure(task, samples, known=used, **how)
  more, told = task.more(samples) if task.more else ({}, {})
  near, copied = _by_text(found, samples, task.reference)
  reference = described('reference', task.reference)
  details = {'reference': reference, **found.details, **copied, **told}
  origins = _origins(task, samples)
  details |= {f'{flag}_made_with': origin for flag, origin in origins.items()}
  if unknown := [flag for flag, origin in origins.items() if not origin]:
    caveats = [_unknown(flag, task.judge) for flag in unknown]
    details['caveats'] = details.get('caveats', []) + caveats
  results = {**found.results, **near, **more}
  card = cards.create(subject, task.protocol, results, details)

  def keep():
    if known is None:
      statistics.keep(there, found.statistics)
    if FLAGS.write_statistics:
      made_with = (
        statistics.describe(task.judge, task.reference.count)
        if isinstance(task.reference, Images)
        else origins['reference']
      )
      statistics.write(FLAGS.write_statistics, found.statistics, made_with)
    if path and FLAGS.neighbours and found.nearest:
      picture = path.with_name(f'{path.stem}_neighbours.png')
      _draw_neighbours(picture, found, samples, task.reference)
    if path:
      files.write_json(path, card)

  distributed.on_first(keep)
  return card


def _kept(judge: Judge, cache, sample_cache, **_) -> Callable[[int], str]:
  """What is kept after an interruption, see `terminal.Progress`."""

  def told(done):
    if cache:
      there = ' and '.join(dict.fromkeys(map(str, (sample_cache, cache))))
      return f'the features of {done} images are kept in {there}'
    name = judge.protocol['features']
    drawn = f'the samples are kept in {sample_cache}, but ' * bool(sample_cache)
    return f'{drawn}no features of {name} are kept: judging begins again'

  return told


def _takes_images(metrics) -> bool:
  """Whether a metric needs the reference's images, not only statistics."""
  return bool(set(metrics) - {*measure.OF_STATISTICS, 'is'})


def _by_text(found, samples, reference) -> tuple[dict, dict]:
  """How the nearest training images go with the prompts of samples.

  Returns:
    (results, details): how often the nearest image has the sample's prompt, and
    the samples that are near it, nearest first.
  """
  texts = [getattr(one, 'text', None) for one in (samples, reference)]
  if not (found.nearest and all(texts)):
    return {}, {}
  prompts = [texts[0](int(i)) for i in found.searched]
  captions = [texts[1](int(i)) for i in found.nearest.indices[:, 0]]
  same = [a == b for a, b in zip(prompts, captions, strict=True)]
  results = {'nearest_own': float(np.mean(same))}
  if found.nearer is None:
    return results, {}
  distances = found.nearest.distances[:, 0]
  near = [
    [int(found.searched[i]), prompts[i], captions[i], float(distances[i])]
    for i in np.argsort(distances, kind='stable')
    if found.nearer[i] < measure.NEAR
  ]
  return results, {'copied': near[: breakdown.SHOWN]} if near else {}


def _draw_neighbours(path, measured, samples, reference):
  """Draws samples next to their nearest training images, nearest first."""
  nearest = measured.nearest
  order = np.argsort(nearest.distances[:, 0], kind='stable')
  rows, labels, captions = [], [], []
  told = samples.text and reference.text
  for i in order[: FLAGS.neighbours]:
    number = int(measured.searched[i])
    real = map(reference.image, nearest.indices[i])
    rows.append(np.stack([samples.image(number), *real]))
    label = f'sample {number}, distance {nearest.distances[i, 0]:.3g}'
    if measured.nearer is not None:
      label += f'; {measured.nearer[i]:.0%} of held-out images are nearer'
    labels.append(label)
    if told:
      captions += [samples.text(number), *map(told, nearest.indices[i])]
  files.make(path.parent)
  picture = pictures.neighbours(np.stack(rows), labels, captions or None)
  pictures.save(path, picture)
