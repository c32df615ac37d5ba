"""Folders of image files, and the one rule from a file to an array."""

import io
import os
import struct

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
from PIL import Image, PngImagePlugin

from diffusion_jax import data
from diffusion_jax.data import images as images_module
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


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_samples_that_leave_most_of_the_range_unused_are_said(tmp_path, suffix):
  """12 bits of 16: nearly black, unless data.bits says so."""
  samples = np.arange(64, dtype=np.uint16).reshape(8, 8) * 64
  Image.fromarray(samples).save(tmp_path / f'a.{suffix}')
  source = folder(tmp_path, channels=1)
  (note,) = source.notes
  for part in ('brightest', '15 of 255', 'data.bits=12'):
    assert part in note
  bright = folder(tmp_path, channels=1, bits=12)
  assert bright.notes == ()
  np.testing.assert_array_equal(bright[0]['image'][..., 0], samples >> 4)
  with pytest.raises(
    UserError, match='0 to 4032, not whole numbers of 11 bits'
  ):
    folder(tmp_path, channels=1, bits=11)[0]


def test_masks_of_0_and_1(tmp_path):
  mask = (np.indices((8, 8)).sum(0) % 2).astype(np.uint8)
  Image.fromarray(mask).save(tmp_path / 'a.png')
  assert 'data.bits=1' in folder(tmp_path, channels=1).notes[0]
  image = folder(tmp_path, channels=1, bits=1)[0]['image'][..., 0]
  np.testing.assert_array_equal(image, mask * 255)
  colour = np.repeat(mask[..., None], 3, -1)
  Image.fromarray(colour).save(tmp_path / 'a.png')
  (note,) = folder(tmp_path).notes
  assert '1 of 255' in note
  assert 'data.bits' not in note  # of grey images only


def test_one_bright_image_is_enough(tmp_path):
  for i in range(5):
    Image.new('L', (8, 8), 1 + (i == 3) * 100).save(tmp_path / f'{i}.png')
  assert folder(tmp_path, channels=1).notes == ()


def test_images_that_cannot_be_read_are_not_called_dark(tmp_path):
  (tmp_path / 'a.png').write_bytes(b'no image')
  Image.new('F', (8, 8), 0.5).save(tmp_path / 'b.tif')
  assert folder(tmp_path, channels=1).notes == ()


def test_the_brightest_image_counts_whatever_its_bits(tmp_path):
  Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(tmp_path / 'a.png')
  Image.new('L', (8, 8), 10).save(tmp_path / 'b.png')
  (note,) = folder(tmp_path, channels=1).notes
  assert '15 of 255' in note
  assert 'data.bits=12' in note
  source = folder(tmp_path, channels=1, bits=12)
  assert [source[i]['image'].max() for i in (0, 1)] == [4000 >> 4, 10]


def test_packed_samples_of_12_bits_in_a_tiff(tmp_path):
  """The file says 12 bits, so that nothing has to be assumed."""
  samples = np.arange(64).reshape(8, 8) * 64
  pairs = samples.reshape(-1, 2)
  packed = np.stack(
    [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8,
     pairs[:, 1] & 255], -1
  ).astype(np.uint8).tobytes()  # fmt: skip
  tags = [(256, 8), (257, 8), (258, 12), (259, 1), (262, 1), (273, 8),
          (277, 1), (278, 8), (279, len(packed))]  # fmt: skip
  head = struct.pack('<2sHI', b'II', 42, 8 + len(packed))
  entries = b''.join(struct.pack('<HHII', tag, 4, 1, x) for tag, x in tags)
  (tmp_path / 'a.tif').write_bytes(
    head + packed + struct.pack('<H', len(tags)) + entries + bytes(4)
  )
  source = folder(tmp_path, channels=1)
  np.testing.assert_array_equal(source[0]['image'][..., 0], samples >> 4)
  assert source.notes == ()


@pytest.mark.parametrize('mode', ['F', 'I'])
def test_samples_without_a_range_are_refused(tmp_path, mode):
  values = [[-5, 70000]] if mode == 'I' else [[0.0, 0.5]]
  dtype = np.int32 if mode == 'I' else np.float32
  Image.fromarray(np.array(values, dtype)).save(tmp_path / 'a.tif')
  message = error_line('folder', path=str(tmp_path), image_size=8, channels=1)
  assert 'not whole numbers of 16 bits' in message


