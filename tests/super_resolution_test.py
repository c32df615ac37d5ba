"""Super-resolution by training: the condition, and runs of it."""

import json

import binaries
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from scipy import stats

import diffusion_jax
from diffusion_jax import conditioning
from diffusion_jax.codecs import pixels
from diffusion_jax.conditioning import low_resolution
from diffusion_jax.configs import digits_sr
from diffusion_jax.data import augment
from diffusion_jax.evaluation import features, sharpness
from diffusion_jax.reporting import pictures
from diffusion_jax.runs import exports, planned, store, upscaled, validation
from diffusion_jax.system.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 8, 12, 3), dtype=np.uint8)


def create(noise=0.0, factor=2, by='mean', shape=(8, 12, 3), other=None):
  return low_resolution.create(
    other or conditioning.none(), pixels.create(shape), factor, by, noise
  )


# --- pictures -----------------------------------------------------------------


def test_a_mean_is_that_of_its_block():
  got = low_resolution.reduced(IMAGES, 4, 'mean')
  assert got.shape == (6, 2, 3, 3)
  for row, column in np.ndindex(2, 3):
    block = IMAGES[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
    np.testing.assert_array_equal(
      got[:, row, column], np.round(block.astype(float).mean((1, 2)))
    )


@pytest.mark.parametrize('factor', [2, 4])
def test_bicubic_is_pillows(factor):
  """Both ways, but for Pillow's rounding of 8-bit intermediate pictures."""
  small = low_resolution.reduced(IMAGES, factor, 'bicubic')
  large = low_resolution.enlarged(small, (8, 12))
  for image, less, more in zip(IMAGES, small, large, strict=True):
    size = 12 // factor, 8 // factor
    theirs = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(less) - np.asarray(theirs)).max() <= 1
    again = Image.fromarray(np.asarray(less).astype(np.uint8))
    again = again.resize((12, 8), Image.Resampling.BICUBIC)
    got = np.clip(np.asarray(more), 0, 255)
    assert np.abs(got - np.asarray(again)).max() < 2


def test_a_constant_stays_one():
  for by in low_resolution.BY:
    small = low_resolution.reduced(jnp.full((1, 8, 8, 1), 37.0), 2, by)
    np.testing.assert_array_equal(small, 37)
    large = low_resolution.enlarged(small, (8, 8))
    np.testing.assert_allclose(large, 37, rtol=1e-6)


@pytest.mark.parametrize(
  ('make', 'told'),
  [
    (lambda: create(factor=5), 'super_resolution.factor=5 does not divide'),
    (lambda: low_resolution.reduced(IMAGES, 2, 'area'), 'by=.area.: one of'),
  ],
)
def test_what_cannot_be_reduced_is_one_line(make, told):
  with pytest.raises(UserError, match=told) as error:
    make()
  assert '\n' not in str(error.value)


# --- the condition ------------------------------------------------------------


def test_it_is_made_of_the_image_or_given():
  """[-1, 1], enlarged; the same whether it is made or given; grey without."""
  conditioner = create()
  assert conditioner.doors == {'channels': 3}
  made = conditioner.condition({}, {'image': IMAGES}, None)['channels']
  small = np.asarray(low_resolution.reduced(IMAGES, 2, 'mean'), np.uint8)
  given = conditioner.condition({}, {low_resolution.ROW: small}, None)
  np.testing.assert_allclose(made, given['channels'], atol=1e-6)
  want = low_resolution.enlarged(small / np.float32(127.5) - 1, (8, 12))
  np.testing.assert_allclose(made, want, atol=1e-6)
  keys = jax.random.split(jax.random.key(0), 6)
  again = conditioner.condition({}, {'image': IMAGES}, keys)['channels']
  np.testing.assert_array_equal(made, again)  # it is never dropped
  none = conditioner.condition({}, {}, None)['channels']
  np.testing.assert_array_equal(none, jnp.zeros((1, 8, 12, 3)))


