"""Folders of image files, and the one rule from a file to an array."""

import os

import binaries
import numpy as np
import pytest
from imagesets import (
  all_images,
  all_labels,
  error_line,
  folder,
  numbered,
  random_images,
)
from PIL import Image

from diffusion_jax import data
from diffusion_jax.data import pipeline, sources
from diffusion_jax.system.errors import UserError


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
  os.symlink(binaries.ROOT / 'README.md', path / 'out.png')


def folder_link_out(path):
  os.symlink(binaries.ROOT, path / 'away')


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


def test_pictures_of_other_proportions(tmp_path):
  """(height, width): the largest centred rectangle, resized."""
  pixels = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
  Image.fromarray(pixels).save(tmp_path / 'a.png')

  def read(size):
    source = data.create(
      name='folder', path=str(tmp_path), split='train', image_size=size,
      channels=3,
    )  # fmt: skip
    return source[0]['image']

  np.testing.assert_array_equal(read((20, 30)), pixels)
  assert read((10, 20)).shape == (10, 20, 3)
  # Of 30x20 twice as wide as high: 30x15, two rows off above, three below.
  cut = Image.fromarray(pixels[2:17])
  expected = cut.resize((10, 5), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(read((5, 10)), expected)
  with pytest.raises(UserError, match=r'data\.image_size is'):
    read((5, 0))
