"""Captions from every source, which one is chosen, and mistakes in one line."""

import itertools
import json

import jax
import numpy as np
import pytest
from imagesets import folder, png, random_images, write_tfds
from PIL import Image

from diffusion_jax import data
from diffusion_jax.data import broken, captions, emoji, pipeline, resident
from diffusion_jax.runs import dataset
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding


def texts_of(source):
  return [source.caption_fn(i) for i in range(len(source))]


def refusal(make, *parts):
  with pytest.raises(UserError) as error:
    captions.check(make(), None)
  message = str(error.value)
  assert '\n' not in message
  for part in parts:
    assert part in message
  return message


def write_images(path, names):
  for name, image in zip(names, random_images(len(names)), strict=True):
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path / name)


# --- arrays ------------------------------------------------------------------


def arrays(path, split='train', every=0, **more):
  return data.create(
    'arrays', path=str(path), split=split, image_size=8, channels=3,
    heldout_every=every, **more,
  )  # fmt: skip


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_captions_of_an_array_file_follow_its_images(tmp_path, save):
  path, images = tmp_path / 'a.npz', random_images(4)
  two = np.array([['a', 'b'], ['c', ''], ['', ''], [' d ', 'é']])
  save(path, images=images, captions=two, notes=two[:, 0])
  assert texts_of(arrays(path, every=2)) == [('a', 'b'), ('',)]
  assert texts_of(arrays(path, 'test', 2)) == [('c',), ('d', 'é')]
  other = texts_of(arrays(path, captions='notes'))
  assert other == [('a',), ('c',), ('',), ('d',)]
  save(
    path, train_images=images, train_captions=two[:, 0],
    test_images=images[:1], test_captions=['z'],
  )  # fmt: skip
  assert texts_of(arrays(path))[1] == ('c',)
  assert texts_of(arrays(path, 'test')) == [('z',)]


def test_captions_that_an_array_file_cannot_have(tmp_path):
  path, images = tmp_path / 'a.npz', random_images(3)
  for wrong, parts in (
    (['a', 'b'], ['captions of 2 images', '3']),
    ([1, 2, 3], ['int64', 'np.array(captions)']),
    (np.array(['a', None, 'b'], object), ['pickled']),
  ):
    np.savez(path, images=images, captions=wrong)
    refusal(lambda: arrays(path), "'captions'", *parts)
    assert arrays(path)[0]['image'].shape == (8, 8, 3)  # which are not in need
  beyond = np.array(['a', 'b', 'c'])
  beyond.view(np.uint32)[1] = 0x110000
  np.savez(path, images=images, captions=beyond)
  refusal(lambda: texts_of(arrays(path)), 'image 1', 'not Unicode')
  np.savez(path, images=images)
  refusal(lambda: arrays(path), 'has none', "conditioning.name='none'")
  refusal(lambda: arrays(path, captions='texts'), 'texts', 'images', 'auto')


# --- folders -----------------------------------------------------------------


def test_texts_beside_images(tmp_path):
  write_images(tmp_path, ['a.png', 'sub/b.jpg', 'sub/c.webp'])
  (tmp_path / 'a.txt').write_text('\ufeffa red apple\n\n an apple \r\n')
  (tmp_path / 'sub/b.TXT').write_text('ein grüner Apfel')
  (tmp_path / 'sub/c.txt').write_text('')
  (tmp_path / 'README.txt').write_text('not a caption')

  def opened():
    return folder(tmp_path, classes='none')

  source = opened()
  assert texts_of(source) == [
    ('a red apple', 'an apple'), ('ein grüner Apfel',), ('',),
  ]  # fmt: skip
  assert 'captions are in NAME.txt beside images' in source.notes
  assert any('1 .txt' in note for note in source.notes)
  (tmp_path / 'sub/c.txt').unlink()
  (tmp_path / 'a.txt').unlink()
  refusal(opened, "2 of 3 images ('a.png', 'sub/c.webp')", 'add them')
  (tmp_path / 'a.txt').write_bytes(b'caf\xe9')
  (tmp_path / 'sub/c.txt').write_text('c')
  refusal(opened, "'a.txt'", 'not UTF-8 (byte 3)')
  (tmp_path / 'a.txt').write_text('x' * 2**20 + 'x')
  refusal(opened, "'a.txt'", 'no caption')


