"""Measurements against dense matrices, other libraries and their transposes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from diffusion_jax.editing import kernels, measurements
from diffusion_jax.system.errors import UserError

SHAPE = (8, 12, 3)
KINDS = {
  'inpaint': {'name': 'inpaint'},
  'mean': {'name': 'upscale', 'factor': 4},
  'bicubic': {'name': 'upscale', 'factor': 2, 'by': 'bicubic'},
  'colourise': {'name': 'colourise'},
  'gaussian': {'name': 'deblur', 'kernel': kernels.gaussian(1.2, 8).tolist()},
  'even': {'name': 'deblur', 'kernel': [[1.0, 2.0, 3.0, 1.0], [2, 4, 6, 2]]},
  'motion': {'name': 'deblur', 'kernel': kernels.motion(5, 30).tolist()},
  'denoise': {'name': 'denoise'},
}


def drawn(seed, shape):
  return np.random.default_rng(seed).normal(size=shape)


def made(kind, shape=SHAPE, batch=2):
  mask = drawn(7, (batch, *shape[:2], 1)) > 0
  rows = {'noise': np.full(batch, 0.1), 'mask': mask}
  return measurements.create(KINDS[kind], shape)(rows)


@pytest.mark.parametrize('kind', KINDS)
def test_the_adjoint_is_the_transpose(x64, kind):
  """<A x, y> = <x, A' y>, and so for each example."""
  one = made(kind)
  y_shape = measurements.shape_of(KINDS[kind], SHAPE)
  x, y = drawn(0, (2, *SHAPE)), drawn(1, (2, *y_shape))
  ax, ay = one.apply(jnp.asarray(x)), one.adjoint(jnp.asarray(y))
  assert ax.shape == y.shape
  assert ay.shape == x.shape
  left = np.sum(ax * y, axis=(1, 2, 3))
  np.testing.assert_allclose(left, np.sum(x * ay, axis=(1, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_the_spectrum_is_a_singular_value_decomposition(x64, kind):
  """U' A x = S V' x, |U' y| = |y| for y = A x, and V is orthogonal."""
  one = made(kind)
  if kind == 'motion':
    assert one.spectrum is None
    return
  x = jnp.asarray(drawn(0, (2, *SHAPE)))
  there = one.spectrum.coordinates(x)
  y = one.apply(x)
  seen = one.spectrum.observed(y)
  close = {'atol': 1e-12}
  np.testing.assert_allclose(seen, one.spectrum.values * there, **close)
  np.testing.assert_allclose(np.sum(seen**2), np.sum(y**2), rtol=1e-12)
  np.testing.assert_allclose(np.sum(there**2), np.sum(x**2), rtol=1e-12)
  np.testing.assert_allclose(one.spectrum.picture(there), x, **close)
  # A' = V S U'
  z = jnp.asarray(drawn(1, y.shape))
  back = one.spectrum.values * one.spectrum.observed(z)
  np.testing.assert_allclose(
    one.spectrum.picture(back), one.adjoint(z), **close
  )


def test_they_run_in_the_dtype_of_the_picture():
  for kind in KINDS:
    mask = jnp.ones((2, *SHAPE[:2], 1))
    rows = {'noise': jnp.zeros(2), 'mask': mask}
    one = measurements.create(KINDS[kind], SHAPE)(rows)
    y = one.apply(jnp.ones((2, *SHAPE), jnp.float32))
    assert one.adjoint(y).dtype == y.dtype == jnp.float32


def test_each_example_has_its_own_mask_and_noise(x64):
  mask = np.zeros((2, 4, 4, 1))
  mask[0, :2], mask[1, 1] = 1, 1
  make = measurements.create({'name': 'inpaint'}, (4, 4, 3))
  one = jax.jit(lambda rows: make(rows).apply(jnp.ones((2, 4, 4, 3))))
  found = one({'noise': np.zeros(2), 'mask': mask})
  np.testing.assert_array_equal(found, np.broadcast_to(mask, found.shape))
  # Nothing of a hidden pixel reaches y.
  rows = {'noise': np.ones(2), 'mask': mask}
  x = np.where(mask > 0, 1.0, np.nan) * np.ones(3)
  y = measurements.observe(
    {'name': 'inpaint'}, make(rows), jnp.asarray(x), jnp.ones((2, 4, 4, 3))
  )
  np.testing.assert_array_equal(y, 2 * np.broadcast_to(mask, y.shape))


@pytest.mark.parametrize('kind', ['even', 'motion', 'gaussian'])
def test_blurs_are_convolutions_with_mirrored_borders(x64, kind):
  """scipy's 'reflect' repeats the edge; its middle is K // 2 as well."""
  x = drawn(3, (2, *SHAPE))
  kernel = np.asarray(KINDS[kind]['kernel'])
  kernel = kernel / kernel.sum()
  # scipy flips the kernel about (K - 1) / 2: an even one moves by a pixel.
  origin = [-1 if k % 2 == 0 else 0 for k in kernel.shape]
  expected = ndimage.correlate(
    x, kernel[None, ::-1, ::-1, None], mode='reflect', origin=(0, *origin, 0)
  )
  found = made(kind).apply(jnp.asarray(x))
  np.testing.assert_allclose(found, expected, atol=1e-7)
  as_convolution = measurements.convolution(kernel, SHAPE)({'noise': 0.0})
  np.testing.assert_allclose(
    as_convolution.apply(jnp.asarray(x)), expected, atol=1e-12
  )


def test_a_point_becomes_the_kernel(x64):
  kernel = np.arange(1.0, 7).reshape(2, 3) ** 2
  x = np.zeros((1, 7, 7, 1))
  x[0, 3, 3] = kernel.sum()
  make = measurements.create({'name': 'deblur', 'kernel': kernel}, x.shape[1:])
  found = make({'noise': 0.0}).apply(jnp.asarray(x))[0, 2:4, 2:5, 0]
  np.testing.assert_allclose(found, kernel, atol=1e-12)


@pytest.mark.parametrize('factor', [2, 4])
def test_bicubic_is_pillows(x64, factor):
  x = drawn(4, (16, 24)).astype(np.float32)
  size = (24 // factor, 16 // factor)
  expected = np.asarray(Image.fromarray(x).resize(size, Image.BICUBIC))
  kind = {'name': 'upscale', 'factor': factor, 'by': 'bicubic'}
  one = measurements.create(kind, (16, 24, 1))({'noise': 0.0})
  found = one.apply(jnp.asarray(x, float)[None, ..., None])[0, ..., 0]
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_mean_is_that_of_blocks_and_grey_is_pillows(x64):
  x = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
  found = made('mean').apply(jnp.asarray(x, float)[None])[0]
  blocks = x.reshape(2, 4, 3, 4, 3).mean((1, 3))
  np.testing.assert_allclose(found, blocks, rtol=1e-12)
  grey = made('colourise').apply(jnp.asarray(x, float)[None])[0, ..., 0]
  pillow = np.asarray(Image.fromarray(x).convert('L'))
  assert np.abs(grey - pillow).max() < 0.51


def test_kernels_sum_to_one_and_have_their_moments():
  line = kernels.gaussian(2.0).sum(axis=0)
  place = np.arange(len(line)) - len(line) // 2
  assert line.sum() == pytest.approx(1)
  assert (line * place**2).sum() == pytest.approx(4, rel=0.04)
  np.testing.assert_allclose(kernels.motion(5), np.full((1, 5), 0.2))
  np.testing.assert_allclose(kernels.motion(5, 90), np.full((5, 1), 0.2))
  np.testing.assert_allclose(kernels.motion(2), [[0.25, 0.5, 0.25]])
  # The diagonal crosses each pixel from corner to corner.
  diagonal = kernels.motion(3 * np.sqrt(2), 45)
  np.testing.assert_allclose(diagonal, np.eye(3)[::-1] / 3, atol=1e-9)
  for angle in (17.0, 200.0, -63.0):
    kernel = kernels.motion(9.5, angle)
    assert kernel.sum() == pytest.approx(1)
    np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-12)
    i, j = (
      np.indices(kernel.shape) - (np.array(kernel.shape) // 2)[:, None, None]
    )
    leaning = np.rad2deg(
      np.arctan((kernel * -i * j).sum() / (kernel * j * j).sum())
    )
    turns = np.mod(leaning - angle + 90, 180) - 90
    assert abs(turns) < 4


def test_a_wide_gaussian_is_cut_to_the_picture():
  assert kernels.gaussian(2, 8).shape == (7, 7)
  assert kernels.gaussian(1, 8).shape == (7, 7)


WRONG = [
  ({'name': 'sharpen'}, 'inpaint'),
  ({}, 'inpaint'),
  ({'name': 'upscale'}, 'factor'),
  ({'name': 'upscale', 'factor': 3}, 'must divide'),
  ({'name': 'upscale', 'factor': 1}, 'from 2'),
  ({'name': 'upscale', 'factor': 2.0}, 'whole'),
  ({'name': 'upscale', 'factor': 2, 'by': 'lanczos'}, 'bicubic'),
  ({'name': 'colourise', 'weights': [1, 1]}, 'each of 3'),
  ({'name': 'deblur'}, 'kernel'),
  ({'name': 'deblur', 'kernel': []}, 'at least one row'),
  ({'name': 'deblur', 'kernel': [1.0, 2.0]}, 'matrix'),
  ({'name': 'deblur', 'kernel': [['a']]}, 'matrix'),
  ({'name': 'deblur', 'kernel': [[1.0], [1.0, 2.0]]}, 'matrix'),
  ({'name': 'deblur', 'kernel': [[1.0, np.nan]]}, 'finite'),
  ({'name': 'deblur', 'kernel': np.ones((9, 1))}, '9x1'),
  ({'name': 'deblur', 'kernel': [[1.0, -1.0]]}, 'sums to 0'),
  ({'name': 'denoise', 'factor': 2}, 'option'),
]


@pytest.mark.parametrize(('kind', 'says'), WRONG)
def test_what_cannot_be_measured_is_refused(kind, says):
  with pytest.raises(UserError, match=says) as told:
    measurements.create(kind, SHAPE)
  assert '\n' not in str(told.value)


def test_wrong_kernels_and_grey_pictures_are_refused():
  for sd in (0, -1, float('nan'), 5):
    with pytest.raises(UserError, match='sd='):
      kernels.gaussian(sd, 8)
  for of in ((0.5, 0), (np.inf, 0), (3, np.nan)):
    with pytest.raises(UserError, match='motion'):
      kernels.motion(*of)
  with pytest.raises(UserError, match='grey'):
    measurements.create({'name': 'colourise'}, (8, 8, 1))
  with pytest.raises(UserError, match='mask'):
    measurements.create({'name': 'inpaint'}, SHAPE)({'noise': np.zeros(1)})
