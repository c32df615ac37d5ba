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
from diffusion_jax.runs import dataset, finetune, frozen_text, kept_parts
from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint

AGAIN = kept_parts.AGAIN
OWN = 'tokenizer'  # the file of a run with one tokenizer
SET = ('ids', 'length', 'sha256')  # keys of conditioning that a start sets


class Encoder(NamedTuple):
  """A run's tokenizers, as the `encode_fn` of a source.

  Attributes:
    each: the name of a file, without its end -> a tokenizer. A text's ids by
      each of them stand side by side.
  """

  each: dict[str, tokenizers.Tokenizer]

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    return self.encode(texts).ids

  def encode(self, texts: Sequence[str]) -> tokenizers.Tokens:
    """The ids of texts by all tokenizers; what is cut is that of the first."""
    found = [one.encode(texts) for one in self.each.values()]
    ids, mask = (
      np.concatenate([getattr(one, name) for one in found], axis=1)
      for name in ('ids', 'mask')
    )
    return tokenizers.Tokens(ids, mask, found[0].cut)

  @property
  def length(self) -> int:
    """The most tokens of a text, with start and end."""
    return next(iter(self.each.values())).length

  @property
  def sha256(self) -> str:
    """The hash of the tokenizers."""
    digests = [one.sha256 for one in self.each.values()]
    if len(digests) == 1:
      return digests[0]
    return hashlib.sha256('\n'.join(digests).encode()).hexdigest()


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
      if key in own and not config.conditioning.get(key):
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
    lambda: _tokenizers(config, workdir, splits[0], origin)
  )
  if len({*distributed.gather(made.sha256)}) > 1:
    raise UserError(
      'the tokenizers are not the same on all hosts: install the same version '
      'of the package tokenizers on all of them'
    )
  chosen = {'sha256': made.sha256}
  if not frozen_text.is_used(config):
    one = made.each[OWN]
    ids = {'bos': one.bos, 'eos': one.eos, 'pad': one.pad}
    chosen |= {'ids': ids, 'length': one.length}
  with config.unlocked():
    config.conditioning.update(ConfigDict(chosen))
  return tuple(one and captions.encoded(one, made) for one in splits)


def write(workdir, source: Source) -> None:
  """Writes the tokenizer into a run, unless it is there.

  Call it in all processes.

  Args:
    workdir: the run's folder.
    source: the training images, from `prepare`.
  """
  if not isinstance(source.encode_fn, Encoder):
    return
  save(workdir, source.encode_fn)


def save(workdir, encoder: Encoder) -> None:
  """Writes tokenizers into a run, see `write`."""
  folder = files.at(workdir) / kept_parts.FOLDER

  def put():
    for name, made in encoder.each.items():
      path = files.make(folder) / f'{name}.json'
      if not path.exists() or path.read_bytes() != made.content.encode():
        tokenizers.write(path, made)

  distributed.on_first(put)


def kept(workdir, config: Mapping) -> Encoder:
  """The tokenizers that a run has kept.

  Args:
    workdir: the run's folder.
    config: its config.

  Raises:
    UserError: they are missing, or not what was saved.
  """
  folder = files.at(workdir) / kept_parts.FOLDER
  names = [OWN]
  if frozen_text.is_used(config):
    parts = sorted(config['conditioning']['encoders'])
    names = [frozen_text.FOLDERS[part][1] for part in parts]
  paths = {name: folder / f'{name}.json' for name in names}
  # Damaged files are not read.
  digests = [
    hashlib.sha256(files.content(path, AGAIN)).hexdigest()
    for path in paths.values()
  ]
  whole = digests[0]
  if len(digests) > 1:
    whole = hashlib.sha256('\n'.join(digests).encode()).hexdigest()
  if whole != config['conditioning']['sha256']:
    given = ' or '.join(map(str, paths.values()))
    raise UserError(f'{given} is not what was saved: {AGAIN}')
  return Encoder({n: tokenizers.read(path) for n, path in paths.items()})


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


def _tokenizers(config, workdir, source, origin) -> Encoder:
  """The tokenizers of a start."""
  options = config['conditioning']
  if workdir and checkpoint.steps(files.at(workdir) / 'checkpoints'):
    return kept(workdir, config)
  if frozen_text.is_used(config):
    made = of_path(options['path'], options)
    _say_cut(made, _some(source))
    return made
  length = options['length'] or None
  texts = _some(source)
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
  made = Encoder({OWN: made})
  _say_cut(made, texts)
  return made


def of_path(path, conditioning: Mapping) -> Encoder:
  """The tokenizers of text encoders that are not trained.

  Args:
    path: the folder or run of the encoders.
    conditioning: the config's group, completed.
  """
  encoders = conditioning['encoders']
  return Encoder(
    {
      frozen_text.FOLDERS[part][1]: frozen_text.tokenizer_of(
        path, part, encoders[part]
      )
      for part in sorted(encoders)
    }
  )


def _some(source) -> list[str]:
  """Captions of a source, evenly spaced."""
  count = min(len(source), captions.DESCRIBED)
  each = captions.of(source, np.arange(count) * len(source) // count)
  return [text for several in each for text in several]


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
  own = place / kept_parts.FOLDER / tokenizers.FILE
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
