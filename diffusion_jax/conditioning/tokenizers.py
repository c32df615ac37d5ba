"""Tokenizers: captions -> rows of token ids, all of one length.

Byte-pair encoding as in CLIP (arXiv 2103.00020): Unicode NFC, white space
collapsed, lower case, split into words, digits and runs of other signs; the
bytes of each piece are merged, and its last token ends with `</w>`. HTML is not
unescaped and broken encodings are not repaired, as in pipelines of diffusers.

A tokenizer comes from a folder (`read`) or from the captions of a run
(`train`), and is kept as one file, a tokenizer.json of the library tokenizers,
which holds all of it: merges, length, and padding.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from diffusion_jax.system import errors, files
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights.settings import LARGEST, shown

FILE = 'tokenizer.json'
MERGES, VOCABULARY = 'merges.txt', 'vocab.json'
SETTINGS = 'tokenizer_config.json'
SPECIAL = 'special_tokens_map.json'  # older folders have these apart

BOS, EOS, PAD = '<|startoftext|>', '<|endoftext|>', '<|pad|>'
END = '</w>'  # of a word
LENGTH = 77  # CLIP's context
SHORTEST = 3  # a token between BOS and EOS
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
ADVICE = f'give a folder with {MERGES} or {FILE}, such as tokenizer/'


class Tokens(NamedTuple):
  """Texts as token ids.

  Attributes:
    ids: [N, length] int32: BOS, the tokens, EOS, and padding.
    mask: [N, length] bool, whether an id is not padding.
    cut: the number of each text that was too long -> the part left out.
  """

  ids: np.ndarray
  mask: np.ndarray
  cut: dict[int, str]


class Tokenizer(NamedTuple):
  """A tokenizer.

  Attributes:
    encode: texts -> Tokens.
    length: tokens of each text, with BOS, EOS and padding.
    size: the number of ids.
    bos: the id of the start.
    eos: the id of the end.
    pad: the id of padding; CLIP pads with `eos`.
    content: the content of its file, see `write`.
    sha256: the hash of `content`.
  """

  encode: Callable[[Sequence[str]], Tokens]
  length: int
  size: int
  bos: int
  eos: int
  pad: int
  content: str
  sha256: str


def train(
  captions: Sequence[str], size: int, length: int | None = None
) -> Tokenizer:
  """A tokenizer of the pieces of words that are most frequent in captions.

  The result depends neither on the order of the captions nor on the machine.
  Any text can be encoded: what the captions lack, byte by byte. The names of
  special tokens are no special tokens in a text.

  Args:
    captions: texts.
    size: the largest number of ids: those of 512 bytes, within and at the end
      of words, of merges, padding, start and end. There are fewer if no pair
      of pieces is left that occurs twice.
    length: tokens of each text; None = as many as the longest caption has.

  Raises:
    UserError: there are no captions, or sizes that are too small.
  """
  specials = (PAD, BOS, EOS)
  least = len(_vocabulary([], specials))
  if not captions:
    raise UserError('there are no captions to train a tokenizer on')
  if size < least:
    raise UserError(
      f'a vocabulary of {size} tokens: at least {least}, of bytes and special '
      'tokens'
    )
  captions = list(map(_valid, captions))
  learned = _pipeline({}, [])
  trainer = trainers.BpeTrainer(
    vocab_size=size - len(specials),
    # The symbols are numbered before the words are seen, in no fixed order.
    special_tokens=list(_vocabulary([], ())),
    end_of_word_suffix=END,
    min_frequency=2,
    show_progress=False,
  )
  learned.train_from_iterator(captions, trainer)
  merges = [tuple(x) for x in json.loads(learned.to_str())['model']['merges']]
  one = _pipeline(_vocabulary(merges, specials), merges)
  if length is None:
    length = 2 + max(len(x.ids) for x in one.encode_batch(captions))
  return _complete(one, BOS, EOS, PAD, length)


def read(path, length: int | None = None) -> Tokenizer:
  """Reads a tokenizer.

  Args:
    path: a file that `write` wrote, or a folder as diffusers' pipelines have
      them: merges.txt, with vocab.json or CLIP's order of ids, or
      tokenizer.json; tokenizer_config.json and special_tokens_map.json say
      what it pads with, and the length.
    length: tokens of each text, in place of the folder's.

  Raises:
    UserError: there is no tokenizer, or it is damaged.
  """
  path = files.at(path)
  if path.is_file():
    return _of_content(_text(path), path, length)
  settings = _settings(path)
  names = [_name(settings, 'bos_token', BOS), _name(settings, 'eos_token', EOS)]
  names.append(_name(settings, 'pad_token', names[1]))
  if (path / MERGES).is_file():
    merges = _merges(path / MERGES)
    if (path / VOCABULARY).is_file():
      vocabulary = _json(path / VOCABULARY)
    else:
      vocabulary = _vocabulary(merges, names[:2])
    with errors.one_line(f'{path} holds no tokenizer (', f'): {ADVICE}'):
      one = _pipeline(vocabulary, merges, unknown=names[1])
  elif (path / FILE).is_file():
    one = _library(_text(path / FILE), path / FILE)
  else:
    raise UserError(f'{path} holds no tokenizer: {ADVICE}')
  for name in names:
    if one.token_to_id(name) is None:
      raise UserError(
        f'{path}: {shown(name)} is not in the vocabulary, but its settings '
        'name it as a special token: download the folder again'
      )
  # In a prompt, too, the names stand for the tokens, as in transformers.
  one.add_special_tokens(
    [tokenizers.AddedToken(x, normalized=False, special=True) for x in names]
  )
  given = settings.get('model_max_length')
  if type(given) is not int or not SHORTEST <= given < LARGEST:
    given = LENGTH  # transformers writes 1e30 for 'none'
  return _complete(one, *names, length or given)


def write(path, tokenizer: Tokenizer) -> None:
  """Writes the file of a tokenizer, which `read` reads.

  Args:
    path: the file, such as tokenizer.json.
    tokenizer: the tokenizer.
  """
  with files.replacing(path) as file:
    file.write(tokenizer.content.encode())


def write_folder(path, tokenizer: Tokenizer) -> None:
  """Writes a folder that transformers loads as a `CLIPTokenizer`.

  Args:
    path: the folder.
    tokenizer: the tokenizer.

  Raises:
    UserError: it is another kind than CLIP's.
  """
  told = json.loads(tokenizer.content)
  model, ends = told['model'], told['post_processor']
  if model['type'] != 'BPE' or model['end_of_word_suffix'] != END:
    raise UserError(
      f'a tokenizer of the kind {model["type"]} cannot be written as a '
      f"CLIPTokenizer: only byte-pair encoding with {END} can, such as CLIP's"
    )
  special = {
    'bos_token': ends['cls'][0],
    'eos_token': ends['sep'][0],
    'pad_token': told['padding']['pad_token'],
    'unk_token': ends['sep'][0],
  }
  path = files.make(path)
  merges = ['#version: 0.2', *map(' '.join, model['merges']), '']
  with files.replacing(path / MERGES) as file:
    file.write('\n'.join(merges).encode())
  files.write_json(path / VOCABULARY, model['vocab'])
  files.write_json(path / SPECIAL, special)
  settings = {
    'tokenizer_class': 'CLIPTokenizer',
    'model_max_length': tokenizer.length,
    'do_lower_case': True,
    **special,
  }
  files.write_json(path / SETTINGS, settings)


# --- the library's tokenizer -------------------------------------------------


def _pipeline(vocabulary, merges, unknown=None) -> tokenizers.Tokenizer:
  """CLIP's steps, with a vocabulary of one's own; adds no special tokens."""
  model = models.BPE(
    vocabulary, merges, end_of_word_suffix=END, unk_token=unknown
  )
  one = tokenizers.Tokenizer(model)
  one.normalizer = normalizers.Sequence(
    [
      normalizers.NFC(),
      normalizers.Replace(tokenizers.Regex(r'\s+'), ' '),
      normalizers.Lowercase(),
    ]
  )
  one.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(
        tokenizers.Regex(WORDS), behavior='removed', invert=True
      ),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  return one


def _vocabulary(merges, specials) -> dict[str, int]:
  """Token -> id in CLIP's order: bytes, the same at ends, merges, specials."""
  symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
  ends = [symbol + END for symbol in symbols]
  tokens = [*symbols, *ends, *(a + b for a, b in merges), *specials]
  return {token: number for number, token in enumerate(tokens)}


