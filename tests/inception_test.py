"""FID's Inception equals those of torch-fidelity and pytorch-fid.

The golden file holds what they answered with random weights; the tests under
the marker `parity` ask them now. The real weights are looked for beside the
project.
"""

import functools

import binaries
import jax
import numpy as np
import pytest
from parity import inception as parity
from PIL import Image

from diffusion_jax.evaluation import features
from diffusion_jax.evaluation import inception as judges
from diffusion_jax.models import inception
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding
from diffusion_jax.weights import inception as weights

DATA = binaries.ROOT.parent / 'shared' / 'data'
REAL = DATA / 'inception' / 'inception_2015_12_05_to_mixed_7.npz'
SHEET = DATA / 'cifar10' / 'test' / '000.webp'

CONVENTIONS = pytest.mark.parametrize('convention', inception.CONVENTIONS)


@functools.cache
def answers():
  return parity.ours()


def assert_equal(reference, found):
  errors = parity.errors(reference, found)
  assert len(errors) == 2 * 7 + 4 + 8
  assert max(errors.values()) < parity.TOLERANCE, errors


def test_equals_golden():
  assert_equal(parity.reference_golden(), answers())


@pytest.mark.parity
def test_equals_theirs():
  for tool in ('torch_fidelity', 'pytorch_fid'):
    pytest.importorskip(tool, reason=f'needs {tool}, see CONTRIBUTING.md')
  assert_equal(parity.reference_live(), answers())


def test_the_golden_file_is_small_and_says_something():
  assert parity.FILE.stat().st_size < 300_000
  for name, values in parity.reference_golden().items():
    if name.startswith(tuple(parity.ASKED)):
      assert values.dtype == np.float32
      assert np.isfinite(values).all()
      # The two images are told apart, far above the tolerance.
      assert np.abs(values[0] - values[1]).max() > np.abs(values).max() / 4


def _padding_counts(monkeypatch):
  monkeypatch.setattr(
    inception,
    '_average_pool',
    lambda x: inception.nnx.avg_pool(x, (3, 3), (1, 1), 'SAME'),
  )
  return '192', 'spatial'


def _average_in_the_last_block(monkeypatch):
  right = inception._max_pool
  monkeypatch.setattr(
    inception,
    '_max_pool',
    lambda x, stride=1, padding='SAME': (
      inception._average_pool(x) if stride == 1 else right(x, stride, padding)
    ),
  )
  return '768', '2048'


@pytest.mark.slow
@pytest.mark.parametrize(
  'change', [_padding_counts, _average_in_the_last_block]
)
def test_a_wrong_detail_is_seen(change, monkeypatch):
  """From where it is on, and not before it."""
  before, after = change(monkeypatch)
  golden = parity.reference_golden()
  x = inception.preprocess(parity.images((32, 32)), 'tf1')
  found = jax.jit(lambda p, x: inception.features(p, x, (before, after)))(
    parity.params(), x
  )
  errors = {
    tap: np.abs(found[tap] - golden[f'tf1_32/{tap}']).max() for tap in found
  }
  assert errors[before] < 1e-4
  assert errors[after] > 1e-2


# --- what comes before the network -------------------------------------------


def resize_slowly(image, convention):
  """[H, W, C] -> [299, 299, C] in float64, by four neighbours a pixel."""

  def neighbours(size):
    i = np.arange(299, dtype='f8')
    if convention == 'tf1':
      at = i * size / 299
    else:
      at = np.maximum((i + 0.5) * size / 299 - 0.5, 0)
    low = np.minimum(np.floor(at).astype(int), size - 1)
    return low, np.minimum(low + 1, size - 1), at - low

  image = image.astype('f8')
  top, bottom, down = neighbours(image.shape[0])
  left, right, along = neighbours(image.shape[1])
  down, along = down[:, None, None], along[None, :, None]
  upper = image[top][:, left] * (1 - along) + image[top][:, right] * along
  lower = image[bottom][:, left] * (1 - along) + image[bottom][:, right] * along
  return upper * (1 - down) + lower * down


