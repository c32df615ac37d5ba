"""Edits of a tiny run: addresses, batches, meshes, resuming, mistakes."""

import json
import types

import binaries
import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import diffusion_jax
from diffusion_jax.data import pictures as given
from diffusion_jax.editing import measurements, methods
from diffusion_jax.reporting import pictures
from diffusion_jax.runs import edit_plans, edits
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 8, 8, 1), np.uint8)
MASK = RNG.random((5, 8, 8)) < 0.6
SHORT = {'num_steps': 3, 'seed': 4}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return tiny.trained(tmp_path_factory.mktemp('edit') / 'run')


@pytest.fixture(scope='module')
def trained(workdir):
  return diffusion_jax.load(workdir)


def test_known_pixels_are_kept_bitwise_and_others_drawn(trained):
  found = trained.edit(IMAGES, 'inpaint', mask=MASK, samples=2, **SHORT)
  assert found.shape == (5, 2, 8, 8, 1)
  assert found.dtype == np.uint8
  for k in range(2):
    np.testing.assert_array_equal(found[:, k][MASK], IMAGES[MASK])
    assert (found[:, k][~MASK] != IMAGES[~MASK]).mean() > 0.9
  assert (found[:, 0][~MASK] != found[:, 1][~MASK]).mean() > 0.9


def test_an_answer_depends_on_its_input_seed_and_number_alone(workdir, trained):
  """Not on the batch, the order, or the devices."""
  how = {'measurement': {'name': 'upscale', 'factor': 2}, 'method': 'ddrm'}
  small = IMAGES[:, ::2, ::2]
  all_at_once = trained.edit(small, **how, samples=3, **SHORT)
  reverse = trained.edit(small[::-1], **how, samples=2, batch_size=2, **SHORT)
  np.testing.assert_array_equal(reverse[::-1], all_at_once[:, :2])
  mesh = sharding.make_mesh(data=4, fsdp=2, devices=jax.devices())
  spread = diffusion_jax.load(workdir, mesh=mesh).edit(
    small, **how, samples=3, **SHORT
  )
  apart = np.abs(spread.astype(int) - all_at_once)
  assert apart.max() <= 1
  other = trained.edit(small, **how, num_steps=3, seed=5)
  assert (other[:, 0] != all_at_once[:, 0]).mean() > 0.5


def test_a_blurred_answer_fits_what_is_known(trained):
  """Of pictures that a blur has made, with the noise's level as residual."""
  kind = {'name': 'deblur', 'kernel': [[0.25, 0.5, 0.25]]}
  plan = edits.plan(trained, kind, (8, 8, 1), method='ddrm', num_steps=50)
  make = measurements.create(kind, (8, 8, 1))
  clean = np.float32(IMAGES) / 127.5 - 1
  y = make({'noise': np.zeros(5, np.float32)}).apply(clean)
  noise = 8 * np.random.default_rng(1).normal(size=y.shape)
  known = (np.asarray(y) + 1) * 127.5 + noise
  given = edits.rows(plan, known, 8.0)
  found = edits.answer(trained, plan, given, np.zeros(5), 5)
  off = edits.residuals(plan, given, found.images)
  assert off.mean() < 1.1 * 8
  np.testing.assert_allclose(
    edits.residuals(plan, given, IMAGES), np.sqrt((noise**2).mean((1, 2, 3))),
    rtol=1e-3,
  )  # fmt: skip


def test_the_mean_takes_one_evaluation_and_levels_of_each(trained):
  """Each picture at its own level of noise, in one program."""
  known = np.float32(IMAGES)
  levels = np.float32([0, 5, 20, 60, 200])
  found = trained.edit(known, 'denoise', noise=levels)[:, 0]
  np.testing.assert_array_equal(found[0], IMAGES[0])
  for i in (1, 3):
    one = trained.edit(known[i : i + 1], 'denoise', noise=float(levels[i]))
    np.testing.assert_array_equal(one[0, 0], found[i])
  plan = edits.plan(trained, {'name': 'denoise'}, (8, 8, 1))
  assert plan.evaluations == 1


