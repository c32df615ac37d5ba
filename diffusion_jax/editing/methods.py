"""The methods by name: what each needs, its options, and how to make one."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from diffusion_jax.editing import measurements
from diffusion_jax.editing.daps import daps
from diffusion_jax.editing.ddrm import ddrm
from diffusion_jax.editing.editing import Editing
from diffusion_jax.editing.guided import covariance, dps, pigdm
from diffusion_jax.editing.replacement import repaint, replacement, walk
from diffusion_jax.editing.sdedit import denoise, sdedit
from diffusion_jax.editing.trained import trained
from diffusion_jax.guidance import clipping
from diffusion_jax.system.errors import UserError, one_of

SPECTRUM, GRADIENTS = 'spectrum', 'gradients'
PICTURE, NOISY, TRAINED = 'picture', 'noisy', 'trained'
NEEDS = {
  SPECTRUM: 'singular values of the measurement',
  GRADIENTS: 'gradients through the network',
  PICTURE: 'a picture of the size of the result',
  NOISY: 'a noisy picture of which nothing is missing',
  TRAINED: 'a small picture, and a run that was trained to sharpen it',
}


def _one_a_step(grid, options) -> int:
  return len(grid) - 1


class About(NamedTuple):
  """A description of a method.

  Attributes:
    create: (denoiser, schedule, measurement, y, **options) -> Editing.
    needs: keys of NEEDS.
    source: arXiv id, or where else it is from.
    what: a one-line description.
    decoder: whether `measurement.apply` may be that of decoded latents, or, if
      it needs a picture, whether y may be latents.
    evaluations: network evaluations per step, in words.
    count: (grid, options) -> network evaluations per answer.
  """

  create: Callable
  needs: tuple[str, ...]
  source: str
  what: str
  decoder: bool = False
  evaluations: str = '1'
  count: Callable = _one_a_step


_ALL = (
  About(
    replacement, (SPECTRUM,), '2011.13456',
    'puts what is known back after each step',
  ),
  About(
    repaint, (SPECTRUM,), '2201.09865', 'replacement, with ways back up',
    evaluations='about jump_n_sample',
    count=lambda grid, options: len(walk(len(grid) - 1, **options)),
  ),
  About(
    ddrm, (SPECTRUM,), '2201.11793', 'steps along the singular vectors',
  ),
  About(
    pigdm, (GRADIENTS,), 'ICLR 2023',
    'gradient of the likelihood, covariance sigma^2 I', evaluations='1 + back',
  ),
  About(
    covariance, (GRADIENTS,), '2310.06721',
    'gradient of the likelihood, covariance by the Jacobian',
    evaluations='1 + back, iterations + 1 times',
  ),
  About(
    dps, (GRADIENTS,), '2209.14687', 'gradient of the distance, times zeta',
    True, '1 + back',
  ),
  About(
    daps, (), '2407.01521', 'draws x0 given y at each level, and noises it',
    evaluations='ode_steps',
    count=lambda grid, options: options['ode_steps'] * (len(grid) - 1),
  ),
  About(
    sdedit, (PICTURE,), '2108.01073', 'noises a picture and samples from there',
    True,
  ),
  About(
    denoise, (NOISY,), '2006.11239', 'samples on from the noise of a picture',
  ),
  About(
    trained, (TRAINED,), '2104.07636', 'samples, by a run that was told of y',
  ),
)  # fmt: skip
ABOUT = {about.create.__name__: about for about in _ALL}

# Arguments that are data of each call, and no options of a plan.
DATA = ('t0', 'covariance')

# The options of all methods: their type, and the smallest and largest value.
RANGES = {
  'eta': (float, 0, 1),
  'eta_b': (float, 0, 1),
  'zeta': (float, 0, math.inf),
  'data_std': (float, 0, math.inf),
  'jump_length': (int, 1, math.inf),
  'jump_n_sample': (int, 1, math.inf),
  'ode_steps': (int, 1, math.inf),
  'iterations': (int, 1, math.inf),
}


def defaults(name: str) -> dict:
  """The options of a method, with their default values.

  Args:
    name: a key of ABOUT.

  Raises:
    UserError: an unknown name.
  """
  create_fn = ABOUT[one_of('method', name, ABOUT)].create
  taken = inspect.signature(create_fn).parameters.values()
  return {
    of.name: of.default
    for of in taken
    if of.kind is of.KEYWORD_ONLY and of.name not in DATA
  }


def options(name: str, **given) -> dict:
  """All options of a method: the given ones, and defaults of the others.

  Args:
    name: a key of ABOUT.
    **given: its options; None means not given.

  Raises:
    UserError: an unknown name, an option that it does not have, or one out of
      range.
  """
  known = defaults(name)
  given = {
    option: value for option, value in given.items() if value is not None
  }
  for option, value in given.items():
    if option not in known:
      takes = f'it takes {", ".join(known)}' if known else 'it takes none'
      raise UserError(f'{option}={value}: {name} has no such option; {takes}')
    kind, low, high = RANGES[option]
    allowed = (int,) if kind is int else (int, float)
    typed = isinstance(value, allowed) and not isinstance(value, bool)
    if not typed or not low <= value <= high or math.isinf(value):
      number = 'a whole number' if kind is int else 'a number'
      limit = f'from {low} to {high}' if high < math.inf else f'from {low}'
      raise UserError(f'{option}={value}: {number} {limit}')
  return known | given


def check(name: str, kind: Mapping | None, shape, **given) -> dict:
  """All options of a method, if it can do a measurement.

  Args:
    name: a key of ABOUT.
    kind: the measurement, see `measurements`; None for a picture to start from.
    shape: (H, W, C).
    **given: its options; None means not given.

  Raises:
    UserError: it cannot, or see `options`.
  """
  chosen = options(name, **given)
  able = [other for other in ABOUT if _lacks(other, kind, shape) is None]
  lacks = _lacks(name, kind, shape)
  if lacks is not None:
    task = 'a picture to start from' if kind is None else kind['name']
    raise UserError(
      f'method={name} cannot do {task} here: it needs {NEEDS[lacks]}; use one '
      f'of {", ".join(able)}'
    )
  return chosen


def _lacks(name, kind, shape) -> str | None:
  """What a method needs and a measurement does not have."""
  needs = ABOUT[name].needs
  if kind is None:
    return None if PICTURE in needs else SPECTRUM
  if PICTURE in needs and measurements.shape_of(kind, shape) != tuple(shape):
    return PICTURE
  if TRAINED in needs and kind['name'] != 'upscale':
    return TRAINED
  if NOISY in needs and kind['name'] != 'denoise':
    return NOISY
  if SPECTRUM in needs and not measurements.has_spectrum(kind, shape):
    return SPECTRUM
  return None


def count_evaluations(name: str, grid, **given) -> int:
  """Network evaluations per answer, without those backwards.

  Args:
    name: a key of ABOUT.
    grid: the times.
    **given: the method's options.

  Raises:
    UserError: see `options`.
  """
  return ABOUT[name].count(grid, options(name, **given))


def create(
  name: str, denoiser, schedule, measurement, y, *, bound=None, **given
) -> Editing:
  """A method by name, to be called inside jit.

  Args:
    name: a key of ABOUT.
    denoiser: the model, with its conditioning and guidance, not clipped.
    schedule: the noise schedule.
    measurement: what is known, see `measurements`; None if the method needs a
      picture.
    y: what was measured, or the picture.
    bound: x0 is clipped to [-bound, bound], after guidance by gradients: the
      gradient of a clipped estimate is 0, as if it were certain. None for not.
    **given: the method's options, None for the default, and data: `t0` of
      sdedit, `covariance` of daps.

  Raises:
    UserError: see `options`.
  """
  data = {option: given.pop(option) for option in DATA if option in given}
  chosen = options(name, **given)
  about, last = ABOUT[name], GRADIENTS in ABOUT[name].needs
  if bound is not None and not last:
    denoiser = clipping.clip_x0(denoiser, schedule, bound)
  made = about.create(denoiser, schedule, measurement, y, **chosen, **data)
  if bound is None or not last:
    return made
  clipped = clipping.clip_x0(made.denoiser, schedule, bound)
  return made._replace(denoiser=clipped)


def table() -> list[tuple[str, ...]]:
  """The table of --method=list: a header, and a row for each method."""
  rows = [
    ('method', 'needs', 'evaluations', 'latents', 'what', 'source', 'options')
  ]
  for name, about in ABOUT.items():
    shown = ' '.join(f'{k}={v}' for k, v in defaults(name).items())
    latents = 'yes' if about.decoder else 'no'
    needs = ', '.join(about.needs) or '-'
    told = (about.evaluations, latents, about.what, about.source)
    rows.append((name, needs, *told, shown))
  return rows
