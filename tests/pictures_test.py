"""Pictures for people: every image whole, enlarged and apart from the next."""

import itertools

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.reporting import captions, pictures


def dark(count, size, channels, seed=0):
  """Random images without any white, so that gutters are all that is white."""
  rng = np.random.default_rng(seed)
  shape = (count, size, size, channels)
  return rng.integers(0, 200, shape, dtype=np.uint8)


def spans(filled):
  """[(start, end)] of the runs of True."""
  edges = np.flatnonzero(np.diff(np.concatenate([[0], filled, [0]])))
  return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def cells(picture):
  """(rows, columns): what lies between the lines that are wholly white."""
  ink = np.any(picture != 255, axis=-1)
  return spans(ink.any(axis=1)), spans(ink.any(axis=0))


def enlarged(image, factor):
  """Each pixel as a square, by Kronecker product; grey as three channels."""
  image = np.broadcast_to(image, (*image.shape[:2], 3))
  return np.kron(image, np.ones((factor, factor, 1), np.uint8))


SIZES = pytest.mark.parametrize(
  ('size', 'factor'), [(1, 64), (8, 8), (28, 3), (32, 2), (64, 1), (70, 1)]
)


@SIZES
@pytest.mark.parametrize('channels', [1, 3])
def test_tiles_stand_apart_and_are_enlarged(size, factor, channels):
  """To 64 pixels or more, by the least whole factor that does it.

  The tiles have no white in them, so the white lines across the picture must be
  the gutters: one above and one below each tile, one left and one right.
  """
  assert size * factor >= 64
  assert factor == 1 or size * (factor - 1) < 64
  images = dark(6, size, channels)
  picture = pictures.grid(images, columns=3)
  assert picture.dtype == np.uint8
  rows, columns = cells(picture)
  assert (len(rows), len(columns)) == (2, 3)
  for lines, length in ((rows, picture.shape[0]), (columns, picture.shape[1])):
    borders = [0, *itertools.chain(*lines), length]
    assert set(np.diff(borders)[1::2]) == {size * factor}
    # One width of gutter, and a visible one.
    (gap,) = set(np.diff(borders)[::2])
    assert gap >= 4
  places = itertools.product(rows, columns)
  for image, ((top, bottom), (left, right)) in zip(images, places, strict=True):
    tile = picture[top:bottom, left:right]
    np.testing.assert_array_equal(tile, enlarged(image, factor))


@pytest.mark.parametrize(
  ('count', 'columns', 'shape'),
  [
    (1, None, (1, 1)),
    (2, None, (1, 2)),
    (4, None, (2, 2)),
    (5, None, (2, 3)),
    (7, None, (3, 3)),
    (100, None, (10, 10)),
    (7, 2, (4, 2)),
    (7, 7, (1, 7)),
    (3, 1, (3, 1)),
  ],
)
def test_rows_and_columns(count, columns, shape):
  picture = pictures.grid(dark(count, 16, 1), columns)
  rows, cols = cells(picture)
  assert (len(rows), len(cols)) == shape


def test_the_last_row_may_be_incomplete():
  images = dark(5, 16, 3)
  picture = pictures.grid(images, columns=3)
  rows, columns = cells(picture)
  (top, bottom), (left, right) = rows[1], columns[1]
  np.testing.assert_array_equal(
    picture[top:bottom, left:right], enlarged(images[4], 4)
  )
  assert np.all(picture[top:bottom, right:] == 255)


def test_more_columns_than_images_leave_white():
  images = dark(2, 64, 3)
  picture = pictures.grid(images, columns=4)
  rows, columns = cells(picture)
  assert (len(rows), len(columns)) == (1, 2)
  assert picture.shape == pictures.grid(dark(4, 64, 3), columns=4).shape


# --- trajectories ------------------------------------------------------------