def test_a_strength_of_nearly_nothing_changes_nearly_nothing(trained):
  little = trained.edit(IMAGES, None, strength=0.002, **SHORT)[:, 0]
  much = trained.edit(IMAGES, None, strength=1.0, **SHORT)[:, 0]
  assert np.abs(little.astype(int) - IMAGES).mean() < 4
  assert np.abs(much.astype(int) - IMAGES).mean() > 30


def test_tiles_answer_pictures_of_any_size(trained):
  large = np.tile(IMAGES[:2], (1, 2, 3, 1))[:, :13, :20]
  found = trained.edit(large, 'denoise', noise=20, tile=8)
  assert found.shape == (2, 1, 13, 20, 1)
  whole = trained.edit(IMAGES, 'denoise', noise=20)
  tiled = trained.edit(IMAGES, 'denoise', noise=20, tile=8)
  np.testing.assert_array_equal(whole, tiled)


def test_the_usual_method_depends_on_the_size(trained):
  """Of the run's images, so that a folder is answered by one method."""
  for side in (8, 20):
    plan = edits.plan(trained, {'name': 'inpaint'}, (side, 8, 1), tile=8)
    assert plan.method == 'dps'
  one = types.SimpleNamespace(image_shape=(32, 8, 3))
  assert edit_plans.best('inpaint', one) == 'covariance'
  assert edit_plans.best('denoise', one) == 'mean'


@pytest.mark.parametrize(
  ('measurement', 'options', 'must'),
  [
    ('inpaint', {}, 'mask'),
    ('inpaint', {'mask': np.ones((5, 8, 8))}, 'leaves everything known'),
    ('inpaint', {'mask': np.zeros((5, 8, 8))}, 'leaves nothing known'),
    ('inpaint', {'mask': np.ones((5, 4, 8))}, 'the mask has the shape'),
    ('denoise', {'noise': -1}, 'noise=-1'),
    ('denoise', {'method': 'mean', 'num_steps': 3}, 'one evaluation'),
    ('denoise', {'method': 'nope'}, 'nope'),
    ('denoise', {'method': 'sdedit'}, 'strength'),
    ('denoise', {'samples': 0}, 'samples=0'),
    ('denoise', {'samples': 2}, 'the mean is one answer'),
    ('denoise', {'overlap': 3}, 'overlap=3'),
    ('denoise', {'tile': 4, 'overlap': 1.5}, 'overlap=1.5'),
    ('denoise', {'tile': 9}, 'tile=9: '),
    ('denoise', {'tile': 4.5}, 'tile=4.5: one or two whole numbers'),
    ('denoise', {'tile': (4, 4, 1)}, 'tile=(4, 4, 1)'),
    ('denoise', {'noise': 'much'}, 'noise=much'),
    ('denoise', {'noise': [1, 2]}, 'one for each of 5'),
    ({'name': 'upscale', 'factor': '2'}, {}, "factor='2'"),
    ({'factor': 2}, {}, 'measurement=None'),
    (None, {'strength': 'half'}, 'strength=half'),
    ('denoise', {'label': 3}, 'label=3'),
    ('denoise', {'zeta': 0.5}, 'zeta'),
    ('colourise', {}, 'grey'),
    ('inpainting', {}, 'inpaint'),
    (None, {'strength': 0}, 'strength=0'),
    (None, {'strength': 1.5}, 'strength=1.5'),
    (None, {}, 'strength'),
    (None, {'method': 'ddrm', 'strength': 0.5}, 'sdedit'),
    ({'name': 'deblur', 'kernel': np.eye(3).tolist()}, {'method': 'ddrm'},
     'singular values'),
    ('denoise', {'mask': MASK}, 'a mask is for inpaint'),
  ],
)  # fmt: skip
def test_mistakes_are_one_line(trained, measurement, options, must):
  with pytest.raises(UserError) as raised:
    trained.edit(IMAGES, measurement, **options)
  message = str(raised.value)
  assert must in message
  assert '\n' not in message