def test_a_metadata_file_of_each_folder(tmp_path):
  write_images(tmp_path, ['train/a.png', 'train/b.png', 'test/a.png'])
  lines = [
    {'file_name': 'b.png', 'text': 'of b', 'more': 1},
    {'file_name': './a.png', 'text': ['of a', 'again']},
  ]
  (tmp_path / 'train/metadata.jsonl').write_text(
    '\n\n'.join(map(json.dumps, lines))
  )
  (tmp_path / 'metadata.jsonl').write_text(
    json.dumps({'image': 'test/a.png', 'caption': 'half \ud800'}) + '\n'
  )
  assert texts_of(folder(tmp_path)) == [('of a', 'again'), ('of b',)]
  assert texts_of(folder(tmp_path, split='test')) == [('half ?',)]


def test_a_table_of_captions(tmp_path):
  write_images(tmp_path, ['a.png', 'b.png'])
  (tmp_path / 'captions.csv').write_text(
    '\ufeffimage,caption,title\r\na.png,"one, two",x\r\nb.png,three,y\r\n'
    'a.png,four,z\r\n'
  )
  assert texts_of(folder(tmp_path)) == [('one, two', 'four'), ('three',)]
  titles = texts_of(folder(tmp_path, captions='title'))
  assert titles == [('x', 'z'), ('y',)]


TABLES = {
  'columns': ('captions.csv', 'image,words\na.png,x\n', 'image, words'),
  'names': ('captions.csv', 'path,text\na.png,x\n', 'names of images'),
  'short row': ('captions.csv', 'image,text\na.png,x\nb.png\n', 'line 3'),
  'long row': ('captions.csv', 'image,text\na.png,x\nb.png,a, b\n', 'line 3'),
  'json': (
    'metadata.jsonl',
    '{"file_name": "a.png", "text": "x"}\n{"file_name": "b.pn\n',
    'line 2',
  ),
  'no object': ('metadata.jsonl', '[1]\n', 'line 1'),
  'no text': ('metadata.jsonl', '{"image": "a.png", "text": 3}', 'text=3'),
  'lacking': (
    'metadata.jsonl',
    '{"image": "a.png", "text": "x"}',
    "1 of 2 images ('b.png')",
  ),
  'deep': ('metadata.jsonl', '[' * 10**5, 'line 1'),
}


@pytest.mark.parametrize('case', TABLES)
def test_a_damaged_table_is_one_line(tmp_path, case):
  name, content, part = TABLES[case]
  write_images(tmp_path, ['a.png', 'b.png'])
  (tmp_path / name).write_text(content)
  refusal(lambda: folder(tmp_path), name, part)


# --- other sets --------------------------------------------------------------


def test_captions_of_a_prepared_set(tmp_path):
  import tensorflow_datasets as tfds

  features = {
    'image': tfds.features.Image(shape=(None, None, 3)),
    'captions': tfds.features.Sequence(
      {'id': tfds.features.Scalar(np.int64), 'text': tfds.features.Text()}
    ),
    'title': tfds.features.Text(),
  }
  pictures = random_images(2)
  write_tfds(
    tmp_path, 'my_words', '1.0.0', features,
    {
      'train': [
        {
          'image': png(image), 'captions/text': f'number {i}'.encode(),
          'captions/id': i, 'title': b'caf\xc3\xa9' if i else b'\xe9',
        }
        for i, image in enumerate(pictures)
      ]
    },
  )  # fmt: skip

  def opened(**how):
    return data.create(
      'tfds:my_words', path=str(tmp_path), image_size=8, channels=3, **how
    )

  assert texts_of(opened()) == [('number 0',), ('number 1',)]
  assert opened(captions='title').caption_fn(1) == ('café',)
  np.testing.assert_array_equal(opened()[1]['image'], pictures[1])
  refusal(lambda: opened(captions='title'), 'not UTF-8')
  refusal(lambda: opened(captions='id'), 'captions, title')


def test_captions_of_emoji_are_their_names(monkeypatch):
  count, width = len(emoji.codepoints()), 64
  monkeypatch.setattr(emoji, '_find', lambda path, what: '/dev/null')
  pictures = np.zeros((count, width, width, 3), np.uint8)
  monkeypatch.setattr(emoji, '_images', lambda *of: (pictures, 16 * '0'))
  source = data.create('emoji', split='test', image_size=width, channels=3)
  assert source.caption_fn(0) == (emoji.captions()[9],)


# --- batches -----------------------------------------------------------------


def encode(texts):
  """Three numbers of each text: its length, its first and its last letter."""
  assert isinstance(texts, list)
  ends = [(x[:1] or '\0', x[-1:] or '\0') for x in texts]
  return np.array(
    [(len(x), ord(a), ord(b)) for x, (a, b) in zip(texts, ends, strict=True)]
  )


