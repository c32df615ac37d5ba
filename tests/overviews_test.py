"""Grids beside the samples in a folder."""

import numpy as np
import pytest
from judges import random_images
from PIL import Image

from diffusion_jax import data
from diffusion_jax.data import overviews
from diffusion_jax.system.errors import UserError


def save(path, image):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(image).save(path)


def tiled(images, across, margin=2):
  """A grid with black lines, as others draw it."""
  padded = np.pad(images, ((0, 0), (margin, 0), (margin, 0), (0, 0)))
  rows = np.split(padded, len(images) // across)
  return np.concatenate([np.concatenate(list(row), 1) for row in rows])


@pytest.fixture
def samples(tmp_path):
  images = random_images(24, (8, 8, 3))
  for i, image in enumerate(images):
    save(tmp_path / f'{i:04d}.png', image)
  return images


@pytest.mark.parametrize(
  'name', ['grid.png', 'zz_step_0001.png', '-first.png', 'overview/all.png']
)
def test_a_grid_is_left_out_and_named(tmp_path, samples, name):
  """Wherever its name sorts."""
  save(tmp_path / name, tiled(samples, 6))
  source = data.open_set(str(tmp_path))
  assert len(source) == 24
  np.testing.assert_array_equal(source[0]['image'], samples[0])
  (note,) = [note for note in source.notes if 'left out' in note]
  assert repr(name) in note


def test_a_set_that_is_resized_needs_the_word_too(tmp_path, samples):
  """Photos are of any size."""
  save(tmp_path / 'photo.png', tiled(samples, 6))
  assert len(data.open_set(str(tmp_path), image_size=8)) == 25
  (tmp_path / 'photo.png').rename(tmp_path / 'my_samples.png')
  assert len(data.open_set(str(tmp_path), image_size=8)) == 24
  create = {'path': str(tmp_path), 'image_size': 8, 'channels': 3}
  assert len(data.create('folder', **create)) == 25  # to train on


def test_a_set_of_two_sizes_is_refused(tmp_path, samples):
  for i in range(6):
    save(tmp_path / f'large_{i}.png', random_images(1, (32, 32, 3), i)[0])
  source = data.open_set(str(tmp_path))
  assert len(source) == 30
  with pytest.raises(UserError, match='--image_size=N'):
    source[29]


@pytest.mark.parametrize(
  ('sizes', 'left'),
  [
    ({'a': 10, 'b': 10, 'c': 10, 'grid': 100}, ['grid']),
    ({'a': 10, 'b': 10, 'c': 10, 'd': 12}, []),  # no larger file
    ({'grid': 10}, []),
    ({f'{i}': 10 for i in range(300)} | {'x': 99, 'y': 99}, ['x', 'y']),
    (dict.fromkeys('abcdefghij', 10) | dict.fromkeys('wxyz', 99), []),
  ],
)
def test_only_few_larger_files_are_overviews(sizes, left):
  def size_of(name):
    return (64, 64) if sizes[name] > 50 else (8, 8)

  assert overviews.find(list(sizes.items()), size_of, False) == left


def test_files_that_are_only_larger_are_images(tmp_path):
  """A noisy image among flat ones has more bytes, and as many pixels."""
  for i in range(9):
    save(tmp_path / f'{i}.png', np.full((16, 16, 3), i, np.uint8))
  save(tmp_path / 'grid.png', random_images(1, (16, 16, 3))[0])
  assert len(data.open_set(str(tmp_path))) == 10


@pytest.mark.parametrize('names', [['a.png'], ['a.png', 'b.png', 'grid.png']])
@pytest.mark.parametrize('folders', [['png'], ['0', '1', '2']])
def test_small_grids_beside_folders_of_samples(tmp_path, names, folders):
  """Four images each, with fewer bytes than twice those of one."""
  images = random_images(24, (8, 8, 3))
  for i, image in enumerate(images):
    save(tmp_path / 'out' / folders[i % len(folders)] / f'{i:04d}.png', image)
  for name in names:
    save(tmp_path / 'out' / name, np.zeros((18, 18, 3), np.uint8))
  source = data.open_set(str(tmp_path))
  assert len(source) == 24
  assert source[0]['image'].shape == (8, 8, 3)
  (note,) = [note for note in source.notes if 'left out' in note]
  assert f'{len(names)} larger pictures beside the folders' in note
  assert repr(f'out/{names[0]}') in note


def test_samples_beside_folders_of_samples_are_named(tmp_path, samples):
  """Of the same size: which of them are meant is not clear."""
  for i in range(30):
    save(tmp_path / 'more' / f'{i}.png', random_images(1, (8, 8, 3), i)[0])
  with pytest.raises(UserError) as error:
    data.open_set(str(tmp_path))
  told = str(error.value)
  assert "directly inside ('0000.png', " in told
  assert "in sub-folders ('more')" in told
  assert told.endswith('move those 24 away, or give one of the sub-folders')
