"""Data: what each source promises, and that the stream depends on nothing."""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from jax.sharding import NamedSharding
from PIL import Image

from diffusion_jax import data
from diffusion_jax.data import pipeline, sources
from diffusion_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CIFAR = ROOT.parent / 'shared' / 'data' / 'cifar10'


def random_images(num_images, size=8, channels=3, seed=0):
  shape = (num_images, size, size, channels)
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def all_images(source):
  return np.stack([source[i]['image'] for i in range(len(source))])


def all_labels(source):
  return [int(source[i]['label']) for i in range(len(source))]


def error_line(*args, **kwargs):
  """The message of the UserError that create() answers with."""

  def read_first():  # a folder is read lazily
    return data.create(*args, **kwargs)[0]

  with pytest.raises(UserError) as caught:
    read_first()
  message = str(caught.value)
  assert '\n' not in message
  return message


def numbered(num_images, size=4):
  """A source whose image i is filled with i, but for a marked left column."""
  images = np.zeros((num_images, size, size, 1), np.uint8)
  images += np.arange(num_images, dtype=np.uint8)[:, None, None, None]
  images[:, :, 0] = 255
  return sources.Source(num_images, lambda i: (images[i], i), num_images, '')


# --- digits ------------------------------------------------------------------


def test_digits_are_split_into_1438_and_359():
  train = data.create('digits', image_size=8, channels=1)
  test = data.create('digits', split='test', image_size=8, channels=1)
  assert (len(train), len(test)) == (1438, 359)
  assert train.num_classes == test.num_classes == 10
  assert '1438' in train.description

  # Interleaved again they are the whole set, in order.
  from sklearn.datasets import load_digits

  digits = load_digits()
  whole = np.empty((1797, 8, 8, 1), np.uint8)
  whole[4::5] = all_images(test)
  whole[np.arange(1797) % 5 != 4] = all_images(train)
  np.testing.assert_array_equal(
    whole[..., 0], np.round(digits.images * 255 / 16)
  )
  assert whole.min() == 0
  assert whole.max() == 255
  assert all_labels(test) == list(digits.target[4::5])


def test_a_record_has_the_promised_types():
  record = data.create('digits', image_size=8, channels=1)[3]
  assert record['image'].dtype == np.uint8
  assert record['image'].shape == (8, 8, 1)
  assert isinstance(record['label'], np.int32)


def test_an_index_out_of_range_ends_an_iteration():
  source = numbered(3)
  assert [int(record['label']) for record in source] == [0, 1, 2]
  with pytest.raises(IndexError):
    source[-1]


# --- names, splits and sizes -------------------------------------------------

MISTAKES = {
  'name': (('nonesuch',), {}, ['nonesuch', 'digits', 'folder', 'tfds:NAME']),
  'near name': (('digit',), {}, ["'digit'", 'mean digits']),
  'image_size': (('digits',), {'image_size': 32}, ['32x32x1', '8x8x1']),
  'channels': (('digits',), {'channels': 3}, ['8x8x3', '8x8x1']),
  'zero size': (('digits',), {'image_size': 0}, ['image_size is 0']),
  'zero channels': (('digits',), {'channels': 0}, ['channels is 0']),
  'split': (('digits',), {'split': 'val'}, ["'val'", 'train or test']),
  'heldout': (('digits',), {'heldout_every': 1}, ['heldout_every is 1']),
  'no path': (('arrays',), {}, ['data.path', 'arrays']),
  'no folder path': (('folder',), {}, ['data.path', 'folder']),
  'missing file': (('arrays',), {'path': 'no.npz'}, ['no.npz']),
  'not an array': (('arrays',), {'path': 'a.txt'}, ['a.txt', '.npy']),
  'missing folder': (('folder',), {'path': 'nodir'}, ['nodir']),
  'four channels': (
    ('folder',),
    {'path': 'nodir', 'channels': 4},
    ['channels is 4'],
  ),
}


@pytest.mark.parametrize('case', MISTAKES)
def test_a_mistake_is_answered_in_one_line(case):
  args, kwargs, must_name = MISTAKES[case]
  message = error_line(*args, **({'image_size': 8, 'channels': 1} | kwargs))
  for part in must_name:
    assert part in message


# --- arrays ------------------------------------------------------------------


def arrays(path, split='train', channels=3, **kwargs):
  return data.create(
    'arrays',
    path=str(path),
    split=split,
    image_size=8,
    channels=channels,
    **kwargs,
  )


@pytest.mark.parametrize('order', ['C', 'F'])
def test_npy_is_read_as_it_is(tmp_path, order):
  images = random_images(10)
  np.save(tmp_path / 'a.npy', np.asarray(images, order=order))
  source = arrays(tmp_path / 'a.npy')
  np.testing.assert_array_equal(all_images(source), images)
  assert all_labels(source) == [-1] * 10
  assert source.num_classes == 0
  assert arrays(tmp_path / 'a.npy', 'test') is None


def test_a_grey_array_needs_no_channel_axis(tmp_path):
  images = random_images(5, channels=1)
  np.save(tmp_path / 'a.npy', images[..., 0])
  source = arrays(tmp_path / 'a.npy', channels=1)
  np.testing.assert_array_equal(all_images(source), images)


