"""Encodes the captions of a run's images once, for frozen text encoders."""

import hashlib
import json
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.conditioning import frozen_text as conditioning
from diffusion_jax.data import captions, latents
from diffusion_jax.data import encoded_captions as cache
from diffusion_jax.runs import frozen_text, kept_parts
from diffusion_jax.runs.dataset import Splits
from diffusion_jax.system import distributed, files, numerics
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checksum, sharding

BATCH = 64  # captions encoded at once
OTHER = {
  'weights': 'text encoders',
  'tokenizers': 'tokenizers',
  'captions': 'captions',
}


def cached(config, splits: Splits, parts: kept_parts.Frozen) -> Splits:
  """The splits with encodings from conditioning.cache.

  Args:
    config: the run's config.
    splits: the training images and the held-out ones, with tokens.
    parts: the frozen parts.

  Raises:
    UserError: there are no such encodings, or of other captions or encoders.
  """
  folder = config['conditioning']['cache']
  about, given = cache.read_about(folder), f'conditioning.cache={folder}'
  if about is None:
    raise UserError(
      f'{given} holds no encoded captions: write them with python -m '
      'diffusion_jax.encode --captions'
    )
  now = _about(config, splits, parts)
  for key, what in OTHER.items():
    if about[key] != now[key]:
      raise UserError(
        f'{given} is of other {what} than those of the run: encode into a new '
        'folder, or leave conditioning.cache out'
      )
  rows = cache.opened(folder, about)
  return tuple(one and captions.with_rows(one, rows) for one in splits)


def tokens_of(splits: Splits) -> np.ndarray:
  """The tokens of all captions, each once: int32 [N, length], sorted."""
  each = [captions.all_tokens(one)['ids'] for one in splits if one]
  return np.unique(np.concatenate(each), axis=0)


@numerics.fixed()
def write(
  config, splits: Splits, all_tokens: np.ndarray, parts: kept_parts.Frozen,
  mesh: Mesh, output, tell: Callable = lambda count: None,
) -> int:  # fmt: skip
  """Writes the encodings of all captions, see `data.encoded_captions`.

  Files that are there and whole are kept. Call it in all processes.

  Args:
    config: the config, completed.
    splits: the images, with tokens.
    all_tokens: from `tokens_of`.
    parts: the frozen parts.
    mesh: the devices.
    output: the folder.
    tell: called with the number of captions that have just been done.

  Returns:
    The number of files written.

  Raises:
    UserError: the folder holds encodings of others.
  """
  options = config['conditioning']
  encode = jax.jit(
    conditioning.encoder(
      options['encoders'], options['ids'], options['masked'],
      options['size_features'],
    )
  )  # fmt: skip
  of = jax.eval_shape(encode, parts.params, all_tokens[:1])
  shapes = {name: list(x.shape[1:]) for name, x in of.items()}
  about = {**_about(config, splits, parts), 'shapes': shapes}
  hashes = distributed.on_first(lambda: _begin(output, about))
  known = {}

  def keep(name, make):
    """Writes a file unless it is there and whole; whether it was written."""
    path = files.at(output) / name
    there = distributed.on_first(lambda: latents.sha256_of(path))
    is_new = not there or hashes.get(name, there) != there
    if is_new:
      made = make()
      there = distributed.on_first(lambda: latents.write(path, made))
    known[name] = there
    return is_new

  def of_span(first, end):
    found = sharding.in_batches(
      lambda rows: encode(parts.params, rows), all_tokens[first:end],
      sharding.rounded(min(BATCH, end - first), mesh), mesh,
    )  # fmt: skip
    flat = [np.reshape(found[name], (end - first, -1)) for name in shapes]
    return np.concatenate(flat, axis=1).astype(np.float32)

  written = keep(cache.TOKENS, lambda: all_tokens)
  for first, end in latents.bounds(len(all_tokens), latents.PER_FILE):
    name = latents.name_of(first, end)
    written += keep(name, lambda first=first, end=end: of_span(first, end))
    tell(end - first)
  whole = {**about, 'files': known}
  distributed.on_first(
    lambda: files.write_json(files.at(output) / cache.ABOUT, whole)
  )
  return written


def _about(config, splits, parts) -> dict:
  """What identifies encodings: the content of captions.json without files."""
  own = {name: parts.params[name] for name in frozen_text.abstract(config)}
  sums = json.dumps(checksum.of(own), sort_keys=True)
  return {
    'weights': hashlib.sha256(sums.encode()).hexdigest(),
    'tokenizers': config['conditioning']['sha256'],
    'captions': [
      captions.describe(one)['sha256'] if one else None for one in splits
    ],
  }


def _begin(output, about) -> dict:
  """Writes captions.json; returns the hashes of the files of an earlier job."""
  before = cache.read_about(output)
  if before is None:
    files.make(files.at(output))
    empty = {**about, 'files': {}}
    files.write_json(files.at(output) / cache.ABOUT, empty)
    return {}
  for key, what in OTHER.items():
    if before[key] != about[key]:
      raise UserError(
        f'--output={output} is of other {what}: encode into a new folder'
      )
  return before['files']