def test_of_a_transformed_image_it_shows_the_transformed_one():
  numbers = np.zeros((6, augment.SIZE), np.float32)
  numbers[:, 0] = 1  # mirrored
  rows = {'image': IMAGES, 'augment': numbers}
  got = create().condition({}, rows, None)['channels']
  mirrored = {'image': IMAGES[:, :, ::-1]}
  want = create().condition({}, mirrored, None)['channels']
  np.testing.assert_allclose(got, want, atol=1 / 64)  # .5 is rounded


def test_other_doors_stay():
  label = conditioning.create('label', num_classes=3, drop=0.0)
  conditioner = create(other=label)
  assert conditioner.doors == {'label': 3, 'channels': 3}
  rows = {'image': IMAGES, 'label': np.arange(6) % 3}
  found = conditioner.condition({}, rows, None)
  np.testing.assert_array_equal(found['label'], rows['label'])


def test_noise_in_training_is_of_a_uniform_deviation_that_is_told():
  """Its law by Kolmogorov and Smirnov; the noise is standard normal."""
  count, most = 4000, 0.4
  conditioner = create(most, factor=1, shape=(2, 2, 1))
  assert conditioner.doors == {'channels': 2}
  rows = {low_resolution.ROW: np.full((count, 2, 2, 1), 127, np.uint8)}
  keys = jax.random.split(jax.random.key(0), count)
  found = np.asarray(conditioner.condition({}, rows, keys)['channels'])
  level = found[:, 0, 0, 1]
  assert (found[..., 1] == level[:, None, None]).all()
  assert stats.kstest(level, stats.uniform.cdf).pvalue > 1e-3
  eps = (found[..., 0] - (127 / 127.5 - 1)) / (most * level)[:, None, None]
  assert stats.kstest(eps.ravel(), stats.norm.cdf).pvalue > 1e-3
  # Of each row by its own key.
  one = {low_resolution.ROW: rows[low_resolution.ROW][5:6]}
  alone = conditioner.condition({}, one, keys[5:6])['channels']
  np.testing.assert_array_equal(alone[0], found[5])


def test_noise_of_samples_is_that_asked_for():
  conditioner = create(0.4)
  small = np.full((2, 4, 6, 3), 100, np.uint8)
  rows = {low_resolution.ROW: small}
  clean = np.asarray(conditioner.condition({}, rows, None)['channels'])
  np.testing.assert_array_equal(clean[..., 3], 0)
  rows |= {
    low_resolution.NOISE: np.float32([0.1, 0.2]),
    low_resolution.KEYS: jax.random.split(jax.random.key(0)),
  }
  noised = np.asarray(conditioner.condition({}, rows, None)['channels'])
  np.testing.assert_allclose(noised[:, 0, 0, 3], [0.25, 0.5])
  assert (noised[..., :3] != clean[..., :3]).all()


# --- what is measured ---------------------------------------------------------


def test_sharpness_of_known_samples():
  small = np.asarray(low_resolution.reduced(IMAGES, 2, 'mean'), np.uint8)
  off = np.clip(IMAGES.astype(int) + 3, 0, 255)

  def measured(samples, originals=IMAGES):
    images = features.Images(
      len(samples), lambda: [samples[:4], samples[4:]], ''
    )
    return sharpness.measure(images, small, originals, 2, 'mean')

  same = measured(IMAGES)
  assert same['psnr'] == 100
  assert same['ssim'] == pytest.approx(1)
  assert same['rms_low'] == 0
  # Sample i is of picture i % P.
  assert measured(np.concatenate([IMAGES, IMAGES]))['psnr'] == 100
  error = np.mean(np.square(off - IMAGES.astype(float)), axis=(1, 2, 3))
  want = np.mean(10 * np.log10(255**2 / error))
  other = measured(off.astype(np.float32))
  assert other['psnr'] == pytest.approx(want)
  assert other['psnr_bicubic'] == same['psnr_bicubic'] < 30
  assert measured(off, None).keys() == {'rms_low'}


# --- runs ---------------------------------------------------------------------