@CONVENTIONS
@pytest.mark.parametrize(
  'shape', [(1, 1), (8, 28), (32, 32), (299, 299), (300, 298), (600, 401)]
)
def test_resize_equals_numpys(shape, convention):
  image = parity.images(shape)[0]
  expected = resize_slowly(image, convention)
  middle = {'tf1': 128, 'pytorch-fid': 127.5}[convention]
  expected = (expected - middle) / middle
  for given in (image, image.astype('f4')):
    found = inception.preprocess(given[None], convention)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=2e-6)


@CONVENTIONS
def test_an_image_of_that_size_is_only_scaled(convention):
  image = np.arange(256, dtype=np.uint8).repeat(1050)[: 299 * 299 * 3]
  image = image.reshape(1, 299, 299, 3)
  found = inception.preprocess(image, convention)
  middle = 128 if convention == 'tf1' else 127.5
  np.testing.assert_allclose(
    found, (image.astype('f8') - middle) / middle, rtol=0, atol=1e-7
  )


@CONVENTIONS
def test_grey_is_three_equal_channels(convention):
  grey = parity.images((28, 28))[..., :1]
  np.testing.assert_allclose(
    inception.preprocess(grey, convention),
    inception.preprocess(grey.repeat(3, axis=-1), convention),
    rtol=0,
    atol=1e-6,
  )


def test_the_conventions_differ():
  image = parity.images((32, 32))
  first, second = (
    inception.preprocess(image, name) for name in inception.CONVENTIONS
  )
  # By half a pixel of 299 / 32, half of what neighbours differ by.
  assert np.abs(first - second).mean() > 0.05


# --- taps ---------------------------------------------------------------------


def test_shapes_are_the_networks():
  shapes = inception.shapes()
  assert len(shapes) == 95  # 94 convolutions
  assert shapes['conv'] == (3, 3, 3, 32)
  assert shapes['mixed_10_tower_1_mixed_conv_1'] == (3, 1, 384, 384)
  assert list(shapes.items())[-1] == ('softmax', (2048, 1008))
  assert sum(np.prod(s) + s[-1] for s in shapes.values()) == 23_833_744
  # Up to a tap, and no further.
  for tap, last in {
    '64': 'conv_2',
    '192': 'conv_4',
    'spatial': 'mixed_6_tower_2_conv',
    '768': 'mixed_7_tower_2_conv',
    '2048': 'mixed_10_tower_2_conv',
    'logits_unbiased': 'softmax',
  }.items():
    short = inception.shapes([tap])
    assert list(short)[-1] == last
    assert list(short.items()) == list(shapes.items())[: len(short)]
  assert inception.shapes(['64', '192']) == inception.shapes(['192'])


def test_no_more_parameters_than_a_tap_needs():
  params = {k: parity.params()[k] for k in inception.shapes(['64'])}
  image = parity.images((32, 32))
  found = jax.jit(lambda p, x: inception.apply(p, x, ['64']))(params, image)
  assert list(found) == ['64']
  expected = parity.reference_golden()['tf1_32/64']
  np.testing.assert_allclose(found['64'], expected, atol=1e-5)
  with pytest.raises(KeyError, match='conv_3'):
    inception.apply(params, image, ['192'])


@pytest.mark.parametrize(
  ('arguments', 'must_name'),
  [
    ({'taps': ['1024']}, r"tap='1024': one of 64, 192, spatial, 768"),
    ({'convention': 'clean'}, r"convention='clean': one of tf1, pyt"),
    ({'channels': 4}, r'images of 4 channels: .*RGB'),
  ],
)
def test_mistakes_are_named(arguments, must_name):
  asked = {'taps': ['64'], 'convention': 'tf1', 'channels': 3} | arguments
  images = np.zeros((1, 8, 8, asked.pop('channels')), np.uint8)
  with pytest.raises(UserError, match=must_name):
    inception.apply({}, images, **asked)


# --- the judge ----------------------------------------------------------------