@pytest.mark.parametrize('size', [8, 28, 100])
@pytest.mark.parametrize('channels', [1, 3])
def test_a_trajectory_has_a_row_for_each_image(size, channels):
  """Row n, column f is frame f of image n; a band of labels lies above."""
  times = [999, 887.5, 0, -1]
  frames = dark(4 * 2, size, channels).reshape(4, 2, size, size, channels)
  picture = pictures.trajectory(frames, times)
  assert picture.dtype == np.uint8
  plain = pictures.grid(
    frames.swapaxes(0, 1).reshape(8, size, size, channels), 4
  )
  band = picture.shape[0] - plain.shape[0]
  assert picture.shape == (plain.shape[0] + band, plain.shape[1], 3)
  # No label reaches into the images or their gutters.
  np.testing.assert_array_equal(picture[band:], plain)
  assert np.any(picture[:band] != 255)
  rows, columns = cells(picture[band:])
  factor = (columns[0][1] - columns[0][0]) // size
  for n, f in itertools.product(range(2), range(4)):
    (top, bottom), (left, right) = rows[n], columns[f]
    np.testing.assert_array_equal(
      picture[band + top : band + bottom, left:right],
      enlarged(frames[f, n], factor),
    )


@pytest.mark.parametrize(
  'times', [[999, 888, 777, 666, -1], [998.9999, 443.37, 12.345, 0.0010010, -1]]
)
def test_labels_stand_above_their_own_column(times):
  """The ink of each is within its column, and clear of its neighbours'.

  At the least width that a tile can have, with ten columns as `sample` draws.
  """
  times = times[:-1] + times
  frames = dark(9, 64, 1).reshape(9, 1, 64, 64, 1)
  picture = pictures.trajectory(frames, times)
  plain = pictures.grid(frames[:, 0], 9)
  band = picture[: picture.shape[0] - plain.shape[0]]
  ink = np.any(band != 255, axis=-1)
  # Not cut off by the edges of the band either.
  assert not ink[0].any()
  assert not ink[-1].any()
  columns = np.array(cells(plain)[1])
  within = np.zeros(len(ink[0]), bool)
  for left, right in columns:
    assert ink[:, left:right].any()
    within[left:right] = True
  assert not ink[:, ~within].any()
  # Centred: as far from one side as from the other, to the width of a gutter.
  for left, right in columns:
    marks = np.flatnonzero(ink[:, left:right].any(axis=0))
    assert abs(marks[0] - (right - left - 1 - marks[-1])) <= 6


def test_labels_say_the_time():
  """Equal times are labelled alike, others are not; clean data is 'x0'.

  Which is shorter than any 't = ...'.
  """

  def label(time):
    frames = np.full((1, 1, 64, 64, 1), 255, np.uint8)
    return pictures.trajectory(frames, [time])

  def width(picture):
    return np.ptp(np.flatnonzero(np.any(picture != 255, axis=(0, 2))))

  assert np.array_equal(label(999), label(999.0))
  assert np.array_equal(label(-1), label(-1.0))
  different = {label(time).tobytes() for time in (999, 998, 0, 0.25, -1)}
  assert len(different) == 5
  assert width(label(-1)) < 0.75 * width(label(0))


# --- captions ----------------------------------------------------------------

SHORT = ['a cat', 'a red dog', 'grün', 'Ψ']
LONG = 'a photograph of an astronaut who rides a horse ' * 9