CHANGES = {
  'super_resolution.factor': 2, 'super_resolution.noise': 0.2,
  'loss.law': 'levels', 'loss.level': 'alpha', 'num_steps': 4, 'eval_every': 2,
  'sample_every': 4, 'checkpoint_every': 4, 'keep_every': 0,
  'sample.num_images': 3,
}  # fmt: skip
HOW = ('--sampler=ddim', '--num_steps=2')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('sharpening') / 'run'
  tiny.train(workdir, **CHANGES)
  return workdir


@pytest.fixture(scope='module')
def trained(run):
  return diffusion_jax.load(run)


SMALL = RNG.integers(0, 256, (3, 4, 4, 1), dtype=np.uint8)


def test_edit_upscales_by_what_the_run_was_trained_for(trained):
  kind = {'name': 'upscale', 'factor': 2}
  found = trained.edit(SMALL, kind, samples=2, num_steps=3)
  assert found.shape == (3, 2, 8, 8, 1)
  alone = trained.edit(SMALL[1:2], kind, samples=2, num_steps=3)
  np.testing.assert_array_equal(alone[0], found[1])
  assert (found[:, 0] != found[:, 1]).any()
  # The network sees the picture: another one has another answer.
  eps = trained.edit(SMALL[1:2], kind, num_steps=1, eta=0.0)
  other = trained.edit(255 - SMALL[1:2], kind, num_steps=1, eta=0.0)
  assert (eps != other).any()
  for what, options in (
    ('denoise', {'noise': 9}), ({'name': 'upscale', 'factor': 4}, {}),
    (kind, {'method': 'ddrm'}), (kind, {'tile': 4}),
  ):  # fmt: skip
    with pytest.raises(UserError, match='upscale with factor=2'):
      trained.edit(SMALL, what, **options)


def test_training_shows_pictures_samples_and_images(run):
  picture = pictures.read(run / 'samples/train_00000004.png')
  tile, gap = 64, 8
  assert picture.shape[1] == 3 * (tile + gap) + gap
  low, _, image = (
    picture[gap : gap + tile, left : left + tile, 0]
    for left in (gap + k * (tile + gap) for k in range(3))
  )
  image = image[::8, ::8]
  want = low_resolution.reduced(image[None, ..., None], 2, 'mean')
  np.testing.assert_array_equal(low[::16, ::16], want[0, ..., 0])


def test_a_sample_depends_on_its_picture_and_index_only(trained):
  how = {'sampler': 'ancestral', 'num_steps': 2, 'low_resolution': SMALL}
  whole = trained.sample(5, **how)
  np.testing.assert_array_equal(
    trained.sample(2, first=3, batch_size=1, **how), whole[3:]
  )
  alone = trained.sample(1, first=4, **{**how, 'low_resolution': SMALL[1]})
  np.testing.assert_array_equal(alone[0], whole[4])
  other = trained.sample(1, first=4, **{**how, 'low_resolution': SMALL[2]})
  assert (other[0] != whole[4]).any()
  noised = trained.sample(5, low_resolution_noise=0.1, **how)
  assert (noised != whole).any(axis=(1, 2, 3)).all()
  np.testing.assert_array_equal(
    trained.sample(1, first=3, low_resolution_noise=0.1, **how), noised[3:4]
  )


def test_a_condition_of_rows_is_that_of_samples(trained):
  """What an edit calls: rows of pictures -> the network's condition."""
  given = upscaled.given(SMALL, trained.config, 0.1)
  rows = upscaled.rows(given, np.array([0, 4]))
  np.testing.assert_array_equal(rows[upscaled.ROW], SMALL[[0, 1]])
  np.testing.assert_allclose(rows[upscaled.NOISE], 0.1)
  rows.pop(upscaled.NOISE)
  cond = trained.recipe.conditioner.condition(trained.params, rows, None)
  assert cond['channels'].shape == (2, 8, 8, 2)
  seen = trained.denoise(jnp.ones((2, 8, 8, 1)), 10.5, cond)
  null = trained.denoise(jnp.ones((2, 8, 8, 1)), 10.5)
  assert (seen.x0 != null.x0).any()