def test_every_nth_image_is_held_out(tmp_path):
  images = random_images(10)
  np.savez(tmp_path / 'a.npz', images=images, labels=np.arange(10) % 3)
  train = arrays(tmp_path / 'a.npz', heldout_every=4)
  test = arrays(tmp_path / 'a.npz', 'test', heldout_every=4)
  np.testing.assert_array_equal(all_images(test), images[[3, 7]])
  np.testing.assert_array_equal(
    all_images(train), images[[0, 1, 2, 4, 5, 6, 8, 9]]
  )
  assert all_labels(test) == [0, 1]
  assert train.num_classes == test.num_classes == 3


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_npz_with_a_test_set_of_its_own(tmp_path, save):
  images, labels = random_images(10), np.arange(10) % 4
  save(
    tmp_path / 'a.npz',
    train_images=images[:8],
    train_labels=labels[:8, None],
    test_images=images[8:],
    test_labels=labels[8:],
  )
  train = arrays(tmp_path / 'a.npz', heldout_every=4)
  test = arrays(tmp_path / 'a.npz', 'test', heldout_every=4)
  np.testing.assert_array_equal(all_images(train), images[:8])
  np.testing.assert_array_equal(all_images(test), images[8:])
  assert all_labels(train) == list(labels[:8])
  assert all_labels(test) == list(labels[8:])
  assert train.num_classes == test.num_classes == 4


def test_npz_with_unnamed_images(tmp_path):
  np.savez(tmp_path / 'a.npz', random_images(3))
  source = arrays(tmp_path / 'a.npz')
  np.testing.assert_array_equal(all_images(source), random_images(3))


def write_npz(path, **members):
  """A .npz of members as they are given, in bytes."""
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    for name, content in members.items():
      archive.writestr(f'{name}.npy', content)


def npy_bytes(array, claim=None):
  """A .npy in memory; its header may claim another shape."""
  stream = io.BytesIO()
  header = np.lib.format.header_data_from_array_1_0(array)
  np.lib.format.write_array_header_1_0(
    stream, header | ({'shape': claim} if claim else {})
  )
  return stream.getvalue() + array.tobytes()


def truncated_npz(path):
  np.savez(path, images=random_images(20))
  path.write_bytes(path.read_bytes()[:-2000])


def flipped_npz(path):
  np.savez(path, images=random_images(20))
  content = bytearray(path.read_bytes())
  content[1000] ^= 255
  path.write_bytes(content)


# What is written, and what the answer must name.
DAMAGED = {
  'truncated': (truncated_npz, []),
  'one bad byte': (flipped_npz, ['CRC']),
  'not a zip': (lambda p: p.write_bytes(b'no zip at all'), ['zip']),
  'empty': (lambda p: p.write_bytes(b''), []),
  'pickled images': (
    lambda p: np.savez(p, images=np.array([{}, {}], object)),
    ['pickled', 'images'],
  ),
  'pickled labels': (
    lambda p: np.savez(
      p, images=random_images(2), labels=np.array(['a', None], object)
    ),
    ['pickled', 'labels'],
  ),
  'no images': (
    lambda p: np.savez(p, x_train=random_images(2), y_train=[1, 2]),
    ['x_train, y_train', 'train_images'],
  ),
  'other size': (
    lambda p: np.savez(p, images=random_images(2, size=16)),
    ['[2, 16, 16, 3]', '[N, 8, 8, 3]'],
  ),
  'floats': (
    lambda p: np.savez(p, images=random_images(2) / 255),
    ['float64', 'uint8'],
  ),
  'zero images': (lambda p: np.savez(p, images=random_images(0)), ['no image']),
  'missing labels': (
    lambda p: np.savez(p, images=random_images(3), labels=[1, 2]),
    ['3 images', '2 labels'],
  ),
  'negative labels': (
    lambda p: np.savez(p, images=random_images(2), labels=[-7, 2]),
    ['-7'],
  ),
  'names as labels': (
    lambda p: np.savez(p, images=random_images(2), labels=['cat', 'dog']),
    ['labels', 'integers'],
  ),
  'a header that claims terabytes': (
    lambda p: write_npz(
      p, images=npy_bytes(random_images(2), claim=(10**10, 8, 8, 3))
    ),
    ['damaged', '10000000000'],
  ),
  'a header that claims less': (
    lambda p: write_npz(p, images=npy_bytes(random_images(2), (1, 8, 8, 3))),
    ['damaged'],
  ),
  'a member that is no array': (
    lambda p: write_npz(p, images=b'hello'),
    ['magic'],
  ),
}


@pytest.mark.parametrize('case', DAMAGED)
def test_a_damaged_npz_is_answered_in_one_line(tmp_path, case):
  write_fn, must_name = DAMAGED[case]
  write_fn(tmp_path / 'bad.npz')
  message = error_line(
    'arrays', path=str(tmp_path / 'bad.npz'), image_size=8, channels=3
  )
  for part in ['bad.npz', *must_name]:
    assert part in message


