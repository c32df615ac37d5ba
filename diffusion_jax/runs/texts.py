"""What a run with captions does before training: its tokenizer.

A small tokenizer is trained on the captions of the run, or one is taken from a
folder, or from the run whose parameters training starts from. The run keeps it
as parts/tokenizer.json; its hash and the ids of its special tokens are in
config.json.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import runs
from diffusion_jax.conditioning import tokenizers
from diffusion_jax.data import captions
from diffusion_jax.data.sources import Source
from diffusion_jax.runs import dataset, finetune
from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint

FOLDER = 'parts'
AGAIN = 'copy the folder parts/ from a backup, or train in a new workdir'
SET = ('ids', 'length', 'sha256')  # keys of conditioning that a start sets


class Encoder(NamedTuple):
  """A tokenizer as the `encode_fn` of a source."""

  tokenizer: tokenizers.Tokenizer

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    return self.tokenizer.encode(texts).ids


def complete(config: ConfigDict, workdir=None) -> None:
  """Sets what a run with captions has found out when it began, in place.

  Args:
    config: the config of a run.
    workdir: the run's folder, new or existing, or None.
  """
  if not (workdir and dataset.has_captions(config['conditioning'])):
    return
  if not checkpoint.steps(files.at(workdir) / 'checkpoints'):
    return
  own = runs.read_config(workdir)['conditioning']
  if not dataset.has_captions(own):
    return
  with config.unlocked():
    for key in SET:
      # A length or hash that is given is compared with that of the run.
      if not config.conditioning.get(key):
        value = own[key]
        config.conditioning[key] = ConfigDict(value) if key == 'ids' else value


def prepare(
  config: ConfigDict,
  workdir,
  splits: dataset.Splits,
  origin: finetune.Origin | None = None,
) -> dataset.Splits:
  """The splits with tokens of captions; without captions, as they are.

  Call it in all processes. It sets keys of the config's conditioning, see SET.

  Args:
    config: the run's config.
    workdir: the run's folder, new or existing, or None.
    splits: the training images and the held-out ones, with captions.
    origin: the origin of the initial parameters. Its embeddings are those of
      its tokenizer, which is taken unless conditioning.tokenizer is set.

  Raises:
    UserError: there is no such tokenizer, or the run's is missing or damaged.
  """
  if not dataset.has_captions(config['conditioning']):
    return splits
  made = distributed.everywhere(
    lambda: _tokenizer(config, workdir, splits[0], origin)
  )
  if len({*distributed.gather(made.sha256)}) > 1:
    raise UserError(
      'the tokenizers are not the same on all hosts: install the same version '
      'of the package tokenizers on all of them'
    )
  chosen = {
    'ids': {'bos': made.bos, 'eos': made.eos, 'pad': made.pad},
    'length': made.length,
    'sha256': made.sha256,
  }
  with config.unlocked():
    config.conditioning.update(ConfigDict(chosen))
  encode = Encoder(made)
  return tuple(one and captions.encoded(one, encode) for one in splits)


def write(workdir, source: Source) -> None:
  """Writes the tokenizer into a run, unless it is there.

  Call it in all processes.

  Args:
    workdir: the run's folder.
    source: the training images, from `prepare`.
  """
  if not isinstance(source.encode_fn, Encoder):
    return
  made, folder = source.encode_fn.tokenizer, files.at(workdir) / FOLDER

  def put():
    path = files.make(folder) / tokenizers.FILE
    if not path.exists() or path.read_bytes() != made.content.encode():
      tokenizers.write(path, made)

  distributed.on_first(put)


def kept(workdir, config: Mapping) -> tokenizers.Tokenizer:
  """The tokenizer that a run has kept.

  Args:
    workdir: the run's folder.
    config: its config.

  Raises:
    UserError: it is missing, or not what was saved.
  """
  path = files.at(workdir) / FOLDER / tokenizers.FILE
  content = files.content(path, AGAIN)
  digest = hashlib.sha256(content).hexdigest()
  if digest != config['conditioning']['sha256']:
    raise UserError(f'{path} is not what was saved: {AGAIN}')
  return tokenizers.read(path)


def captions_of_grid(source: Source, count: int) -> list[str] | None:
  """What pictures of captions show; None without captions.

  Args:
    source: the images, whose captions are taken, evenly spaced.
    count: how many pictures.
  """
  if source.encode_fn is None:
    return None
  indices = np.arange(count) * len(source) // count
  return captions.chosen(source, indices, np.zeros(count, np.uint32))


def of_grid(source: Source, count: int) -> tuple:
  """Arguments of `draw` for pictures of captions; () without captions.

  Args:
    source: see `captions_of_grid`.
    count: how many pictures.
  """
  told = captions_of_grid(source, count)
  if told is None:
    return ()
  return None, {'tokens': np.asarray(source.encode_fn(told), np.int32)}


def _tokenizer(config, workdir, source, origin) -> tokenizers.Tokenizer:
  """The tokenizer of a start."""
  options = config['conditioning']
  if workdir and checkpoint.steps(files.at(workdir) / 'checkpoints'):
    return kept(workdir, config)
  length = options['length'] or None
  count = min(len(source), captions.DESCRIBED)
  each = captions.of(source, np.arange(count) * len(source) // count)
  texts = [text for several in each for text in several]
  path = options['tokenizer'] or _of_origin(origin)
  if path:
    made = tokenizers.read(_place(path), length)
  else:
    made = tokenizers.train(texts, options['vocabulary'], length)
  if made.size > options['vocabulary']:
    raise UserError(
      f'conditioning.vocabulary={options["vocabulary"]}: '
      f'conditioning.tokenizer={path} has {made.size} ids: set '
      f'conditioning.vocabulary={made.size}'
    )
  _say_cut(made, texts)
  return made


def _of_origin(origin) -> str | None:
  """The run that the parameters come from, if it has captions."""
  if origin is None:
    return None
  there = runs.read_config(origin.workdir)
  if not dataset.has_captions(there['conditioning']):
    return None
  kept(origin.workdir, there)
  terminal.say(
    f'the tokenizer is that of {origin.workdir}, to which its embeddings belong'
  )
  return origin.workdir


def _place(path):
  """A folder or file of a tokenizer; of a run its own."""
  place = files.at(path).expanduser()
  own = place / FOLDER / tokenizers.FILE
  return own if own.is_file() else place


def _say_cut(made, texts) -> None:
  """Says how many captions are longer than the context."""
  cut = []
  for start in range(0, len(texts), captions.AT_ONCE):
    part = texts[start : start + captions.AT_ONCE]
    cut += [(part[k], left) for k, left in made.encode(part).cut.items()]
  if cut:
    caption, left = cut[0]
    terminal.say(
      f'{len(cut):,} of {len(texts):,} captions are longer than '
      f'conditioning.length={made.length} tokens, and their ends are left out, '
      f'such as {left[:40]!r} of {caption[:60]!r}'
    )