@pytest.mark.parametrize(
  ('texts', 'side'),
  [(SHORT, 64), ([*SHORT[:3], LONG], 128), ([LONG] * 4, 128)],
)
def test_captions_stand_under_their_own_images(texts, side):
  """Within its width, below it, and a gutter above the next row."""
  images = dark(4, 8, 3)
  picture = pictures.grid(images, 2, texts)
  ink, gap = np.any(picture != 255, axis=-1), pictures.gutter(side)
  tiles = [enlarged(image, side // 8) for image in images]
  lefts = gap, gap + side + gap

  def tile(top, left):
    return picture[top : top + side, left : left + side]

  second = next(
    top
    for top in range(gap + side, len(picture) - side)
    if np.array_equal(tile(top, gap), tiles[2])
  )
  for row, (top, end) in enumerate([(gap, second), (second, len(picture))]):
    for i, left in enumerate(lefts):
      np.testing.assert_array_equal(tile(top, left), tiles[2 * row + i])
    marks = ink[top + side : end].copy()
    assert not marks[: gap // 4].any()
    assert not marks[-gap:].any()
    if texts[2 * row] != texts[2 * row + 1]:
      for left in lefts:
        assert marks[:, left : left + side].any()
        marks[:, left : left + side] = False
    else:
      assert marks.any()
      marks[:, gap:-gap] = False
    assert not marks.any()


def test_a_row_of_one_caption_has_it_once():
  """Across, in the middle."""
  picture = pictures.grid(dark(6, 64, 1), 3, ['the same'] * 3 + SHORT[:3])
  (first, second) = spans(np.any(picture != 255, axis=(1, 2)))[1::2]
  marks = np.flatnonzero(np.any(picture[slice(*first)] != 255, axis=(0, 2)))
  width = picture.shape[1]
  assert np.ptp(marks) < 64
  assert abs(marks[0] + marks[-1] - width) <= 4
  assert np.any(picture[slice(*second), : width // 3] != 255)


def test_captions_come_in_turn_as_their_images_do():
  texts = ['first', 'second one'] * 3
  images = dark(6, 64, 1)
  order = [0, 2, 4, 1, 3, 5]
  want = pictures.grid(images[order], 3, [texts[i] for i in order])
  np.testing.assert_array_equal(pictures.in_turn(images, 2, texts), want)


def test_no_words_take_no_room():
  images = dark(4, 16, 3)
  want = pictures.grid(images)
  np.testing.assert_array_equal(pictures.grid(images, None, [''] * 4), want)


def test_lines_of_captions():
  size = 13
  letters = captions.font(size).getlength
  whole, is_whole = captions.wrapped('a red apple on\na  table', 90, size)
  assert is_whole
  assert ' '.join(whole) == 'a red apple on a table'
  assert max(map(letters, whole)) <= 90
  # Each word stands on the first line that has room for it.
  for line, after in itertools.pairwise(whole):
    assert letters(f'{line} {after.split()[0]}') > 90
  for long in (LONG, 'x' * 300, 'x' * 5000, 'a ' * 100_000):
    lines, is_whole = captions.wrapped(long, 90, size)
    assert not is_whole
    assert len(lines) == captions.LINES
    assert lines[-1].endswith('…')
    assert max(map(letters, lines)) <= 90
    assert long.startswith(lines[0])
  assert captions.wrapped(' \n', 90, size) == ([], True)
  assert captions.wrapped('W', 1, size) == (['W'], True)


# --- files -------------------------------------------------------------------


@pytest.mark.parametrize('channels', [1, 3])
def test_a_saved_picture_is_a_png_of_the_same_pixels(tmp_path, channels):
  image = dark(1, 9, channels)[0]
  path = tmp_path / 'image.png'
  pictures.save(path, image)
  with Image.open(path) as read:
    assert read.format == 'PNG'
    assert read.mode == {1: 'L', 3: 'RGB'}[channels]
    np.testing.assert_array_equal(np.asarray(read).reshape(image.shape), image)


def test_a_saved_grid_and_trajectory_can_be_read(tmp_path):
  frames = dark(6, 16, 1).reshape(3, 2, 16, 16, 1)
  for picture in (
    pictures.grid(frames[0]),
    pictures.trajectory(frames, [5, 0, -1]),
  ):
    pictures.save(tmp_path / 'a.png', picture)
    with Image.open(tmp_path / 'a.png') as read:
      np.testing.assert_array_equal(np.asarray(read), picture)


@pytest.mark.parametrize('shape', [(1, 5, 3), (5, 1, 3), (1, 5, 1), (5, 1, 1)])
def test_a_picture_one_pixel_wide_keeps_its_shape(tmp_path, shape):
  picture = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
  pictures.save(tmp_path / 'a.png', picture)
  with Image.open(tmp_path / 'a.png') as read:
    assert read.size == (shape[1], shape[0])
    np.testing.assert_array_equal(np.asarray(read).reshape(shape), picture)


def test_kinds_in_turn_have_a_row_each():
  """Images 0, 3, 6 are of the first kind; the rest of a turn is left out."""
  images = np.arange(8, dtype=np.uint8)[:, None, None, None] * 30
  images = np.broadcast_to(images, (8, 64, 64, 1))
  picture = pictures.in_turn(images, 3)
  rows = picture[40::72, 40::72, 0]
  np.testing.assert_array_equal(rows, [[0, 90], [30, 120], [60, 150]])
  for kinds in (1, 9):
    np.testing.assert_array_equal(
      pictures.in_turn(images, kinds), pictures.grid(images)
    )
