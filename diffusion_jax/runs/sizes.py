"""Networks for images of other sizes than they were trained on.

A U-Net, and the decoder of an autoencoder, has the same parameters at any size
that it can halve. Such a network is that of a config with another image size,
in which the same levels attend.
"""

import copy
import dataclasses
import re
from collections.abc import Mapping

import jax
import numpy as np

from diffusion_jax import codecs, models, runs
from diffusion_jax.models import control
from diffusion_jax.runs import draw, low_rank
from diffusion_jax.runs import recipe as recipes
from diffusion_jax.system.errors import UserError

LARGEST = 2**13  # pixels a side


def parsed(asked, config: Mapping) -> tuple[int, int] | None:
  """The height and width that are asked for; None if they are the run's own.

  Args:
    asked: pixels: a number, (height, width), or text: '48' or '48x64'; None
      for those of the run.
    config: the run's config.

  Raises:
    UserError: it is something else.
  """
  if asked is None:
    return None
  sides = asked
  if isinstance(asked, str):
    found = re.fullmatch(r'(\d{1,6})(?:x(\d{1,6}))?', asked.strip())
    sides = [int(side or found[1]) for side in found.groups()] if found else ()
  elif not isinstance(asked, list | tuple):
    sides = [asked, asked]
  sides = [int(x) if isinstance(x, np.integer) else x for x in sides]
  whole = all(type(side) is int and 1 <= side <= LARGEST for side in sides)
  if len(sides) != 2 or not whole:
    raise UserError(
      f'image_size={asked!r:.60}: give pixels, such as 48, or HEIGHTxWIDTH, '
      f'such as 48x64, at most {LARGEST} a side'
    )
  own = runs.image_shape(config['data'])[:2]
  return None if tuple(sides) == own else tuple(sides)


def config_for(config: Mapping, sides: tuple[int, int]) -> dict:
  """The config of the same network for images of another size.

  Args:
    config: the run's config, as plain dicts.
    sides: (height, width).

  Raises:
    UserError: the network, or the decoder, cannot draw images of that size.
  """
  made, old = copy.deepcopy(dict(config)), runs.image_shape(config['data'])
  new = *sides, old[-1]
  groups = [(made['model'], *_of_x0(config, old, new))]
  if codecs.is_in_latents(config):
    codec = made['codec']
    groups.append((codec['coder'], old, new))
    if codec['decoding']:
      groups.append((codec['decoding']['model'], old, new))
  for group, *_ in groups:
    if group.get('name') == 'dit':
      raise UserError(
        f"{_given(sides)}: model.name='dit' knows the positions of "
        f'{old[0]}x{old[1]} images alone: leave the size out'
      )
  _check_halves(sides, groups, old)
  for group, before, after in groups:
    group['attention_resolutions'] = _moved(group, before, after)
  made['data']['image_size'] = list(sides)
  return made


def _of_x0(config, old, new):
  """The shapes of what is diffused, for images of two sizes."""
  return [codecs.x0_shape(shape, config['codec']) for shape in (old, new)]


def _check_halves(sides, groups, old) -> None:
  """Raises UserError unless all networks can halve images of this size."""
  multiple = 1
  for group, before, _ in groups:
    # Of a network in latents, which are smaller than the images.
    multiple = max(
      multiple, 2 ** (len(group['multipliers']) - 1) * (old[0] // before[0])
    )
  if any(side % multiple for side in sides):
    below = [max(side // multiple, 1) * multiple for side in sides]
    raise UserError(
      f'{_given(sides)}: the network halves images {multiple.bit_length() - 1} '
      f'times, so both sides must be multiples of {multiple}: use '
      f'{below[0]}x{below[1]}'
    )


def _moved(group, before, after) -> list[int]:
  """The resolutions of the levels that attended before."""
  return [
    min(after[:2]) // 2**level
    for level in range(len(group['multipliers']))
    if min(before[:2]) // 2**level in group['attention_resolutions']
  ]


def recipe_for(config: Mapping, made: recipes.Recipe) -> recipes.Recipe:
  """The recipe of the same network for images of another size.

  Args:
    config: a result of `config_for`.
    made: the run's recipe.

  Raises:
    UserError: the network would have other parameters.
  """
  found = recipes.create(low_rank.plain(config))
  old, new = (_shapes(one) for one in (made, found))
  for row in models.differences(old, new, lambda leaf: tuple(leaf.shape)):
    raise UserError(
      f'{_given(runs.image_shape(config["data"])[:2])}: the network would have '
      f'{row["name"]} of {row["here"]}, and was trained with {row["there"]}: '
      'leave the size out'
    )
  return found._replace(
    frozen=made.frozen, origins=made.origins, controls=made.controls
  )


def _shapes(made):
  # A ControlNet is for any size, its picture for one.
  own = {k: made.frozen[k] for k in made.frozen if k != control.PART}
  return {**own, **jax.eval_shape(made.init, jax.random.key(0))}


def check(config: Mapping, sides: tuple[int, int]) -> None:
  """Checks that a run can draw images of another size, without its weights.

  Args:
    config: the run's config.
    sides: (height, width).

  Raises:
    UserError: it cannot.
  """
  made = recipes.create(low_rank.plain(config))
  recipe_for(config_for(config, sides), made)


def of(trained, image_size):
  """A `Trained` for images of another size; see there.

  Args:
    trained: the network. What is made for a size is kept in its `of_sizes`.
    image_size: see `parsed`.

  Raises:
    UserError: as for `parsed` and `check`.
  """
  sides = parsed(image_size, trained.config)
  if sides is None:
    return trained
  guides = {name: of(other, sides) for name, other in trained.guides.items()}
  if sides not in trained.of_sizes:
    config = config_for(trained.config, sides)
    made = recipe_for(config, trained.recipe)
    others = {name: other.recipe for name, other in guides.items()}
    compiled = draw.compiled(made, trained.mesh, **others)
    trained.of_sizes[sides] = {
      'config': config, 'recipe': made, 'compiled': compiled
    }  # fmt: skip
  return dataclasses.replace(
    trained, guides=guides, of_sizes={}, **trained.of_sizes[sides]
  )


def _given(sides) -> str:
  return f'image_size={sides[0]}x{sides[1]}'