@pytest.mark.parametrize(
  ('content', 'must_name'),
  [
    (npy_bytes(random_images(20))[:-1000], 'damaged'),
    (npy_bytes(random_images(20))[:50], 'header'),
    (b'', 'magic'),
    (npy_bytes(random_images(2), (2**40, 8, 8, 3)), 'damaged'),
    (npy_bytes(random_images(2)[..., :2]), '[2, 8, 8, 2]'),
  ],
  ids=['truncated', 'half a header', 'empty', 'terabytes', 'channels'],
)
def test_a_damaged_npy_is_answered_in_one_line(tmp_path, content, must_name):
  (tmp_path / 'bad.npy').write_bytes(content)
  message = error_line(
    'arrays', path=str(tmp_path / 'bad.npy'), image_size=8, channels=3
  )
  assert 'bad.npy' in message
  assert must_name in message


def test_pickles_in_npy_are_never_loaded(tmp_path):
  np.save(tmp_path / 'bad.npy', np.array([print], object))
  message = error_line(
    'arrays', path=str(tmp_path / 'bad.npy'), image_size=8, channels=3
  )
  assert 'pickled' in message


def test_holding_out_more_than_there_is(tmp_path):
  np.save(tmp_path / 'a.npy', random_images(5))
  with pytest.raises(UserError, match=r'heldout_every is 9.*5 images'):
    arrays(tmp_path / 'a.npy', 'test', heldout_every=9)


@pytest.mark.skipif(
  not CIFAR.is_dir(), reason='needs CIFAR-10 in ../shared/data/cifar10'
)
def test_cifar10_through_an_npz(tmp_path):
  sheets = [np.asarray(Image.open(CIFAR / f'train/00{i}.webp')) for i in (0, 1)]
  images = np.stack(sheets).reshape(2, 10, 32, 10, 32, 3)
  images = images.transpose(0, 1, 3, 2, 4, 5).reshape(200, 32, 32, 3)
  labels = np.load(CIFAR / 'labels.npz')['train'][:200]
  np.savez(tmp_path / 'cifar.npz', images=images, labels=labels)
  source = data.create(
    'arrays', path=str(tmp_path / 'cifar.npz'), image_size=32, channels=3
  )
  np.testing.assert_array_equal(all_images(source), images)
  assert all_labels(source)[:4] == [6, 9, 9, 4]  # frog, truck, truck, deer
  assert source.num_classes == 10


# --- folders -----------------------------------------------------------------


def folder(path, image_size=8, channels=3, **kwargs):
  return data.create(
    'folder',
    path=str(path),
    image_size=image_size,
    channels=channels,
    **kwargs,
  )


def only_image(path, **kwargs):
  source = folder(path, **kwargs)
  assert len(source) == 1
  return source[0]['image']


def test_images_directly_inside_are_unlabelled_and_sorted(tmp_path):
  images = random_images(4)
  for name, image in zip(['b.png', 'a.BMP', 'c.webp'], images, strict=False):
    Image.fromarray(image).save(tmp_path / name, lossless=True)
  (tmp_path / 'notes.txt').write_text('no image')
  (tmp_path / '.hidden.png').write_bytes(b'no image')
  source = folder(tmp_path)
  np.testing.assert_array_equal(all_images(source), images[[1, 0, 2]])
  assert all_labels(source) == [-1] * 3
  assert source.num_classes == 0
  assert folder(tmp_path, split='test') is None
  heldout = folder(tmp_path, split='test', heldout_every=3)
  np.testing.assert_array_equal(all_images(heldout), images[[2]])


def test_sub_folders_are_classes_in_order_of_name(tmp_path):
  for i, name in enumerate(['dog/1.png', 'ape/x/2.png', 'ape/1.png', 'cat/.x']):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('L', (8, 8), i).save(path, format='png')
  source = folder(tmp_path, channels=1)
  assert all_images(source)[:, 0, 0, 0].tolist() == [2, 1, 0]
  assert all_labels(source) == [0, 0, 1]  # no class without images
  assert source.num_classes == 2


def test_the_largest_centred_square_is_cut_out(tmp_path):
  image = random_images(1, size=13)[0][:8]  # 13 wide, 8 high
  Image.fromarray(image).save(tmp_path / 'a.png')
  np.testing.assert_array_equal(only_image(tmp_path), image[:, 2:10])


def test_pixels_outside_of_the_square_have_no_influence(tmp_path):
  image = np.zeros((16, 32, 3), np.uint8)
  image[:, :8] = image[:, 24:] = 255
  Image.fromarray(image).save(tmp_path / 'a.png')
  assert only_image(tmp_path).max() == 0


