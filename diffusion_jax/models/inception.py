"""The network of FID, Inception v3 of 2015-12-05 (arXiv 1512.00567).

It is TensorFlow's graph `classify_image_graph_def.pb`, which defines FID (arXiv
1706.08500), and differs from other networks of this name: its average pools do
not count the padding, its last block has a maximum pool in place of an average
pool, and it has 1008 classes. It is never trained here, so it is a pure
function. Its batch norms are folded: a convolution is relu(conv(x, w) + b).
Names are those of the graph with _ for /, such as `mixed_4_tower_1_conv_3`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from diffusion_jax.system.errors import UserError, one_of

SIZE = 299
NUM_CLASSES = 1008

# The available outputs, in the order of the network, with their sizes.
TAPS = {
  '64': 64,  # after the first maximum pool, averaged over positions
  '192': 192,  # after the second
  'spatial': 17 * 17 * 7,  # for sFID: the first 7 channels of mixed_6/conv
  '768': 768,  # mixed_7, averaged
  '2048': 2048,  # mixed_10, averaged: the usual features of FID
  'logits_unbiased': NUM_CLASSES,  # without softmax/b, for IS
  'logits': NUM_CLASSES,
}
CONVENTIONS = ('tf1', 'pytorch-fid')

# Exact float32 products, on devices where they are not the default.
EXACT = lax.Precision.HIGHEST


def apply(
  params: dict, images: jax.Array, taps: Sequence[str], convention: str = 'tf1'
) -> dict[str, jax.Array]:
  """Computes outputs of the network for images.

  Args:
    params: {name: {'w', 'b'}}, at least those of `shapes(taps)`.
    images: uint8, or float in [0, 255], [B, H, W, C]; C is 1 or 3.
    taps: keys of TAPS.
    convention: one of CONVENTIONS, see `preprocess`.

  Returns:
    {tap: [B, TAPS[tap]] float32}.

  Raises:
    UserError: a tap or the convention is not known, or the images are neither
      grey nor RGB.
  """
  return features(params, preprocess(images, convention), taps)


def preprocess(images: jax.Array, convention: str) -> jax.Array:
  """Resizes and scales images for the network, with one of two conventions.

  'tf1', used by the graph itself and by torch-fidelity: bilinear as in
  TensorFlow 1, where pixel i is sampled at i H / 299, then (x - 128) / 128.
  'pytorch-fid': bilinear at (i + 1/2) H / 299 - 1/2, then (x - 127.5) /
  127.5. Neither is antialiased.

  Args:
    images: uint8, or float in [0, 255], [B, H, W, C]; C is 1, which is
      repeated, or 3.
    convention: one of CONVENTIONS.

  Returns:
    [B, 299, 299, 3] float32.

  Raises:
    UserError: the convention is not known, or C is neither 1 nor 3.
  """
  one_of('convention', convention, CONVENTIONS)
  _, height, width, channels = images.shape
  if channels not in (1, 3):
    raise UserError(
      f'images of {channels} channels: Inception takes grey (1) or RGB (3) '
      'images; use other features'
    )
  x = jnp.einsum(
    'bhwc,yh,xw->byxc',
    images.astype(jnp.float32),
    resize_matrix(height, convention),
    resize_matrix(width, convention),
    precision=EXACT,
  )
  middle = 128.0 if convention == 'tf1' else 127.5
  x = (x - middle) / middle
  return x.repeat(3, axis=-1) if channels == 1 else x


def resize_matrix(size: int, convention: str) -> np.ndarray:
  """The weights of a bilinear resize along one axis, computed in float64.

  Args:
    size: the original size of the axis.
    convention: one of CONVENTIONS, see `preprocess`.

  Returns:
    [299, size] float32; a row has at most two nonzero weights.
  """
  at = np.arange(SIZE) * size / SIZE
  if convention != 'tf1':
    at = at + (size / SIZE - 1) / 2
  at = np.clip(at, 0, size - 1)
  return np.maximum(0, 1 - abs(at[:, None] - np.arange(size))).astype('f4')


def features(
  params: dict, x: jax.Array, taps: Sequence[str]
) -> dict[str, jax.Array]:
  """The network without preprocessing, up to the last requested tap.

  Args:
    params: see `apply`.
    x: [B, 299, 299, 3] float32, from `preprocess`.
    taps: keys of TAPS.

  Returns:
    {tap: [B, TAPS[tap]] float32}.

  Raises:
    UserError: a tap is not known.
  """

  return _until(taps, _walk(lambda name, shape: params[name], x))


def shapes(taps: Sequence[str] = ('logits',)) -> dict[str, tuple[int, ...]]:
  """The shapes of the parameters that taps need, in the order of the network.

  Args:
    taps: keys of TAPS; the last one needs all parameters.

  Returns:
    {name: shape of w}, HWIO, except for the last, softmax, [2048, 1008]. The
    size of b is the last axis of w.

  Raises:
    UserError: a tap is not known.
  """
  return dict(_shapes(tuple(taps)))


def parameters(taps: Sequence[str]) -> dict[str, dict]:
  """Abstract parameters that taps need: {name: {'w', 'b'}}, float32."""
  return {
    name: {
      'w': jax.ShapeDtypeStruct(shape, jnp.float32),
      'b': jax.ShapeDtypeStruct(shape[-1:], jnp.float32),
    }
    for name, shape in shapes(taps).items()
  }


@functools.cache
def _shapes(taps: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
  found = {}

  def weights(name, shape):
    found[name] = shape
    return {'w': jnp.zeros(shape), 'b': jnp.zeros(shape[-1])}

  image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
  jax.eval_shape(lambda x: _until(taps, _walk(weights, x)), image)
  return found


def _until(taps, steps) -> dict[str, jax.Array]:
  """Collects the requested taps from the steps, and stops after the last."""
  for tap in taps:
    one_of('tap', tap, TAPS)
  found = {}
  for tap, value in steps:
    if tap in taps:
      found[tap] = value
    if len(found) == len(set(taps)):
      break
  return found


def _parts_of(weights: Callable) -> tuple[Callable, Callable, Callable]:
  """Building blocks: a convolution, a chain and a fork; see `_walk`."""

  def conv(name, x, channels, kernel=(1, 1), stride=1, padding='SAME'):
    p = weights(name, (*kernel, x.shape[-1], channels))
    y = lax.conv_general_dilated(
      x, p['w'], (stride, stride), padding,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision=EXACT,
    )  # fmt: skip
    return nnx.relu(y + p['b'][None, None, None])

  def chain(name, x, *layers):
    for i, layer in enumerate(layers):
      x = conv(f'{name}_conv_{i}' if i else f'{name}_conv', x, *layer)
    return x

  def fork(name, x):  # 1x3 and 3x1 in parallel
    parts = [((1, 3), f'{name}_mixed_conv'), ((3, 1), f'{name}_mixed_conv_1')]
    return _join(*(conv(part, x, 384, kernel) for kernel, part in parts))

  return conv, chain, fork


def _walk(weights: Callable, x: jax.Array) -> Iterator[tuple[str, jax.Array]]:
  """Yields (tap, value); `weights` is (name, shape of w) -> {'w', 'b'}."""
  conv, chain, fork = _parts_of(weights)
  half = 2, 'VALID'  # a stride and its padding

  x = conv('conv', x, 32, (3, 3), *half)  # 149
  x = conv('conv_1', x, 32, (3, 3), 1, 'VALID')  # 147
  x = conv('conv_2', x, 64, (3, 3))
  x = _max_pool(x, *half)  # 73
  yield '64', _mean(x)

  x = conv('conv_3', x, 80)
  x = conv('conv_4', x, 192, (3, 3), 1, 'VALID')  # 71
  x = _max_pool(x, *half)  # 35
  yield '192', _mean(x)

  for name, pooled in (('mixed', 32), ('mixed_1', 64), ('mixed_2', 64)):
    x = _join(
      chain(name, x, [64]),
      chain(f'{name}_tower', x, [48], [64, (5, 5)]),
      chain(f'{name}_tower_1', x, [64], [96, (3, 3)], [96, (3, 3)]),
      chain(f'{name}_tower_2', _average_pool(x), [pooled]),
    )

  x = _join(  # 17
    chain('mixed_3', x, [384, (3, 3), *half]),
    chain('mixed_3_tower', x, [64], [96, (3, 3)], [96, (3, 3), *half]),
    _max_pool(x, *half),
  )

  for number, c in enumerate((128, 160, 160, 192), start=4):
    name = f'mixed_{number}'
    wide, high = [c, (1, 7)], [c, (7, 1)]
    x = _join(
      chain(name, x, [192]),
      chain(f'{name}_tower', x, [c], wide, [192, (7, 1)]),
      chain(f'{name}_tower_1', x, [c], high, wide, high, [192, (1, 7)]),
      chain(f'{name}_tower_2', _average_pool(x), [192]),
    )
    if name == 'mixed_6':
      yield 'spatial', x[..., :7].reshape(len(x), -1)
  yield '768', _mean(x)

  wide, high = [192, (1, 7)], [192, (7, 1)]
  x = _join(  # 8
    chain('mixed_8_tower', x, [192], [320, (3, 3), *half]),
    chain('mixed_8_tower_1', x, [192], wide, high, [192, (3, 3), *half]),
    _max_pool(x, *half),
  )

  for name, pool in (('mixed_9', _average_pool), ('mixed_10', _max_pool)):
    x = _join(
      chain(name, x, [320]),
      fork(f'{name}_tower', chain(f'{name}_tower', x, [384])),
      fork(
        f'{name}_tower_1', chain(f'{name}_tower_1', x, [448], [384, (3, 3)])
      ),
      chain(f'{name}_tower_2', pool(x), [192]),
    )
  x = _mean(x)
  yield '2048', x

  last = weights('softmax', (x.shape[-1], NUM_CLASSES))
  x = jnp.matmul(x, last['w'], precision=EXACT)
  yield 'logits_unbiased', x
  yield 'logits', x + last['b'][None]


def _max_pool(x, stride=1, padding='SAME'):
  return nnx.max_pool(x, (3, 3), (stride, stride), padding)


def _average_pool(x):
  return nnx.avg_pool(x, (3, 3), (1, 1), 'SAME', count_include_pad=False)


def _join(*parts):
  return jnp.concatenate(parts, axis=-1)


def _mean(x):
  return x.mean((1, 2))
