"""Plans of edits: what is known, the method, its options and its grid."""

import numbers
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from diffusion_jax.editing import measurements, methods
from diffusion_jax.guidance import tiles
from diffusion_jax.runs import guided, labels, planned, prompts, upscaled
from diffusion_jax.samplers import plan as plans
from diffusion_jax.system.errors import UserError, one_of

TRAINED = 'trained'  # of runs that sharpen pictures
MEAN = 'mean'  # of 'denoise' in one step, which needs no other method
# Method -> its usual number of steps, and its grid.
USUAL = {
  'replacement': (100, 'quadratic'),
  'repaint': (30, 'uniform'),
  'ddrm': (100, 'karras'),
  'pigdm': (50, 'uniform'),
  'covariance': (25, 'uniform'),
  'dps': (100, 'uniform'),
  'daps': (30, 'karras'),
  'sdedit': (100, 'uniform'),
  'denoise': (100, 'uniform'),
  TRAINED: (100, 'uniform'),
}
SMALL = 16  # pixels a side
# What is known -> the methods that docs/editing.md shows best for it: of small
# images by the digits, of others, but for deblur, by CIFAR-10.
BEST = {
  'inpaint': ('dps', 'covariance'),
  'upscale': ('covariance', 'ddrm'),
  'colourise': ('covariance', 'covariance'),
  'deblur': ('covariance', 'covariance'),
  'denoise': (MEAN, MEAN),
  None: ('sdedit', 'sdedit'),
}


class Edit(NamedTuple):
  """How answers are drawn.

  Attributes:
    kind: what is known of pictures, see `measurements`; None if they are only
      where the samples start.
    method: a key of `methods.ABOUT`.
    options: all of the method's options.
    plan: the grid, the seed, the condition and its guidance. Its sampler is not
      used.
    image_shape: (H, W, C) of the answers.
    tile: (h, w) of the tiles that the network sees; None for whole pictures.
    overlap: the least number of pixels that neighbouring tiles share.
  """

  kind: dict | None
  method: str
  options: dict
  plan: plans.Plan
  image_shape: tuple[int, int, int]
  tile: tuple[int, int] | None = None
  overlap: int = 0

  @property
  def tiles(self) -> int:
    """The number of tiles of a picture."""
    if not self.tile:
      return 1
    return tiles.count(self.image_shape, self.tile, self.overlap)

  @property
  def evaluations(self) -> int:
    """Evaluations of the network, or of its tiles, an answer."""
    return methods.count_evaluations(
      self.method, self.plan.grid, **self.options
    )

  def protocol(self) -> dict:
    """The edit as saved with its answers."""
    how = self.plan.protocol()
    for name in ('sampler', *self.plan.options):
      how.pop(name)
    tiled = {'tile': self.tile, 'overlap': self.overlap} if self.tile else {}
    return {
      'kind': self.kind, 'method': self.method, **self.options, **how,
      'image_shape': self.image_shape, **tiled,
    }  # fmt: skip


def able(kind: str | None) -> list[str]:
  """The methods that may do a task, the usual ones first.

  Args:
    kind: the name of a measurement; None for a picture to start from.
  """
  found = [MEAN, *USUAL] if kind == 'denoise' else [*USUAL]
  of_kind = {
    'sdedit': (None,), 'denoise': ('denoise',), TRAINED: ('upscale',)
  }  # fmt: skip
  fits = [x for x in found if kind in of_kind.get(x, (kind,))]
  if kind is None:
    fits = ['sdedit']
  return sorted(fits, key=lambda x: x not in BEST[kind])


def best(kind: str | None, trained) -> str:
  """The usual method of a run, for pictures of any size.

  Args:
    kind: see `able`.
    trained: the network, a `Trained`.
  """
  small, large = BEST[kind]
  return small if max(trained.image_shape[:2]) <= SMALL else large


