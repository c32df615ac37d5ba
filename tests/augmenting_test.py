"""`edit augment`: labelled sets of new and of varied images of a run."""

import json
import shutil

import binaries
import imagesets
import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import diffusion_jax
from diffusion_jax import data, runs
from diffusion_jax.process import noise
from diffusion_jax.runs import addresses, draw, varied
from diffusion_jax.system.errors import UserError

HOW = ('--grid=700,300', '--sampler=ddim')
PER_CLASS = 3


def augment(run, *given):
  result = binaries.run(
    'edit', 'augment', f'--workdir={run}', '--json', *HOW, *given
  )
  assert result.code == 0, result.err
  return result


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return tiny.labelled(tmp_path_factory.mktemp('runs') / 'labelled')


@pytest.fixture(scope='module')
def sets(run, tmp_path_factory):
  """A set of new images as a file and as a folder, and one of varied images."""
  folder = tmp_path_factory.mktemp('sets')
  for given in (
    ('--output=new.npz',),
    ('--output=new',),
    ('--output=varied.npz', '--from=train', '--strength=0.5', '--label=7,2'),
  ):
    name = given[0].partition('=')[2]
    augment(
      run, f'--output={folder / name}', f'--per_class={PER_CLASS}', *given[1:]
    )
  return folder


def read(run, path, name='arrays'):
  """The training images of a config of such a run, with the set as its data."""
  config = runs.read_config(run)
  train, _ = data.splits(
    {**config['data'], 'name': name, 'path': str(path), 'heldout_split': ''}
  )
  return imagesets.all_images(train), imagesets.all_labels(train)


def facts_of(path):
  return json.loads(path.with_name(f'{path.name}.json').read_text())


def test_a_set_has_the_samples_that_its_json_names(run, sets):
  images, labels = read(run, sets / 'new.npz')
  assert np.bincount(labels).tolist() == [PER_CLASS] * 10
  facts = facts_of(sets / 'new.npz')
  assert facts['labels'] == labels
  assert labels == [i % 10 for i in facts['indices']]
  trained = diffusion_jax.load(run)
  want = trained.sample(
    max(facts['indices']) + 1, sampler='ddim', grid='700,300', label='all'
  )
  np.testing.assert_array_equal(images, want[facts['indices']])
  protocol = facts['protocol']
  assert protocol['weights_sha256'] == trained.weights_sha256
  assert protocol['grid'] == [700, 300, -1]
  looked_at, near, same = (
    sum(facts[name].values())
    for name in ('candidates', 'left_out_near', 'left_out_identical')
  )
  assert looked_at - near - same == len(images)


def test_a_folder_holds_the_same_set(run, sets):
  """In the order of its classes."""
  want, labels = read(run, sets / 'new.npz')
  got, theirs = read(run, sets / 'new', 'folder')
  order = np.argsort(labels, kind='stable')
  np.testing.assert_array_equal(got, want[order])
  assert theirs == sorted(labels)


def test_pictures_carry_addresses(run, sets):
  path = next((sets / 'new' / '4').glob('*.png'))
  found = addresses.read(path)
  (image,) = diffusion_jax.load(run).sample(**found.how)
  with Image.open(path) as there:
    np.testing.assert_array_equal(image[..., 0], np.array(there))
  assert found.facts['label'] == 4


def test_varied_images_are_of_training_images_of_their_class(run, sets):
  images, labels = read(run, sets / 'varied.npz')
  assert np.bincount(labels).tolist() == [0, 0, 3, 0, 0, 0, 0, 3]
  facts = facts_of(sets / 'varied.npz')
  digits, theirs = read(run, '', 'digits')
  trained = diffusion_jax.load(run)
  plan = trained.plan(sampler='ddim', grid='700,300')
  at = facts['varied']
  assert [theirs[i] for i in at] == labels
  assert len({*at}) == len(at)
  rows = {
    'index': np.array(facts['indices'], np.uint32), 'image': digits[at],
    'label': np.array(labels, np.int32),
  }  # fmt: skip
  want = varied.drawer(trained, plan, 0.5)(rows)
  np.testing.assert_array_equal(images, np.asarray(want)[: len(images)])


def test_one_step_from_a_noised_image_is_the_estimate_of_it(run):
  trained = diffusion_jax.load(run)
  plan = trained.plan(sampler='ddim', grid='700,300', seed=5)
  assert varied.times(plan, 0.5) == [300, -1]
  assert varied.times(plan, 0.1) == [300, -1]
  assert varied.times(plan, 1) == [700, 300, -1]
  digits, _ = read(run, '', 'digits')
  index = np.array([3, 900], np.uint32)
  labels = np.array([1, 8], np.int32)
  got = varied.drawer(trained, plan, 0.5)(
    {'index': index, 'image': digits[:2], 'label': labels}
  )
  first, _ = draw.sample_keys(5, index)
  eps = noise.draw(first, varied.NOISE, (8, 8, 1), np.float32)
  alpha, sigma = (float(fn(300)) for fn in (
    trained.schedule.alpha, trained.schedule.sigma))  # fmt: skip
  xt = alpha * (digits[:2] / np.float32(127.5) - 1) + sigma * eps
  seen = trained.denoise(xt, 300, {'label': labels})
  want = np.clip(np.asarray(seen.x0), -1, 1) * 127.5 + 127.5
  np.testing.assert_allclose(np.asarray(got)[:2], want, atol=0.51)


