"""Digits, and what every source promises: records, and one-line mistakes."""

import numpy as np
import pytest
from imagesets import all_images, all_labels, error_line, numbered
from PIL import Image

from diffusion_jax import data
from diffusion_jax.system.errors import UserError


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
  everything = data.create('digits', split='all', image_size=8, channels=1)
  np.testing.assert_array_equal(all_images(everything), whole)


def test_a_set_with_test_images_of_its_own_has_no_split_of_all(tmp_path):
  images = np.zeros((3, 4, 4, 3), np.uint8)
  named = {'train_images': images, 'test_images': images[:1]}
  np.savez(tmp_path / 'own.npz', **named)
  np.savez(tmp_path / 'plain.npz', images=images)
  for split in ('train', 'test'):
    for i in range(2):
      path = tmp_path / 'folder' / split / f'{i}.png'
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(images[i]).save(path)
  how = {'split': 'all', 'image_size': 4, 'channels': 3}
  for name, path in (('arrays', 'own.npz'), ('folder', 'folder')):
    told = error_line(name, path=str(tmp_path / path), **how)
    assert 'has test images of its own: use train or test' in told
  plain = str(tmp_path / 'plain.npz')
  for every in (0, 2):
    source = data.create('arrays', path=plain, heldout_every=every, **how)
    assert len(source) == 3
  with pytest.raises(UserError, match='use train, test or all'):
    data.create('arrays', path=plain, **{**how, 'split': 'val'})


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
  'split': (('digits',), {'split': 'val'}, ["'val'", 'train, test or all']),
  'heldout': (('digits',), {'heldout_every': 1}, ['heldout_every is 1']),
  'no path': (('arrays',), {}, ['path is empty: name', 'arrays']),
  'no folder path': (('folder',), {}, ['path is empty: name', 'folder']),
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
  assert 'data.' not in message  # the argument is no key of a config


def test_a_mistake_in_a_config_names_its_key():
  config = {'train_split': 'train', 'heldout_split': '', 'channels': 1}
  for name, size, must in (
    ('folder', 8, "data.path is empty: data.name 'folder' needs a path"),
    ('digits', 0, 'data.image_size is 0'),
  ):
    with pytest.raises(UserError, match=must):
      data.splits({**config, 'name': name, 'image_size': size})