# --- the binary --------------------------------------------------------------


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('pictures')
  for i, image in enumerate(IMAGES[:3]):
    pictures.save(folder / f'p{i}.png', image)
  return folder


def edit(task, workdir, folder, output, *flags):
  return binaries.run(
    'edit', task, f'--workdir={workdir}', f'--input={folder}',
    f'--output={output}', '--num_steps=3', *flags,
  )  # fmt: skip


def test_it_writes_answers_and_goes_on_where_it_stopped(
  workdir, folder, tmp_path
):
  output = tmp_path / 'out'
  flags = '--box=2,2,4,4', '--samples=2', '--json'
  first = edit('inpaint', workdir, folder, output, *flags)
  assert first.code == 0, first.err
  found = json.loads(first.out)
  assert found['drawn'] == 6
  names = [one['name'] for one in found['pictures']]
  assert names == ['p0', 'p1', 'p2']
  assert found == json.loads((output / 'edit.json').read_text())
  answer = output / 'p1_1.png'
  kept = answer.read_bytes()
  with Image.open(answer) as image:
    address = json.loads(image.text['diffusion_jax_edit'])
  assert address['index'] == 1
  assert address['input'] == found['pictures'][1]['input']
  assert pictures.read(output / 'spread' / 'p0.png').shape == (8, 8, 1)
  inside = np.zeros((8, 8), bool)
  inside[2:6, 2:6] = True
  np.testing.assert_array_equal(
    pictures.read(answer)[~inside], IMAGES[1][~inside]
  )
  answer.unlink()
  again = edit('inpaint', workdir, folder, output, *flags, '--batch_size=1')
  assert json.loads(again.out)['drawn'] == 1
  assert answer.read_bytes() == kept
  other = edit('inpaint', workdir, folder, output, *flags, '--seed=1')
  assert 'seed=0, not 1: choose another --output' in other.message


@pytest.mark.parametrize(
  ('task', 'flags', 'must'),
  [
    ('inpaint', (), 'p0 has no transparent part'),
    ('inpaint', ('--box=2,2,4',), '--box=2,2,4'),
    ('inpaint', ('--box=6,6,4,4',), 'must lie in the picture'),
    ('inpaint', ('--random=1.5',), '--random=1.5'),
    ('inpaint', ('--mask=nowhere.png',), 'nowhere.png is not a folder'),
    ('upscale', ('--factor=3',), '--factor=3: 2, 4 or 8'),
    ('deblur', ('--blur=nope',), '--blur=nope'),
    ('deblur', ('--angle=3',), '--angle is for --blur=motion'),
    ('denoise', ('--noise=-3',), '--noise=-3'),
    ('restyle', ('--strength=0',), '--strength=0'),
    ('restyle', ('--simulate',), '--simulate'),
    ('denoise', ('--num_images=3',), '--num_images=3'),
    ('denoise', ('--mask=x.png',), 'mask'),
    ('denoise', ('--samples=2',), '--samples=2: the mean is one answer'),
    ('denoise', ('--method=sdedit',), 'sdedit'),
    ('deblur', ('--blur=motion', '--length=9'), '--length=9: from 1'),
    ('denoise', ('--tile=0',), '--tile=0'),
  ],
)  # fmt: skip
def test_a_mistake_writes_nothing(workdir, folder, tmp_path, task, flags, must):
  output = tmp_path / 'out'
  assert must in edit(task, workdir, folder, output, *flags).message
  assert not output.exists()


def test_list_prints_all_methods_and_needs_no_run():
  told = binaries.run('edit', 'deblur', '--method=list')
  assert told.code == 0, told.err
  lines = told.out.splitlines()
  assert [line.split()[0] for line in lines] == ['method', *methods.ABOUT]
  assert '--workdir is missing' in binaries.run('edit', 'deblur').message


