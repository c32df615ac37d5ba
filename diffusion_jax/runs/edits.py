"""Edits pictures with a run's network: answers to what is known of them.

An answer is identified by (run, seed, input, index), where the input is the
hash of what is known, so it does not depend on its batch, on its order or on
the folder that the picture is in.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.codecs import pixels
from diffusion_jax.editing import measurements, methods, noise_level
from diffusion_jax.guidance import tiles
from diffusion_jax.process import noise
from diffusion_jax.runs import draw, edit_plans, guided, prompts, upscaled
from diffusion_jax.runs.edit_plans import Edit, plan
from diffusion_jax.samplers.solve import solve
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

KEPT = 8  # programs of a network


def rows(
  edit: Edit,
  known: np.ndarray,
  level=0.0,
  mask: np.ndarray | None = None,
  strength: float | None = None,
) -> dict[str, np.ndarray]:
  """What a program is given of pictures.

  Args:
    edit: the plan.
    known: what is known, [N, ...] as `measurements.shape_of`, in [0, 255].
    level: the standard deviation of its noise, in the same units, of all or of
      each, [N]; None = estimated from each, for pictures of all pixels.
    mask: of 'inpaint', [N, H, W], 1 where the picture is known.
    strength: of 'sdedit', how far to noise pictures, above 0 and at most 1.

  Returns:
    'measured' float32 in [-1, 1], 'noise' [N], 'input' uint32 [N], 'mask'
    float32 [N, H, W, 1] if there is one, and 'strength' [N] if that is given.

  Raises:
    UserError: arrays of another shape, a level below 0, or a mask with nothing
      known or nothing unknown.
  """
  known = np.asarray(known)
  wanted = edit.image_shape
  if edit.kind is not None:
    wanted = measurements.shape_of(edit.kind, edit.image_shape)
  if known.shape[1:] != wanted or not len(known):
    raise UserError(
      f'what is known of a picture has the shape {list(known.shape[1:])}, but '
      f'this edit takes {list(wanted)}'
    )
  if level is None:
    scaled = known / 127.5 - 1.0
    level = [127.5 * noise_level.estimate(one) for one in scaled]
  try:
    levels = np.broadcast_to(np.asarray(level, np.float64), len(known))
  except (TypeError, ValueError) as e:
    raise UserError(
      f'noise={level}: one number, or one for each of {len(known)} pictures'
    ) from e
  for each in levels:
    if not 0 <= each < math.inf:
      raise UserError(f'noise={each:g}: at least 0, in levels of 255')
  if mask is not None and (edit.kind or {}).get('name') != 'inpaint':
    raise UserError('a mask is for inpaint: leave it out')
  found = {
    'measured': np.asarray(known, np.float32) / 127.5 - 1,
    'noise': np.float32(levels / 127.5),
  }
  if mask is not None:
    found['mask'] = _mask(mask, edit.image_shape, len(known))
    found['measured'] = np.where(found['mask'] > 0, found['measured'], 0)
  if (edit.method == 'sdedit') != (strength is not None):
    need = 'needs a strength' if strength is None else 'takes no strength'
    raise UserError(f'method={edit.method} {need}, above 0 and at most 1')
  if strength is not None:
    if isinstance(strength, str) or not 0 < strength <= 1:
      raise UserError(f'strength={strength}: above 0 and at most 1')
    found['strength'] = np.full(len(known), strength, np.float32)
  pieces = [found[name] for name in ('measured', 'mask') if name in found]
  found['input'] = np.array(
    [hashed([piece[i] for piece in pieces]) for i in range(len(known))],
    np.uint32,
  )
  return found


def _mask(mask, image_shape, count) -> np.ndarray:
  """A mask, checked: float32 [N, H, W, 1]."""
  mask = np.asarray(mask)
  if mask.shape != (count, *image_shape[:2]):
    raise UserError(
      f'the mask has the shape {list(mask.shape)}, but the pictures '
      f'{[count, *image_shape[:2]]}: give a mask of the same size'
    )
  mask = np.float32(mask > 0)
  for i, one in enumerate(mask):
    if one.all() or not one.any():
      what = 'everything' if one.all() else 'nothing'
      raise UserError(
        f'the mask of picture {i} leaves {what} known: mark a part of it'
      )
  return mask[..., None]


def hashed(pieces) -> int:
  """32 bits that identify an input."""
  digest = hashlib.sha256()
  for piece in pieces:
    digest.update(np.ascontiguousarray(piece))
  return int.from_bytes(digest.digest()[:4], 'big')


def answer_keys(seed: int, inputs, indices) -> tuple[jax.Array, jax.Array]:
  """The random keys of answers: for the initial noise and for the sampler.

  Samples use fold_in(seed, 1), see `draw.sample_keys`.

  Args:
    seed: the seed.
    inputs: [B] uint32, what is known.
    indices: [B] uint32, which answer.
  """
  root = jax.random.fold_in(jax.random.key(seed), 2)

  def keys(given, index):
    key = jax.random.fold_in(jax.random.fold_in(root, given), index)
    return jax.random.split(key)

  pairs = jax.vmap(keys)(inputs, indices)
  return pairs[:, 0], pairs[:, 1]


class Answers(NamedTuple):
  """Answers of a program, [N, ...] each.

  Attributes:
    images: uint8 [N, H, W, C].
    finite: whether the answer was finite.
  """

  images: jax.Array
  finite: jax.Array


def program(trained, edit: Edit) -> Callable:
  """The compiled function that draws answers.

  Args:
    trained: the network, a `Trained`.
    edit: the plan.

  Returns:
    (params, rows, texts) -> `Answers`, where rows are those of `rows` with
    'index' [B] uint32, the number of the answer, and texts those of `prompts.
    tables`.
  """
  sized = trained.sized(edit.plan.image_size)
  cache, key = sized.compiled.edits, json.dumps(edit)
  if key not in cache:
    while len(cache) >= KEPT:
      cache.pop(next(iter(cache)))
    others = {name: one.recipe for name, one in sized.guides.items()}
    run = functools.partial(
      _answers, recipe=sized.recipe, mesh=sized.mesh, edit=edit, others=others
    )
    cache[key] = jax.jit(run)
  return cache[key]


def _answers(params, rows, texts, *, recipe, mesh, edit, others) -> Answers:
  """The function that `program` compiles."""
  codec, schedule, how = recipe.codec, recipe.schedule, edit.plan
  shape = codec.shape if not edit.tile else edit.image_shape
  params = recipe.whole(params, mesh)
  given = draw.conditions(how, rows['index'], texts)
  given = {
    name: x if name == 'negative' else jnp.repeat(x, edit.tiles, axis=0)
    for name, x in given.items()
  }
  if edit.method == edit_plans.TRAINED:
    whole = jnp.round((rows['measured'] + 1) * 127.5)
    given[upscaled.ROW] = jnp.clip(whole, 0, 255)
  denoiser = guided.denoiser(
    recipe, params, given, how.guidance, mesh, **others
  )
  if edit.tile:
    denoiser = tiles.tiled(denoiser, shape, edit.tile, edit.overlap)
  first, later = answer_keys(how.seed, rows['input'], rows['index'])
  decoding = jax.vmap(lambda key: jax.random.fold_in(key, draw.DECODING))(later)
  known, measurement, given = rows['measured'], None, {}
  if edit.kind is not None:
    measurement = measurements.create(edit.kind, edit.image_shape)(rows)
  if codec.levels is None and measurement:
    apply = measurement.apply  # to the picture that latents are decoded to
    measurement = measurement._replace(
      apply=lambda z: apply(pixels.to_float(codec.decode(params, z, decoding)))
    )
  elif codec.levels is None:
    known = codec.encode(params, {'image': (known + 1) * 127.5}, decoding)
  if 'strength' in rows:
    given['t0'] = rows['strength'] * schedule.num_timesteps - 1
  bound = codec.bound if how.clip else None
  made = methods.create(
    edit.method, denoiser, schedule, measurement, known, bound=bound,
    **edit.options, **given,
  )  # fmt: skip
  x = made.start(noise.normal(first, shape, jnp.float32), how.grid[0])
  x0 = solve(made.sampler, made.denoiser, schedule, how.grid, x, later)
  data = draw.in_groups(codec, params, x0, decoding, mesh)
  axes = tuple(range(1, data.ndim))
  finite = jnp.isfinite(data).all(axes) & jnp.isfinite(x0).all(axes)
  if 'mask' in rows:
    exact = (rows['mask'] > 0) & (rows['noise'] == 0).reshape(-1, 1, 1, 1)
    data = jnp.where(exact, (rows['measured'] + 1) * 127.5, data)
  return Answers(draw.ROUNDED['uint8'](data), finite)


def residuals(edit: Edit, given: dict, images: np.ndarray) -> np.ndarray:
  """How far answers are from what is known.

  Args:
    edit: the plan.
    given: a result of `rows`, one row for each answer.
    images: uint8 [N, H, W, C], the answers.

  Returns:
    float [N], the root mean square of y - A x over what is known, in levels of
    255; that of the noise alone is its level. Of a picture that samples only
    start from, that of the difference to it.
  """
  made = measurements.create(edit.kind or {'name': 'denoise'}, edit.image_shape)
  given = {name: jnp.asarray(given[name]) for name in given}
  off = made(given).apply(pixels.to_float(images)) - given['measured']
  seen = jnp.broadcast_to(given.get('mask', 1.0), off.shape)
  axes = tuple(range(1, off.ndim))
  mean = (jnp.square(off) * seen).sum(axes) / seen.sum(axes)
  return 127.5 * np.sqrt(np.asarray(mean, np.float64))


def answer(
  trained, edit: Edit, given: dict, indices: np.ndarray, batch_size: int
) -> Answers:
  """Draws answers.

  Args:
    trained: the network, a `Trained`.
    edit: the plan.
    given: a result of `rows`, one row for each answer.
    indices: [N], the number of each answer.
    batch_size: answers drawn at once.

  Raises:
    UserError: an answer is not finite.
  """
  how, texts = prompts.tables(trained.workdir, trained.config, edit.plan)
  run = program(trained, edit._replace(plan=how))
  given = {**given, 'index': np.asarray(indices, np.uint32)}
  size = sharding.rounded(min(batch_size, len(indices)), trained.mesh)
  found = sharding.in_batches(
    lambda part: run(trained.all_params, part, texts),
    given, size, trained.mesh,
  )  # fmt: skip
  draw.checked(found, found.finite.all())
  return found


def edit(
  trained,
  images: np.ndarray,
  measurement: str | Mapping | None,
  *,
  method: str | None = None,
  samples: int = 1,
  batch_size: int = 64,
  noise: float | np.ndarray | None = 0.0,
  mask: np.ndarray | None = None,
  strength: float | None = None,
  **options,
) -> np.ndarray:
  """Answers what is known of pictures.

  Args:
    trained: the network, a `Trained`.
    images: what is known, [N, ...] in [0, 255]: whole pictures; of 'upscale'
      small ones, of 'colourise' grey ones with one channel.
    measurement: 'inpaint', 'colourise', 'denoise'; {'name': 'upscale',
      'factor': 2, 'by': 'mean'}, {'name': 'deblur', 'kernel': [[...]]}, see
      `editing.measurements` and `editing.kernels`; None to start from the
      pictures alone, with a strength (SDEdit).
    method: a key of `methods.ABOUT`, or 'mean' of 'denoise'; by default the
      usual one.
    samples: answers for each picture.
    batch_size: answers drawn at once.
    noise: the standard deviation of noise in the images, in levels of 255; of
      all or of each, [N]; None = estimated.
    mask: of 'inpaint', [N, H, W], 1 where the picture is known.
    strength: without a measurement, how far to noise pictures, above 0 and at
      most 1.
    **options: see `plan`.

  Returns:
    uint8 [N, samples, H, W, C]. An answer depends on what is known, the seed
    and its number, not on the batch.

  Raises:
    UserError: see `plan` and `rows`, or answers that are not finite.
  """
  if isinstance(measurement, str):
    measurement = {'name': measurement}
  kind = measurements.plain(measurement)
  images = np.asarray(images)
  if images.ndim != 4 or not len(images):
    raise UserError(
      f'images have the shape {list(images.shape)}: give [N, H, W, C]'
    )
  if type(samples) is not int or samples < 1:
    raise UserError(f'samples={samples}: at least 1')
  height, width, _ = images.shape[1:]
  factor = measurements.factor_of(kind)
  shape = height * factor, width * factor, trained.image_shape[-1]
  made = plan(trained, kind, shape, method=method, **options)
  if samples > 1 and (made.method, made.evaluations) == ('denoise', 1):
    raise UserError(
      f"samples={samples}: the mean is one answer; give method='denoise'"
    )
  found = rows(made, images, noise, mask, strength)
  pairs = np.indices((len(images), samples)).reshape(2, -1)
  given = {name: x[pairs[0]] for name, x in found.items()}
  answers = answer(trained, made, given, pairs[1], batch_size).images
  return answers.reshape(len(images), samples, *shape)
