"""Judges, the networks that --features selects."""

from absl import flags

from diffusion_jax import runs
from diffusion_jax.cli import declare
from diffusion_jax.data import Source
from diffusion_jax.evaluation import classifier, features, inception, kept
from diffusion_jax.models.inception import CONVENTIONS
from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import inception as weights

FLAGS = flags.FLAGS
declare.table(
  features=(
    str,
    'Network that judges the images: classifier (trained on the data; the '
    'default for labelled data), pixels (no network; the default otherwise), '
    'inception (its weights in the cache), or a file: Inception weights (.npz, '
    '.pth, .pb) or RUN/evaluations/classifier_*.npz.',
  ),
  taps=(
    ['2048'],
    f'Feature layers of Inception: {", ".join(inception.DISTANCES)}. Metrics '
    'other than Frechet distances use the first one.',
  ),
  convention=(
    CONVENTIONS,
    'How Inception resizes and scales its input: like the original TensorFlow '
    'graph (tf1) or like pytorch-fid.',
  ),
  cache=(
    str,
    'Folder for features and weights; by default ~/.cache/diffusion_jax. It '
    'may be emptied at any time.',
  ),
  download=(
    False,
    'First fetch the published Inception weights into the cache '
    f'({weights.BYTES / 1e6:.0f} MB from github.com; their hash is checked).',
  ),
)


def cache() -> files.Path:
  """The folder for features and weights.

  Raises:
    UserError: it cannot be written, or there is no home for the default.
  """
  try:
    folder = files.cache(FLAGS.cache)
  except RuntimeError as e:  # neither HOME nor an entry of the user
    raise UserError(
      'features and weights are kept in the home folder, but HOME is not set: '
      'give --cache=DIR'
    ) from e
  runs.usable_folder('cache', folder)
  return folder


def download() -> None:
  """Fetches the published weights into the cache if they are missing."""

  def obtain():
    progress = terminal.Progress('downloading', weights.BYTES, unit='bytes')
    with progress:
      return weights.obtain(cache(), on_bytes=progress.update)

  # Each host has its own cache.
  terminal.say(f'Inception weights: {distributed.everywhere(obtain)}')


def judge_of(
  source: Source | None, heldout: Source | None, image_shape, folder=None
) -> features.Judge:
  """The network that --features selects; trains a classifier if needed.

  Without --features it is a classifier of the data, if that can judge them, and
  the pixels otherwise.

  Args:
    source: the training images, or None.
    heldout: images to measure a classifier's accuracy on, or None.
    image_shape: (H, W, C) of the images to judge; None if there are only
      statistics, which need no network.
    folder: folder of the classifiers of these data, or None.

  Raises:
    UserError: there is no such network, it does not take such images, or it was
      asked for and is no better than chance.
  """
  if image_shape is None:
    protocol = {'features': 'of the files'}
    return features.Judge(None, {}, {'statistics': 'frechet'}, '', protocol, {})
  name = FLAGS.features or _usual(source, image_shape, folder)
  if name == 'pixels':
    return features.pixels(image_shape)
  if _is_inception(name):
    cache()  # to know before anything is read whether it can be written
    return _inception(name)
  path = files.at(name).expanduser()
  if name == 'classifier':
    path = _train_classifier(folder, source, image_shape)
  judge = classifier.load(path, image_shape)
  num_classes = source.num_classes if source else 0
  if num_classes not in (0, judge.protocol['num_classes']):
    raise UserError(
      f'--features={name} knows {judge.protocol["num_classes"]} classes, but '
      f'the data have {num_classes}: give another classifier'
    )
  score = classifier.score(judge, heldout) if heldout else None
  if score and not score.is_skill:
    if FLAGS.features == 'classifier':
      raise UserError(
        f'--features=classifier: {score.doubt()}; give --features=pixels'
      )
    if not FLAGS.features:
      terminal.say(f'{score.doubt()}; the samples are judged by their pixels')
      return features.pixels(image_shape)
    terminal.say(f'warning: --features={name}: {score.doubt()}')
  right = score.accuracy if score else None
  return judge._replace(details={**judge.details, 'classifier_accuracy': right})


def _usual(source, image_shape, folder) -> str:
  """The default of --features; says why a run is judged by pixels."""
  if not (source and folder):
    return 'pixels'
  if reason := classifier.unfit(source.num_classes, image_shape):
    terminal.say(
      f'{reason}: the samples are judged by their pixels; --features=inception '
      '--download gives the FID'
    )
    return 'pixels'
  return 'classifier'


def _is_inception(name) -> bool:
  """Whether a value of --features means Inception."""
  if name == 'inception' or files.at(name).suffix in ('.pth', '.pb'):
    return True
  there = kept.names(name)
  return bool(there) and classifier.FACTS not in there


def _inception(name) -> features.Judge:
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
  more = ['spatial'] if 'sfid' in FLAGS.metrics else []
  taps = list(dict.fromkeys([*FLAGS.taps, *more]))
  if not taps:
    raise UserError(f'--taps is empty: use {", ".join(inception.DISTANCES)}')
  return inception.load(
    path, taps=taps, logits='is' in FLAGS.metrics, convention=FLAGS.convention
  )


def _converted(path) -> files.Path:
  """Converts a published file to a .npz in the cache."""
  target = cache() / f'inception_{weights.checked(path)[:16]}.npz'
  if not target.exists():
    weights.convert(path, target)
  return target


def _train_classifier(folder, source, image_shape):
  """The file of the classifier of these data, trained if it is missing."""
  if folder is None:
    raise UserError(
      '--features=classifier is for evaluating a run: give the file of a '
      'classifier, or another judge'
    )
  if not (source and source.num_classes):
    what = source.description if source else 'there are only statistics'
    raise UserError(f'--features=classifier: {what}; give --features=pixels')
  if reason := classifier.unfit(source.num_classes, image_shape):
    raise UserError(f'--features=classifier: {reason}; give --features=pixels')

  def train():
    digest = classifier.fingerprint(source)
    path = folder / f'classifier_{digest[:8]}.npz'
    if not path.exists():
      steps = classifier.num_steps_for(len(source))
      terminal.say(
        f'training a classifier of the {source.num_classes} classes first: '
        f'{steps} steps of {classifier.BATCH} images, kept in {path}; '
        '--features=pixels needs none'
      )
      part = classifier.part_of(path)
      with terminal.Progress(
        *('classifier', steps),
        kept=lambda done: (
          f'{classifier.kept_of(done)} steps are kept in {part}'
        ),
      ) as progress:
        classifier.train(path, source, on_steps=progress.update)
    return str(path)

  return files.at(distributed.on_first(train))
