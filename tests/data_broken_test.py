"""Broken images: found beforehand, left out, or the end of a run."""

import errno
import itertools

import binaries
import numpy as np
import pytest
from imagesets import all_images, folder
from PIL import Image

from diffusion_jax import data
from diffusion_jax.data import broken, pipeline
from diffusion_jax.planning import checks
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import metrics


def write(path, broken_ones, count=8):
  """Image i is filled with 100 + i, but for broken ones."""
  for i in range(count):
    file = path / f'{i}.png'
    Image.new('L', (8, 8), 100 + i).save(file)
    if i in broken_ones:
      file.write_bytes(file.read_bytes()[:50])
  return {
    'name': 'folder', 'path': str(path), 'image_size': 8, 'channels': 1,
    'train_split': 'train', 'heldout_split': '', 'heldout_every': 0,
    'skip_broken': True,
  }  # fmt: skip


def values(source):
  return all_images(source)[:, 0, 0, 0].tolist()


@pytest.mark.parametrize('read_order', [1, -1])
def test_the_next_whole_image_takes_the_place_of_a_broken_one(
  tmp_path, capsys, read_order
):
  config = write(tmp_path, {2, 3, 7})
  train, _ = data.splits(config)
  for i in range(8)[::read_order]:
    train[i]
  assert values(train) == [100, 101, 104, 104, 104, 105, 106, 100]
  assert sorted(train.broken) == [2, 3, 7]
  told = capsys.readouterr().err
  for i in (2, 3, 7):
    assert told.count(f"'{i}.png'") == 1  # though it was read twice
  broken.say_left_out(train, None)
  told = capsys.readouterr().err
  assert 'data: 3 broken images left out: ' in told
  assert told.index("'2.png'") < told.index("'7.png'")


def test_the_order_of_the_others_stays(tmp_path):
  """Batches are equal but for the rows of the broken image."""
  whole = data.splits(write(tmp_path, {}))[0]
  before = pipeline.stream(whole, batch_size=5, seed=3, flip=False)
  expected = [before[i]['image'][:, 0, 0, 0] for i in range(6)]
  after, _ = data.splits(write(tmp_path, {4}))
  stream = pipeline.stream(after, batch_size=5, seed=3, flip=False)
  seen = [stream[i]['image'][:, 0, 0, 0] for i in range(6)]
  np.testing.assert_array_equal(
    seen, np.where(np.equal(expected, 104), 105, expected)
  )


def test_the_first_image_may_be_broken_too(tmp_path):
  train, _ = data.splits(write(tmp_path, {0}))
  assert values(train)[:2] == [101, 101]
  with pytest.raises(UserError, match=r"'0\.png'.*cannot be read"):
    data.splits(write(tmp_path, {0}) | {'skip_broken': False})


def test_a_set_of_broken_images_is_an_error(tmp_path):
  with pytest.raises(UserError, match='all images are broken'):
    data.splits(write(tmp_path, range(8)))


def test_what_is_refused_for_another_reason_is_not_left_out(tmp_path):
  config = write(tmp_path, {1}) | {'bits': 4}
  with pytest.raises(UserError, match='not whole numbers of 4 bits'):
    data.splits(config)


@pytest.mark.parametrize(
  'error',
  [OSError(errno.EIO, 'I/O error'), MemoryError(), PermissionError(13, 'x')],
)
@pytest.mark.parametrize(
  ('owner', 'function'), [(Image, 'open'), (Image.Image, 'getexif')]
)
def test_an_image_that_cannot_be_read_at_the_moment_is_not_left_out(
  tmp_path, monkeypatch, error, owner, function
):
  """Nor is it turned another way: a run would depend on the state of a disk."""
  train, _ = data.splits(write(tmp_path, {}))

  def fail(*_, **__):
    raise error

  monkeypatch.setattr(owner, function, fail)
  with pytest.raises(UserError, match=r"'3\.png' .*cannot be read"):
    train[3]
  assert not train.broken


def test_all_images_are_decoded_beforehand(tmp_path):
  config = write(tmp_path, {0, 5}) | {'skip_broken': False}
  (check,) = (x for x in checks.run(config_of(config), None, True)
              if x.name == 'images')  # fmt: skip
  assert not check.well
  for part in ('2 of 8 images are broken', "'0.png'", "'5.png'",
               'data.skip_broken=True'):  # fmt: skip
    assert part in check.told
  for i in (0, 5):
    Image.new('L', (8, 8), 9).save(tmp_path / f'{i}.png')
  checked = checks.run(config_of(config), None, True)
  assert checks.Check('images', True, 'all 8 can be read') in checked
  assert 'images' not in {
    x.name for x in checks.run(config_of(config), None, False)
  }


def test_leaving_out_is_proposed_only_for_what_it_helps_with(tmp_path):
  config = write(tmp_path, {0}, count=3) | {'skip_broken': False}

  def told():
    checked = {x.name: x for x in checks.run(config_of(config), None, True)}
    return checked['images'].told

  Image.new('F', (8, 8), 1.5).save(tmp_path / '1.tiff')
  assert '2 of 4 images are broken' in told()
  assert told().endswith('to leave the damaged ones out')
  Image.new('L', (8, 8), 9).save(tmp_path / '0.png')
  assert 'has samples from 1.5' in told()
  assert 'skip_broken' not in told()


def config_of(data_config):
  return {'data': data_config}


def test_held_out_images_are_looked_at_too(tmp_path):
  config = write(tmp_path, {3}) | {'heldout_split': 'test', 'heldout_every': 4}
  train, heldout = data.both(config)
  (error,) = broken.find(train, heldout)
  assert "'3.png'" in str(error)
  _, heldout = data.splits(config)
  assert values(heldout) == [107, 107]


