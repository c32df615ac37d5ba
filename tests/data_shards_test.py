"""Tar shards of images: random access, splits, and damaged or hostile files."""

import io
import json
import tarfile

import numpy as np
import pytest
from data_captions_test import encode, texts_of
from imagesets import all_images, all_labels, png, random_images

from diffusion_jax import data
from diffusion_jax.data import broken, captions, pipeline
from diffusion_jax.system.errors import UserError


def write(path, members, format=tarfile.PAX_FORMAT):
  """Writes a tar of (name, content), or of (TarInfo, content)."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w', format=format) as shard:
    for name, content in members:
      info = name
      if isinstance(name, str):
        info = tarfile.TarInfo(name)
        info.size = len(content)
      shard.addfile(info, io.BytesIO(content))
  return path


def samples(images, first=0, kind='txt'):
  """Members of a sample for each image: picture, class and caption."""
  for i, image in enumerate(images, first):
    yield f'{i:05d}.png', png(image)
    yield f'{i:05d}.cls', f'{i % 3}\n'.encode()
    text = f'number {i}'
    if kind == 'json':
      text = json.dumps({'caption': text, 'other': [text, 'b']})
    yield f'{i:05d}.{kind}', text.encode()


def opened(path, **how):
  given = {'image_size': 8, 'channels': 3, **how}
  return data.create('webdataset', path=str(path), **given)


def refusal(path, *parts, **how):
  with pytest.raises(UserError) as error:
    captions.check(opened(path, **how), None)
  message = str(error.value)
  assert '\n' not in message
  for part in parts:
    assert part in message
  return message


@pytest.mark.parametrize('form', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_shards_are_one_set_in_the_order_of_their_names(tmp_path, form):
  images = random_images(10)
  write(tmp_path / 'b' / '1.tar', samples(images[6:], 6), form)
  write(tmp_path / 'a-0.tar', samples(images[:6]), form)
  source, test = (
    opened(tmp_path, split=split, heldout_every=5)
    for split in ('train', 'test')
  )
  np.testing.assert_array_equal(all_images(test), images[[4, 9]])
  kept = [0, 1, 2, 3, 5, 6, 7, 8]
  np.testing.assert_array_equal(all_images(source), images[kept])
  assert all_labels(source) == [i % 3 for i in kept]
  assert source.num_classes == test.num_classes == 3
  assert source.label_fn(7) == 2
  assert texts_of(test) == [('number 4',), ('number 9',)]
  assert not opened(tmp_path, classes='none').num_classes
  both = [
    number
    for number in (one.identity['names'] for one in (source, test))
    if number
  ]
  assert len({*both}) == 2
  # Batches are those of the same images in an array file.
  np.savez(tmp_path / 'a.npz', images=images[kept], labels=np.array(kept) % 3)
  array = data.create(
    'arrays', path=str(tmp_path / 'a.npz'), image_size=8, channels=3
  )
  how = {'batch_size': 4, 'seed': 2, 'flip': True}
  here = pipeline.stream(captions.encoded(source, encode), **how)[5]
  there = pipeline.stream(array, **how)[5]
  for key, rows in there.items():
    np.testing.assert_array_equal(here[key], rows)
  assert here['tokens'].shape == (4, 3)
  single = opened(tmp_path / 'a-0.tar')
  np.testing.assert_array_equal(all_images(single), images[:6])
  whole = data.open_set(str(tmp_path / 'a-0.tar'))
  np.testing.assert_array_equal(all_images(whole), images[:6])


def test_names_of_shards_say_what_is_held_out(tmp_path):
  images = random_images(6)
  for k in range(2):
    write(tmp_path / f'train-{k:03d}.tar', samples(images[2 * k : 2 * k + 2]))
  write(tmp_path / 'val-000.tar', samples(images[4:5], kind='json'))
  write(tmp_path / 'extra.tar', samples(images[5:]))
  train, test = (opened(tmp_path, split=split) for split in ('train', 'test'))
  np.testing.assert_array_equal(all_images(train), images[:4])
  np.testing.assert_array_equal(all_images(test), images[4:5])
  assert texts_of(test) == [('number 0',)]
  assert any('1 others are left out' in note for note in train.notes)
  ranged = opened(tmp_path / 'train-{000..001}.tar')
  np.testing.assert_array_equal(all_images(ranged), images[:4])
  refusal(tmp_path / 'train-{000..003}.tar', '4 shards', '2 do not exist')
  refusal(tmp_path / 'part-{0..1}' / 'x.tar', 'name of a folder')


def test_members_that_are_no_samples_are_passed_over(tmp_path):
  link = tarfile.TarInfo('b.png')
  link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
  image = random_images(1)[0]
  members = [
    ('./x/a.mask.png', png(image)), ('./x/a.png', png(image)), (link, b''),
    ('./x/a.json', b'{"text": ["one", " two"]}'), ('lone.txt', b'x'),
    ('.hidden', b''), ('c.mp3', b''),
  ]  # fmt: skip
  source = opened(write(tmp_path / 'a.tar', members))
  assert len(source) == 1
  assert source.caption_fn(0) == ('one', 'two')
  told = next(note for note in source.notes if 'passed over' in note)
  for part in ('no regular file', '1 .png', '1 .mp3', 'without an image'):
    assert part in told
  named = opened(tmp_path / 'a.tar', captions='text')
  assert named.caption_fn(0) == ('one', 'two')
  refusal(tmp_path / 'a.tar', 'x/a.json', 'text', captions='words')


def test_mistakes_in_shards_are_one_line(tmp_path):
  images = random_images(3)
  good = list(samples(images))

  def told(members, *parts):
    refusal(write(tmp_path / 'a.tar', members), 'a.tar', *parts)

  told([*good, ('../x.txt', b'')], "'../x.txt'", 'leads out')
  told([('/x.png', good[0][1])], 'leads out')
  told([*good, ('00001.jpg', b'')], 'two members', '00001')
  told([('0.png', good[0][1]), ('0.cls', b'cat')], '0.cls', 'cat')
  told([*good, ('9.png', good[0][1])], '1 of 4 images', '/9')
  told([*good[:2], ('00000.txt', b'\xff')], '00000.txt', 'not UTF-8')
  told([good[0], ('00000.json', b'{')], '00000.json', 'no JSON')
  told([good[0], ('00000.json', b'{}')], '00000.json', 'data.captions')
  told([('a.txt', b'a')], 'no images')
  assert opened(write(tmp_path / 'b.tar', good[:1])).caption_fn is None
  whole = write(tmp_path / 'a.tar', good).read_bytes()
  end = len(whole.rstrip(b'\0')) // 512 * 512 + 512
  for content, part in (
    (whole[:100], 'cannot be read'),
    (whole[: end - 700], 'a.tar'),  # within the last member
    (whole[: end + 100], 'a.tar'),  # within the mark of the end
    (whole[:end], 'truncated'),  # which only the mark tells
    (whole[: 3 * 512] + b'x' * 512, 'a.tar'),
    (b'\x1f\x8b' + whole, 'gunzip'),
    (b'', 'a.tar'),
  ):
    (tmp_path / 'a.tar').write_bytes(content)
    refusal(tmp_path / 'a.tar', part)
  (tmp_path / 'a.tar').rename(tmp_path / 'a.tar.gz')
  (tmp_path / 'b.tar').unlink()
  refusal(tmp_path, 'no .tar files', 'a.tar.gz')
  refusal(tmp_path / 'c', 'does not exist')


@pytest.mark.parametrize('form', [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_that_lead_back_or_fill_memory_are_refused(tmp_path, form):
  image = png(random_images(1)[0])
  back = tarfile.TarInfo('b.png')
  if form == tarfile.GNU_FORMAT:
    back.size = -1024
  else:
    back.pax_headers['size'] = '-2048'
  content = b''.join(
    [
      *(tarfile.TarInfo('a.txt').tobuf(), back.tobuf(form)),
      *(image, bytes(-len(image) % 512 + 1024)),
    ]
  )
  path = tmp_path / 'a.tar'
  path.write_bytes(content)
  refusal(path, "a.tar' cannot be read", "'b.png' has -")
  long = tarfile.TarInfo('long')
  long.size = 2**17
  for size, kind in (
    (2**17, tarfile.XHDTYPE), (2**17, tarfile.GNUTYPE_LONGNAME),
    (-1024, tarfile.XHDTYPE),
  ):  # fmt: skip
    long.size, long.type = size, kind
    path.write_bytes(long.tobuf(tarfile.GNU_FORMAT) + b'1' * 2**18)
    refusal(path, f'a header of {size:,} bytes')


def test_a_broken_image_in_a_shard_can_be_left_out(tmp_path):
  members = [*samples(random_images(3))]
  members[3] = ('00001.png', b'broken')
  source = opened(write(tmp_path / 'a.tar', members))
  with pytest.raises(UserError, match=r'a\.tar/00001'):
    source[1]
  left = captions.encoded(broken.left_out(source), encode)
  batch, _ = next(pipeline.heldout(left, batch_size=3))
  assert [chr(c) for c in batch['tokens'][:, 2]] == ['0', '2', '2']
