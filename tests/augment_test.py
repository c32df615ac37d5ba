"""Augmentation that the network is told."""

import binaries
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import ndimage

from diffusion_jax import conditioning
from diffusion_jax.codecs import pixels
from diffusion_jax.configs import digits
from diffusion_jax.data import augment, pipeline, resident
from diffusion_jax.runs import programs, recipe
from diffusion_jax.training import sharding

apply = jax.jit(augment.apply)
KEYS = np.random.SeedSequence(7).generate_state(augment.STREAMS, np.uint64)


def images(count=4, height=8, width=8, channels=2):
  rng = np.random.default_rng(0)
  shape = count, height, width, channels
  return rng.integers(0, 256, shape).astype(np.float32) / 127.5 - 1


def numbers(count=4, **which):
  """Numbers of transforms: n3=-1.0 sets number 3."""
  found = np.zeros((count, augment.SIZE), np.float32)
  for name, value in which.items():
    found[:, int(name[1:])] = value
  return found


@pytest.mark.parametrize(
  ('which', 'expected'),
  [
    ({}, lambda x: x),
    ({'n0': 1}, lambda x: x[:, :, ::-1]),
    ({'n1': 1}, lambda x: x[:, ::-1]),
    ({'n3': -1, 'n4': 1}, lambda x: np.rot90(x, -1, (1, 2))),
    ({'n3': -2}, lambda x: x[:, ::-1, ::-1]),
    # An eighth of 8 pixels is one; outside is the mirror image.
    ({'n7': 2}, lambda x: np.pad(x, PAD, 'reflect')[:, 3:-3, 1:9]),
    ({'n8': -3}, lambda x: np.pad(x, PAD, 'reflect')[:, 6:, 3:-3]),
    # The image is mirrored first, and then moved to the right.
    ({'n0': 1, 'n7': 1}, lambda x: np.pad(x, PAD, 'reflect')[:, 3:-3, 11:3:-1]),
  ],
)  # fmt: skip
def test_flips_right_angles_and_whole_pixels_are_exact(which, expected):
  x = images()
  np.testing.assert_array_equal(apply(x, numbers(**which)), expected(x))


PAD = ((0, 0), (3, 3), (3, 3), (0, 0))


def linear(which):
  """The matrix (y, x) that the numbers describe, by its definition."""
  n = numbers(1, **which)[0].astype(float)
  angle, axis = np.arctan2(n[4], 1 + n[3]), np.arctan2(n[6], n[5])
  stretch = 2 ** (0.2 * np.hypot(n[5], n[6]))

  def turn(a):  # from x to y, which points down
    return np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])

  return (
    turn(axis) @ np.diag([1 / stretch, stretch]) @ turn(-axis)
    @ turn(angle) * 2 ** (0.2 * n[2])
  )  # fmt: skip


@pytest.mark.parametrize(
  'which',
  [
    {'n2': 1.3},
    {'n2': -0.7, 'n3': np.cos(0.4) - 1, 'n4': np.sin(0.4)},
    {'n5': 1.1 * np.cos(2.2), 'n6': 1.1 * np.sin(2.2)},
    {'n3': np.cos(-2) - 1, 'n4': np.sin(-2), 'n5': 0.4, 'n6': -0.9, 'n8': 0.3},
  ],
)
def test_the_numbers_tell_the_transform(which):
  """A smooth image is that of SciPy, moved by the matrix of the numbers."""
  y, x = np.mgrid[:24, :24] / 23 * 2 - 1
  smooth = (np.sin(2 * x + y) * np.cos(1.5 * y - 0.3))[..., None]
  matrix = np.linalg.inv(linear(which))
  center, shift = np.full(2, 11.5), np.array([which.get('n8', 0) * 3, 0])
  expected = ndimage.affine_transform(
    smooth[..., 0], matrix, center - matrix @ (center + shift), mode='mirror'
  )
  found = apply(smooth[None].astype(np.float32), numbers(1, **which))[0, ..., 0]
  np.testing.assert_allclose(found, expected, atol=0.01)


def test_numbers_have_the_laws_of_the_paper():
  drawn = augment.draw(KEYS, np.arange(40_000), 0.5).astype(float)
  flips = drawn[:, :2].mean(0)
  np.testing.assert_allclose(flips, 0.25, atol=0.01)
  for column in (2, 7, 8):
    some = drawn[drawn[:, column] != 0, column]
    assert len(some) / len(drawn) == pytest.approx(0.5, abs=0.01)
    assert some.mean() == pytest.approx(0, abs=0.03)
    assert some.std() == pytest.approx(1, abs=0.03)
  turned = drawn[drawn[:, 4] != 0]
  np.testing.assert_allclose(
    (turned[:, 3] + 1) ** 2 + turned[:, 4] ** 2, 1, rtol=1e-6
  )
  stretched = drawn[drawn[:, 5] != 0]
  square = (stretched[:, 5:7] ** 2).sum(1)
  assert square.mean() == pytest.approx(1, abs=0.05)
  # Whether one is made tells nothing of another.
  made = np.corrcoef((drawn[:, [0, 1, 2, 4, 5, 7]] != 0).T)
  np.testing.assert_allclose(made, np.eye(6), atol=0.03)


