"""Sets to judge: opened from a line of text, and never resized in silence."""

import io
import zipfile

import numpy as np
import pytest
from imagesets import all_images, all_labels, png, random_images, write_tfds
from PIL import Image

from diffusion_jax import data
from diffusion_jax.system.errors import UserError


def save(folder, **images):
  """A folder of png files from arrays [H, W, 3] or [H, W]."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, image in images.items():
    Image.fromarray(image).save(folder / f'{name}.png')
  return folder


def colour(width, height):
  return random_images(1, size=32)[0][:height, :width]


def grey(size=8):
  return random_images(1, size=size, channels=1)[0, ..., 0]


def refusal(text, **kwargs):
  """The one line in which a set, or the first bad image of it, is refused."""

  def read_all():
    return [record['label'] for record in data.open_set(str(text), **kwargs)]

  with pytest.raises(UserError) as caught:
    read_all()
  message = str(caught.value)
  assert '\n' not in message
  assert 'data.' not in message  # there is no config whose key it could be
  return message


# --- folders -----------------------------------------------------------------


def test_a_folder_has_the_size_of_its_images(tmp_path):
  images = random_images(3, size=12)
  save(tmp_path, a=images[0], b=images[1], c=images[2])
  source = data.open_set(str(tmp_path))
  np.testing.assert_array_equal(all_images(source), images)
  assert all_labels(source) == [-1] * 3
  assert '3 images of 12x12x3' in source.description
  assert 'resized' not in source.description
  assert '\n' not in source.description


def test_sub_folders_are_labels(tmp_path):
  save(tmp_path / 'ape', a=colour(8, 8))
  save(tmp_path / 'dog', a=colour(8, 8), b=colour(8, 8))
  source = data.open_set(str(tmp_path))
  assert all_labels(source) == [0, 1, 1]
  assert source.num_classes == 2


def test_images_of_two_sizes_are_refused_unless_a_size_is_given(tmp_path):
  save(tmp_path, a=colour(8, 8), b=colour(8, 8), c=colour(16, 16))
  source = data.open_set(str(tmp_path))  # known when it is read
  assert [len(source[i]['image']) for i in (0, 1)] == [8, 8]
  message = refusal(tmp_path)
  for part in ("'c.png'", '16x16', '8x8', '--image_size=N', 'bicubic'):
    assert part in message

  resized = data.open_set(str(tmp_path), image_size=8)
  assert all_images(resized).shape == (3, 8, 8, 3)
  np.testing.assert_array_equal(
    resized[2]['image'],
    Image.fromarray(colour(16, 16)).resize((8, 8), Image.Resampling.BICUBIC),
  )
  for part in ('8x8', 'cropped', 'resized', 'bicubic'):
    assert part in resized.description


@pytest.mark.parametrize(
  ('name', 'why'), [('a', 'must be square'), ('c', 'the first one 8x8')]
)
def test_an_oblong_image_is_refused_unless_a_size_is_given(tmp_path, name, why):
  save(tmp_path, b=colour(8, 8), **{name: colour(12, 8)})
  message = refusal(tmp_path)
  for part in (f"'{name}.png'", '12x8', why, '--image_size=N'):
    assert part in message
  source = data.open_set(str(tmp_path), image_size=8)
  np.testing.assert_array_equal(
    source['ac'.index(name)]['image'], colour(12, 8)[:, 2:10]
  )


def test_sizes_are_those_of_the_image_as_it_is_shown(tmp_path):
  """EXIF turns the first one: 12x8 as it is stored, 8x12 as it is seen."""
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(colour(12, 8)).save(tmp_path / 'a.png', exif=exif)
  assert '8x12 and must be square' in refusal(tmp_path)


@pytest.mark.parametrize(
  'first',
  [grey(), grey() > 127, grey().astype(np.uint16) * 256, None],
  ids=['8 bits', '1 bit', '16 bits', 'with transparency'],
)
def test_a_set_is_grey_if_all_its_images_are(tmp_path, first):
  save(tmp_path, b=grey())
  if first is None:
    Image.new('LA', (8, 8)).save(tmp_path / 'a.png')
  else:
    save(tmp_path, a=first)
  source = data.open_set(str(tmp_path))
  np.testing.assert_array_equal(source[1]['image'][..., 0], grey())
  assert source[0]['image'].shape == (8, 8, 1)

  save(tmp_path, c=colour(8, 8))
  mixed = data.open_set(str(tmp_path))
  assert all_images(mixed).shape == (3, 8, 8, 3)
  assert '2 of 3 images looked at are grey, and read as RGB' in mixed.notes
  luma = np.asarray(Image.fromarray(colour(8, 8)).convert('L'))
  as_grey = data.open_set(str(tmp_path), channels=1)
  np.testing.assert_array_equal(as_grey[2]['image'][..., 0], luma)


def test_the_order_of_names_does_not_decide_whether_a_set_is_grey(tmp_path):
  """Nor does a sample: one of 200 is in colour, and every one is looked at."""
  images = {f'{i:03d}': grey() for i in range(200)}
  for odd in ('000', '101', '199'):
    path = tmp_path / odd
    source = data.open_set(str(save(path, **(images | {odd: colour(8, 8)}))))
    assert source[0]['image'].shape == (8, 8, 3)


def test_a_grey_image_among_colours_is_rgb_without_loss(tmp_path):
  source = data.open_set(str(save(tmp_path, a=colour(8, 8), b=grey())))
  np.testing.assert_array_equal(
    source[1]['image'], np.repeat(grey()[..., None], 3, -1)
  )


def test_colours_are_kept_where_only_the_size_is_given(tmp_path):
  save(tmp_path, a=grey(), b=colour(16, 16))
  assert data.open_set(str(tmp_path), image_size=8)[1]['image'].shape[-1] == 3
  assert "'b.png'" in refusal(tmp_path, channels=3)  # its size


def test_train_and_test_inside_are_splits(tmp_path):
  save(tmp_path / 'train', a=colour(8, 8), b=colour(8, 8))
  save(tmp_path / 'test', c=colour(8, 8))
  source = data.open_set(str(tmp_path))
  assert (len(source), source.num_classes) == (2, 0)
  assert "'test' is held out" in source.notes[0]
  assert len(data.open_set(f'{tmp_path}@test')) == 1


def test_notes_name_no_key_of_a_config_where_there_is_none(tmp_path):
  for i in range(3):
    save(tmp_path / f'0000{i}', a=grey() // 100)
  source = data.open_set(str(tmp_path))
  assert 'not as classes' in source.notes[0]
  assert 'brightest' in source.notes[1]
  assert not any('data.' in note for note in source.notes)


# --- arrays ------------------------------------------------------------------


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('suffix', ['npy', 'npz'])
def test_arrays_have_the_size_of_their_header(tmp_path, suffix, channels):
  images = random_images(5, size=12, channels=channels)
  write = np.save if suffix == 'npy' else np.savez
  write(tmp_path / f'a.{suffix}', images)
  source = data.open_set(str(tmp_path / f'a.{suffix}'))
  np.testing.assert_array_equal(all_images(source), images)
  assert f'5 images of 12x12x{channels}' in source.description
  same = data.open_set(
    str(tmp_path / f'a.{suffix}'), image_size=12, channels=channels
  )
  np.testing.assert_array_equal(all_images(same), images)
  assert 'resized' not in same.description


@pytest.mark.parametrize('suffix', ['npy', 'npz'])
def test_an_array_of_three_axes_is_grey(tmp_path, suffix):
  images = random_images(5, channels=1)
  write = np.save if suffix == 'npy' else np.savez
  write(tmp_path / f'a.{suffix}', images[..., 0])
  source = data.open_set(str(tmp_path / f'a.{suffix}'))
  np.testing.assert_array_equal(all_images(source), images)


def test_the_test_images_of_an_npz(tmp_path):
  images, path = random_images(10), tmp_path / 'a.npz'
  labels = np.arange(10) % 4
  np.savez(
    path,
    train_images=images[:8],
    train_labels=labels[:8],
    test_images=images[8:],
    test_labels=labels[8:],
  )
  for text, rows in ((path, slice(8)), (f'{path}@train', slice(8))):
    source = data.open_set(str(text))
    np.testing.assert_array_equal(all_images(source), images[rows])
  source = data.open_set(f'{path}@test')
  np.testing.assert_array_equal(all_images(source), images[8:])
  assert all_labels(source) == list(labels[8:])
  assert source.num_classes == 4


def test_arrays_that_are_no_square_images(tmp_path):
  path = tmp_path / 'a.npz'
  for array, part in [
    (np.zeros((2, 8, 6, 3), np.uint8), 'square'),
    (np.zeros((2, 3, 8, 8), np.uint8), 'channels last'),
    (np.zeros((2, 8), np.uint8), '[2, 8]'),
    (np.zeros((2, 8, 8, 3)), 'float64'),
    (np.zeros((2, 0, 0, 3), np.uint8), '[2, 0, 0, 3]'),
    (np.zeros((0, 8, 8, 3), np.uint8), 'no images'),
  ]:
    np.savez(path, array)
    message = refusal(path)
    assert part in message
    assert f"'arr_0' in {str(path)!r}" in message


def test_an_array_is_not_resized(tmp_path):
  np.save(tmp_path / 'a.npy', random_images(2, size=16))
  message = refusal(tmp_path / 'a.npy', image_size=8)
  assert '[2, 16, 16, 3]' in message
  assert '[N, 8, 8, C]' in message
  assert '[N, S, S, 1]' in refusal(tmp_path / 'a.npy', channels=1)


@pytest.mark.parametrize('axes', [3, 4])
def test_a_grey_array_can_be_read_as_rgb(tmp_path, axes):
  images = random_images(2, channels=1)
  np.save(tmp_path / 'a.npy', images if axes == 4 else images[..., 0])
  source = data.open_set(str(tmp_path / 'a.npy'), channels=3)
  np.testing.assert_array_equal(all_images(source), np.repeat(images, 3, -1))
  assert '2 images of 8x8x3' in source.description
  assert source.notes == ('the images are grey, and read as RGB',)


def npy(claim, content=b''):
  """A .npy whose header claims a shape."""
  stream = io.BytesIO()
  header = {'descr': '|u1', 'fortran_order': False, 'shape': claim}
  np.lib.format.write_array_header_1_0(stream, header)
  return stream.getvalue() + content


@pytest.mark.parametrize('claim', [(2**40, 8, 8, 3), (1, 2**31, 2**31, 1)])
@pytest.mark.parametrize('suffix', ['npy', 'npz'])
def test_a_header_that_claims_more_than_there_is(tmp_path, suffix, claim):
  path = tmp_path / f'bad.{suffix}'
  if suffix == 'npy':
    path.write_bytes(npy(claim, bytes(192)))
  else:
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
      archive.writestr('arr_0.npy', npy(claim, bytes(192)))
  message = refusal(path)
  assert 'damaged' in message
  assert repr(str(path)) in message


def test_pickles_are_never_loaded(tmp_path):
  np.save(tmp_path / 'bad.npy', np.array([print], object))
  assert 'pickled' in refusal(tmp_path / 'bad.npy')


# --- names -------------------------------------------------------------------


def test_digits_by_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert len(data.open_set('digits')) == 1438
  test = data.open_set('digits@test')
  assert len(test) == 359
  assert test.num_classes == 10
  assert '8x8x1' in refusal('digits', image_size=32)


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('digits', 'digits@test', 'tfds:cifar10'):
    save(tmp_path / name, a=colour(12, 12))
    assert data.open_set(name)[0]['image'].shape == (12, 12, 3)
    assert data.open_set(f'./{name}')[0]['image'].shape == (12, 12, 3)


def test_home_is_spelt_out(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  save(tmp_path / 'mine', a=colour(12, 12))
  np.save(tmp_path / 'a.npy', random_images(2))
  assert len(data.open_set('~/mine')) == 1
  assert len(data.open_set('~/a.npy@train')) == 2


def write_own(data_dir, *images):
  """A prepared set, with images for 'train' and one for 'test'."""
  import tensorflow_datasets as tfds

  examples = [{'image': png(x), 'label': i} for i, x in enumerate(images)]
  features = {
    'image': tfds.features.Image(shape=(None, None, 3)),
    'label': tfds.features.ClassLabel(num_classes=5),
  }
  splits = {'train': examples, 'test': examples[:1]}
  write_tfds(data_dir, 'my_own', '1.0.0', features, splits)


def test_a_tfds_set_has_the_size_of_its_images(tmp_path):
  images = random_images(3, size=12)
  write_own(tmp_path, *images)
  source = data.open_set('tfds:my_own', path=str(tmp_path))
  np.testing.assert_array_equal(all_images(source), images)
  assert all_labels(source) == [0, 1, 2]
  assert len(data.open_set('tfds:my_own@test', path=str(tmp_path))) == 1
  part = data.open_set('tfds:my_own@train[1:]', path=str(tmp_path))
  np.testing.assert_array_equal(all_images(part), images[1:])
  small = data.open_set('tfds:my_own', path=str(tmp_path), image_size=8)
  assert small[0]['image'].shape == (8, 8, 3)
  assert 'bicubic' in small.description


def test_a_tfds_set_of_two_sizes_is_refused(tmp_path):
  write_own(tmp_path, colour(8, 8), colour(16, 16))
  message = refusal('tfds:my_own', path=str(tmp_path))
  for part in ('image 1 of', 'my_own', '16x16', '8x8', '--image_size=N'):
    assert part in message
  assert "'valid'" in refusal('tfds:my_own@valid', path=str(tmp_path))


def test_a_tfds_set_is_grey_if_all_its_images_are(tmp_path):
  write_own(tmp_path, grey(), colour(8, 8))
  source = data.open_set('tfds:my_own@train[:1]', path=str(tmp_path))
  assert source[0]['image'].shape == (8, 8, 1)
  source = data.open_set('tfds:my_own', path=str(tmp_path))
  assert source[0]['image'].shape == (8, 8, 3)
  assert source.notes == ('1 of 2 images looked at are grey, and read as RGB',)


# --- mistakes ----------------------------------------------------------------

ALLOWED = ['a folder', '.npy', '.npz', 'digits', 'tfds:NAME']


@pytest.mark.parametrize(
  ('text', 'kwargs', 'must'),
  [
    ('nonsense', {}, ["'nonsense'", *ALLOWED]),
    ('', {}, ["''", *ALLOWED]),
    ('none.npz', {}, ["'none.npz'", *ALLOWED]),
    ('{tmp}/notes.txt', {}, ['notes.txt', *ALLOWED]),
    ('{tmp}/set.zip', {}, ['set.zip', 'unpack', *ALLOWED]),
    ('two\nlines\0', {}, ['two', *ALLOWED]),
    ('x' * 5000, {}, ALLOWED),
    ('digits@', {}, ["'digits@'", *ALLOWED]),
    ('digits@valid', {}, ["'valid'", "'digits'", 'train, test or all']),
    ('{tmp}/empty', {}, ['empty', 'no images', '.png']),
    ('{tmp}/full@test', {}, ['full@test', 'no test images']),
    ('{tmp}/a.npy@test', {}, ['a.npy@test', 'no test images']),
    ('{tmp}/a.npz@test', {}, ['a.npz@test', 'no test images']),
    ('{tmp}/broken', {}, ['first.png', 'cannot be read']),
    ('{tmp}/full', {'channels': 4}, ['channels is 4', '1 (grey) or 3']),
    ('{tmp}/full', {'image_size': 0}, ['image_size is 0']),
    ('{tmp}/full', {'channels': 0}, ['channels is 0']),
    ('gs://bucket/a.npz', {}, ['gs://bucket/a.npz', 'gcsfuse']),
    ('tfds:my_own', {'path': 'gs://b'}, ['gs://b', 'gcsfuse']),
    ('tfds:cifr10', {'path': '{tmp}'}, ['cifr10', 'mean tfds:cifar10']),
    ('tfds:', {'path': '{tmp}'}, ["'tfds:'"]),
  ],
)
def test_a_mistake_is_answered_in_one_line(tmp_path, text, kwargs, must):
  (tmp_path / 'notes.txt').write_text('no images')
  (tmp_path / 'set.zip').write_bytes(b'PK')
  (tmp_path / 'empty').mkdir()
  save(tmp_path / 'full', a=colour(8, 8))
  save(tmp_path / 'broken', second=colour(8, 8))
  (tmp_path / 'broken' / 'first.png').write_bytes(b'no png')
  np.save(tmp_path / 'a.npy', random_images(2))
  np.savez(tmp_path / 'a.npz', random_images(2))
  if 'path' in kwargs:
    kwargs = kwargs | {'path': kwargs['path'].format(tmp=tmp_path)}
  message = refusal(text.format(tmp=tmp_path), **kwargs)
  for part in must:
    assert part in message


def test_the_first_image_is_looked_at_at_once(tmp_path):
  save(tmp_path, b=colour(8, 8))
  (tmp_path / 'a.png').write_bytes(b'no png')
  for size in ({}, {'image_size': 8, 'channels': 3}):
    with pytest.raises(UserError, match=r"'a\.png'.*cannot be read"):
      data.open_set(str(tmp_path), **size)