def test_grey_among_coloured_and_the_other_way_is_said(tmp_path):
  Image.new('L', (8, 8), 200).save(tmp_path / 'a.png')
  for name in ('b', 'c'):
    Image.new('RGB', (8, 8), 'red').save(tmp_path / f'{name}.png')
  assert folder(tmp_path).notes == (
    '1 of 3 images looked at are grey, and read as RGB',
  )
  assert folder(tmp_path, channels=1).notes == (
    '2 of 3 images looked at are in colour, and converted to grey',
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
  Image.new('RGB', (8, 8)).save(path / 'pcx.png', format='pcx')


def bomb(path):
  Image.new('1', (20000, 20000)).save(path / 'huge.png')


def link_out(path):
  os.symlink(binaries.ROOT / 'README.md', path / 'out.png')


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
    (other_format, 'pcx.png'),
    (bomb, 'huge.png'),
    (link_out, 'out.png'),
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


def test_links_out_of_the_folder_are_read(tmp_path):
  """To files and folders; no folder twice, and no cycle without an end."""
  pool, mine = tmp_path / 'pool', tmp_path / 'mine'
  for i, name in enumerate(['a/1.png', 'a/b/2.png', '3.png']):
    path = pool / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('L', (8, 8), i).save(path)
  mine.mkdir()
  os.symlink(pool / '3.png', mine / '0.png')
  os.symlink(pool / 'a', mine / 'z')
  os.symlink(pool / 'a' / 'b', mine / 'zz')  # is in z already
  os.symlink(mine, pool / 'a' / 'back')
  source = folder(mine, channels=1, classes='none')
  assert all_images(source)[:, 0, 0, 0].tolist() == [2, 0, 1]
  notes = ' '.join(source.notes)
  assert '3 images are read through links to elsewhere' in notes
  assert '1 folder linked twice' in notes


def test_links_to_nothing_are_counted_and_named_when_read(tmp_path):
  Image.new('L', (8, 8)).save(tmp_path / 'a.png')
  for name in ('b.png', 'c.png'):
    os.symlink(tmp_path / 'not fetched' / name, tmp_path / name)
  source = folder(tmp_path, channels=1)
  assert len(source) == 3
  assert '2 images are links that lead nowhere' in ' '.join(source.notes)
  with pytest.raises(UserError, match=r"'b\.png'.*No such file"):
    source[1]


def test_folders_of_the_system_are_no_classes(tmp_path):
  for name in ('a.png', '@eaDir/a.png/THUMB.png', 'lost+found/x.png'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new('L', (8, 8), 200).save(tmp_path / name)
  assert len(folder(tmp_path)) == 1


def test_a_sub_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
  (tmp_path / 'private').mkdir()
  scan = os.scandir

  def scandir(path):
    if str(path).endswith('private'):
      raise PermissionError(13, 'Permission denied', str(path))
    return scan(path)

  monkeypatch.setattr(os, 'scandir', scandir)
  message = error_line('folder', path=str(tmp_path), image_size=8, channels=3)
  assert message.endswith(f'Permission denied: {tmp_path / "private"}')


def test_a_link_to_itself_is_a_broken_image(tmp_path):
  Image.new('L', (8, 8), 200).save(tmp_path / 'a.png')
  (tmp_path / 'b.png').symlink_to('b.png')
  source = folder(tmp_path)
  assert len(source.identity['sample']) == 2
  with pytest.raises(images_module.Broken, match=r"'b\.png'"):
    source[1]


def test_files_that_are_passed_over_are_counted(tmp_path):
  for name in ('d.txt', 'b.TXT', 'c.csv', 'LICENSE', 'empty.png', '.b.png'):
    (tmp_path / name).write_text('' if name == 'empty.png' else 'x')
  Image.new('L', (8, 8)).save(tmp_path / 'a.png')
  (note,) = (x for x in folder(tmp_path).notes if 'passed' in x)
  assert note.startswith('5 files are passed over: 2 .txt, ')
  for part in ('1 .csv', '1 without a suffix', '1 empty'):
    assert part in note


@pytest.mark.parametrize(
  ('names', 'must'),
  [
    (['train.zip'], ['1 .zip', 'unpack']),
    (['a.tar', 'b.tar'], ['2 .tar', 'unpack']),
    (['images.npz'], ['1 .npz', 'the .npy or .npz file itself']),
    (['1.heic', '2.HEIC', 'x/3.heic'], ['3 .heic', '.png']),
    (['0001', '0002'], ['2 without a suffix', 'such as .png']),
  ],
)
def test_a_folder_without_images_says_what_it_has(tmp_path, names, must):
  for name in names:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b'x')
  message = error_line('folder', path=str(tmp_path), image_size=8, channels=3)
  for part in ['no images', *must]:
    assert part in message


def test_a_path_that_is_no_folder_says_what_to_do(tmp_path):
  for name, part in [
    ('set.zip', 'unpack'), ('set.npz', "data.name 'arrays'"),
    ('a.png', 'give the folder that has the file'),
  ]:  # fmt: skip
    (tmp_path / name).write_bytes(b'x')
    path = str(tmp_path / name)
    message = error_line('folder', path=path, image_size=8, channels=3)
    assert 'is not a folder' in message
    assert part in message
  message = error_line('arrays', path=str(tmp_path), image_size=8, channels=3)
  assert "data.name 'folder'" in message


@pytest.mark.parametrize('suffix', ['jfif', 'jpe', 'tif', 'tiff', 'gif', 'ppm'])
def test_more_kinds_of_files(tmp_path, suffix):
  Image.new('RGB', (8, 8), (200, 100, 50)).save(tmp_path / f'a.{suffix}')
  assert abs(only_image(tmp_path) - np.array([200, 100, 50.0])).max() < 4


@pytest.mark.parametrize('suffix', ['gif', 'tif', 'png', 'webp'])
def test_the_first_frame_is_read(tmp_path, suffix):
  first, second = (Image.new('RGB', (8, 8), c) for c in ('red', 'blue'))
  first.save(tmp_path / f'a.{suffix}', save_all=True, append_images=[second])
  source = folder(tmp_path)
  assert abs(source[0]['image'] - np.array([255, 0, 0.0])).max() < 9
  assert '1 of 1 images looked at are of several frames' in source.notes[0]


@pytest.mark.parametrize(
  'compression', [None, 'tiff_lzw', 'tiff_adobe_deflate']
)
def test_a_truncated_tiff_is_broken(tmp_path, compression):
  image = Image.fromarray(random_images(1, size=64)[0])
  image.save(tmp_path / 'a.tif', compression=compression)
  content = (tmp_path / 'a.tif').read_bytes()
  for part in (len(content) // 2, len(content) - 400):
    (tmp_path / 'a.tif').write_bytes(content[:part])
    message = error_line('folder', path=str(tmp_path), image_size=8, channels=3)
    assert "'a.tif'" in message


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'tif'])
def test_the_orientation_is_that_of_any_kind_of_file(tmp_path, suffix):
  exif = Image.Exif()
  exif[0x0112] = 3
  image = Image.fromarray(np.repeat(np.uint8([[[0] * 3, [255] * 3]]), 8, 0))
  image.resize((8, 8), 0).save(tmp_path / f'a.{suffix}', exif=exif, quality=95)
  row = only_image(tmp_path)[4, :, 0]
  assert row[0] > 200
  assert row[-1] < 50


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp'])
@pytest.mark.parametrize(
  'exif', [b'Exif\0\0no such header', b'Exif\0\0II*\0\xff\xff\xff\xff', b'MM']
)
def test_a_damaged_exif_block_does_not_matter(tmp_path, suffix, exif):
  image = Image.new('RGB', (8, 8), (100, 100, 100))
  image.save(tmp_path / f'a.{suffix}', exif=exif, dpi=(72, 72))
  assert abs(only_image(tmp_path) - 100.0).max() < 3


