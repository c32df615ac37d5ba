"""Nearest-neighbour upsampling and the 3x3 convolution after it, in one.

Each output pixel sees 2x2 input pixels, so that the two are one transposed 4x4
convolution with stride 2: 4/9 of the products, and the upsampled map is never
written. Its derivatives are those of a strided convolution, which all compilers
know; what JAX derives for a transposed one is an order of magnitude slower.
"""

import jax
import jax.numpy as jnp

LAYOUT = ('NHWC', 'HWIO', 'NHWC')


def upsample_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Doubles a map by nearest neighbour, then convolves it, zero-padded.

  Args:
    x: [B, H, W, I].
    kernel: [3, 3, I, O], of any dtype.

  Returns:
    [B, 2 H, 2 W, O] in the dtype of x.
  """
  # As the kernel of the strided convolution from the large map to the small.
  folded = jnp.swapaxes(_folded(_folded(kernel, 0), 1), 2, 3)
  return _transposed(x, folded.astype(x.dtype))


def _folded(kernel, axis):
  """Three taps, of which two fall on the same pixel, as four, backwards."""
  a, b, c = jnp.split(kernel, 3, axis)
  return jnp.concatenate([c, b + c, a + b, a], axis)


def _strided(large, kernel):
  """[B, 2 H, 2 W, O], kernel [4, 4, O, I] -> [B, H, W, I]."""
  return jax.lax.conv_general_dilated(
    large, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=LAYOUT
  )


def _upsampled(x, kernel):
  """The transpose of `_strided` by the large map."""
  b, h, w, _ = x.shape
  like = jax.ShapeDtypeStruct((b, 2 * h, 2 * w, kernel.shape[2]), x.dtype)
  return jax.linear_transpose(lambda y: _strided(y, kernel), like)(x)[0]


def _of_kernel(large, small):
  """The transpose of `_strided` by the kernel."""
  channels = large.shape[-1], small.shape[-1]
  like = jax.ShapeDtypeStruct((4, 4, *channels), small.dtype)
  return jax.linear_transpose(lambda k: _strided(large, k), like)(small)[0]


@jax.custom_jvp
def _transposed(x, kernel):
  return _upsampled(x, kernel)


@_transposed.defjvp
def _transposed_jvp(primals, tangents):
  (x, kernel), (dx, dkernel) = primals, tangents
  y = _upsampled(x, kernel)
  # As the transpose of `_of_kernel`, so that the backward pass is `_of_kernel`.
  by_kernel = jax.linear_transpose(lambda large: _of_kernel(large, x), y)
  return y, _upsampled(dx, kernel) + by_kernel(dkernel)[0]
