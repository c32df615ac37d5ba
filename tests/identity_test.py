"""What a run knows of its images: changed, mixed and leaked ones are told."""

import dataclasses
import json
import shutil

import binaries
import numpy as np
import pytest
import tiny
from imagesets import folder, numbered, png, random_images, write_tfds
from PIL import Image

from diffusion_jax import data
from diffusion_jax.data import identity, sources
from diffusion_jax.runs import dataset
from diffusion_jax.system import distributed, files
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import saved


def write(path, count, seed=0, first=0):
  """A folder of pictures, each from its own noise."""
  path.mkdir(parents=True, exist_ok=True)
  for i, image in enumerate(random_images(count, seed=seed)):
    (path / f'{first + i:04d}.png').write_bytes(png(image))
  return path


def opened(path, every=4):
  kwargs = {'heldout_every': every}
  return folder(path, **kwargs), folder(path, split='test', **kwargs)


def begun(workdir, splits, split='test', step=10):
  """A run that has saved a step, and knows these images."""
  (workdir / 'checkpoints' / str(step)).mkdir(parents=True)
  dataset.write(workdir, dataset.check(workdir, splits, split, False))
  return workdir


def change_of(workdir, splits, split='test') -> str:
  """The line by which other images are refused; '' if they are not."""
  try:
    known = dataset.check(workdir, splits, split, False)
  except UserError as e:
    return str(e)
  assert not known.change
  return ''


# --- identities --------------------------------------------------------------


def test_an_identity_is_of_the_images_not_of_their_place(tmp_path):
  first = folder(write(tmp_path / 'a', 70)).identity
  shutil.copytree(tmp_path / 'a', tmp_path / 'b/wrapped')
  assert folder(tmp_path / 'b').identity == first
  assert json.loads(json.dumps(first)) == first
  assert first['images'] == 70
  assert len(first['sample']) == identity.SAMPLED
  write(tmp_path / 'a', 1, seed=9, first=70)
  assert folder(tmp_path / 'a').identity != first


def test_arrays_are_known_by_rows_and_labels(tmp_path):
  images, labels = random_images(20), np.arange(20)

  def of(name, **arrays):
    np.savez(tmp_path / name, **arrays)
    path = str(tmp_path / name)
    return data.create('arrays', path=path, image_size=8, channels=3).identity

  first = of('a.npz', images=images, labels=labels)
  assert of('b.npz', train_images=images, train_labels=labels) == first
  told = identity.difference(
    first, of('c.npz', images=images, labels=labels[::-1]), 'then', 'now'
  )
  assert told == "'image 0' has another content then than now"
  fewer = of('d.npz', images=images[1:], labels=labels[1:])
  told = identity.difference(first, fewer, 'then', 'now')
  assert told == "20 images then, 19 now ('image 19' is missing now)"


def test_a_million_names_are_one_digest():
  """Without files: what the names and sizes cost, not what a disk does."""
  names = [f'{i // 1000:05d}/{i:08d}.jpg' for i in range(100_000)]
  sizes = np.arange(100_000)

  def of(names, sizes):
    return identity.of(
      identity.Contents(
        len(names), lambda i: bytes(8), names=names, sizes_fn=lambda: sizes
      )
    )

  first = of(names, sizes)
  assert len(json.dumps(first)) < 4000
  renamed = of([*names[:-1], 'z.jpg'], sizes)
  assert 'other names' in identity.difference(first, renamed, 'then', 'now')
  longer = of(names, sizes + (sizes == 77))
  assert 'other sizes' in identity.difference(first, longer, 'then', 'now')
  lost = of(names[:-1], sizes[:-1])
  told = identity.difference(first, lost, 'then', 'now', names[1:-1])
  assert told == (
    "100,000 images then, 99,999 now ('00000/00000000.jpg' is missing now)"
  )


def test_large_files_are_known_by_more_than_their_first_rows(tmp_path):
  """Scans with a white border begin alike and have the same size."""
  page = np.full((200, 200, 3), 255, np.uint8)
  for i in range(3):
    page[130:132] = i
    Image.fromarray(page).save(tmp_path / f'{i}.ppm')
  sample = folder(tmp_path).identity['sample']
  assert len(set(sample.values())) == 3


# --- a run that goes on ------------------------------------------------------


def test_the_same_images_elsewhere_go_on(tmp_path):
  run = begun(tmp_path / 'run', opened(write(tmp_path / 'a', 40)))
  shutil.copytree(tmp_path / 'a', tmp_path / 'b')
  assert not change_of(run, opened(tmp_path / 'b'))