def test_a_drawer_takes_the_pictures_of_its_network(trained):
  made = upscaled.applied(trained, upscaled.given(SMALL, trained.config))
  plan = made.plan(sampler='ddim', num_steps=2)
  assert plan.condition[upscaled.ROW]['count'] == 3
  drawn = np.asarray(made.drawer(plan)(np.arange(4)))[:4]
  np.testing.assert_array_equal(
    drawn, trained.sample(4, low_resolution=SMALL, sampler='ddim', num_steps=2)
  )
  assert planned.rows(trained, np.arange(2))[1:] == []


def test_a_cascade_takes_the_samples_of_a_store(run, tmp_path, capsys):
  """Up to a gap; those of other sizes are refused."""
  low = tmp_path / 'low'
  for folder, images in ((low, SMALL), (tmp_path / 'wide', IMAGES)):
    store.open_store(folder, {'dtype': 'uint8'})
    store.save(folder, np.arange(3), images[:3])
  common = 'sample', f'--workdir={run}', *HOW, '--num_samples=4'
  out = tmp_path / 'out'
  binaries.here(*common, f'--low_resolution={low}', f'--output={out}')
  want = diffusion_jax.load(run).sample(
    4, low_resolution=SMALL, sampler='ddim', num_steps=2
  )
  np.testing.assert_array_equal(store.load(out, 4), want)
  with pytest.raises(UserError, match='is a sample store of images of'):
    binaries.here(*common, f'--low_resolution={tmp_path / "wide"}')


@pytest.mark.parametrize(
  ('options', 'told'),
  [
    ({}, 'give low_resolution, pictures of 4x4x1'),
    ({'low_resolution': SMALL[:, :2]}, 'or image_size=4x8 for images of that'),
    ({'low_resolution': SMALL.repeat(3, -1)}, 'sharpens 4x4x1: give such'),
    ({'low_resolution': SMALL[:0]}, r'uint8 \[0, 4, 4, 1\]: give uint8'),
    ({'low_resolution': SMALL / 255}, 'an array of float64'),
    (
      {'low_resolution': SMALL, 'low_resolution_noise': 0.3},
      'low_resolution_noise=0.3: from 0 to 0.2',
    ),
    ({'low_resolution_noise': 0.1}, 'low_resolution_noise=0.1 is for pictures'),
  ],
)
def test_other_pictures_are_one_line(trained, options, told):
  with pytest.raises(UserError, match=told) as error:
    trained.sample(**options)
  assert '\n' not in str(error.value)


def test_a_run_without_takes_no_pictures(tmp_path):
  plain = diffusion_jax.load(tiny.trained(tmp_path / 'plain'))
  with pytest.raises(UserError, match='the run sharpens no pictures'):
    plain.sample(low_resolution=SMALL)


def test_a_cascade_and_its_addresses(run, tmp_path, capsys):
  """Pictures of a store; of a sample's own picture the hash is in its PNG."""
  np.savez(tmp_path / 'low.npz', images=SMALL)
  common = f'--workdir={run}', *HOW
  place = f'--low_resolution={tmp_path / "low.npz"}'
  out = tmp_path / 'out'
  binaries.here(
    'sample', *common, place, '--num_samples=4', '--png', f'--output={out}'
  )
  capsys.readouterr()
  facts = json.loads((out / 'store.json').read_text())
  assert facts[upscaled.ROW]['count'] == 3
  png = out / 'png/000003.png'
  with Image.open(png) as image:
    facts = json.loads(image.info['diffusion_jax'])
  assert facts[upscaled.ROW] == {
    'sha256': upscaled.sha256(SMALL[0]), 'noise': 0.0
  }  # fmt: skip
  with pytest.raises(UserError, match='give it, as --low_resolution=PLACE'):
    binaries.here('sample', f'--like={png}', f'--output={tmp_path}/no')
  # The same picture elsewhere.
  Image.fromarray(SMALL[0, ..., 0]).save(tmp_path / 'one.png')
  one = f'--low_resolution={tmp_path / "one.png"}'
  binaries.here(
    'sample', f'--like={png}', one, f'--output={tmp_path}/yes', '--json'
  )
  assert json.loads(capsys.readouterr().out)['largest_difference'] == 0
  Image.fromarray(SMALL[1, ..., 0]).save(tmp_path / 'other.png')
  other = f'--low_resolution={tmp_path / "other.png"}'
  with pytest.raises(UserError, match='has no picture with the SHA-256'):
    binaries.here('sample', f'--like={png}', other, f'--output={tmp_path}/no')
  assert not (tmp_path / 'no').exists()