def _complete(one, bos: str, eos: str, pad: str, length: int) -> Tokenizer:
  """Makes a tokenizer add special tokens, cut and pad."""
  if length < SHORTEST:
    raise UserError(
      f'texts of {length} tokens: at least {SHORTEST}, for start and end'
    )
  ids = {name: one.token_to_id(name) for name in (bos, eos, pad)}
  one.post_processor = processors.RobertaProcessing(
    (eos, ids[eos]), (bos, ids[bos]), trim_offsets=False, add_prefix_space=False
  )
  one.enable_truncation(length)
  one.enable_padding(length=length, pad_id=ids[pad], pad_token=pad)
  content = one.to_str()

  def encode(texts: Sequence[str]) -> Tokens:
    texts = list(map(_valid, texts))
    found = one.encode_batch(texts)
    return Tokens(
      np.array([x.ids for x in found], np.int32).reshape(-1, length),
      np.array([x.attention_mask for x in found], bool).reshape(-1, length),
      {
        number: texts[number][x.overflowing[0].offsets[1][0] :]
        for number, x in enumerate(found)
        if x.overflowing
      },
    )

  return Tokenizer(
    encode, length, one.get_vocab_size(), ids[bos], ids[eos], ids[pad], content,
    hashlib.sha256(content.encode()).hexdigest(),
  )  # fmt: skip