@pytest.mark.parametrize(
  ('damage', 'must'),
  [
    (lambda a: (a / '0000.png').unlink(), "'0000.png' is missing now"),
    (lambda a: write(a, 1, 5, 40), "41 now ('0040.png' is missing then)"),
    (lambda a: (a / '0005.png').rename(a / '5.png'), "'0005.png' is missing"),
    (lambda a: write(a, 1, 5, 8), "'0008.png' has another content"),
    (lambda a: write(a, 1, 5, 7), "'0007.png' has another content"),
  ],
)  # fmt: skip
def test_other_images_are_refused_and_named(tmp_path, damage, must, capsys):
  a = write(tmp_path / 'a', 40)
  run = begun(tmp_path / 'run', opened(a))
  before = (run / 'data.json').read_text()
  damage(a)
  told = change_of(run, opened(a))
  assert must in told
  assert '\n' not in told
  assert '--accept_data' in told
  assert (run / 'data.json').read_text() == before
  known = dataset.check(run, opened(a), 'test', True)
  assert must in known.change
  assert 'accepted' in capsys.readouterr().err
  dataset.write(run, known)
  assert not change_of(run, opened(a))


@pytest.mark.parametrize('changed', ['train_images', 'test_images'])
def test_numbered_images_of_both_splits_are_compared(tmp_path, changed):
  arrays = {'train_images': random_images(9), 'test_images': random_images(9)}

  def both():
    np.savez(tmp_path / 'a.npz', **arrays)
    kwargs = {'path': str(tmp_path / 'a.npz'), 'image_size': 8, 'channels': 3}
    return tuple(
      data.create('arrays', split=split, **kwargs)
      for split in ('train', 'test')
    )

  arrays['test_images'] = random_images(9, seed=1)
  run = begun(tmp_path / 'run', both())
  assert not change_of(run, both())
  arrays[changed] = 255 - arrays[changed]
  told = change_of(run, both())
  assert "image 0' has another content then than now" in told


def test_before_the_first_checkpoint_the_images_may_be_corrected(tmp_path):
  run = tmp_path / 'run'
  for name in ('a', 'b'):
    splits = opened(write(tmp_path / name, 40, seed=ord(name)))
    dataset.write(run, dataset.check(run, splits, 'test', False))
  saved.note(run / 'checkpoints', 5)
  (run / 'checkpoints/5').mkdir(parents=True)
  assert 'another content' in change_of(run, opened(tmp_path / 'a'))


@pytest.mark.parametrize('text', ['', '\0' * 40, '[]', '{"train": 3}', '{}'])
def test_without_a_whole_note_the_images_of_now_are_the_runs(
  tmp_path, text, capsys
):
  splits = opened(write(tmp_path / 'a', 40))
  run = begun(tmp_path / 'run', splits)
  (run / 'data.json').write_text(text)
  known = dataset.check(run, splits, 'test', False)
  assert 'the images found now are taken' in capsys.readouterr().err
  dataset.write(run, known)
  assert dataset.read(run) == known.facts


def test_another_split_may_be_held_out_on_the_way(tmp_path):
  train, heldout = opened(write(tmp_path / 'a', 40))
  run = begun(tmp_path / 'run', (train, None), '')
  assert not change_of(run, (train, heldout))


# --- hosts -------------------------------------------------------------------


def test_hosts_with_other_images_all_say_so(tmp_path, monkeypatch):
  a, b = (opened(write(tmp_path / n, k), 2) for n, k in (('a', 40), ('b', 30)))
  theirs = dataset._facts(b, 'test')

  def gather(value):
    return [value, theirs if isinstance(value, dict) else value]

  monkeypatch.setattr(distributed, 'gather', gather)
  assert change_of(tmp_path / 'run', a) == (
    'the images are not the same on all hosts: 40 images in process 0, 30 in '
    "process 1 ('0030.png' is missing in process 1): copy the same images to "
    'all of them'
  )


def test_hosts_with_equal_names_and_other_contents(tmp_path, monkeypatch):
  a, b = (opened(write(tmp_path / n, 40, seed=ord(n)), 0) for n in 'ab')
  theirs = dataset._facts(b, '')
  monkeypatch.setattr(
    distributed,
    'gather',
    lambda value: [value, theirs if isinstance(value, dict) else value],
  )
  told = change_of(tmp_path / 'run', a, '')
  assert "'0000.png' has another content in process 0 than in process 1" in told


# --- held-out images in training ---------------------------------------------


def leaked(train, heldout, accept=False):
  dataset._check_heldout((train, heldout), accept)


def test_copies_of_training_images_are_not_held_out(tmp_path, capsys):
  train = folder(write(tmp_path / 'a', 40))
  write(tmp_path / 'b', 5, seed=3)
  copies = folder(write(tmp_path / 'b', 5, first=95))
  leaked(train, folder(write(tmp_path / 'c', 10, seed=4)))
  with pytest.raises(UserError, match=r"'0095\.png' is '0000\.png'") as error:
    leaked(train, copies)
  assert '5 of 10 held-out images are also training images' in str(error.value)
  assert '--accept_data' in str(error.value)
  leaked(train, copies, accept=True)
  assert '5 of 10' in capsys.readouterr().err


def test_a_duplicate_in_a_large_set_is_a_word(tmp_path, capsys):
  train = folder(write(tmp_path / 'a', 40))
  write(tmp_path / 'b', 20, seed=7)
  write(tmp_path / 'b', 1, first=90)
  leaked(train, folder(tmp_path / 'b'))
  assert '1 of 21 held-out images' in capsys.readouterr().err


