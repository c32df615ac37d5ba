"""Draws samples by seed and index.

A sample is identified by (run, seed, index). Its random keys depend only on
seed and index, so its noise is bitwise the same in any batch, on any mesh and
in any order.
"""

import functools
import json
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.codecs import Codec
from diffusion_jax.conditioning import low_resolution
from diffusion_jax.guidance import clipping
from diffusion_jax.models.control import Control
from diffusion_jax.process import noise
from diffusion_jax.runs import guided
from diffusion_jax.runs.recipe import Recipe
from diffusion_jax.samplers.plan import Plan
from diffusion_jax.samplers.solve import solve
from diffusion_jax.system.errors import UserError, one_of
from diffusion_jax.training import sharding

# Numbers that `solve` never folds in.
DECODING, LABEL, PICTURE = 2**32 - 1, 2**32 - 2, 2**32 - 3


def sample_keys(seed: int, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The random keys of samples: for the initial noise and for the sampler.

  Training keys are derived from fold_in(seed, 0), sample keys from
  fold_in(seed, 1): split and fold_in of the same key can give the same
  children, so sharing a root would share noise.

  Args:
    seed: the seed of the samples.
    indices: [B] uint32, the indices of the samples.

  Returns:
    (first [B], later [B]). The initial noise of a sample is
    jax.random.normal(first[b], image_shape); `later` is passed to `solve`.
  """
  root = jax.random.fold_in(jax.random.key(seed), 1)

  def keys(index):
    return jax.random.split(jax.random.fold_in(root, index))

  pairs = jax.vmap(keys)(indices)
  return pairs[:, 0], pairs[:, 1]


def indices_of(num_samples: int, first: int, batch_size: int) -> np.ndarray:
  """The indices of samples: uint32 [num_samples], from `first` on.

  Raises:
    UserError: a number is out of range.
  """
  for name, value, least in (
    ('num_samples', num_samples, 1), ('first', first, 0),
    ('batch_size', batch_size, 1),
  ):  # fmt: skip
    if value < least:
      raise UserError(f'{name}={value}: at least {least}')
  if first + num_samples > 2**32:
    raise UserError(f'first={first}: first + num_samples is at most 2**32')
  return np.arange(first, first + num_samples, dtype=np.uint32)


def conditions(
  plan: Plan, indices: jax.Array, texts: dict | None = None
) -> dict[str, jax.Array]:
  """The data that the conditions of samples are computed from.

  Args:
    plan: the sampling plan.
    indices: [B] uint32, the indices of the samples.
    texts: 'tokens' int32 [P, length] of prompts, which samples get in turn by
      index, and perhaps 'negative' [1, length], of the negative prompt.

  Returns:
    {'label': int32 [B]}, or {} without a condition. A label depends on the
    plan's seed and the sample's index only. With texts also 'tokens' [B,
    length] and 'negative'.
  """
  if texts:
    table = jnp.asarray(texts['tokens'])
    given = {**texts, 'tokens': table[indices % len(table)]}
    return {**conditions(plan, indices), **given}
  asked = plan.condition.get('label')
  if asked is None:
    return {}
  if asked != 'data':
    return {'label': jnp.asarray(asked, jnp.int32)[indices % len(asked)]}
  bounds = np.cumsum(plan.condition['label_counts'])

  def chance(key):
    key = jax.random.fold_in(key, LABEL)
    return jax.random.randint(key, (), 0, int(bounds[-1]))

  _, later = sample_keys(plan.seed, indices)
  found = jnp.searchsorted(
    jnp.asarray(bounds, jnp.int32), jax.vmap(chance)(later), side='right'
  )
  return {'label': found.astype(jnp.int32)}


# The output dtypes: rounded to 8 bits, or as decoded.
ROUNDED = {
  'uint8': lambda data: jnp.round(data).astype(jnp.uint8),
  'float32': lambda data: data,
}


def drawer(
  recipe: Recipe,
  mesh: Mesh,
  plan: Plan,
  *,
  frames: tuple[int, ...] = (),
  dtype: str | None = None,
  took: bool = False,
  estimates: bool = False,
  guide: Recipe | None = None,
  classifier: Recipe | None = None,
) -> Callable:
  """Returns a function that draws samples, to be jitted.

  Args:
    recipe: the run's recipe.
    mesh: the devices.
    plan: the sampling plan; x0 is clipped to the codec's bound, if any.
    frames: steps at which to keep x, see `solve`.
    dtype: dtype of the data: 'uint8', rounded, or 'float32', as decoded; by
      default 'uint8' for 8-bit images and 'float32' for other data.
    took: whether to also return the cost of each sample, for samplers that
      choose their own steps.
    estimates: whether frames are estimates of x0 in place of x, at one more
      evaluation each (arXiv 2006.11239, section 4.3); x for clean data.
    guide: the recipe of a network that guides, see `guided.denoiser`.
    classifier: the recipe of a classifier that guides.

  Returns:
    draw(params, indices [B], rows={}, texts=None) -> (data [B, ...], whether
    finite). `params` holds all parts, and `rows` the data that a condition is
    computed from, beside and before those of `conditions`. With `frames`, the
    data are a pair of them and [F, B, ...]; with `took`, of them and
    `adaptive.Took`.

  Raises:
    UserError: an unknown dtype, or one that does not fit the data.
  """
  codec, schedule = recipe.codec, recipe.schedule
  dtype = _dtype(dtype, codec)
  sampler, grid = plan.create(), plan.grid

  def draw(params, indices, rows=None, texts=None):
    first, later = sample_keys(plan.seed, indices)
    rows = _given(rows, conditions(plan, indices, texts), later)
    params = recipe.whole(params, mesh)
    denoiser = guided.denoiser(
      recipe, params, rows, plan.guidance, mesh, guide, classifier
    )
    if plan.clip and codec.bound is not None:
      denoiser = clipping.clip_x0(denoiser, schedule, codec.bound)
    decoding = _folded(later, DECODING)

    def decode(x0):
      data = in_groups(codec, params, x0, decoding, mesh)
      # Clipping and rounding would hide what is not finite.
      finite = jnp.isfinite(x0).all() & jnp.isfinite(data).all()
      return ROUNDED[dtype](data), finite

    x = noise.normal(first, codec.shape, jnp.float32)
    if took:
      x0, counts = sampler.run(denoiser, schedule, x)
      data, is_finite = decode(x0)
      return (data, counts), is_finite
    out = solve(sampler, denoiser, schedule, grid, x, later, frames)
    if not frames:
      return decode(out)
    x, kept = out
    if estimates:
      # Clean data, which can only be the last frame, needs no estimate.
      times = jnp.array([grid[k] for k in frames if grid[k] >= 0], x.dtype)
      noised, clean = jnp.split(kept, [len(times)])
      guesses = jax.lax.map(lambda frame: denoiser(*frame).x0, (noised, times))
      kept = jnp.concatenate([guesses, clean])
    data, is_finite = decode(x)
    shown, are_finite = jax.lax.map(decode, kept)
    return (data, shown), is_finite & are_finite.all()

  return draw


def _given(rows, others, later) -> dict:
  """All rows, with the keys of the noise of pictures if they get any."""
  found = {**others, **(rows or {})}
  if low_resolution.NOISE in found:
    found[low_resolution.KEYS] = _folded(later, PICTURE)
  return found


def _folded(keys, number):
  return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def _dtype(asked, codec: Codec) -> str:
  """The dtype of data that `drawer` is asked for, or its default."""
  known = ROUNDED if codec.eight_bits else {'float32': ROUNDED['float32']}
  if isinstance(asked, type | np.dtype):  # such as np.uint8
    asked = np.dtype(asked).name
  return one_of('dtype', asked or next(iter(known)), known)


class Compiled(NamedTuple):
  """The compiled functions of a network, for parameters of any checkpoint.

  Attributes:
    denoise: (params, xt, t, cond) -> Denoised.
    drawer: (a plan as JSON, **options) -> draw, see `drawer`.
    controlled: a ControlNet -> the functions of the network with it.
    edits: what `edits.program` has compiled.
  """

  denoise: Callable
  drawer: Callable
  controlled: Callable
  edits: dict


def compiled(recipe: Recipe, mesh: Mesh, **others: Recipe) -> Compiled:
  """The functions of a network; each is compiled when it is called first.

  Args:
    recipe: the run's recipe.
    mesh: the devices.
    **others: the recipes of networks that guide, see `drawer`.
  """

  @jax.jit
  def denoise(params, xt, t, cond):
    cond = {**recipe.conditioner.condition(params, {}, None), **cond}
    return recipe.denoiser(params, cond, mesh)(xt, t)

  # Cached, so that a second call of `sample` does not compile again.
  @functools.lru_cache(maxsize=8)
  def of_plan(plan, **options):
    how = Plan(*json.loads(plan))
    return jax.jit(drawer(recipe, mesh, how, **others, **options))

  # Cached, so that another picture or scale does not compile again.
  @functools.lru_cache(maxsize=8)
  def controlled(control: Control):
    made = recipe._replace(controls=(*recipe.controls, control))
    return compiled(made, mesh, **others)

  return Compiled(denoise, of_plan, controlled, {})


def in_groups(codec: Codec, params, x0, keys, mesh: Mesh):
  """Decodes x0, by groups of `codec.decode_rows` on each device.

  So a decoder takes no more memory than the network. To be called inside jit.

  Args:
    codec: the codec.
    params: all parts.
    x0: [B, ...].
    keys: [B] random keys.
    mesh: the devices.
  """
  if codec.decode_rows is None:
    return codec.decode(params, x0, keys)
  # Otherwise XLA splits the decoder's channels in place of the images, which
  # then are all on each device. It removes gathers of parts that are not read.
  params = sharding.gather_fsdp(params, mesh)
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  rows, left = divmod(len(x0), parts)
  if left or rows <= codec.decode_rows:
    return codec.decode(params, x0, keys)
  groups = next(
    n for n in range(-(-rows // codec.decode_rows), rows + 1) if not rows % n
  )
  pieces = sharding.split_batch((x0, keys), groups, mesh)
  data = jax.lax.map(lambda piece: codec.decode(params, *piece), pieces)
  return sharding.join_batch(data, mesh)


def checked(data, is_finite):
  """Returns drawn data if they are finite.

  Args:
    data: any.
    is_finite: a scalar, whether x0 and the data were finite before rounding.

  Raises:
    UserError: they were not, and would be black or white pixels.
  """
  if not is_finite:
    raise UserError(
      'the samples have pixels that are not finite: use another checkpoint, '
      'more sampling steps, or clipping'
    )
  return data