def test_each_picture_of_a_folder_has_a_name(tmp_path):
  for name in ('a/b.png', 'a_b.png', 'c.png', 'c.bmp', 'd.png'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.fromarray(IMAGES[0, ..., 0]).save(tmp_path / name)
  found = given.listed(str(tmp_path), 'input')
  assert len(found) == 5
  assert {*found} >= {'d', 'c.png', 'c.bmp'}
  assert len({*found.values()}) == 5


@pytest.mark.slow
def test_what_answers_depend_on_is_not_mixed(workdir, folder, tmp_path):
  how = 'vary', workdir, folder
  assert edit(*how, tmp_path / 'out', '--samples=1').code == 0
  other = edit(*how, tmp_path / 'out', '--samples=1', '--strength=0.9')
  assert 'choose another --output' in other.message
  inside = edit(*how, folder / 'out')
  assert 'is inside of --input' in inside.message


@pytest.mark.slow
def test_a_mask_may_be_a_box_a_picture_or_transparency(workdir, tmp_path):
  """The same pixels are known, so the answers are the same."""
  white = np.zeros((8, 8), np.uint8)
  white[2:6, 1:5] = 255
  clear = np.dstack([np.repeat(IMAGES[0], 3, -1), 255 - white])
  for name, picture in (('mask', white), ('clear', clear)):
    (tmp_path / name).mkdir()
    Image.fromarray(picture).save(tmp_path / name / 'p.png')
  (tmp_path / 'plain').mkdir()
  pictures.save(tmp_path / 'plain' / 'p.png', IMAGES[0])
  answers = []
  for i, (place, *flags) in enumerate((
    ('plain', '--box=2,1,4,4'), ('plain', f'--mask={tmp_path}/mask/p.png'),
    ('plain', f'--mask={tmp_path}/mask'), ('clear',),
  )):  # fmt: skip
    output = tmp_path / f'out{i}'
    found = edit('inpaint', workdir, tmp_path / place, output, *flags)
    assert found.code == 0, found.err
    answers.append(pictures.read(output / 'p_0.png'))
  for other in answers[1:]:
    np.testing.assert_array_equal(other, answers[0])
  small = tmp_path / 'small.png'
  Image.fromarray(white[:4]).save(small)
  message = edit(
    'inpaint', workdir, tmp_path / 'plain', tmp_path / 'no', f'--mask={small}'
  ).message
  assert 'give a mask of the same size' in message


def test_inputs_of_other_sizes_are_answered_or_told(workdir, folder, tmp_path):
  odd = tmp_path / 'odd'
  odd.mkdir()
  none = edit('denoise', workdir, odd, tmp_path / 'none', '--noise=9')
  assert 'odd has no images' in none.message
  pictures.save(odd / 'large.png', np.tile(IMAGES[0], (2, 3, 1))[:13, :19])
  pictures.save(odd / 'usual.png', IMAGES[1])
  output = tmp_path / 'out'
  message = edit('denoise', workdir, odd, output, '--noise=9').message
  for word in ('large is 19 wide and 13 high', '--resize', '--tile=8'):
    assert word in message
  for flag, shape in (('--tile=8', (13, 19, 1)), ('--resize', (8, 8, 1))):
    found = edit(
      'denoise', workdir, odd, f'{output}{flag}', '--noise=9', flag,
      '--method=denoise',
    )  # fmt: skip
    assert found.code == 0, found.err
    answer = pictures.read(tmp_path / f'out{flag}' / 'large_0.png')
    assert answer.shape == shape
    told = json.loads((output.parent / f'out{flag}/edit.json').read_text())
    counts = [one.get('tiles') for one in told['pictures']]
    assert counts == ([12, 1] if flag == '--tile=8' else [None, None])
    # It has the pictures of all sizes.
    overview = pictures.read(output.parent / f'out{flag}/overview.png')
    assert overview.shape[0] > 18 + 2 * 64
