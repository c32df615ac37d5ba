"""Runs that train an autoencoder: their parts, and reconstructions."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax import conditioning, models, objectives, runs
from diffusion_jax.codecs import Codec, dito, latents, pixels
from diffusion_jax.codecs.autoencoder import of_coder
from diffusion_jax.data import Source
from diffusion_jax.models import autoencoder, bottleneck, critic
from diffusion_jax.objectives import autoencoding
from diffusion_jax.objectives import dito as dito_objective
from diffusion_jax.process import schedules
from diffusion_jax.system import distributed
from diffusion_jax.training import sharding

PART = autoencoding.CODEC
# A codebook has collapsed if the perplexity is below this share of its codes.
COLLAPSED = 0.02
EARLY = 200  # steps in which it need not be found yet


def coder_of(config: Mapping) -> autoencoder.Coder:
  """The autoencoder of a run's config."""
  return latents.coder_of(runs.image_shape(config['data']), config['codec'])


def create(config: Mapping, frozen: Mapping, origins: Mapping) -> tuple:
  """The fields of the recipe of an autoencoder's run, see `recipe.Recipe`.

  Args:
    config: the run's config.
    frozen: name -> parameters of each part that is not trained.
    origins: name -> where it comes from.
  """
  create_parts = _dito if config['loss']['name'] == objectives.DITO else _plain
  schedule = schedules.create(**config['process'])
  parts, codec, objective = create_parts(config)
  return (
    parts, frozen, origins, codec, conditioning.none(), schedule, None,
    objective,
  )  # fmt: skip


def _plain(config):
  """Parts, codec and objective of an autoencoder with a decoder."""
  coder, shape = coder_of(config), runs.image_shape(config['data'])
  loss = {k: config['loss'][k] for k in config['loss'] if k != 'name'}
  del loss['lpips_path'], loss['lpips_sha256']
  channels, strides = loss.pop('critic_channels'), loss.pop('critic_strides')
  parts, judge = {PART: coder}, None
  if loss['critic_weight']:
    judge = critic.create(
      shape, channels, strides, dtype=config['codec']['dtype']
    )
    parts[autoencoding.CRITIC] = judge
  objective = autoencoding.create(coder, pixels.create(shape), judge, **loss)
  return parts, of_coder(coder, shape), objective


def _dito(config):
  """Parts, codec and objective of a diffusion autoencoder."""
  coder, shape = coder_of(config), runs.image_shape(config['data'])
  made = dito.create(shape, coder.shape[-1], config)
  told = ('name', 'prediction', 'level', 'decode_steps')
  loss = {k: x for k, x in config['loss'].items() if k not in told}
  objective = dito_objective.create(
    made.network_fn, coder, pixels.create(shape), made.schedule,
    prediction=made.prediction, **loss,
  )  # fmt: skip
  parts = {models.NET: made.network, PART: coder}
  return parts, of_coder(coder, shape, made.decode), objective


# --- reconstructions ----------------------------------------------------------


def reconstructor(codec: Codec, mesh: Mesh, seed: int = 0) -> Callable:
  """Returns a function that encodes and decodes images, to be jitted.

  Args:
    codec: that of the run.
    mesh: the devices.
    seed: of the noise of decoders that need any.

  Returns:
    (params of all parts, indices [B], images uint8 [B, H, W, C]) ->
    (uint8 [B, H, W, C], whether all are finite). The noise of an image depends
    on its index only.
  """

  def reconstruct(params, indices, images):
    params = sharding.gather_fsdp(params, mesh)
    root = jax.random.key(seed)
    keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(indices)
    x0 = codec.encode(params, {'image': images}, keys)
    data = codec.decode(params, x0, keys)
    # x0, too: some decoders make any numbers finite.
    is_finite = jnp.isfinite(x0).all() & jnp.isfinite(data).all()
    return jnp.round(data).astype(jnp.uint8), is_finite

  return reconstruct


def counter(config: Mapping) -> Callable | None:
  """Returns a function that counts the codes of images.

  Args:
    config: the run's config.

  Returns:
    (params of all parts, images uint8 [B, H, W, C], whether each counts [B]) ->
    [codes]; None for an autoencoder without codes.
  """
  coder = coder_of(config)
  if not coder.codes:
    return None

  def count(params, images, counts):
    found = coder.encode(params[PART], pixels.to_float(images))
    index = coder.index_of(params[PART], found)
    return bottleneck.histogram(index, coder.codes, counts[:, None, None])

  return count


def examples(source: Source, count: int, mesh: Mesh) -> tuple:
  """Images of a set, evenly spaced, to be reconstructed.

  Args:
    source: the images.
    count: how many, at most all; rounded down to the mesh, if it is larger.
    mesh: the devices.

  Returns:
    (indices uint32 [N], images uint8 [N, H, W, C]), global arrays.
  """
  count, parts = (
    min(count, len(source)),
    mesh.shape['data'] * mesh.shape['fsdp'],
  )
  count = max(count // parts, 1) * parts
  chosen = np.arange(count) * len(source) // count
  images = np.stack([source[int(i)]['image'] for i in chosen])
  return sharding.put_batch((chosen.astype(np.uint32), images), mesh)


class Watch:
  """Says once that the codebook of a run has collapsed.

  Args:
    codec: the config's group of this name.
    say: text -> None.
  """

  def __init__(self, codec: Mapping, say: Callable):
    self._codec, self._say, self._said = codec, say, False

  def look(self, step: int, row: Mapping) -> None:
    """Looks at the metrics of a step, {} for none."""
    line = collapsed(step, row, self._codec)
    if line and not self._said and distributed.is_first():
      self._said = True
      self._say(line)


def collapsed(step: int, row: Mapping, codec: Mapping) -> str | None:
  """What to say if the metrics of a step show that a codebook has collapsed.

  Args:
    step: the step.
    row: its metrics.
    codec: the config's group of this name.
  """
  used = row.get('perplexity')
  if used is None or step < EARLY:
    return None
  is_book = codec['regulariser'] == 'vq'
  codes = codec['codes'] if is_book else math.prod(codec['levels'])
  if used >= max(COLLAPSED * codes, 2):
    return None
  remedy = 'a lower optim.lr, or fewer codec.levels'
  if is_book:
    remedy = (
      'a lower optim.lr, fewer codec.codes, a larger loss.revive, or '
      'codec.regulariser=fsq'
    )
  return (
    f'the codebook has collapsed: at step {step} its perplexity is {used:.1f} '
    f'of {codes} codes: use {remedy}'
  )
