"""LPIPS, a learned perceptual distance of pictures (arXiv 1801.03924).

Both pictures pass through VGG16 (arXiv 1409.1556). The features after the last
ReLU of each of its five stages are normalised over the channels; their squared
differences are weighted by channel, averaged over positions and added up. It is
version 0.1 of the authors' package. It is never trained here, so it is a pure
function.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

WIDTHS = (64, 128, 256, 512, 512)  # channels of the stages
CONVS = (2, 2, 3, 3, 3)  # convolutions of each
SMALLEST = 2 ** (len(WIDTHS) - 1)  # pixels a side that leave one at the end

SHIFT = (-0.030, -0.088, -0.188)  # of RGB in [-1, 1]
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10  # added to the norm over the channels


def shapes(widths: tuple[int, ...] | None = None) -> dict:
  """The shapes of the parameters, nested by their names.

  Args:
    widths: channels of each stage; by default the published WIDTHS.

  Returns:
    {'stages': {stage: {number: {'kernel': HWIO, 'bias': [C]}}},
    'heads': {stage: [C]}}; stages and numbers are '0', '1' and so on.
  """
  widths, stages, before = widths or WIDTHS, {}, len(SHIFT)
  for stage, width in enumerate(widths):
    stages[str(stage)] = {}
    for number in range(CONVS[stage]):
      stages[str(stage)][str(number)] = {
        'kernel': (3, 3, before, width), 'bias': (width,)
      }  # fmt: skip
      before = width
  heads = {str(stage): (width,) for stage, width in enumerate(widths)}
  return {'stages': stages, 'heads': heads}


def abstract() -> dict:
  """Abstract parameters, float32."""
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    shapes(),
    is_leaf=lambda x: isinstance(x, tuple),
  )


def apply(params: dict, a: jax.Array, b: jax.Array) -> jax.Array:
  """The distance of each pair of pictures.

  Args:
    params: of `shapes`; fewer stages than published give their distance.
    a: [B, H, W, C] pictures in [-1, 1]; C is 3, or 1, which is repeated.
    b: [B, H, W, C] others.

  Returns:
    [B] float32, 0 or more if the heads' weights are.
  """
  total = 0.0
  pairs = zip(_features(params, a), _features(params, b), strict=True)
  for stage, (one, other) in enumerate(pairs):
    error = jnp.square(_normalised(one) - _normalised(other))
    # Channels are weighted last, after the mean over positions.
    means = jnp.mean(error, axis=(1, 2))
    total = total + means @ params['heads'][str(stage)]
  return total


def _features(params, x) -> Iterator[jax.Array]:
  """Yields the last activations of each stage."""
  shift, scale = (jnp.array(x, jnp.float32) for x in ([[[SHIFT]]], [[[SCALE]]]))
  x = (x.astype(jnp.float32) - shift) / scale
  for stage in range(len(params['stages'])):
    if stage:
      x = nnx.max_pool(x, (2, 2), (2, 2))
    layers = params['stages'][str(stage)]
    for number in range(len(layers)):
      layer = layers[str(number)]
      x = lax.conv_general_dilated(
        x, layer['kernel'], (1, 1), 'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      )  # fmt: skip
      x = jax.nn.relu(x + layer['bias'][None, None, None])
    yield x


def _normalised(x):
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  # The root has no derivative where all channels are 0.
  norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
  return x / (norm + EPSILON)