@pytest.mark.parametrize('size', [32, 5])
def test_resizing_is_antialiased_bicubic(tmp_path, size):
  image = Image.fromarray(random_images(1, size=size)[0])
  image.save(tmp_path / 'a.png')
  expected = image.resize((8, 8), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(only_image(tmp_path), np.asarray(expected))


def test_a_fine_chequerboard_becomes_grey(tmp_path):
  board = np.indices((64, 64)).sum(0) % 2 * 255
  Image.fromarray(board.astype(np.uint8)).save(tmp_path / 'a.png')
  image = only_image(tmp_path, channels=1)
  assert abs(image.astype(int) - 127.5).max() < 3


def test_exif_orientation_is_applied(tmp_path):
  image = random_images(1)[0]
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees clockwise
  Image.fromarray(image).save(tmp_path / 'a.png', exif=exif)
  np.testing.assert_array_equal(
    only_image(tmp_path), np.rot90(image, axes=(1, 0))
  )


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'PA'])
def test_transparency_is_composited_over_white(tmp_path, mode):
  image = Image.new('RGBA', (8, 8), (0, 0, 0, 255))
  image.putpixel((0, 0), (0, 0, 0, 0))
  image.putpixel((1, 0), (0, 0, 0, 51))
  image = image.convert('LA') if mode == 'LA' else image
  image = image.quantize() if mode == 'PA' else image  # a palette with alpha
  image.save(tmp_path / 'a.png')
  for channels in (1, 3):
    row = only_image(tmp_path, channels=channels)[0, :, 0]
    assert row[:3].tolist() == [255, 204, 0]


@pytest.mark.parametrize('channels', [1, 3])
def test_a_transparent_colour_is_white(tmp_path, channels):
  image = Image.new('RGB', (8, 8), (10, 20, 30))
  image.putpixel((0, 0), (1, 2, 3))
  image.save(tmp_path / 'a.png', transparency=(1, 2, 3))
  pixels = only_image(tmp_path, channels=channels)[0]
  assert (pixels[0] == 255).all()
  assert (pixels[1] < 31).all()


def test_every_kind_of_file_becomes_grey_or_rgb(tmp_path):
  colour = (200, 100, 50)
  rgb = Image.new('RGB', (8, 8), colour)
  kinds = {
    'rgb.png': rgb,
    'palette.png': rgb.quantize(),
    'cmyk.jpg': rgb.convert('CMYK'),
    'rgb.jpeg': rgb,
    'rgb.webp': rgb,
    'rgb.bmp': rgb,
  }
  for name, image in kinds.items():
    image.save(tmp_path / name)
  luma = np.asarray(rgb.convert('L'))[0, 0]
  for i, image in enumerate(all_images(folder(tmp_path))):
    assert abs(image.astype(int) - colour).max() <= 4, i
  for i, image in enumerate(all_images(folder(tmp_path, channels=1))):
    assert image.shape == (8, 8, 1)
    assert abs(image.astype(int) - luma).max() <= 4, i


def test_grey_files_keep_their_values(tmp_path):
  grey = random_images(1, channels=1)[0, ..., 0]
  Image.fromarray(grey).save(tmp_path / 'a.png')
  np.testing.assert_array_equal(only_image(tmp_path, channels=1)[..., 0], grey)
  np.testing.assert_array_equal(
    only_image(tmp_path, channels=3), np.repeat(grey[..., None], 3, -1)
  )


def test_samples_of_16_bits_keep_their_high_byte(tmp_path):
  samples = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
  Image.fromarray(samples).save(tmp_path / 'a.png')
  np.testing.assert_array_equal(
    only_image(tmp_path, channels=1)[..., 0], samples >> 8
  )


def test_a_bilevel_image_is_black_and_white(tmp_path):
  bits = random_images(1, channels=1)[0, ..., 0] > 127
  Image.fromarray(bits).save(tmp_path / 'a.png')
  np.testing.assert_array_equal(
    only_image(tmp_path, channels=1)[..., 0], bits * 255
  )


