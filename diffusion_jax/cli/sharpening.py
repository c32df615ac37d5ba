"""Pictures that runs of super-resolution sharpen: --low_resolution.

`flags.adopt_module_key_flags(sharpening)` makes the flags a binary's own, which
also needs --accept_data.
"""

import functools
from collections.abc import Mapping

import numpy as np
from absl import flags
from PIL import Image

from diffusion_jax import data, runs
from diffusion_jax.cli import declare, given, run_data
from diffusion_jax.conditioning import low_resolution
from diffusion_jax.data import images
from diffusion_jax.evaluation import features, sharpness
from diffusion_jax.reporting import pictures
from diffusion_jax.runs import sizes, upscaled
from diffusion_jax.runs.trained import Trained
from diffusion_jax.samplers.plan import Plan
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(run_data)
declare.table(
  low_resolution=(
    str,
    'Runs that sharpen pictures: those to sharpen, which samples get in turn: '
    'a picture, a folder of them, a .npz or .npy, a sample store of another '
    'run, or heldout, the held-out images of the run, made small.',
  ),
  low_resolution_noise=(
    0.0,
    '--low_resolution: deviation of noise to add to the pictures, in units of '
    '[-1, 1], of which the network is told.',
  ),
)
HELDOUT = 'heldout'
SHOWN = 8  # rows of a picture
LARGEST = 2**32  # bytes of pictures


def asked(image_size=None) -> upscaled.Pictures | None:
  """The pictures that --low_resolution names; read once.

  Args:
    image_size: of the samples, see `sizes.parsed`.

  Raises:
    UserError: they cannot be read, or the run does not sharpen such pictures,
      or has none and needs some.
  """
  config = runs.read_config(declare.workdir())
  text, noise = FLAGS.low_resolution, FLAGS.low_resolution_noise
  upscaled.check_taken(config, text is not None)
  if text is None:
    if noise:
      raise UserError(
        f'--low_resolution_noise={noise} has no effect without '
        '--low_resolution: give it too, or leave the noise out'
      )
    return None
  sides = sizes.parsed(image_size, config)
  return _read(text, noise, sides, FLAGS.workdir, FLAGS.data_path)


@functools.cache
def _read(text, noise, sides, workdir, data_path) -> upscaled.Pictures:
  del workdir, data_path
  config = runs.read_config(declare.workdir())
  if text == HELDOUT:
    found = upscaled.reduced(_originals(config), config)
  else:
    found = _of_place(text, config['data']['channels'])
  return upscaled.given(found, config, noise, sides)


def _originals(config: Mapping) -> np.ndarray:
  """All held-out images of a run: uint8 [N, H, W, C]."""
  _, heldout = run_data.splits(config)
  if heldout is None:
    raise UserError(
      f'--low_resolution={HELDOUT}: the run has no held-out images: give a '
      'folder of pictures'
    )
  return _all(heldout, f'--low_resolution={HELDOUT}')


def _of_place(text: str, channels: int) -> np.ndarray:
  """The pictures of a place: uint8 [N, h, w, C]."""
  path = files.at(text).expanduser()
  if path.is_file() and path.suffix not in ('.npz', '.npy', '.tar'):
    with path.open('rb') as file:
      whole = images.whole(file, text)
    if channels == 1:
      whole = np.asarray(Image.fromarray(whole).convert('L'))[..., None]
    return whole[None]
  given.check('low_resolution', text)
  source = given.store_of(text, channels=channels)
  return _all(
    source or data.open_set(text, channels=channels), f'--low_resolution={text}'
  )


def _all(source, told) -> np.ndarray:
  count = len(source)
  if count * source[0]['image'].nbytes > LARGEST:
    raise UserError(
      f'{told} has {count:,} pictures, more than {LARGEST:,} bytes: give fewer'
    )
  return np.concatenate(list(features.images_of(source).stream()))


def condition(image_size=None) -> dict:
  """What a plan says of the pictures, see `upscaled.condition`."""
  config = runs.read_config(declare.workdir())
  return upscaled.condition(config, asked(image_size))


def applied(trained: Trained, image_size=None) -> Trained:
  """The network with the pictures that --low_resolution names."""
  return upscaled.applied(trained, asked(image_size))


def again(
  trained: Trained, there: Mapping | None, image_size
) -> tuple[Trained, str | None]:
  """The network with the picture that a sample was drawn for.

  Args:
    trained: the network.
    there: what the sample's address says of its picture; None without.
    image_size: of the sample.

  Returns:
    (the network, the hash of the picture).

  Raises:
    UserError: --low_resolution does not have the picture.
  """
  if there is None:
    return trained, None
  sides = sizes.parsed(image_size, trained.config)
  found = _read(
    FLAGS.low_resolution, 0.0, sides, FLAGS.workdir, FLAGS.data_path
  )
  for picture in found.images:
    if upscaled.sha256(picture) == there['sha256']:
      made = upscaled.given(picture, trained.config, there['noise'], sides)
      return upscaled.applied(trained, made), there['sha256']
  raise UserError(
    f'--low_resolution={FLAGS.low_resolution} has no picture with the SHA-256 '
    f'{there["sha256"]:.12}: give the one that was sharpened'
  )


def name(plan: Plan) -> list[str]:
  """The parts of a name of samples that say what they are drawn for."""
  there = plan.condition.get(upscaled.ROW)
  if there is None:
    return []
  noise = f'noise{there["noise"]:g}' if there['noise'] else ''
  return [f'low{there["sha256"][:8]}{noise}']


def of_heldout() -> None:
  """Without --low_resolution, the held-out images of a run that needs some."""
  config = runs.read_config(declare.workdir())
  if upscaled.factor(config) and FLAGS.low_resolution is None:
    FLAGS.low_resolution = HELDOUT


def measured(trained: Trained, samples: features.Images) -> dict:
  """The results of sharpened pictures for a card; {} of other runs.

  Args:
    trained: the network.
    samples: its samples.
  """
  if trained.low_resolution is None:
    return {}
  originals = None
  if FLAGS.low_resolution == HELDOUT:
    originals = _originals(trained.config)
  how = trained.config['super_resolution']
  small = trained.low_resolution.images
  return sharpness.measure(samples, small, originals, how['factor'], how['by'])


def draw(trained: Trained, samples: features.Images, card) -> None:
  """Draws a picture beside a card: small pictures, samples and originals.

  Args:
    trained: the network.
    samples: its samples.
    card: the file of the card; runs that sharpen nothing have no picture.
  """
  if trained.low_resolution is None:
    return
  count = min(SHOWN, samples.count)
  sides = trained.image_shape[:2]
  found = upscaled.rows(trained.low_resolution, np.arange(count))
  small = found[upscaled.ROW]
  enlarged = low_resolution.enlarged(small, sides)
  plain = features.whole(np.clip(np.asarray(enlarged), 0, 255))
  shown = {
    'given': upscaled.repeated(small, sides),
    'bicubic': plain,
    'sample': np.stack([samples.image(i) for i in range(count)]),
  }
  if FLAGS.low_resolution == HELDOUT:
    originals = _originals(trained.config)
    shown['original'] = originals[np.arange(count) % len(originals)]
  picture = pictures.columns(np.stack([*shown.values()]), [*shown])
  pictures.save(card.with_name(f'{card.stem}_sharpened.png'), picture)
