"""Which judge is chosen, and what is said of one that cannot judge."""

import dataclasses

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from judges import random_images, source_of

from diffusion_jax import data
from diffusion_jax.cli import judges, judging
from diffusion_jax.evaluation import classifier, features
from diffusion_jax.evaluation import measure as measure_module
from diffusion_jax.system.errors import UserError


def judge_of(folder, source, heldout, *arguments):
  shape = source[0]['image'].shape
  with flagsaver.flagsaver():
    flags.FLAGS(['test', *arguments])
    return judges.judge_of(source, heldout, shape, folder)


def test_ctrl_c_while_a_classifier_is_trained(tmp_path, monkeypatch):
  def train(path, source, on_steps):
    on_steps(classifier.KEEP_EVERY + 20)
    raise KeyboardInterrupt

  monkeypatch.setattr(classifier, 'train', train)
  source = labelled(200, 2)
  with pytest.raises(KeyboardInterrupt) as stopped:
    judge_of(tmp_path, source, None, '--features=classifier')
  (note,) = stopped.value.__notes__
  assert note.startswith(f'50 steps are kept in {tmp_path}/classifier_')
  assert note.endswith('.npz.part')


@pytest.mark.parametrize(
  ('cache', 'samples', 'told'),
  [
    ('cache', 'cache', 'the features of 7 images are kept in cache'),
    ('cache', 'out', 'the features of 7 images are kept in out and cache'),
    (None, None, 'no features of pixels are kept: judging begins again'),
    (None, 'out', 'the samples are kept in out, but no features of pixels are '
     'kept: judging begins again'),
  ],
)  # fmt: skip
def test_ctrl_c_while_images_are_judged(monkeypatch, cache, samples, told):
  def measure(task, samples, **how):
    how['on_images'](7)
    raise KeyboardInterrupt

  judge = features.pixels((8, 8, 1))
  if cache:
    judge = judge._replace(keys={'pixels': 'pixels'})
    monkeypatch.setattr(judges, 'cache', lambda: cache)
  images = features.images_of(source_of(random_images(9, (8, 8, 1))))
  monkeypatch.setattr(judging.measure, 'measure', measure)
  monkeypatch.setattr(judging.statistics, 'paths', lambda *_: {})
  monkeypatch.setattr(judging.statistics, 'cached', lambda _: None)
  task = measure_module.Task(
    judge, images, ['fid'], about={'reference_sha256': 'x'}
  )
  with flagsaver.flagsaver():
    flags.FLAGS(['test'])
    with pytest.raises(KeyboardInterrupt) as stopped:
      judging.carry_out(task, images, {}, None, sample_cache=samples)
  assert stopped.value.__notes__ == [told]


@pytest.fixture
def few_steps(monkeypatch):
  monkeypatch.setattr(classifier, 'LEAST_STEPS', 3)
  monkeypatch.setattr(classifier, 'NUM_STEPS', 3)


def labelled(count, num_classes, shape=(8, 8, 1), seed=0):
  """Random images whose classes mean nothing."""
  labels = np.random.default_rng(seed).integers(0, num_classes, count)
  source = source_of(random_images(count, shape, seed), labels)
  return dataclasses.replace(source, num_classes=num_classes)


def pixels_is_said(folder, capsys, source, heldout, must):
  judge = judge_of(folder, source, heldout)
  assert judge.protocol['features'] == 'pixels'
  told = capsys.readouterr().err
  assert must in told.splitlines()[-1]
  assert 'judged by their pixels' in told


@pytest.mark.parametrize(
  ('num_classes', 'shape', 'must'),
  [
    (1, (8, 8, 1), 'the data have 1 class'),
    (2, (72, 72, 1), 'at most 64 pixels, not 72'),
    (2, (8, 96, 1), 'at most 64 pixels, not 96'),
    (1001, (8, 8, 1), 'at most 1000 classes, not 1001'),
  ],
)
def test_the_default_judge_is_one_that_can_judge(
  tmp_path, capsys, num_classes, shape, must
):
  source = labelled(6, num_classes, shape)
  pixels_is_said(tmp_path, capsys, source, None, must)
  assert not list(tmp_path.iterdir())
  with pytest.raises(UserError, match=must) as error:
    judge_of(tmp_path, source, None, '--features=classifier')
  assert '--features=pixels' in str(error.value)


def test_data_without_labels_are_judged_by_pixels_with_a_word(tmp_path, capsys):
  source = dataclasses.replace(labelled(6, 2), num_classes=0)
  pixels_is_said(tmp_path, capsys, source, None, 'the data have no labels')


def test_a_classifier_of_meaningless_classes_does_not_judge(
  tmp_path, capsys, few_steps
):
  source, heldout = labelled(60, 5), labelled(40, 5, seed=1)
  must = 'no better than chance'
  pixels_is_said(tmp_path, capsys, source, heldout, must)
  with pytest.raises(UserError, match=must):
    judge_of(tmp_path, source, heldout, '--features=classifier')
  (path,) = tmp_path.iterdir()  # trained once
  judge = judge_of(tmp_path, source, heldout, f'--features={path}')
  assert judge.protocol['features'] == 'classifier'
  told = capsys.readouterr().err
  assert told.startswith(f'warning: --features={path}: ')
  assert must in told


def test_held_out_images_of_one_class_prove_nothing(
  tmp_path, capsys, few_steps
):
  heldout = labelled(40, 5)
  heldout = dataclasses.replace(
    heldout, read_fn=lambda i: (random_images(40)[i], 3)
  )
  must = 'no better than chance'
  pixels_is_said(tmp_path, capsys, labelled(60, 5), heldout, must)


@pytest.mark.slow
def test_the_first_line_says_what_training_costs(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(classifier, 'LEAST_STEPS', 60)
  source, heldout = (
    data.create('digits', split=split, image_size=8, channels=1)
    for split in ('train', 'test')
  )
  source = dataclasses.replace(source, num_images=60)
  judge = judge_of(tmp_path, source, heldout)
  assert judge.protocol['features'] == 'classifier'
  first = capsys.readouterr().err.splitlines()[0]
  (path,) = tmp_path.iterdir()
  for must in ('the 10 classes', '90 steps of 128', str(path),
               '--features=pixels'):  # fmt: skip
    assert must in first
  again = judge_of(tmp_path, source, heldout)
  assert again.protocol == judge.protocol
  assert 'training' not in capsys.readouterr().err
