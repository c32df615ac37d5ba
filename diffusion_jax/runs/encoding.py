"""Encoding of a data set by a frozen autoencoder, into a folder or a batch."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax import runs
from diffusion_jax.codecs import latents
from diffusion_jax.data import latents as cache
from diffusion_jax.data import pipeline
from diffusion_jax.data.sources import Source
from diffusion_jax.models.autoencoder import Coder
from diffusion_jax.runs import frozen_codec, kept_parts
from diffusion_jax.runs.dataset import Splits
from diffusion_jax.system import distributed, files, numerics
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checksum, loop, sharding

BATCH = 64  # images encoded at once
SPLITS = ('train', 'test')  # names of sub-folders


def coder_of(config) -> Coder:
  """The autoencoder of a run in latents."""
  shape = runs.image_shape(config['data'])
  return latents.coder_of(shape, config['codec']['coder'])


def fingerprint(params) -> str:
  """What identifies the weights of an autoencoder, without shift and scale.

  Args:
    params: the frozen parts, on any mesh.
  """
  own = {frozen_codec.CODEC: params[frozen_codec.CODEC]}
  sums = checksum.of(own)
  own = {
    name: sums[name] for name in sorted(sums) if frozen_codec.is_weight(name)
  }
  return hashlib.sha256(json.dumps(own).encode()).hexdigest()


def batches(source: Source, mesh: Mesh, size: int = BATCH) -> Iterator:
  """(rows, weight) of a source in order, as global arrays, padded."""
  where = sharding.batch_sharding(mesh)
  size = sharding.rounded(min(size, len(source)), mesh)
  rows = pipeline.local_rows(where, size)
  local = pipeline.heldout(source, batch_size=size, rows=rows)
  while one := loop.read_together(local):
    yield pipeline.put_rows(one, where, size)


def size_of(coder: Coder) -> int:
  """m, the channels of the encoder's output: of 'kl' twice those of z."""
  return coder.shape[-1] * (1 + (coder.regulariser == 'kl'))


@functools.lru_cache(maxsize=2)
def _encoder(coder: Coder, copies: int):
  @jax.jit
  def encode(params, rows):
    images = [rows['image'], rows['image'][:, :, ::-1]][:copies]
    return jnp.stack(
      [latents.moments_of(coder, params, {'image': x}) for x in images], axis=1
    )

  return encode


@numerics.fixed()
def encoded(
  coder: Coder, params, source: Source, indices: Sequence[int], mesh: Mesh,
  batch_size: int = BATCH, copies: int = 1,
) -> np.ndarray:  # fmt: skip
  """The encoder's output: float32 [N, copies, h, w, m], in every process.

  Args:
    coder: the autoencoder.
    params: the frozen parts.
    source: the images.
    indices: N of them.
    mesh: the devices.
    batch_size: images encoded at once.
    copies: 1, or 2 for mirror images, too.
  """
  encode = _encoder(coder, copies)
  found = [
    sharding.to_host(encode(params, rows))
    for rows, _ in batches(some(source, indices), mesh, batch_size)
  ]
  return np.concatenate(found)[: len(indices)]


def some(source: Source, indices: Sequence[int]) -> Source:
  """A source of some of the images."""
  return dataclasses.replace(
    source,
    num_images=len(indices),
    read_fn=lambda i: source.read_fn(indices[i]),
    contents=None,
    label_fn=None,
    caption_fn=None,
    encode_fn=None,
  )


def write(
  config, splits: Splits, parts: kept_parts.Frozen, mesh: Mesh, output,
  batch_size: int = BATCH, tell: Callable = lambda count: None,
) -> int:  # fmt: skip
  """Writes the latents of a data set, see `data.latents`.

  Files that are there and whole are kept. Call it in all processes.

  Args:
    config: a config in latents, completed.
    splits: its images.
    parts: its frozen parts.
    mesh: the devices.
    output: the folder.
    batch_size: images encoded at once.
    tell: called with the number of images that have just been done.

  Returns:
    The number of files written.

  Raises:
    UserError: the folder holds latents of others.
  """
  coder = coder_of(config)
  named = [(n, s) for n, s in zip(SPLITS, splits, strict=True) if s]
  copies = {'train': 1 + config['data']['flip'], 'test': 1}
  about = {
    'weights': fingerprint(parts.params),
    'from': parts.origins[frozen_codec.CODEC],
    'shape': [*coder.shape[:-1], size_of(coder)],
    'per_file': cache.PER_FILE,
    'splits': {
      name: {'images': source.identity, 'copies': copies[name]}
      for name, source in named
    },
  }
  hashes = distributed.on_first(lambda: _begin(output, about))
  written, known = 0, {}
  for name, source in named:
    for first, end in cache.bounds(len(source), cache.PER_FILE):
      file = f'{name}/{cache.name_of(first, end)}'
      path = files.at(output) / file
      there = distributed.on_first(lambda path=path: cache.sha256_of(path))
      if not there or hashes.get(file, there) != there:
        found = encoded(
          coder, parts.params, source, range(first, end), mesh, batch_size,
          copies[name],
        )  # fmt: skip
        there = distributed.on_first(
          lambda path=path, found=found: cache.write(path, found)
        )
        written += 1
      known[file] = there
      tell(end - first)
  whole = {**about, 'files': known}
  distributed.on_first(lambda: cache.write_about(output, whole))
  return written


def _begin(output, about) -> dict:
  """Writes latents.json; returns the hashes of the files of an earlier job."""
  before = cache.read_about(output)
  if before is None:
    cache.write_about(output, about)
    return {}
  for key, what in (
    ('weights', 'other weights'),
    ('shape', 'another shape'),
    ('per_file', 'another version of this program'),
    ('splits', 'other images, or with another data.flip'),
  ):
    if before[key] != about[key]:
      raise UserError(
        f'--output={output} holds latents of {what} ({before["from"]}): encode '
        'into a new folder'
      )
  return before.get('files', {})
