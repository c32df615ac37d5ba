"""What the tasks of `edit` are given: pictures, masks, blurs, levels."""

import collections
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from diffusion_jax import runs
from diffusion_jax.cli import declare, edit_tasks, run_data
from diffusion_jax.codecs import pixels
from diffusion_jax.data import pictures
from diffusion_jax.data.pictures import Picture
from diffusion_jax.editing import kernels, measurements
from diffusion_jax.runs import edit_plans, edits, sizes
from diffusion_jax.system import terminal
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(run_data)
SPLITS = ('heldout', 'train')
declare.shared('accept_data')
declare.table(
  input=(
    str,
    'A picture, or a folder of pictures; or heldout or train: images of the '
    'run, for --simulate.',
  ),
  num_images=(8, '--input=heldout or train: number of images, evenly spaced.'),
  resize=(
    False,
    "Crop pictures to the proportions of the run's images and resize them.",
  ),
  tile=(
    int,
    'Side of overlapping tiles that the network sees in place of the whole '
    'picture, for pictures of any size; usually that of its training images.',
  ),
  overlap=(int, '--tile: pixels that neighbours share; by default half.'),
  simulate=(
    False,
    'The pictures are whole: measure them first, as the task does, answer '
    'that, and report how near the answers come.',
  ),
)


class Asked(NamedTuple):
  """What the flags ask for, checked before any weights are read.

  Attributes:
    task: the task.
    pictures: the pictures of --input.
    kind: what is known of them, see `edit_plans.Edit`.
    masks: of inpaint, one for each picture: bool [H, W], true where known.
    tile: the side of tiles, or None.
  """

  task: str
  pictures: list[Picture]
  kind: dict | None
  masks: list[np.ndarray] | None
  tile: int | None


class Group(NamedTuple):
  """Pictures of one shape.

  Attributes:
    names: their names.
    edit: how they are answered.
    rows: what a program is given, see `edits.rows`.
    shown: what is known of each, as pictures: uint8 [N, H, W, C].
    originals: with --simulate, the whole pictures; None without.
  """

  names: list[str]
  edit: edit_plans.Edit
  rows: dict[str, np.ndarray]
  shown: np.ndarray
  originals: np.ndarray | None


def asked(task: str, config: dict) -> Asked:
  """Reads what the flags ask for.

  Args:
    task: the task.
    config: the run's config.

  Raises:
    UserError: a picture cannot be read or has another size than the run takes,
      or a number is out of range.
  """
  _check_numbers(task)
  own = runs.image_shape(config['data'])
  found = _pictures(config, own[-1])
  larger = 1
  if task == 'upscale' and not FLAGS.simulate:
    larger = FLAGS.factor
  found = [_fitted(picture, config, larger) for picture in found]
  kind = _kind(task, np.min([one.pixels.shape for one in found], axis=0))
  masks = None
  if task == 'inpaint':
    masks = [_mask(picture) for picture in found]
  if task in ('restyle', 'vary') and FLAGS.simulate:
    raise UserError(f'--simulate does not apply to {task}: leave it out')
  return Asked(task, found, kind, masks, FLAGS.tile)


def _check_numbers(task) -> None:
  """Raises UserError for numbers of flags that are out of range."""
  own = {name: FLAGS[name].value for name in edit_tasks.OWN[task]}
  noise, share = own.get('noise'), own.get('random')
  if noise is not None and not 0 <= noise < math.inf:
    raise UserError(f'--noise={noise}: at least 0, in levels of 255')
  if own.get('factor', 2) not in (2, 4, 8):
    raise UserError(f'--factor={FLAGS.factor}: 2, 4 or 8')
  if share is not None and not 0 < share < 1:
    raise UserError(f'--random={share}: a share between 0 and 1')
  if not 0 < own.get('strength', 1) <= 1:
    raise UserError(
      f'--strength={FLAGS.strength}: above 0, which changes nothing, and at '
      'most 1'
    )


def _pictures(config, channels) -> list[Picture]:
  """The pictures of --input."""
  if FLAGS.input not in SPLITS:
    if FLAGS['num_images'].present:
      raise UserError(
        f'--num_images={FLAGS.num_images} is for --input=heldout or train: '
        'leave it out'
      )
    there = pictures.listed(FLAGS.input, 'input')
    return [pictures.read(*one, channels) for one in there.items()]
  found = run_data.images(config, FLAGS.input, FLAGS.num_images, at_most=False)
  whole = np.concatenate(list(found.stream()))
  width = len(str(found.count - 1))
  return [
    Picture(f'{FLAGS.input}{i:0{width}}', one) for i, one in enumerate(whole)
  ]


