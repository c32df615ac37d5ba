"""The training and held-out images of a run, from its config and the flags."""

from absl import flags

from diffusion_jax import data
from diffusion_jax.cli import declare
from diffusion_jax.data import Source, labels, sources
from diffusion_jax.evaluation import features
from diffusion_jax.runs import dataset, upscaled
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
declare.shared('data_path')


def splits(config: dict) -> tuple[Source, Source | None]:
  """A run's training and held-out images; --data_path overrides their folder.

  Args:
    config: the run's config.

  Raises:
    UserError: they cannot be read, or are not those of the run in --workdir.
  """
  if not config['data']['name']:
    raise UserError(
      'the training data of these weights are not known: give --reference, or '
      'convert the weights again with --config'
    )
  moved = {} if FLAGS.data_path is None else {'path': FLAGS.data_path}
  try:
    opened = data.splits({**config['data'], **moved})
  except UserError as e:
    raise UserError(f'{e} (--data_path sets the folder of the data)') from e
  sources.say_notes(*opened)
  dataset.check_known(
    declare.workdir(),
    opened,
    config['data']['heldout_split'],
    FLAGS.accept_data,
  )
  return opened


def of_conditions(config: dict) -> dict:
  """What images are judged with besides labels; {} of most runs."""
  found = {}
  if dataset.has_captions(config['conditioning']):
    found['condition'] = 'empty caption'
  if upscaled.factor(config):
    how = config['super_resolution']
    found[upscaled.ROW] = f'{how["by"]} 1/{how["factor"]}'
  return found


def images(
  config: dict, split: str, count: int | None, *, at_most: bool = True
) -> features.Images:
  """Images of a run, evenly spaced in the set.

  Args:
    config: the run's config.
    split: 'train' or 'heldout'.
    count: number of images; None for all.
    at_most: whether to accept fewer if the set is smaller.

  Raises:
    UserError: there are no images, or too few.
  """
  train, heldout = splits(config)
  source = train if split == 'train' else heldout
  if source is None:
    raise UserError('the run has no held-out images: give --split=train')
  if not at_most and count > len(source):
    raise UserError(
      f'--num_images={count}: at most {len(source)}, the number of images in '
      f'{source.description}'
    )
  labelled = dataset.num_classes(config['conditioning']) > 0
  if labelled:
    labels.check(source, None, dataset.num_classes(config['conditioning']))
  count = min(count or len(source), len(source))
  return features.images_of(source, count, labelled)