def broken_image(path):
  Image.fromarray(random_images(1, size=64)[0]).save(path / 'cut.png')
  content = (path / 'cut.png').read_bytes()
  (path / 'cut.png').write_bytes(content[: len(content) // 2])


def not_an_image(path):
  (path / 'text.jpg').write_text('no picture')


def other_format(path):
  Image.new('RGB', (8, 8)).save(path / 'tiff.png', format='tiff')


def bomb(path):
  Image.new('1', (20000, 20000)).save(path / 'huge.png')


def link_out(path):
  os.symlink(ROOT / 'README.md', path / 'out.png')


def folder_link_out(path):
  os.symlink(ROOT, path / 'away')


def dangling_link(path):
  os.symlink(path / 'gone', path / 'gone.png')


def mixed(path):
  (path / 'cats').mkdir()
  Image.new('RGB', (8, 8)).save(path / 'cats' / 'a.png')
  Image.new('RGB', (8, 8)).save(path / 'a.png')


@pytest.mark.parametrize(
  ('write_fn', 'must_name'),
  [
    (broken_image, 'cut.png'),
    (not_an_image, 'text.jpg'),
    (other_format, 'tiff.png'),
    (bomb, 'huge.png'),
    (link_out, 'out.png'),
    (folder_link_out, 'away'),
    (dangling_link, 'gone.png'),
    (mixed, 'cats'),
    (lambda path: None, 'no images'),
  ],
)
def test_a_bad_folder_is_answered_in_one_line(tmp_path, write_fn, must_name):
  write_fn(tmp_path)
  message = error_line('folder', path=str(tmp_path), image_size=8, channels=3)
  assert must_name in message
  assert str(tmp_path) in message


def test_links_within_the_folder(tmp_path):
  (tmp_path / 'a').mkdir()
  Image.new('L', (8, 8), 7).save(tmp_path / 'a' / '1.png')
  os.symlink(tmp_path / 'a' / '1.png', tmp_path / 'a' / '2.png')
  os.symlink(tmp_path / 'a', tmp_path / 'b')  # would count all images twice
  os.symlink(tmp_path / 'ring', tmp_path / 'ring')
  source = folder(tmp_path, channels=1)
  assert all_images(source)[:, 0, 0, 0].tolist() == [7, 7]


def test_a_broken_file_stops_the_stream_and_is_named(tmp_path):
  Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
  broken_image(tmp_path)
  dataset = pipeline.stream(folder(tmp_path), batch_size=2, seed=0, flip=True)
  with pytest.raises(UserError, match=r'cut\.png'):
    next(iter(dataset.to_iter_dataset()))


def test_a_set_of_moderate_size_is_decoded_once(tmp_path):
  Image.new('L', (8, 8), 7).save(tmp_path / 'a.png')
  source = folder(tmp_path, channels=1)
  first = source[0]
  (tmp_path / 'a.png').unlink()
  np.testing.assert_array_equal(source[0]['image'], first['image'])
  assert source[0]['label'] == first['label']


def test_a_large_set_is_not_kept(monkeypatch):
  monkeypatch.setattr(sources, 'KEEP_BYTES', 10)
  source = numbered(3)
  assert sources.keep_in_memory(source, (4, 4, 1)) is source


# --- TFDS --------------------------------------------------------------------


def varint(number):
  """A protobuf varint."""
  groups = [number >> i & 127 for i in range(0, number.bit_length() or 1, 7)]
  return bytes([group | 128 for group in groups[:-1]] + groups[-1:])


def field(number, content):
  """A protobuf field with a length."""
  return varint(number << 3 | 2) + varint(len(content)) + content


def tf_example(**features):
  """tf.train.Example of bytes and integers, without TensorFlow."""

  def value(x):
    if isinstance(x, bytes):
      return field(1, field(1, x))
    return field(3, field(1, varint(x)))

  entries = [
    field(1, field(1, name.encode()) + field(2, value(x)))
    for name, x in sorted(features.items())
  ]
  return field(1, b''.join(entries))


def write_tfds(data_dir, name, version, features, splits):
  """A prepared set: features {name: connector}, splits {name: examples}."""
  import tensorflow_datasets as tfds

  directory = data_dir / name / version
  directory.mkdir(parents=True)
  tfds.features.FeaturesDict(features).save_config(str(directory))
  infos = []
  for split, examples in splits.items():
    shard = directory / f'{name}-{split}.array_record-00000-of-00001'
    writer = ArrayRecordWriter(str(shard), 'group_size:1')
    for example in examples:
      writer.write(tf_example(**example))
    writer.close()
    infos.append(
      {
        'name': split,
        'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
        'numBytes': '1',
        'shardLengths': [str(len(examples))],
      }
    )
  info = {
    'name': name,
    'version': version,
    'fileFormat': 'array_record',
    'moduleName': name,
    'splits': infos,
  }
  (directory / 'dataset_info.json').write_text(json.dumps(info))
  return directory


def png(image):
  stream = io.BytesIO()
  Image.fromarray(image).save(stream, format='png')
  return stream.getvalue()


def write_cifar10(data_dir, version='3.0.2', num_train=20, num_test=5):
  """A small set under a name that TFDS knows; returns images and labels."""
  import tensorflow_datasets as tfds

  images = random_images(num_train + num_test, size=32)
  labels = np.arange(len(images)) % 10
  examples = [
    {'image': png(image), 'label': int(label), 'id': b'x'}
    for image, label in zip(images, labels, strict=True)
  ]
  directory = write_tfds(
    data_dir,
    'cifar10',
    version,
    {
      'id': tfds.features.Text(),
      'image': tfds.features.Image(shape=(32, 32, 3)),
      'label': tfds.features.ClassLabel(num_classes=10),
    },
    {'train': examples[:num_train], 'test': examples[num_train:]},
  )
  return images, labels, directory


def tfds_source(data_dir, name='cifar10', split='train', **kwargs):
  return data.create(
    f'tfds:{name}',
    path=str(data_dir),
    split=split,
    **({'image_size': 32, 'channels': 3} | kwargs),
  )


@pytest.mark.parametrize('version', ['3.0.2', '2.9.9'])
def test_a_prepared_set_is_read_back_equal(tmp_path, version):
  images, labels, _ = write_cifar10(tmp_path, version)
  train = tfds_source(tmp_path)
  test = tfds_source(tmp_path, split='test')
  np.testing.assert_array_equal(all_images(train), images[:20])
  np.testing.assert_array_equal(all_images(test), images[20:])
  assert all_labels(train) == list(labels[:20])
  assert train.num_classes == 10
  part = tfds_source(tmp_path, split='train[5:15]')
  np.testing.assert_array_equal(all_images(part), images[5:15])


def test_the_rules_for_tfds_are_those_for_folders(tmp_path):
  images, _, _ = write_cifar10(tmp_path / 'tfds', num_train=2)
  (tmp_path / 'files').mkdir()
  for i in range(2):
    Image.fromarray(images[i]).save(tmp_path / 'files' / f'{i}.png')
  size = {'image_size': 12, 'channels': 1}
  np.testing.assert_array_equal(
    all_images(tfds_source(tmp_path / 'tfds', **size)),
    all_images(folder(tmp_path / 'files', **size)),
  )


def test_a_set_of_ones_own_without_labels_and_test(tmp_path):
  import tensorflow_datasets as tfds

  images = random_images(3, channels=1)
  write_tfds(
    tmp_path,
    'my_own',
    '1.0.0',
    {'image': tfds.features.Image(shape=(None, None, 1))},
    {'train': [{'image': png(image[..., 0])} for image in images]},
  )
  size = {'image_size': 8, 'channels': 1}
  source = tfds_source(tmp_path, 'my_own', **size)
  np.testing.assert_array_equal(all_images(source), images)
  assert all_labels(source) == [-1] * 3
  assert source.num_classes == 0
  assert tfds_source(tmp_path, 'my_own', split='test', **size) is None


def test_tfds_reads_from_several_threads(tmp_path, monkeypatch):
  monkeypatch.setattr(sources, 'KEEP_BYTES', 0)
  images, labels, _ = write_cifar10(tmp_path)
  passes = pipeline.heldout(tfds_source(tmp_path), batch_size=3, num_threads=4)
  batches = [batch for batch, _ in passes]
  stacked = np.concatenate([batch['image'] for batch in batches])
  np.testing.assert_array_equal(stacked[:20], images[:20])
  stacked = np.concatenate([batch['label'] for batch in batches])
  np.testing.assert_array_equal(stacked[:20], labels[:20])


TFDS_MISTAKES = {
  'unknown': ({'name': 'cifr10'}, ['cifr10', 'mean tfds:cifar10']),
  'not prepared': ({'name': 'mnist'}, ['mnist', 'prepare_data.sh']),
  'needs TensorFlow': ({'name': 'coco'}, ['coco', 'prepare_data.sh']),
  'other version': ({'name': 'cifar10:9.9.9'}, ['9.9.9', 'prepare_data.sh']),
  'no name': ({'name': ''}, ["'tfds:'"]),
  'namespace': ({'name': 'huggingface:mnist'}, ['huggingface:mnist']),
  'split': ({'split': 'valid'}, ["'valid'", "'train'"]),
  'split syntax': ({'split': 'train[:10'}, ["'train[:10'"]),
  'empty split': ({'split': 'train[5:3]'}, ["'train[5:3]'"]),
  'heldout_every': ({'heldout_every': 5}, ['heldout_every is 5']),
  'channels': ({'channels': 2}, ['channels is 2']),
}


@pytest.mark.parametrize('case', TFDS_MISTAKES)
def test_a_mistake_with_tfds_is_answered_in_one_line(tmp_path, capfd, case):
  kwargs, must_name = TFDS_MISTAKES[case]
  write_cifar10(tmp_path, num_train=2, num_test=1)
  with pytest.raises(UserError) as caught:
    tfds_source(tmp_path, **kwargs)
  assert '\n' not in str(caught.value)
  for part in must_name:
    assert part in str(caught.value)
  assert [path.name for path in tmp_path.iterdir()] == ['cifar10']
  assert capfd.readouterr() == ('', '')


def remove_shard(directory):
  (directory / 'cifar10-train.array_record-00000-of-00001').unlink()


def truncate_shard(directory):
  shard = directory / 'cifar10-train.array_record-00000-of-00001'
  shard.write_bytes(shard.read_bytes()[:-10000])


def truncate_info(directory):
  info = directory / 'dataset_info.json'
  info.write_text(info.read_text()[:-20])


def as_tfrecord(directory):
  info = directory / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))