def test_a_row_depends_on_its_position_only():
  whole = augment.draw(KEYS, np.arange(100), 0.5)
  part = augment.draw(KEYS, np.array([70, 3, 4]), 0.5)
  np.testing.assert_array_equal(part, whole[[70, 3, 4]])
  assert not augment.draw(KEYS, np.arange(100), 0.0).any()


HOW = {'batch_size': 8, 'seed': 3, 'flip': True}


class Source:
  """Twelve images of noise."""

  row, encode_fn = 'image', None
  rows = np.random.default_rng(1).integers(0, 256, (12, *tiny.SHAPE), np.uint8)

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, index):
    return {'image': self.rows[index].copy(), 'label': np.int32(index)}


def test_with_probability_zero_batches_are_what_they_were():
  plain = pipeline.stream(Source(), **HOW)[5]
  same = pipeline.stream(Source(), **HOW, augmented=0.0)[5]
  assert plain.keys() == same.keys() == {'image', 'label'}
  jax.tree.map(np.testing.assert_array_equal, plain, same)


def test_told_flips_are_those_that_are_not_told():
  """The order, too; on the host and with the images on the devices."""
  plain = pipeline.stream(Source(), **HOW)[5]
  told = pipeline.stream(Source(), **HOW, augmented=1e-9)[5]
  encode = pixels.create(tiny.SHAPE).encode
  expected = encode({}, plain, None)
  np.testing.assert_array_equal(encode({}, told, None), expected)
  assert 0 < told['augment'][:, 0].sum() < 8
  order = pipeline.orders(12, **HOW, augmented=1e-9)[5]
  taken = resident.take(
    {'image': jnp.asarray(Source.rows), 'label': jnp.arange(12)}, order
  )
  jax.tree.map(np.testing.assert_array_equal, told, taken)


def test_each_device_transforms_its_own_rows():
  mesh = sharding.make_mesh()
  x = np.tile(images(), (len(jax.devices()), 1, 1, 1))
  drawn = augment.draw(KEYS, np.arange(len(x)), 0.9)
  given = sharding.put_batch((x, drawn), mesh)
  compiled = apply.lower(*given).compile()
  assert 'all-gather' not in compiled.as_text()
  np.testing.assert_allclose(compiled(*given), apply(x, drawn), atol=2e-6)


def test_the_network_is_told_beside_the_label():
  config = digits.get_config()
  config.data.augment = 0.2
  config.conditioning.update(name='label', num_classes=10)
  config.model.update(channels=8, num_groups=4, num_blocks=1, multipliers=(1,))
  config.model.attention_resolutions = ()
  made = recipe.create(config)
  assert made.conditioner.doors == {'label': 10, 'vector': augment.SIZE}
  assert programs.rows(config, made, 4)['augment'] == ((4, 9), np.float32)
  params = jax.eval_shape(made.init, jax.random.key(0))['net']
  assert params['vector']['kernel'].shape[0] == augment.SIZE


def test_held_out_images_and_samples_are_told_zeros():
  told = conditioning.create('label', augment=0.2, num_classes=3)
  cond = told.condition({}, {'label': np.arange(2)}, None)
  np.testing.assert_array_equal(cond['vector'], np.zeros((2, augment.SIZE)))
  null = conditioning.create('none', augment=0.2).condition({}, {}, None)
  np.testing.assert_array_equal(null['vector'], np.zeros((1, augment.SIZE)))
  rows = {'augment': numbers(2, n2=1.5), 'label': np.arange(2)}
  keys = jax.random.split(jax.random.key(0), 2)
  dropped = told.condition({}, rows, keys)
  np.testing.assert_array_equal(dropped['vector'], rows['augment'])


@pytest.mark.slow
def test_a_run_trains_samples_and_judges(tmp_path):
  """With labels; interrupted and resumed, in pieces, bitwise the same order."""
  made = {
    'data.augment': 0.5, 'conditioning.name': 'label',
    'conditioning.num_classes': 10, 'num_steps': 6, 'checkpoint_every': 3,
    **tiny.UNET,
  }  # fmt: skip
  tiny.train(tmp_path / 'run', **made)
  tiny.train(tmp_path / 'half', **made | {'num_steps': 3})
  tiny.train(tmp_path / 'half', **made | {'data.on_device': True})
  whole, half = (tiny.losses(tmp_path / name) for name in ('run', 'half'))
  assert whole.keys() == half.keys()
  for step, loss in whole.items():
    assert half[step] == pytest.approx(loss, rel=3e-6)
  for binary, *flags in (
    ('sample', '--num_samples=4', '--guidance=2', '--sampler=ddim'),
    ('calibrate', '--num_images=4'),
    ('evaluate', '--metrics=bpd', '--num_images=4', '--split=train'),
  ):
    steps = ['--num_steps=2'] * (binary == 'sample')
    result = binaries.run(
      binary, f'--workdir={tmp_path / "run"}', *flags, *steps
    )
    assert result.code == 0, result.err
  result = binaries.run(
    'convert', f'--from={tmp_path / "run"}', f'--to={tmp_path / "unet"}'
  )
  assert 'data.augment=0.5: a UNet2DModel has no input' in result.message