def _fitted(picture: Picture, config, larger: int) -> Picture:
  """The picture at a size that the run takes, or a UserError.

  Args:
    picture: the picture.
    config: the run's config.
    larger: how many times larger its answer is, per side.
  """
  own = runs.image_shape(config['data'])[:2]
  if FLAGS.resize:
    if any(side % larger for side in own):
      raise UserError(
        f'--factor={larger}: it does not divide the {own[0]}x{own[1]} images '
        'of the run'
      )
    sides = tuple(side // larger for side in own)
    if picture.pixels.shape[:2] == sides:
      return picture
    return pictures.resized(picture, sides)
  sides = tuple(side * larger for side in picture.pixels.shape[:2])
  if sides == own or FLAGS.tile:
    return picture
  given = f'{picture.name} is {picture.pixels.shape[1]} wide and '
  given += f'{picture.pixels.shape[0]} high'
  if larger > 1:
    given += f', its answer {sides[1]} and {sides[0]}'
  remedy = (
    f'--resize crops it to the proportions of {own[0]}x{own[1]} and resizes it'
  )
  if min(sides) >= min(own):
    remedy += f', --tile={min(own)} answers it by overlapping tiles'
  try:
    sizes.check(config, sides)
  except UserError as e:
    raise UserError(
      f'{given}, which the network does not take: {remedy}'
    ) from e
  terminal.say_once(
    f'(answers of {sides[0]}x{sides[1]}, training images of {own[0]}x{own[1]}: '
    f'the network sees such pictures whole; {remedy.replace(" it", " them")})'
  )
  return picture


def _kind(task: str, shape) -> dict | None:
  """The measurement of a task's flags, see `edit_plans.Edit`."""
  if edit_tasks.KINDS[task] is None:
    return None
  kind = {'name': edit_tasks.KINDS[task]}
  if task == 'upscale':
    kind |= {'factor': FLAGS.factor, 'by': FLAGS.by}
  if task == 'deblur':
    kind['kernel'] = np.round(_kernel(shape), 12).tolist()
  return kind


def _kernel(shape) -> np.ndarray:
  """The kernel of --blur, for pictures of this shape and larger ones."""
  side = int(min(shape[:2]))
  for name, of in (
    ('sd', 'gaussian'),
    ('length', 'motion'),
    ('angle', 'motion'),
  ):
    if FLAGS[name].present and FLAGS.blur != of:
      raise UserError(f'--{name} is for --blur={of}, not --blur={FLAGS.blur}')
  if FLAGS.blur == 'gaussian':
    return kernels.gaussian(FLAGS.sd, side)
  if FLAGS.blur == 'motion':
    if not 1 <= FLAGS.length <= side:
      raise UserError(
        f'--length={FLAGS.length:g}: from 1 to the side of the pictures, {side}'
      )
    return kernels.motion(FLAGS.length, FLAGS.angle)
  if not Path(FLAGS.blur).expanduser().is_file():
    raise UserError(
      f'--blur={FLAGS.blur}: gaussian, motion, or a picture of the kernel'
    )
  path = Path(FLAGS.blur).expanduser()
  return kernels.given(pictures.read(path.stem, path, 1).pixels[..., 0], shape)


def _mask(picture: Picture) -> np.ndarray:
  """What is known of a picture: bool [H, W]."""
  sides = picture.pixels.shape[:2]
  given = [name for name in ('mask', 'box', 'random') if FLAGS[name].value]
  if len(given) > 1:
    raise UserError(f'--{given[0]} and --{given[1]}: give one of them')
  if FLAGS.box:
    return ~_box(FLAGS.box, sides)
  if FLAGS.random:
    seed = edits.hashed([picture.pixels]) + FLAGS.seed
    chance = np.random.default_rng(seed).permutation(math.prod(sides))
    return (chance >= round(FLAGS.random * math.prod(sides))).reshape(sides)
  if FLAGS.mask:
    unknown = _mask_file(picture.name, sides)
  elif picture.alpha is None:
    raise UserError(
      f'{picture.name} has no transparent part: give --mask, --box or --random'
    )
  else:
    unknown = picture.alpha < 128
  if unknown.all() or not unknown.any():
    what = 'nothing' if unknown.all() else 'everything'
    raise UserError(
      f'the mask of {picture.name} leaves {what} known: white is filled in, '
      'black is kept'
    )
  return ~unknown


def _mask_file(name: str, sides) -> np.ndarray:
  """Where --mask is white: bool [H, W]."""
  there = pictures.listed(FLAGS.mask, 'mask')
  if Path(FLAGS.mask).expanduser().is_file():
    there = {name: next(iter(there.values()))}
  if name not in there:
    raise UserError(f'--mask={FLAGS.mask} has no mask of the name {name}')
  mask = pictures.read(name, there[name], 1)
  if mask.pixels.shape[:2] != sides and FLAGS.resize:
    mask = pictures.resized(mask, sides)
  if mask.pixels.shape[:2] != sides:
    raise UserError(
      f'the mask {there[name]} is {mask.pixels.shape[1]} wide and '
      f'{mask.pixels.shape[0]} high, {name} {sides[1]} and {sides[0]}: give a '
      'mask of the same size'
    )
  return mask.pixels[..., 0] >= 128


def _box(text: str, sides) -> np.ndarray:
  """TOP,LEFT,HEIGHT,WIDTH -> bool [H, W], true inside."""
  try:
    top, left, height, width = map(int, text.split(','))
  except ValueError as e:
    raise UserError(
      f'--box={text}: give TOP,LEFT,HEIGHT,WIDTH in pixels, such as 2,2,4,4'
    ) from e
  inside = np.zeros(sides, bool)
  if min(top, left) >= 0 and min(height, width) >= 1:
    inside[top : top + height, left : left + width] = True
  if inside.sum() != height * width or inside.all():
    raise UserError(
      f'--box={text}: it must lie in the picture, which is {sides[0]} high and '
      f'{sides[1]} wide, and leave a part of it'
    )
  return inside


def groups(asked: Asked, plan_of: Callable) -> list[Group]:
  """The pictures by shape, each with its edit.

  Args:
    asked: a result of `asked`.
    plan_of: (kind, image shape, tile=, overlap=) -> `edit_plans.Edit`.

  Raises:
    UserError: as for `edit_plans.plan` and `edits.rows`.
  """
  by_shape = collections.defaultdict(list)
  for i, picture in enumerate(asked.pictures):
    by_shape[picture.pixels.shape].append(i)
  return [_group(asked, places, plan_of) for places in by_shape.values()]


def _group(asked: Asked, places: Sequence[int], plan_of) -> Group:
  """Pictures of one shape."""
  names = [asked.pictures[i].name for i in places]
  whole = np.stack([asked.pictures[i].pixels for i in places])
  masks = asked.masks and np.stack([asked.masks[i] for i in places])
  height, width, channels = whole.shape[1:]
  factor = 1
  if asked.task == 'upscale' and not FLAGS.simulate:
    factor = FLAGS.factor
  shape = height * factor, width * factor, channels
  edit = plan_of(asked.kind, shape, tile=asked.tile, overlap=FLAGS.overlap)
  level = FLAGS['noise'].value if 'noise' in FLAGS else 0.0
  if FLAGS.simulate and asked.kind is not None:
    if level is None:
      raise UserError('--simulate needs the noise to add: give --noise')
    known = _measured(edit, whole, masks, level)
  else:
    known = whole
    if asked.task == 'colourise':
      grey = [pictures.in_channels(one, 1) for one in whole]
      known = np.stack(grey)
  strength = (
    FLAGS.strength if 'strength' in edit_tasks.OWN[asked.task] else None
  )
  rows = edits.rows(edit, known, level, masks, strength)
  shown = _shown(known, shape, masks)
  originals = whole if FLAGS.simulate else None
  return Group(names, edit, rows, shown, originals)


def _measured(edit, whole, masks, level) -> np.ndarray:
  """What is known of whole pictures, with noise: [N, ...] in [0, 255].

  The noise of a picture depends on it and on the seed only.
  """
  rows = {'noise': jnp.full(len(whole), level / 127.5, jnp.float32)}
  if masks is not None:
    rows['mask'] = jnp.asarray(masks[..., None], jnp.float32)
  measurement = measurements.create(edit.kind, edit.image_shape)(rows)
  shape = measurements.shape_of(edit.kind, edit.image_shape)
  root = jax.random.fold_in(jax.random.key(FLAGS.seed), 3)
  keys = [jax.random.fold_in(root, edits.hashed([one])) for one in whole]
  standard = jnp.stack([jax.random.normal(key, shape) for key in keys])
  y = measurements.observe(
    edit.kind, measurement, pixels.to_float(whole), standard
  )
  return np.asarray((y + 1) * 127.5)


def _shown(known, shape, masks) -> np.ndarray:
  """What is known as pictures: grey where nothing is, enlarged if small."""
  seen = np.clip(np.round(known), 0, 255).astype(np.uint8)
  if masks is not None:
    seen = np.where(masks[..., None], seen, np.uint8(127))
  seen = seen.repeat(shape[0] // seen.shape[1], axis=1)
  seen = seen.repeat(shape[1] // seen.shape[2], axis=2)
  return np.broadcast_to(seen, (len(seen), *shape))
