"""Tokenizers: CLIP's from folders, and those trained on captions."""

import hashlib
import json
import os
import random
import unicodedata

import numpy as np
import pytest

from diffusion_jax.conditioning import tokenizers
from diffusion_jax.system.errors import UserError

CLIP = 'DIFFUSION_JAX_CLIP_TOKENIZER'  # a folder with OpenAI's merges.txt
# With these merges; start and end are left out.
GOLDEN = {
  '': [],
  'a photo of a cat': [320, 1125, 539, 320, 2368],
  'A PHOTO of a Cat!': [320, 1125, 539, 320, 2368, 256],
  'an astronaut riding a horse on mars': [
    550, 18376, 6765, 320, 4558, 525, 7496,
  ],
  'a photograph of an astronaut riding a horse': [
    320, 8853, 539, 550, 18376, 6765, 320, 4558,
  ],
  'digit 7': [27472, 278],
  '0123456789': [*range(271, 281)],
  "it's 2026, 3.14%": [
    585, 568, 273, 271, 273, 277, 267, 274, 269, 272, 275, 260,
  ],
  'naïve café — 日本語': [
    1097, 35689, 563, 15304, 2005, 39121, 44353, 34002, 508,
  ],
  'supercalifragilisticexpialidocious': [
    1642, 2857, 13093, 2076, 5868, 26850, 835, 639, 38466,
  ],
}  # fmt: skip
TEXTS = [
  *GOLDEN,
  '  two\twords \n',
  "I'LL don't 've",
  'what?!  ...no!',
  'e\u0301 Ä \u212b',
  '<|endoftext|> a <|startoftext|>b',
  '🍎 red-apple_7',
  '&amp; &lt;b&gt;',
  'cat ' * 100,
]

MERGES = ['c a', 'ca t</w>', 'h o', 'a n</w>']
BOS, EOS = 516, 517
CAPTIONS = [
  f'a {colour} {thing}'
  for colour in ('red', 'blue', 'green')
  for thing in ('apple', 'heart', 'horse', 'house')
]


def folder_of(path, merges=MERGES, special=None, **settings):
  """A tokenizer's folder."""
  path.mkdir(exist_ok=True)
  (path / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges, '']))
  if settings:
    (path / 'tokenizer_config.json').write_text(json.dumps(settings))
  if special:
    (path / 'special_tokens_map.json').write_text(json.dumps(special))
  return path


def inner(tokens, row=0):
  """The ids between start and end."""
  return tokens.ids[row][tokens.mask[row]][1:-1].tolist()


def within(sign):
  """The id of a printable ASCII sign that does not end a word."""
  return ord(sign) - ord('!')


def at_end(sign):
  return 256 + within(sign)


def test_a_folder_of_merges_is_encoded_as_clip_does(tmp_path):
  one = tokenizers.read(folder_of(tmp_path / 'it'))
  assert one[1:6] == (77, 518, BOS, EOS, EOS)
  cat, ho, an = 513, 514, 515
  for text, ids in {
    '  an\n CAT ': [an, cat],
    'cats': [512, within('t'), at_end('s')],
    '!7ho': [at_end('!'), at_end('7'), within('h'), at_end('o')],
    'hoc': [ho, at_end('c')],
    "an's": [an, within("'"), at_end('s')],
    '47': [at_end('4'), at_end('7')],
  }.items():
    found = one.encode([text])
    assert inner(found) == ids, text
    assert found.ids[0, 0] == BOS
    assert (found.ids[0, len(ids) + 1 :] == EOS).all()
    assert found.mask[0].sum() == len(ids) + 2
  composed, taken_apart = (
    inner(one.encode([unicodedata.normalize(form, 'Éé')]))
    for form in ('NFC', 'NFD')
  )
  assert composed == taken_apart
  assert len(composed) == 4  # two bytes each, both of the lower case
  assert composed[1] == composed[3] - 256


def test_long_texts_are_cut_and_what_is_left_out_is_said(tmp_path):
  one = tokenizers.read(folder_of(tmp_path / 'it'), length=6)
  found = one.encode(['cat an cat an', 'cat  an CAT an, a\u00e9', ''])
  assert found.ids.shape == (3, 6)
  assert found.ids.dtype == np.int32
  assert found.cut == {1: ', a\u00e9'}
  assert found.ids[1].tolist() == [BOS, 513, 515, 513, 515, EOS]
  assert found.mask.sum(1).tolist() == [6, 6, 2]
  assert one.encode([]).ids.shape == (0, 6)