def captioned(tmp_path):
  """Nine images of one colour, i, with i % 3 + 1 captions, as tokens."""
  path = tmp_path / 'captioned.npz'
  if not path.exists():
    images = np.zeros((9, 8, 8, 3), np.uint8)
    images += np.arange(9, dtype=np.uint8)[:, None, None, None]
    each = [
      [f'{i} {"abc"[k]}' if k <= i % 3 else '' for k in range(3)]
      for i in range(9)
    ]
    np.savez(path, images=images, captions=each)
  return captions.encoded(arrays(path), encode)


def number_and_caption(batch):
  rows = np.asarray(batch['tokens'])
  images = np.asarray(batch['image'])[:, 0, 0, 0]
  assert rows.dtype == np.int32
  assert (rows[:, 1] - ord('0') == images).all()
  return [(int(i), chr(c)) for i, c in zip(images, rows[:, 2], strict=True)]


def test_one_of_several_captions_is_chosen_by_position(tmp_path):
  source, how = captioned(tmp_path), {'seed': 1, 'flip': True}
  stream = pipeline.stream(source, batch_size=6, **how)
  first = [number_and_caption(stream[k]) for k in range(60)]
  seen = {}
  for image, letter in itertools.chain(*first):
    seen.setdefault(image, []).append(letter)
  for image, letters in seen.items():
    counts = [letters.count(x) for x in 'abc'[: image % 3 + 1]]
    assert sum(counts) == 40
    assert min(counts) > 4  # five deviations from a third of 40
  # Any rows of any batch, with threads or not, are the same.
  part = pipeline.stream(source, batch_size=6, rows=slice(2, 4), **how)
  assert number_and_caption(part[7]) == first[7][2:4]
  bare = pipeline.stream(
    arrays(tmp_path / 'captioned.npz'), batch_size=6, **how
  )
  assert (bare[3]['image'] == stream[3]['image']).all()
  assert 'tokens' not in bare[3]
  batch, _ = next(pipeline.heldout(source, batch_size=9))
  assert number_and_caption(batch) == [(i, 'a') for i in range(9)]


def test_images_on_devices_get_the_same_captions(tmp_path):
  source, mesh = captioned(tmp_path), sharding.make_mesh()
  resident.check(source)
  placed = resident.place(resident.read(source), mesh)
  take = jax.jit(resident.take)
  how = {'batch_size': 8, 'seed': 5, 'flip': False}
  where = sharding.batch_sharding(mesh)
  orders = pipeline.batches(source, read=False, sharding=where, **how)
  batches = pipeline.batches(source, sharding=where, **how)
  for _ in range(5):
    there, here = take(placed, next(orders)), next(batches)
    assert there.keys() == here.keys()
    assert number_and_caption(there) == number_and_caption(here)
  orders.close()
  batches.close()


def test_a_caption_stays_with_its_image_if_others_are_broken(tmp_path):
  write_images(tmp_path, [f'{i}.png' for i in range(4)])
  for i in range(4):
    (tmp_path / f'{i}.txt').write_text(f'{i}')
  (tmp_path / '1.png').write_bytes(b'broken')
  source = captions.encoded(broken.left_out(folder(tmp_path)), encode)
  batch, _ = next(pipeline.heldout(source, batch_size=4))
  assert [chr(c) for c in batch['tokens'][:, 1]] == ['0', '2', '2', '3']
  text = resident.read(source)['text']
  assert text['ids'][:, 1].tolist() == batch['tokens'][:, 1].tolist()


# --- what a run remembers ----------------------------------------------------


def test_a_run_remembers_its_captions(tmp_path):
  write_images(tmp_path / 'set', ['a.png', 'b.png', 'c.png'])
  for name in 'abc':
    (tmp_path / f'set/{name}.txt').write_text(name)

  def check(accept=False):
    splits = folder(tmp_path / 'set'), None
    return dataset.check(
      tmp_path / 'run', splits, 'test', accept, {'name': 'text'}
    )

  known = check()
  found = known.facts['captions']['train']
  assert (found['images'], found['captions'], found['empty']) == (3, 3, 0)
  dataset.write(tmp_path / 'run', known)
  (tmp_path / 'run/checkpoints/5').mkdir(parents=True)
  assert not check().change
  (tmp_path / 'set/a.txt').write_text('d')
  with pytest.raises(UserError, match='some of 3 captions are others'):
    check()
  (tmp_path / 'set/a.txt').write_text('d\ne')
  with pytest.raises(UserError, match='3 captions then, 4 now'):
    check()
  assert check(accept=True).facts['captions']['train']['captions'] == 4