def test_a_varied_image_does_not_depend_on_the_batch_or_the_mesh(run):
  digits, labels = read(run, '', 'digits')
  rows = {
    'index': np.arange(5, dtype=np.uint32), 'image': digits[:5],
    'label': np.array(labels[:5], np.int32),
  }  # fmt: skip
  found = []
  for mesh, count in ((None, 5), (tiny.one_device(), 2)):
    trained = diffusion_jax.load(run, mesh=mesh)
    plan = trained.plan(sampler='ancestral', grid='300')
    some = jax.tree.map(lambda row, n=count: row[:n], rows)
    found.append(np.asarray(varied.drawer(trained, plan, 1)(some))[:2])
  np.testing.assert_allclose(*(x.astype(int) for x in found), atol=1)


def test_a_set_that_is_there_stays_and_a_lost_one_is_written_again(run, sets):
  path = sets / 'again.npz'
  shutil.copy(sets / 'new.npz.json', sets / 'again.npz.json')
  first = augment(run, f'--output={path}', '--per_class=3')  # after a kill
  assert 'drawing' not in first.err
  before = path.stat().st_mtime_ns
  second = augment(run, f'--output={path}', '--per_class=3')
  assert 'nothing to do' in second.err
  assert path.stat().st_mtime_ns == before
  assert json.loads(first.out) == json.loads(second.out)
  for mine, theirs in zip(
    read(run, path), read(run, sets / 'new.npz'), strict=True
  ):
    np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize('given', [[], ['--from=train', '--strength=1']])
def test_two_processes_write_the_same_set(run, tmp_path, given):
  """A process draws half of the samples; both choose among all of them."""
  paths = [tmp_path / f'{count}.npz' for count in (2, 1)]
  for path, start in zip(paths, (binaries.run_several, binaries.run),
                         strict=True):  # fmt: skip
    copy = tmp_path / path.stem
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns('samples'))
    found = start(
      'edit', 'augment', f'--workdir={copy}', *HOW, f'--output={path}',
      '--per_class=3', *given,
    )  # fmt: skip
    for one in found if isinstance(found, list) else [found]:
      assert one.code == 0, one.err
  facts = [facts_of(path) for path in paths]
  assert facts[0]['indices'] == facts[1]['indices']
  images = [read(run, path)[0].astype(int) for path in paths]
  np.testing.assert_allclose(*images, atol=1)


@pytest.mark.parametrize(
  ('given', 'told'),
  [
    ('--output=NEW.npz --per_class=4', 'with per_class=3, not 4'),
    ('--output=NEW --per_class=3 --seed=1', 'with seed=0, not 1'),
    ('--output=NEW.npz --per_class=0', '--per_class=0'),
    ('--output=NEW.npz', '--per_class is missing'),
    ('--output=setup.py --per_class=3', 'setup.py is a file'),
    ('--output=tests --per_class=3', 'no set of this task'),
    ('--output=a.npz --per_class=3 --format=gif', "'gif'"),
    ('--output=a --per_class=3 --format=npz', 'ends in .npz'),
    ('--output=a --per_class=3 --strength=0.3', '--strength does not apply'),
    ('--output=a --per_class=3 --near=1', '--near=1'),
    ('--output=a --per_class=3 --from=train --strength=0', 'strength=0'),
    ('--output=a --per_class=3 --from=train --strength=1.5', 'strength=1.5'),
    ('--output=a --per_class=3 --label=11', 'label=11'),
  ],
)
def test_mistakes(run, sets, given, told):
  given = given.replace('NEW', str(sets / 'new'))
  result = binaries.run(
    'edit', 'augment', f'--workdir={run}', *HOW, *given.split()
  )
  assert told in result.message


def test_a_run_without_labels_is_refused(tmp_path):
  plain = tiny.trained(tmp_path / 'plain')
  result = binaries.run(
    'edit', 'augment', f'--workdir={plain}', '--per_class=3',
    f'--output={tmp_path / "a.npz"}',
  )  # fmt: skip
  assert 'a run without labels' in result.message
  assert not (tmp_path / 'a.npz').exists()
  assert not (plain / 'samples' / 'a').exists()


def test_a_sampler_that_chooses_its_own_steps_varies_nothing(run):
  plan = diffusion_jax.load(run).plan(sampler='adaptive')
  with pytest.raises(UserError, match='chooses its own steps'):
    varied.times(plan, 0.5)