def test_a_folder_says_what_it_pads_with_and_the_length(tmp_path):
  path = folder_of(
    tmp_path / 'it',
    special={'pad_token': '!', 'eos_token': {'content': '<|endoftext|>'}},
    model_max_length=5,
    pad_token='<|endoftext|>',
  )
  one = tokenizers.read(path)
  assert one.encode(['cat']).ids.tolist() == [[BOS, 513, EOS, 0, 0]]
  assert inner(one.encode(['!'])) == [0]  # of SD2, as transformers has it
  # Newer files have all of it in one place.
  settings = {'added_tokens_decoder': {}, 'pad_token': 'a</w>'}
  (path / 'tokenizer_config.json').write_text(json.dumps(settings))
  one = tokenizers.read(path)
  assert (one.pad, one.length) == (at_end('a'), 77)


def test_ids_are_those_of_the_vocabulary_file(tmp_path):
  plain = tokenizers.read(folder_of(tmp_path / 'it'))
  vocabulary = json.loads(plain.content)['model']['vocab']
  turned = {token: 517 - number for token, number in vocabulary.items()}
  (tmp_path / 'it' / 'vocab.json').write_text(json.dumps(turned))
  other = tokenizers.read(tmp_path / 'it')
  found = (one.encode(['an cat!']).ids for one in (plain, other))
  np.testing.assert_array_equal(next(found), 517 - next(found))


@pytest.mark.parametrize('kind', ['folder', 'captions'])
def test_one_file_keeps_a_tokenizer(tmp_path, kind):
  if kind == 'folder':
    path = folder_of(
      tmp_path / 'it', model_max_length=9, special={'pad_token': '!'}
    )
    one = tokenizers.read(path)
  else:
    one = tokenizers.train(CAPTIONS, 530)
  file = tmp_path / 'new' / 'tokenizer.json'
  file.parent.mkdir()
  tokenizers.write(file, one)
  again = tokenizers.read(file)
  assert again[1:] == one[1:]
  assert one.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
  np.testing.assert_array_equal(again.encode(TEXTS).ids, one.encode(TEXTS).ids)
  # A folder may have this file only.
  alone = tokenizers.read(file.parent, length=9)
  assert inner(alone.encode(['cat'])) == inner(one.encode(['cat']))


@pytest.mark.parametrize('pad', ['<|endoftext|>', '!'])
def test_a_folder_is_written_as_it_was_read(tmp_path, pad):
  one = tokenizers.read(
    folder_of(tmp_path / 'it', model_max_length=9, pad_token=pad)
  )
  tokenizers.write_folder(tmp_path / 'new', one)
  assert tokenizers.read(tmp_path / 'new')[1:] == one[1:]
  merges = (
    folder / 'merges.txt' for folder in (tmp_path / 'it', tmp_path / 'new')
  )
  assert len({file.read_bytes() for file in merges}) == 1


def test_training_on_captions():
  one = tokenizers.train(CAPTIONS, 600)
  shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
  assert tokenizers.train(shuffled, 600).sha256 == one.sha256
  assert one.size <= 600
  assert (one.pad, one.bos, one.eos) == tuple(range(one.size - 3, one.size))
  found = one.encode(CAPTIONS)
  assert not found.cut
  assert one.length == 5  # every word is one token
  assert found.mask.all()
  assert len({*map(tuple, found.ids)}) == len(CAPTIONS)
  # Eight times and six; of equal counts the pair with the lower ids is first.
  merges = json.loads(one.content)['model']['merges']
  assert merges[:3] == [['r', 'e'], ['h', 'o'], ['s', 'e</w>']]
  # Halves of pairs, which are no Unicode.
  halves = [text.replace('e', '\ud83c') for text in CAPTIONS]
  marked = [text.replace('e', '?') for text in CAPTIONS]
  assert (
    tokenizers.train(halves, 520).sha256 == tokenizers.train(marked, 520).sha256
  )
  shown = [one.encode(['red\udc00 house' * 3]), one.encode(['red? house' * 3])]
  np.testing.assert_array_equal(shown[0].ids, shown[1].ids)
  assert shown[0].cut == shown[1].cut != {}
  # Nothing is lost of texts that are unlike the captions.
  long = tokenizers.train(CAPTIONS, 520, length=40)
  assert long.size == 520
  names = {i: t for t, i in json.loads(long.content)['model']['vocab'].items()}
  text = long.encode(['日🍎 <|endoftext|>'])
  assert not text.cut
  told = ''.join(names[i] for i in inner(text))
  assert told.count('</w>') == 5  # two signs in a row, then <| endoftext |>
  assert len(told.replace('</w>', '')) == 3 + 4 + len('<|endoftext|>')
  assert long.eos not in inner(text)


