"""Captions encoded by text encoders that a run does not train."""

import json
import shutil

import binaries
import jax
import numpy as np
import pytest
import text_condition_test as words

import diffusion_jax
from diffusion_jax.configs import default
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checksum

PART = 'text'


def config_of(folder, path, **changes):
  """Of the same images, with the encoder of another run."""
  config = words.config_of(folder)
  with config.ignore_type(), config.unlocked():
    config.conditioning = default.frozen_text()
    config.conditioning.path = str(path)
    config.update_from_flattened_dict({'conditioning.drop': 0.5, **changes})
  return config


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('words')


@pytest.fixture(scope='module')
def origin(folder):
  """A run that has trained a text encoder."""
  run = words.Run(folder, folder / 'origin')
  run.train(2)
  return run.write()


def run_of(folder, workdir, path, sizes=(1, 1, 1), **changes):
  return words.Run(folder, workdir, sizes, make=config_of, path=path, **changes)


@pytest.fixture(scope='module')
def whole(folder, origin):
  """A run of four steps and its losses."""
  run = run_of(folder, folder / 'run', origin.workdir)
  before = checksum.of(run.program.frozen)
  losses = run.train()
  assert checksum.of(run.program.frozen) == before
  return run.write(), losses


def test_it_is_the_averaged_encoder_of_the_run_and_is_not_trained(
  folder, origin, whole
):
  run, losses = whole
  theirs = diffusion_jax.load(origin.workdir).params[PART]
  for own, other in zip(
    jax.tree.leaves(run.program.frozen[PART]),
    jax.tree.leaves(theirs),
    strict=True,
  ):
    np.testing.assert_array_equal(own, other)
  assert set(run.state.params) == {'net'}
  facts = json.loads((run.workdir / 'parts/text.json').read_text())
  assert (facts['from'], facts['step']) == (str(origin.workdir), 2)
  many = run_of(
    folder, folder / 'many', origin.workdir, (2, 2, 2), microbatches=2
  )
  np.testing.assert_allclose(many.train(), losses, rtol=3e-6)


def test_it_needs_the_other_run_no_longer(folder, origin, whole, tmp_path):
  run, losses = whole
  moved = shutil.copytree(origin.workdir, tmp_path / 'moved')
  first = run_of(folder, tmp_path / 'run', moved)
  two = first.train(2)
  first.write()
  shutil.rmtree(moved)
  later = run_of(folder, tmp_path / 'run', moved).restore()
  assert two + later.train() == losses
  trained = diffusion_jax.load(run.workdir)
  red, green = (
    trained.sample(1, prompts=[f'a {x} square'], **words.HOW)
    for x in ('red', 'green')
  )
  assert np.abs(red - green).max() > 0


def test_encoded_captions_train_alike(folder, origin, whole, tmp_path, capsys):
  cache, losses = tmp_path / 'captions', whole[1]
  path = tmp_path / 'config.json'
  path.write_text(config_of(folder, origin.workdir).to_json())
  given = ('encode', '--captions', f'--config={path}', f'--output={cache}')

  def written():
    capsys.readouterr()
    binaries.here(*given, '--json')
    return json.loads(capsys.readouterr().out)

  # 'a red square', 'a green square', 'green', 'a blue square', 'blue'.
  assert written() == {'output': str(cache), 'captions': 5, 'files_written': 2}
  run = run_of(
    folder, tmp_path / 'run', origin.workdir,
    **{'conditioning.cache': str(cache)},
  )  # fmt: skip
  np.testing.assert_allclose(run.train(), losses, rtol=3e-6)
  # It is not the encoder that makes them: others in its place change nothing.
  assert 'encoded' in run.splits[0].rows_fn(run.splits[0].encode_fn(['green']))
  (file,) = cache.glob('0*.npy')
  content = file.read_bytes()
  file.write_bytes(content[:-4] + b'\0\0\0\0')
  assert written()['files_written'] == 1
  assert file.read_bytes() == content
  assert written()['files_written'] == 0
  file.unlink()
  with pytest.raises(UserError, match='cannot be read'):
    run_of(
      folder, tmp_path / 'new', origin.workdir,
      **{'conditioning.cache': str(cache)},
    )  # fmt: skip


def test_flags_of_images_are_not_for_captions(tmp_path):
  with pytest.raises(UserError, match='--workdir does not apply to --captions'):
    binaries.here(
      'encode', '--captions', '--config=configs/digits.py',
      f'--workdir={tmp_path}', f'--output={tmp_path}/out',
    )  # fmt: skip
  assert not (tmp_path / 'out').exists()


def test_mistakes_are_one_line(folder, origin, tmp_path):
  other = words.Run(folder, tmp_path / 'other', seed=1).write().workdir
  run = run_of(folder, tmp_path / 'run', origin.workdir).write()
  for path, workdir, changes, told in (
    ('', tmp_path / 'new', {}, 'conditioning.path is empty'),
    (tmp_path / 'none', tmp_path / 'new', {}, 'no config.json'),
    (other, run.workdir, {}, 'was trained with the text encoders of'),
    (
      origin.workdir, tmp_path / 'new',
      {'conditioning.cache': str(tmp_path)}, 'holds no encoded captions',
    ),
  ):  # fmt: skip
    with pytest.raises(UserError, match=told) as error:
      run_of(folder, workdir, path, **changes)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'new').exists()