def remarks(kind):
  """A PNG whose remark Pillow refuses."""
  info = PngImagePlugin.PngInfo()
  text = 'x' * (3_000_000 if kind == 'long' else 3)
  info.add_text('prompt', text, zip=True)
  exif = Image.Exif()
  exif[0x010E] = 'described'
  exif[0x0112] = 3
  stream = io.BytesIO()
  image = Image.new('LA', (8, 8), (100, 255))
  image.putpixel((0, 0), (200, 255))
  image.save(stream, 'png', pnginfo=info, exif=exif)
  content = bytearray(stream.getvalue())
  if kind != 'long':
    content[content.index(kind) + 2] ^= 255
  return bytes(content)


@pytest.mark.parametrize('kind', ['long', b'prompt', b'described'])
def test_remarks_that_are_damaged_or_long_do_not_matter(tmp_path, kind):
  (tmp_path / 'a.png').write_bytes(remarks(kind))
  corner = (0, 0) if kind == b'described' else (7, 7)  # turned, if it is said
  assert only_image(tmp_path, channels=1)[corner] == 200
  assert data.open_set(str(tmp_path))[0]['image'].shape == (8, 8, 1)
  content = (tmp_path / 'a.png').read_bytes()
  (tmp_path / 'a.png').write_bytes(content.replace(b'IDAT', b'IDAX'))
  with pytest.raises(UserError, match=r"'a\.png'"):
    only_image(tmp_path)


def test_a_file_of_another_format_is_answered_with_those_that_are_read(
  tmp_path,
):
  (tmp_path / 'a.jpg').write_bytes(b'\0\0\0\x20ftypheic' + bytes(100))
  with pytest.raises(UserError, match='it is none of PNG, JPEG, WEBP, BMP'):
    only_image(tmp_path)


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
  with pytest.raises(UserError, match='image_size is'):
    read((5, 0))