def test_many_broken_images_are_counted(tmp_path):
  write(tmp_path, range(30), count=31)
  errors = broken.find(folder(tmp_path, channels=1))
  assert len(errors) == 30
  shown = broken.listed(errors)
  assert shown.endswith('; and 10 more')
  assert len(list(itertools.chain(shown.split('cannot be read')))) == 21


def training(path, workdir, *flags, run=binaries.run):
  return run(
    'train', '--config=digits', '--config.data.name=folder',
    f'--config.data.path={path}', '--config.data.heldout_every=0',
    '--config.batch_size=2', '--config.model.channels=8',
    '--config.model.num_groups=4', '--config.model.num_blocks=1',
    '--config.num_steps=8', '--config.log_every=1', '--config.sample_every=0',
    '--config.checkpoint_every=100', f'--workdir={workdir}', *flags,
  )  # fmt: skip


def break_one(images, step, row=0) -> str:
  """16 images, of which the one of this step and row is cut off; its name."""
  images.mkdir()
  train, _ = data.splits(write(images, {}, count=16))
  stream = pipeline.stream(train, batch_size=2, seed=0, flip=False)
  return cut(images, stream[step - 1]['image'][row])


def cut(images, array) -> str:
  """Cuts off the file of an image; its name."""
  file = images / f'{int(array[0, 0, 0]) - 100}.png'
  file.write_bytes(file.read_bytes()[:50])
  return file.name


@pytest.mark.slow
def test_a_run_that_meets_a_broken_image(tmp_path):
  """It is saved, and goes on with the next image in its place."""
  images, workdir, step = tmp_path / 'images', tmp_path / 'run', 6
  odd = break_one(images, step)
  result = training(images, workdir)
  assert result.code == 2
  last = result.err.splitlines()[-1]
  for part in (f'training stopped at step {step}', f"'{odd}'",
               f'checkpoint {step - 1} is complete', 'preflight --all_images',
               'data.skip_broken=True'):  # fmt: skip
    assert part in last
  rows = metrics.read(workdir / 'metrics.jsonl')
  assert [row['step'] for row in rows] == list(range(1, step))
  assert 'the same command then needs --accept_data' in last
  result = training(images, workdir, '--config.data.skip_broken=True')
  assert result.code == 0, result.err
  assert f"left out: image '{odd}'" in result.err
  assert 'data: 1 broken image left out: ' in result.err
  rows = metrics.read(workdir / 'metrics.jsonl')
  assert [row['step'] for row in rows] == list(range(1, 9))


@pytest.mark.slow
@pytest.mark.parametrize('row', [0, 1])
def test_two_processes_of_which_one_meets_a_broken_image(tmp_path, row):
  """Both stop after the same step before it, which is saved."""
  images, workdir = tmp_path / 'images', tmp_path / 'run'
  odd = break_one(images, 8, row)
  results = training(images, workdir, run=binaries.run_several)
  assert [r.code for r in results] == [2, 2], results
  rows = metrics.read(workdir / 'metrics.jsonl')
  step = len(rows)
  assert 0 < step < 8
  assert [row['step'] for row in rows] == list(range(1, step + 1))
  for result in results:
    last = result.err.splitlines()[-1]
    for part in (f'training stopped at step {step}: image ', f"'{odd}'",
                 f'checkpoint {step} is complete'):  # fmt: skip
      assert part in last
  results = training(
    images, workdir, '--config.data.skip_broken=True', run=binaries.run_several
  )
  assert [r.code for r in results] == [0, 0], [r.err for r in results]
  rows = metrics.read(workdir / 'metrics.jsonl')
  assert [row['step'] for row in rows] == list(range(1, 9))


@pytest.mark.slow
def test_two_processes_of_which_one_meets_a_broken_held_out_image(tmp_path):
  images, workdir = tmp_path / 'images', tmp_path / 'run'
  images.mkdir()
  config = write(images, {}, count=16) | {
    'heldout_every': 4, 'heldout_split': 'test',
  }  # fmt: skip
  _, heldout = data.splits(config)
  odd = cut(images, heldout[3]['image'])
  results = training(
    images, workdir, '--config.data.heldout_every=4', '--config.eval_every=5',
    run=binaries.run_several,
  )  # fmt: skip
  assert [r.code for r in results] == [2, 2], results
  for result in results:
    last = result.err.splitlines()[-1]
    for part in (f"'{odd}'", 'checkpoint 5 is complete', 'data.skip_broken'):
      assert part in last
  rows = metrics.read(workdir / 'metrics.jsonl')
  assert [row['step'] for row in rows] == [1, 2, 3, 4, 5]


def test_an_error_is_told_some_batches_before_it_is_raised():
  def batches(error_at, error):
    for i in range(10):
      if i == error_at:
        raise error
      yield i

  warned, seen = [], []
  batched = pipeline._warned(
    batches(7, UserError('odd')), 4, lambda e: warned.append((str(e), *seen))
  )
  with pytest.raises(UserError, match='odd'):
    seen.extend(batched)
  assert seen == list(range(7))
  assert warned == [('odd', 0, 1, 2)]  # four are left
  warned.clear()
  with pytest.raises(UserError):  # too early to stop before it
    list(pipeline._warned(batches(2, UserError('odd')), 4, warned.append))
  with pytest.raises(KeyError):  # a bug is raised in its place
    list(pipeline._warned(batches(7, KeyError('bug')), 4, warned.append))
  assert not warned
  assert list(pipeline._warned(batches(None, None), 4, None)) == [*range(10)]
