"""The images of a run, as the flags say."""

from absl import flags

from diffusion_jax import data
from diffusion_jax.cli import declare
from diffusion_jax.data import Source
from diffusion_jax.evaluation import features
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
declare.shared('data_path')


def splits(config: dict) -> tuple[Source, Source | None]:
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


def images(
  config: dict, split: str, count: int | None, *, at_most: bool = True
) -> features.Images:
  """Images of a run at even distances.

  Args:
    config: the run's.
    split: 'train' or 'heldout'.
    count: how many; None for all.
    at_most: whether fewer will do where there are no more.

  Raises:
    UserError: there are none, or not so many.
  """
  train, heldout = splits(config)
  source = train if split == 'train' else heldout
  if source is None:
    raise UserError('the run holds no images out: give --split=train')
  if not at_most and count > len(source):
    raise UserError(
      f'--num_images={count}: there are {len(source)} ({source.description})'
    )
  return features.images_of(source, min(count or len(source), len(source)))