def broken(path, name, content):
  folder_of(path)
  (path / name).write_bytes(content)
  return path


@pytest.mark.parametrize(
  ('make', 'told'),
  [
    (lambda p: p, 'it holds no tokenizer: give a folder with merges.txt'),
    (lambda p: broken(p, 'vocab.json', b'{'), 'vocab.json is no JSON'),
    (lambda p: broken(p, 'vocab.json', b'{"a": 0}'), 'holds no tokenizer ('),
    (lambda p: broken(p, 'vocab.json', b'[]'), 'holds no settings'),
    (lambda p: broken(p, 'merges.txt', b'a b\na\n'), 'line 2 is "a", not two'),
    (lambda p: broken(p, 'merges.txt', b'\xff\xfe'), 'merges.txt is no text'),
    (
      lambda p: broken(p, 'tokenizer_config.json', b'{"pad_token": 3}'),
      'pad_token of a tokenizer is 3',
    ),
    (
      lambda p: broken(p, 'tokenizer_config.json', b'{"pad_token": "x y"}'),
      '"x y" is not in the vocabulary',
    ),
    (
      lambda p: broken(p, 'x.json', b'{"version": ') / 'x.json',
      'x.json is no file of a tokenizer',
    ),
  ],
)
def test_damaged_folders_are_refused_in_one_line(tmp_path, make, told):
  with pytest.raises(UserError) as error:
    tokenizers.read(make(tmp_path / 'it'))
  assert told in str(error.value)
  assert '\n' not in str(error.value)


def test_sizes_that_cannot_work_are_refused(tmp_path):
  for call, told in (
    (lambda: tokenizers.train([], 600), 'no captions'),
    (lambda: tokenizers.train(CAPTIONS, 514), 'at least 515'),
    (lambda: tokenizers.train(CAPTIONS, 515, length=2), 'at least 3'),
  ):
    with pytest.raises(UserError, match=told):
      call()


@pytest.fixture
def clip():
  if CLIP not in os.environ:
    pytest.skip(f"{CLIP} names no folder with OpenAI's merges.txt")
  return os.environ[CLIP]


def test_ids_equal_openais(clip):
  one = tokenizers.read(clip)
  assert one[1:6] == (77, 49408, 49406, 49407, 49407)
  found = one.encode([*GOLDEN])
  assert [inner(found, row) for row in range(len(GOLDEN))] == [*GOLDEN.values()]


@pytest.mark.parity
@pytest.mark.parametrize('pad', ['<|endoftext|>', '!'])
@pytest.mark.parametrize('merges', ['few', 'clip'])
def test_equals_transformers(tmp_path, request, merges, pad):
  import transformers

  lines = MERGES
  if merges == 'clip':
    with open(f'{request.getfixturevalue("clip")}/merges.txt') as file:
      lines = file.read().split('\n')[1:-1]
  path = folder_of(
    tmp_path / 'it', lines, pad_token=pad, model_max_length=77,
    tokenizer_class='CLIPTokenizer',
  )  # fmt: skip
  ours = tokenizers.read(path)
  vocabulary = json.loads(ours.content)['model']['vocab']
  (path / 'vocab.json').write_text(json.dumps(vocabulary))
  theirs = transformers.CLIPTokenizer.from_pretrained(path)
  wanted = theirs(
    TEXTS, padding='max_length', truncation=True, return_tensors='np'
  )
  found = tokenizers.read(path).encode(TEXTS)
  np.testing.assert_array_equal(found.ids, wanted['input_ids'])
  np.testing.assert_array_equal(found.mask, wanted['attention_mask'])
  np.testing.assert_array_equal(found.ids, ours.encode(TEXTS).ids)
  for tokenizer in (ours, tokenizers.train(CAPTIONS, 530, length=9)):
    tokenizers.write_folder(tmp_path / 'new', tokenizer)
    again = transformers.CLIPTokenizer.from_pretrained(tmp_path / 'new')
    told = again(['a red cat', ''], padding='max_length', truncation=True)
    wanted = tokenizer.encode(['a red cat', ''])
    np.testing.assert_array_equal(told['input_ids'], wanted.ids)
  # What transformers saves comes in, too.
  theirs.save_pretrained(tmp_path / 'saved')
  saved = tokenizers.read(tmp_path / 'saved')
  np.testing.assert_array_equal(saved.encode(TEXTS).ids, found.ids)
  assert saved[1:6] == ours[1:6]
