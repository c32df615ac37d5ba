"""Arrays: .npy and .npz files, good and damaged."""

import io
import tracemalloc
import zipfile

import binaries
import numpy as np
import pytest
from imagesets import all_images, all_labels, error_line, random_images
from PIL import Image

from diffusion_jax import data
from diffusion_jax.system.errors import UserError

CIFAR = binaries.ROOT.parent / 'shared' / 'data' / 'cifar10'


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


def test_test_images_go_before_every_nth(tmp_path):
  images = random_images(6)
  np.savez(tmp_path / 'a.npz', train_images=images[:4], test_images=images[4:])
  kwargs = {'path': str(tmp_path / 'a.npz'), 'image_size': 8, 'channels': 3}
  source = data.create('arrays', heldout_every=2, **kwargs)
  assert len(source) == 4
  assert any('heldout_every is ignored' in note for note in source.notes)


def test_npz_with_the_names_of_keras(tmp_path):
  images, labels = random_images(6, channels=1)[..., 0], np.arange(6) % 3
  np.savez(
    tmp_path / 'mnist.npz', x_train=images[:4], y_train=labels[:4],
    x_test=images[4:], y_test=labels[4:],
  )  # fmt: skip
  for split, part in (('train', slice(4)), ('test', slice(4, 6))):
    source = data.create(
      'arrays',
      path=str(tmp_path / 'mnist.npz'),
      split=split,
      image_size=8,
      channels=1,
    )
    np.testing.assert_array_equal(all_images(source)[..., 0], images[part])
    assert all_labels(source) == list(labels[part])
    assert source.num_classes == 3


def test_npz_with_unnamed_images(tmp_path):
  np.savez(tmp_path / 'a.npz', random_images(3))
  source = arrays(tmp_path / 'a.npz')
  np.testing.assert_array_equal(all_images(source), random_images(3))


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_images_that_are_not_compressed_are_not_read_into_memory(
  tmp_path, save
):
  images = np.zeros((20_000, 8, 8, 3), np.uint8)
  images[1234] = 77
  save(tmp_path / 'a.npz', labels=np.arange(20_000) % 3, images=images)
  tracemalloc.start()
  try:
    source = arrays(tmp_path / 'a.npz')
    _, most = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert (most > images.nbytes) == (save is np.savez_compressed)
  image, label = source.read_fn(1234)
  assert image.min() == image.max() == 77
  assert label == 1234 % 3


def test_a_npz_that_is_cut_while_it_is_open_is_one_line(tmp_path):
  np.savez(tmp_path / 'a.npz', images=random_images(1000))
  source = arrays(tmp_path / 'a.npz')
  with (tmp_path / 'a.npz').open('r+b') as file:
    file.truncate(100)
  with pytest.raises(UserError, match='has become shorter'):
    source.read_fn(999)


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
  'no images': (
    lambda p: np.savez(p, X=random_images(2), y=[1, 2]),
    ['X, y', 'train_images'],
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
  ('labels', 'why'),
  [
    ([1, 2], '3 images, but 2 labels'),
    ([-7, 2, 0], 'from -7 to 2'),
    (['cat', 'dog', 'cat'], '<U3'),
    ([0.0, 1.0, 2.0], 'float64'),
    (np.eye(3, dtype=np.uint8), 'uint8 [3, 3]'),
    (np.array(['a', None, 1], object), 'pickled'),
    (np.array([True, False, True]), 'bool'),
    ([2**40, 1, 2], 'from 1 to'),
    (7, 'int64 []'),
  ],
)
def test_labels_that_are_no_classes_are_left_out_with_a_note(
  tmp_path, labels, why
):
  images = random_images(3)
  np.savez(tmp_path / 'a.npz', images=images, labels=labels)
  source = arrays(tmp_path / 'a.npz')
  np.testing.assert_array_equal(all_images(source), images)
  assert all_labels(source) == [-1] * 3
  assert source.num_classes == 0
  (note,) = source.notes
  assert note.startswith('the labels are left out: ')
  assert why in note


def test_labels_of_one_split_that_are_no_classes(tmp_path):
  images = random_images(4)
  np.savez(
    tmp_path / 'a.npz', train_images=images, train_labels=[0, 1, 2, 3],
    test_images=images[:2], test_labels=[-1, -1],
  )  # fmt: skip
  for split in ('train', 'test'):
    source = arrays(tmp_path / 'a.npz', split)
    assert source.num_classes == 0
    assert "'test_labels'" in source.notes[0]


@pytest.mark.parametrize(
  ('images', 'must'),
  [
    (np.zeros((2, 3, 8, 8), np.uint8), ['channels come first', 'np.moveaxis']),
    (np.zeros((2, 8, 8, 3), np.float32), ['float32', '(images * 255)']),
    (np.zeros((2, 3, 8, 8)), ['np.moveaxis', '(images * 255)']),
    (np.zeros((2, 8, 8, 3), bool), ['bool', '* 255']),
    (np.zeros((2, 8, 8, 3), np.int64), ['int64', 'astype(np.uint8)']),
    (np.zeros((2, 8, 8), np.uint8), ['grey', 'set channels to 1']),
    (np.zeros((8, 8, 3), np.uint8), ['images[None]']),
    (np.zeros((2, 16, 16, 3), np.uint8), ['set image_size and channels']),
  ],
  ids=str,
)
def test_images_of_another_form_are_answered_with_what_to_do(
  tmp_path, images, must
):
  np.save(tmp_path / 'a.npy', images)
  message = error_line(
    'arrays', path=str(tmp_path / 'a.npy'), image_size=8, channels=3
  )
  for part in must:
    assert part in message


def test_the_advice_on_channels_first_helps(tmp_path):
  images = random_images(2)
  np.save(tmp_path / 'a.npy', np.moveaxis(images, -1, 1))
  first = np.load(tmp_path / 'a.npy')
  np.save(tmp_path / 'a.npy', np.moveaxis(first, 1, -1))
  np.testing.assert_array_equal(all_images(arrays(tmp_path / 'a.npy')), images)


def test_arrays_of_0_and_1_are_said_to_be_dark(tmp_path):
  np.save(tmp_path / 'a.npy', random_images(9) % 2)
  (note,) = arrays(tmp_path / 'a.npy').notes
  assert 'the brightest value of 9 images looked at is 1 of 255' in note


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