def _valid(text: str) -> str:
  """A text with '?' in place of halves of pairs, which are no Unicode."""
  return text.encode(errors='replace').decode()


def _of_content(content: str, path, length) -> Tokenizer:
  """The tokenizer of a file that `write` wrote."""
  one = _library(content, path)
  told = json.loads(content)
  try:
    ends, padding = told['post_processor'], told['padding']
    names = ends['cls'][0], ends['sep'][0], padding['pad_token']
    given = told['truncation']['max_length']
    known = all(one.token_to_id(name) is not None for name in names)
  except (LookupError, TypeError):
    known = False
  if not known:
    raise UserError(
      f'{path} says nothing of special tokens, length and padding: give its '
      f'folder, with {SETTINGS}'
    )
  return _complete(one, *names, length or given)


def _library(content: str, path) -> tokenizers.Tokenizer:
  with errors.one_line(
    f'{path} is no file of a tokenizer (', '): download it again'
  ):
    return tokenizers.Tokenizer.from_str(content)


# --- files -------------------------------------------------------------------


def _text(path) -> str:
  with errors.one_line(f'{path} is no text (', '): download it again'):
    return files.content(path, ADVICE).decode()


def _json(path) -> dict:
  with errors.one_line(f'{path} is no JSON (', '): download it again'):
    found = json.loads(_text(path))
  if not isinstance(found, dict):
    raise UserError(f'{path} holds no settings: download it again')
  return found


def _settings(folder) -> dict:
  """The settings of a folder; {} if it has none."""
  one, other = (
    _json(folder / name) if (folder / name).is_file() else {}
    for name in (SETTINGS, SPECIAL)
  )
  # As transformers: the older file counts unless the newer one has it all.
  return one if 'added_tokens_decoder' in one else {**one, **other}


def _name(settings, key: str, default: str) -> str:
  """The name of a special token, which may have settings of its own."""
  value = settings.get(key) or default
  if isinstance(value, dict):
    value = value.get('content')
  if not isinstance(value, str):
    raise UserError(f'{key} of a tokenizer is {shown(value)}: a text')
  return value


def _merges(path) -> list[tuple[str, str]]:
  """The pairs of a file, without its first line '#version'."""
  merges = []
  for number, line in enumerate(_text(path).split('\n'), 1):
    if line.startswith('#version') or not line.strip():
      continue
    pair = tuple(line.split())
    if len(pair) != 2:
      raise UserError(
        f'{path}: line {number} is {shown(line)}, not two pieces of words: '
        'download it again'
      )
    merges.append(pair)
  return merges