def test_evaluate_takes_the_held_out_images(run, capsys):
  binaries.here(
    'evaluate', f'--workdir={run}', *HOW, '--num_samples=6', '--json',
    '--features=pixels', '--metrics=fid', '--rounding=round',
  )  # fmt: skip
  results = json.loads(capsys.readouterr().out)['results']
  assert results['psnr'] < results['psnr_bicubic']
  assert {'ssim', 'ssim_bicubic', 'rms_low'} <= results.keys()
  (picture,) = run.glob('evaluations/*_sharpened.png')
  assert pictures.read(picture).shape[1] == 4 * (64 + 8) + 8
  (store,) = run.glob('samples/*_low*/store.json')
  assert json.loads(store.read_text())[upscaled.ROW]['count'] == 359


def test_bits_are_given_the_pictures(run, capsys):
  binaries.here(
    'evaluate', f'--workdir={run}', '--metrics=bpd', '--num_images=4',
    '--num_steps=3', '--json',
  )  # fmt: skip
  (card,) = json.loads(capsys.readouterr().out)['cards']
  assert card['protocol'][upscaled.ROW] == 'mean 1/2'
  with pytest.raises(UserError, match='--low_resolution'):
    binaries.here(
      'evaluate', f'--workdir={run}', '--metrics=bpd',
      '--low_resolution=heldout',
    )  # fmt: skip


@pytest.mark.parametrize(
  ('binary', 'flags', 'told'),
  [
    ('sample', ['--low_resolution_noise=0.1'], 'give low_resolution'),
    ('sample', ['--low_resolution=/nothing'], 'names no set of images'),
    ('sample', ['--export=FILE'], '--export takes no pictures'),
    (
      'sample', ['--low_resolution=heldout', '--interpolate=2', *HOW],
      '--interpolate takes no pictures',
    ),
    ('invert', [], 'inversion takes no pictures'),
  ],
)  # fmt: skip
def test_what_takes_no_pictures_says_so(run, binary, flags, told):
  with pytest.raises(UserError, match=told) as error:
    binaries.here(binary, f'--workdir={run}', *flags)
  assert '\n' not in str(error.value)


def test_it_has_no_pipeline_of_diffusers(run, tmp_path):
  with pytest.raises(UserError, match='a pipeline of diffusers takes no'):
    exports.write(run, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  ('changes', 'told'),
  [
    ({'super_resolution.factor': 1}, 'factor=1: 0 (none), or 2 or more'),
    ({'super_resolution.factor': 3}, 'does not divide data.image_size=8'),
    ({'super_resolution.by': 'area'}, "by='area': one of mean, bicubic"),
    ({'super_resolution.noise': -1.0}, 'noise=-1.0: 0 (none) or more'),
    (
      {
        'loss.name': 'classification',
        'model.name': 'encoder',
        'conditioning.name': 'label',
        'conditioning.num_classes': 10,
        'sample_every': 0,
      },
      "with loss.name='classification': set loss.name='denoising'",
    ),
  ],
)
def test_configs_that_cannot_work_are_one_line(changes, told):
  config = digits_sr.get_config()
  config.update_from_flattened_dict(changes)
  (problem,) = validation.check(config, jax.devices()[:1])
  assert told in problem
  assert '\n' not in problem