@pytest.mark.parametrize(
  ('damage_fn', 'must_name'),
  [
    (remove_shard, 'cifar10-train'),
    (truncate_shard, 'cifar10'),
    (truncate_info, 'cifar10'),
    (as_tfrecord, 'tfrecord'),
  ],
)
def test_a_damaged_tfds_set_is_answered_in_one_line(
  tmp_path, damage_fn, must_name
):
  damage_fn(write_cifar10(tmp_path)[-1])
  message = error_line(
    'tfds:cifar10', path=str(tmp_path), image_size=32, channels=3
  )
  assert must_name in message


def test_tfds_without_an_image(tmp_path):
  import tensorflow_datasets as tfds

  features = {'words': tfds.features.Text()}
  write_tfds(tmp_path, 'prose', '1.0.0', features, {'train': [{'words': b'a'}]})
  message = error_line(
    'tfds:prose', path=str(tmp_path), image_size=32, channels=3
  )
  assert 'words' in message


def test_an_unprepared_set_makes_no_folder_and_loads_no_tensorflow(tmp_path):
  script = """
import sys
from diffusion_jax import data
from diffusion_jax.errors import UserError
try:
  data.create('tfds:cifar10', path=sys.argv[1], image_size=32, channels=3)
except UserError as error:
  assert 'prepare_data.sh' in str(error), error
else:
  raise SystemExit('no error')
assert 'tensorflow' not in sys.modules
"""
  result = subprocess.run(
    [sys.executable, '-c', script, str(tmp_path / 'none')],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  assert result.stderr == ''
  assert not (tmp_path / 'none').exists()


# --- the stream --------------------------------------------------------------


def labels_of(dataset, num_batches, start=0):
  return np.concatenate(
    [dataset[k]['label'] for k in range(start, start + num_batches)]
  )


def is_flipped(batch):
  """Whether the marked column of `numbered` is on the right: bool [B]."""
  return batch['image'][:, 0, -1, 0] == 255


@pytest.mark.parametrize('num_images', [1, 2, 10, 64, 100])
def test_each_epoch_visits_each_image_once_in_an_order_of_its_own(num_images):
  # Batches that straddle the epochs, and some that hold several.
  dataset = pipeline.stream(
    numbered(num_images), batch_size=16, seed=3, flip=False
  )
  epochs = labels_of(dataset, num_images)[: 16 * num_images]
  epochs = epochs.reshape(16, num_images)
  for epoch in epochs:
    assert sorted(epoch) == list(range(num_images))
  if num_images >= 10:
    assert len({tuple(epoch) for epoch in epochs}) == 16


def test_the_seed_chooses_order_and_flips():
  source = numbered(100)
  first, second = (
    pipeline.stream(source, batch_size=100, seed=seed, flip=True)[0]
    for seed in (0, 1)
  )
  assert (first['label'] != second['label']).any()
  assert (is_flipped(first) != is_flipped(second)).any()
  again = pipeline.stream(source, batch_size=100, seed=0, flip=True)[0]
  np.testing.assert_array_equal(first['image'], again['image'])


def test_the_next_seed_is_not_the_next_epoch():
  source = numbered(50)
  epochs = pipeline.stream(source, batch_size=50, seed=0, flip=False)
  other = pipeline.stream(source, batch_size=50, seed=1, flip=False)
  assert (epochs[1]['label'] != other[0]['label']).any()


@pytest.mark.parametrize('num_processes', [2, 4])
def test_processes_share_the_stream_of_one(num_processes):
  kwargs = {'batch_size': 8, 'seed': 5, 'flip': True}
  whole = pipeline.stream(numbered(30), **kwargs)
  local = 8 // num_processes
  parts = [
    pipeline.stream(
      numbered(30), rows=slice(p * local, (p + 1) * local), **kwargs
    )
    for p in range(num_processes)
  ]
  for k in range(10):
    for name in ('image', 'label'):
      np.testing.assert_array_equal(
        whole[k][name], np.concatenate([part[k][name] for part in parts])
      )


def test_rows_may_lie_anywhere():
  kwargs = {'batch_size': 8, 'seed': 5, 'flip': True}
  rows = np.array([1, 2, 6])
  whole = pipeline.stream(numbered(30), **kwargs)[4]
  part = pipeline.stream(numbered(30), rows=rows, **kwargs)[4]
  np.testing.assert_array_equal(part['image'], whole['image'][rows])


def test_the_order_does_not_depend_on_the_batch_size():
  small = pipeline.stream(numbered(30), batch_size=4, seed=0, flip=True)
  large = pipeline.stream(numbered(30), batch_size=12, seed=0, flip=True)
  np.testing.assert_array_equal(
    np.concatenate([small[k]['image'] for k in range(6)]),
    np.concatenate([large[k]['image'] for k in range(2)]),
  )


def test_a_flip_belongs_to_the_position():
  dataset = pipeline.stream(numbered(10), batch_size=1000, seed=0, flip=True)
  batches = [dataset[k] for k in range(4)]
  flips = np.concatenate([is_flipped(batch) for batch in batches])
  assert abs(flips.mean() - 0.5) < 0.04  # five standard deviations
  # Neither the image nor the position before decides.
  labels = np.concatenate([batch['label'] for batch in batches])
  for label in range(10):
    assert abs(flips[labels == label].mean() - 0.5) < 0.13
  assert abs((flips[1:] == flips[:-1]).mean() - 0.5) < 0.04
  # A flipped image is its mirror, and no image is flipped unless asked.
  plain = pipeline.stream(numbered(10), batch_size=1000, seed=0, flip=False)[0]
  mirrored = plain['image'][:, :, ::-1]
  chosen = is_flipped(batches[0])
  np.testing.assert_array_equal(
    batches[0]['image'],
    np.where(chosen[:, None, None, None], mirrored, plain['image']),
  )
  assert not is_flipped(plain).any()


def test_the_source_is_left_as_it_was():
  source = numbered(10)
  before = all_images(source)
  pipeline.stream(source, batch_size=64, seed=0, flip=True)[0]
  np.testing.assert_array_equal(all_images(source), before)


def test_threads_and_restarts_change_nothing():
  sharding = NamedSharding(jax.make_mesh((1,), ('data',)), jax.P('data'))

  def run(num_batches, **kwargs):
    batches = pipeline.batches(
      numbered(30),
      batch_size=8,
      seed=1,
      flip=True,
      sharding=sharding,
      **kwargs,
    )
    taken = [next(batches) for _ in range(num_batches)]
    batches.close()
    return [{k: np.asarray(x) for k, x in batch.items()} for batch in taken]

  whole = run(9, num_threads=0)
  for num_threads in (1, 4, None):
    for start in (0, 5):
      part = run(9 - start, num_threads=num_threads, start_step=start)
      for a, b in zip(whole[start:], part, strict=True):
        np.testing.assert_array_equal(a['image'], b['image'])
        np.testing.assert_array_equal(a['label'], b['label'])


def test_batches_are_global_arrays():
  sharding = NamedSharding(jax.make_mesh((1,), ('data',)), jax.P(('data',)))
  batch = next(
    pipeline.batches(
      data.create('digits', image_size=8, channels=1),
      batch_size=16,
      seed=0,
      flip=False,
      sharding=sharding,
    )
  )
  assert batch['image'].shape == (16, 8, 8, 1)
  assert batch['image'].dtype == np.uint8
  assert batch['label'].shape == (16,)
  assert batch['label'].dtype == np.int32
  assert batch['image'].sharding.is_equivalent_to(sharding, 4)


def test_eight_devices_hold_the_rows_of_one():
  """In a process of its own, for the number of devices is set at the start."""
  script = """
import jax
jax.config.update('jax_num_cpu_devices', 8)
import numpy as np
from jax.sharding import NamedSharding
from diffusion_jax import data
from diffusion_jax.data import pipeline
from diffusion_jax.errors import UserError

source = data.create('digits', image_size=8, channels=1)
kwargs = dict(batch_size=16, seed=0, flip=True)
whole = pipeline.stream(source, **kwargs)[3]
axes = ('data', 'fsdp', 'tensor')
for shape, spec in [
  ((8, 1, 1), jax.P(('data', 'fsdp'))),
  ((2, 2, 2), jax.P(('data', 'fsdp'))),
  ((1, 1, 8), jax.P(('data', 'fsdp'))),
  ((8, 1, 1), jax.P()),
]:
  sharding = NamedSharding(jax.make_mesh(shape, axes), spec)
  batches = pipeline.batches(source, sharding=sharding, start_step=3, **kwargs)
  with jax.transfer_guard('disallow'):
    batch = next(batches)
  batches.close()
  assert batch['image'].sharding == sharding
  for name, x in batch.items():
    np.testing.assert_array_equal(jax.device_get(x), whole[name])

mesh = jax.make_mesh((4, 2, 1), axes)
sharding = NamedSharding(mesh, jax.P(('data', 'fsdp')))
try:
  pipeline.local_rows(sharding, 63)
except UserError as error:
  assert '63' in str(error) and '8' in str(error), error
else:
  raise SystemExit('63 was accepted')
"""
  subprocess.run(
    [sys.executable, '-c', script],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    check=True,
  )


@pytest.mark.parametrize(
  ('kwargs', 'must_name'),
  [
    ({'batch_size': 0}, 'batch_size is 0'),
    ({'seed': -1}, 'seed is -1'),
    ({'start_step': -2}, 'start_step is -2'),
  ],
)
def test_a_bad_number_is_answered_in_one_line(kwargs, must_name):
  sharding = NamedSharding(jax.make_mesh((1,), ('data',)), jax.P('data'))
  defaults = {'batch_size': 8, 'seed': 0, 'flip': False, 'sharding': sharding}
  with pytest.raises(UserError, match=must_name):
    pipeline.batches(numbered(4), **(defaults | kwargs))


# --- held-out images ---------------------------------------------------------


@pytest.mark.parametrize(
  ('num_examples', 'counted'), [(0, 10), (3, 3), (8, 8), (99, 10)]
)
def test_heldout_is_one_pass_in_order(num_examples, counted):
  pairs = list(
    pipeline.heldout(numbered(10), batch_size=4, num_examples=num_examples)
  )
  assert len(pairs) == -(-counted // 4)
  labels = np.concatenate([batch['label'] for batch, _ in pairs])
  weights = np.concatenate([weight for _, weight in pairs])
  assert all(len(batch['image']) == 4 for batch, _ in pairs)
  assert weights.dtype == np.float32
  assert weights.tolist() == [1] * counted + [0] * (len(weights) - counted)
  assert labels[:counted].tolist() == list(range(counted))


def test_processes_share_the_heldout_images():
  whole = pipeline.heldout(numbered(10), batch_size=4)
  parts = [
    pipeline.heldout(numbered(10), batch_size=4, rows=rows)
    for rows in (slice(0, 2), slice(2, 4))
  ]
  for (batch, weight), *pieces in zip(whole, *parts, strict=True):
    np.testing.assert_array_equal(
      batch['label'], np.concatenate([piece['label'] for piece, _ in pieces])
    )
    np.testing.assert_array_equal(
      weight, np.concatenate([w for _, w in pieces])
    )


# --- preparing ---------------------------------------------------------------


@pytest.mark.parametrize(
  ('arguments', 'code', 'must_name'),
  [
    ([], 2, 'prepare_data.sh NAME'),
    (['--help'], 0, 'prepare_data.sh NAME'),
    (['--frobnicate'], 2, '--frobnicate'),
    (['a', 'b', 'c'], 2, '3 arguments'),
  ],
)
def test_prepare_data_explains_itself(arguments, code, must_name):
  result = subprocess.run(
    ['bash', ROOT / 'launch' / 'prepare_data.sh', *arguments],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == code
  assert must_name in (result.stderr if code else result.stdout)