def test_one_split_for_both_is_refused():
  train = data.create('digits', image_size=8, channels=1)
  with pytest.raises(UserError, match='64 of 64 held-out images'):
    leaked(train, train)
  leaked(train, data.create('digits', split='test', image_size=8, channels=1))


def test_arrays_whose_test_images_are_training_images(tmp_path):
  images = random_images(50)
  np.savez(tmp_path / 'a.npz', train_images=images, test_images=images[::-3])
  kwargs = {'path': str(tmp_path / 'a.npz'), 'image_size': 8, 'channels': 3}
  both = (data.create('arrays', split=s, **kwargs) for s in ('train', 'test'))
  with pytest.raises(UserError, match='17 of 17'):
    leaked(*both)


def test_labels_do_not_hide_that_images_are_the_same(tmp_path):
  images = random_images(50)
  np.savez(
    tmp_path / 'a.npz', train_images=images, train_labels=np.arange(50) % 3,
    test_images=images[:20],
  )  # fmt: skip
  kwargs = {'path': str(tmp_path / 'a.npz'), 'image_size': 8, 'channels': 3}
  both = (data.create('arrays', split=s, **kwargs) for s in ('train', 'test'))
  with pytest.raises(UserError, match='20 of 20'):
    leaked(*both)


def test_slices_of_a_prepared_set_may_not_overlap(tmp_path):
  tfds = pytest.importorskip('tensorflow_datasets')
  examples = [{'image': png(image)} for image in random_images(20)]
  features = {'image': tfds.features.Image(shape=(None, None, 3))}
  splits = {'train': examples, 'test': examples[:4]}
  write_tfds(tmp_path, 'dummy', '1.0.0', features, splits)

  def of(split):
    kwargs = {'path': str(tmp_path), 'image_size': 8, 'channels': 3}
    return data.create('tfds:dummy', split=split, **kwargs)

  leaked(of('train[:90%]'), of('train[90%:]'))
  leaked(of('train'), of('test'))
  for train, heldout, found in (
    ('train', 'train[:10%]', '2 of 2'),
    ('train[:12]+test', 'train[10:]', '2 of 10'),
    ('test+train[15:]', 'train[18:]+test', '6 of 6'),
  ):
    with pytest.raises(UserError, match=f'{found} held-out images'):
      leaked(of(train), of(heldout))
  assert of('train[:50%]').identity == of('train[:10]').identity
  assert of('train[:10]').identity != of('train[10:]').identity


def test_equal_sizes_do_not_read_without_end(monkeypatch):
  monkeypatch.setattr(identity, 'COMPARED', 10)
  read = []
  source = numbered(200)
  counted = dataclasses.replace(
    source, read_fn=lambda i: (read.append(i), source.read_fn(i))[1]
  )
  contents = sources.contents_of(counted)
  assert identity.shared(contents, contents)[1] == identity.SAMPLED
  assert len(read) <= identity.SAMPLED + 10 + 2


# --- the binaries ------------------------------------------------------------


def folder_flags(workdir, path, **changes):
  few = {
    'data.name': 'folder', 'data.path': path, 'data.channels': 3,
    'data.heldout_every': 4, 'num_steps': 2, 'eval_every': 0,
    'sample_every': 0,
  }  # fmt: skip
  return tiny.flags(workdir, **{**few, **changes})


@pytest.mark.slow
def test_a_removed_image_stops_the_run_until_it_is_accepted(tmp_path):
  run, a = tmp_path / 'run', write(tmp_path / 'a', 40)
  flags = folder_flags(run, a)
  assert binaries.run('train', *flags).code == 0
  (a / '0000.png').unlink()
  before = {p: p.read_bytes() for p in run.rglob('*') if p.is_file()}
  flags = folder_flags(run, a, num_steps=4)
  assert "'0000.png' is missing now" in binaries.run('train', *flags).message
  assert {p: p.read_bytes() for p in run.rglob('*') if p.is_file()} == before
  judging = ['--features=pixels', '--num_samples=4', '--sampler=ddim']
  judging += [f'--workdir={run}', '--num_steps=2']
  assert '--data_path' in binaries.run('evaluate', *judging).message
  assert binaries.run('evaluate', *judging, '--accept_data').code == 0
  result = binaries.run('train', *flags, '--accept_data')
  assert result.code == 0, result.err
  last = json.loads((run / 'starts.jsonl').read_text().splitlines()[-1])
  assert "'0000.png' is missing now" in last['data']
  assert binaries.run('train', *flags).code == 0


@pytest.mark.slow
def test_two_hosts_with_other_images_end_with_one_line(tmp_path):
  port = binaries.free_port()
  several = [f'--coordinator=localhost:{port}', '--num_processes=2']
  started = [
    binaries.start(
      'train',
      *folder_flags(tmp_path / 'run', write(tmp_path / str(i), 40 - 10 * i)),
      *several,
      f'--process_id={i}',
    )
    for i in range(2)
  ]
  ended = [one.end() for one in started]
  assert [result.code for result in ended] == [2, 2]
  assert '40 images in process 0, 30 in process 1' in ended[0].err
  assert not files.at(tmp_path / 'run').exists()