def plan(
  trained,
  kind: Mapping | None,
  image_shape: tuple[int, int, int],
  *,
  method: str | None = None,
  tile: int | tuple[int, int] | None = None,
  overlap: int | None = None,
  **options,
) -> Edit:
  """Makes a plan of an edit, and checks that the run and the method can do it.

  Args:
    trained: the network, a `Trained`.
    kind: what is known of pictures, see `Edit`.
    image_shape: (H, W, C) of the answers.
    method: a key of `methods.ABOUT`, or MEAN; None = the usual one of the kind.
    tile: the side, or (height, width), of tiles that are denoised in place of
      whole pictures; usually that of the run's images.
    overlap: pixels that neighbouring tiles share at least; by default half of
      a tile.
    **options: num_steps, grid, clip, seed, guidance and its options, and label,
      prompts and negative_prompt, as of `Trained.plan`; and the method's own.

  Raises:
    UserError: an unknown name, a number out of range, a method that cannot do
      the kind, or a size that the network does not take.
  """
  given = {name: x for name, x in options.items() if x is not None}
  own = {name: given.pop(name) for name in methods.RANGES if name in given}
  kind = measurements.plain(kind)
  name = kind and kind.get('name')
  if kind is not None:
    one_of('measurement', name, measurements.KINDS)
  method = _of_trained(trained.config, kind, method, tile)
  in_latents = trained.codec.levels is None
  # Of the others, through a decoder only DPS keeps to what is known.
  method = method or ('dps' if kind and in_latents else best(name, trained))
  if method == MEAN and name == 'denoise':
    if 'num_steps' in given or 'grid' in given:
      raise UserError('method=mean takes one evaluation: leave num_steps out')
    method, given['num_steps'] = 'denoise', 1
  options = methods.check(method, kind, image_shape, **own)
  steps, grid = USUAL[method]
  if 'grid' not in given:
    given = {'num_steps': steps, **given, 'grid': grid}
  if image_shape[-1] != trained.image_shape[-1]:
    raise UserError(
      f'pictures have {image_shape[-1]} channels, and those of the run '
      f'{trained.image_shape[-1]}: give others'
    )
  if in_latents:
    _check_in_latents(method, kind, tile)
  if tile:
    tile, overlap = _tile(tile, overlap, image_shape)
  elif overlap is not None:
    raise UserError(f'overlap={overlap} has no effect without a tile')
  how = _plan(trained, given, tile or tuple(image_shape[:2]))
  return Edit(
    kind and dict(kind), method, options, how, tuple(image_shape), tile,
    overlap or 0,
  )  # fmt: skip


def _of_trained(config, kind, method: str | None, tile) -> str | None:
  """The method, checked to be `TRAINED` of runs that sharpen pictures alone."""
  factor = upscaled.factor(config)
  if not factor:
    if method == TRAINED:
      raise UserError(
        'method=trained needs a run that was trained to sharpen pictures, with '
        'super_resolution.factor: use another method'
      )
    return method
  own = kind is not None and kind.get('factor') == factor
  if not own or method not in (None, TRAINED) or tile:
    raise UserError(
      f'the run was trained to sharpen pictures {factor} times: it answers '
      f'upscale with factor={factor} by method=trained, without tiles'
    )
  return TRAINED


def _check_in_latents(method, kind, tile) -> None:
  """Raises UserError for what cannot be done through a decoder."""
  fit = [name for name, about in methods.ABOUT.items() if about.decoder]
  if method not in fit:
    raise UserError(
      f'method={method} cannot look through the decoder of a run in latents: '
      f'use one of {", ".join(fit)}'
    )
  if method == 'sdedit' and kind is not None:
    raise UserError(
      f'method=sdedit starts from a picture and does not keep to it: for '
      f'{kind["name"]} use dps'
    )
  if tile:
    raise UserError('tile is for runs that diffuse pixels: leave it out')


def _plan(trained, given: dict, sides) -> plans.Plan:
  """The grid, the seed, the condition and its guidance."""
  asked = any(given.get(name) is not None for name in prompts.NAMES)
  if not asked:
    labels.check_null(trained.recipe.conditioner, 'a label, such as --label=0')
  if upscaled.factor(trained.config):  # what is known comes with the rows
    shape = upscaled.shape_of(trained.config, sides)
    some = upscaled.Pictures(np.zeros((1, *shape), np.uint8))
    trained = upscaled.applied(trained, some)
  made = planned.plan(
    trained, {'sampler': 'ddim', 'image_size': sides, **given}
  )
  rest = {k: x for k, x in made.condition.items() if k not in upscaled.NAMES}
  made = made._replace(condition=rest)
  if asked:
    return made
  guidance = made.guidance
  if 'guidance' in guidance and guided.GUIDE not in guidance:
    raise UserError(
      f'guidance={guidance["guidance"]:g} has no effect without a label or a '
      'prompt: give one, or leave guidance out'
    )
  return made._replace(condition={})  # in place of labels as in the data


def _tile(tile, overlap, image_shape) -> tuple[tuple[int, int], int]:
  """The tile and the overlap, checked."""
  sides = (tile,) * 2 if np.ndim(tile) == 0 else tuple(tile)
  fits = len(sides) == 2 and all(
    isinstance(a, numbers.Integral) and 1 <= a <= b
    for a, b in zip(sides, image_shape, strict=False)
  )
  if not fits:
    raise UserError(
      f'tile={tile}: one or two whole numbers, from 1 to the size of the '
      f'pictures, {image_shape[0]}x{image_shape[1]}'
    )
  tile = tuple(map(int, sides))
  overlap = min(tile) // 2 if overlap is None else overlap
  whole = isinstance(overlap, numbers.Integral)
  if not whole or not 0 <= overlap < min(tile):
    raise UserError(
      f'overlap={overlap}: a whole number from 0 to less than the tile, '
      f'{min(tile)}'
    )
  return tile, overlap
