"""Sets that are written are read as what they were."""

import json

import imagesets
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data
from diffusion_jax.configs import digits_conditional
from diffusion_jax.data import labels, written
from diffusion_jax.system.errors import UserError

NAMES = ['cat', 'train', 'two words', *map(str, range(3, 12))]
OPENED = {'npz': 'arrays', 'folder': 'folder', 'arrayrecord': 'tfds:more'}


def made(channels=3, count=24):
  images = imagesets.random_images(count, channels=channels)
  its = np.arange(count, dtype=np.int32) * 5 % len(NAMES)
  return written.Labelled(images, its, NAMES, lambda i: {'key': str(i)})


def place(folder, kind):
  return folder / ('more.npz' if kind == 'npz' else 'more')


def opened(folder, kind, channels):
  path = folder if kind == 'arrayrecord' else place(folder, kind)
  return data.create(
    OPENED[kind], path=str(path), image_size=8, channels=channels
  )


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('kind', written.WRITERS)
def test_what_is_written_is_read(tmp_path, kind, channels):
  want = made(channels)
  written.write(kind, place(tmp_path, kind), want)
  source = opened(tmp_path, kind, channels)
  assert len(source) == len(want.images)
  assert source.num_classes == len(NAMES)
  if kind == 'arrayrecord':
    assert list(source.class_names) == NAMES

  def rows(images, labels):
    return sorted(
      (int(label), image.tobytes())
      for image, label in zip(images, labels, strict=True)
    )

  assert rows(
    imagesets.all_images(source), imagesets.all_labels(source)
  ) == rows(want.images, want.labels)
  assert not [path for path in tmp_path.iterdir() if path.name[0] == '.']


def test_folders_are_named_after_classes_and_pictures_have_their_text(tmp_path):
  written.write('folder', tmp_path / 'more', made())
  assert {path.name for path in (tmp_path / 'more').iterdir()} >= {
    '00_cat', '01_train', '02_two-words', '03', '11', 'dataset.json',
  }  # fmt: skip
  listed = json.loads((tmp_path / 'more/dataset.json').read_text())['labels']
  for number, (name, _) in enumerate(listed):
    with Image.open(tmp_path / 'more' / name) as image:
      assert image.info['key'] == str(number)


@pytest.mark.parametrize('kind', written.WRITERS)
def test_some_of_the_classes_keep_their_labels(tmp_path, kind):
  """Also in folders, of which there are fewer than classes."""
  want = made()._replace(labels=np.full(24, 4, np.int32))
  written.write(kind, place(tmp_path, kind), want)
  assert {*imagesets.all_labels(opened(tmp_path, kind, 3))} == {4}


@pytest.mark.parametrize('kind', written.WRITERS)
def test_a_config_reads_it(tmp_path, kind):
  """That of digits_conditional, with the set as its data."""
  rng = np.random.default_rng(0)
  want = written.Labelled(
    rng.integers(0, 256, (10, 8, 8, 1), np.uint8),
    np.arange(10, dtype=np.int32), [*map(str, range(10))],
  )  # fmt: skip
  written.write(kind, place(tmp_path, kind), want)
  config = digits_conditional.get_config().data
  path = tmp_path if kind == 'arrayrecord' else place(tmp_path, kind)
  config.update(name=OPENED[kind], path=str(path), heldout_split='')
  train, _ = data.splits(config)
  labels.check(train, None, 10)
  np.testing.assert_array_equal(imagesets.all_images(train), want.images)
  assert imagesets.all_labels(train) == want.labels.tolist()


def test_large_labels_and_numbers_are_whole(tmp_path):
  """Of more than seven bits, in the records of TFDS."""
  names = [f'class {i}' for i in range(300)]
  want = made()._replace(
    labels=np.arange(24, dtype=np.int32) * 13, class_names=names
  )
  written.write('arrayrecord', tmp_path / 'more', want)
  source = opened(tmp_path, 'arrayrecord', 3)
  assert imagesets.all_labels(source) == want.labels.tolist()


@pytest.mark.parametrize('kind', written.WRITERS)
def test_a_failure_leaves_nothing(tmp_path, kind):
  bad = made()
  bad = bad._replace(images=bad.images[:3].astype(object), labels=[None] * 3)
  with pytest.raises((TypeError, ValueError, KeyError)):
    written.write(kind, place(tmp_path, kind), bad)
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
  ('kind', 'path', 'channels', 'told'),
  [
    ('npz', 'more', 1, 'ends in .npz'),
    ('folder', 'more.npz', 1, 'give a folder'),
    ('folder', 'more', 2, '1 or 3 channels, not 2'),
    ('arrayrecord', 'More-1', 1, 'small letters'),
  ],
)
def test_mistakes(tmp_path, kind, path, channels, told):
  with pytest.raises(UserError, match=told) as caught:
    written.check(kind, tmp_path / path, channels)
  assert '\n' not in str(caught.value)