@pytest.mark.slow
def test_a_judge_of_a_file(tmp_path):
  """The whole network, through a file and a pass over devices."""
  path = tmp_path / 'inception.npz'
  weights.write(path, parity.params())
  judge = judges.load(path, taps=['2048', 'spatial'], logits=True)
  assert judge.taps == {'2048': 'fid', 'spatial': 'sfid'}
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  images = parity.images((32, 32))
  ((_, outputs),) = features.passes(judge, [images[:1]], 2, mesh)
  golden = parity.reference_golden()
  assert set(outputs) == {'2048', 'spatial', judge.logits}
  for output, value in outputs.items():
    np.testing.assert_allclose(
      value, golden[f'tf1_32/{output}'][:1], rtol=0, atol=1e-3
    )
  assert judge.protocol.items() >= {
    'features': 'inception', 'taps': ['2048', 'spatial'], 'convention': 'tf1'
  }.items()  # fmt: skip

  # A shorter file makes the same judge of an earlier tap.
  part = tmp_path / 'part.npz'
  weights.write(
    part, {k: parity.params()[k] for k in inception.shapes(['192'])}
  )
  whole, short = (judges.load(p, taps=['192']) for p in (path, part))
  assert whole.protocol == short.protocol
  assert whole.keys == short.keys
  both = judges.load(path, taps=['2048', '192'])
  assert both.keys['192'] == short.keys['192']
  other = judges.load(part, taps=['192'], convention='pytorch-fid')
  assert other.protocol['features_sha256'] == short.protocol['features_sha256']
  assert other.protocol != short.protocol
  assert other.keys != short.keys
  changed = {k: parity.params()[k] for k in inception.shapes(['192'])}
  changed['conv_4'] = changed['conv_4'] | {'b': changed['conv_4']['b'] * 2}
  weights.write(part, changed)
  assert judges.load(part, taps=['192']).protocol != short.protocol
  assert judges.load(part, taps=['192']).keys != short.keys


@pytest.mark.parametrize(
  ('arguments', 'must_name'),
  [
    ({}, r'none.npz: there is no such file; give Inception weights'),
    ({'taps': ['1024']}, r"no tap '1024'"),
  ],
)
def test_a_judge_that_cannot_be(tmp_path, arguments, must_name):
  with pytest.raises(UserError, match=must_name):
    judges.load(tmp_path / 'none.npz', **arguments)


# --- the real weights ---------------------------------------------------------


def conv_slowly(x, layer, stride, pad):
  """relu(conv(x, w) + b) of [H, W, C] in float64."""
  w, b = layer['w'].astype('f8'), layer['b'].astype('f8')
  x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[:2], (0, 1))
  windows = windows[::stride, ::stride].transpose(0, 1, 3, 4, 2)
  rows = windows.reshape(*windows.shape[:2], -1) @ w.reshape(-1, w.shape[-1])
  return np.maximum(rows + b, 0)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason=f'there is no {REAL}')
@pytest.mark.skipif(not SHEET.exists(), reason=f'there is no {SHEET}')
def test_real_weights_judge_real_images():
  sheet = np.asarray(Image.open(SHEET).convert('RGB'))
  images = (
    sheet.reshape(10, 32, 10, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
  )
  images = images[:6]
  judge = judges.load(REAL, taps=['768', '64'])
  outputs = jax.jit(judge.apply)(judge.params, images)
  found, early = (np.asarray(outputs[tap]) for tap in judge.taps)
  assert found.shape == (6, 768)
  assert np.isfinite(found).all()
  assert (found >= 0).all()  # the mean of what was rectified
  distances = np.linalg.norm(found[:, None] - found, axis=-1)
  # Every two images are far apart, in units of the features themselves.
  assert distances[~np.eye(6, dtype=bool)].min() > found.std()

  # The first three layers, of an implementation of their own.
  x = (resize_slowly(images[0], 'tf1') - 128) / 128
  x = conv_slowly(x, judge.params['conv'], 2, 0)
  x = conv_slowly(x, judge.params['conv_1'], 1, 0)
  x = conv_slowly(x, judge.params['conv_2'], 1, 1)
  windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (0, 1))
  expected = windows[::2, ::2].max((-1, -2)).mean((0, 1))
  np.testing.assert_allclose(early[0], expected, rtol=0, atol=1e-5)
