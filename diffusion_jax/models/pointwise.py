"""A dense layer of a map, as a 1x1 convolution.

Convolutions of GPUs add a bias and another map as they write. They keep kernels
and their gradients as [O, I]; here the gradient is that of the convolution the
other way, from O to I, so that it comes as [I, O] and is not transposed.
"""

import jax
import jax.numpy as jnp

LAYOUT = ('NHWC', 'HWIO', 'NHWC')


def _convolved(x, kernel):
  return jax.lax.conv_general_dilated(
    x, kernel[None, None], (1, 1), 'VALID', dimension_numbers=LAYOUT
  )


def _of_kernel(x, dy):
  """The transpose of `_convolved` by the kernel: [I, O]."""
  like = jax.ShapeDtypeStruct((dy.shape[-1], x.shape[-1]), x.dtype)
  transpose = jax.linear_transpose(lambda k: _convolved(dy, k), like)
  return jnp.swapaxes(transpose(x)[0], 0, 1)


@jax.custom_jvp
def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x [B, H, W, I], kernel [I, O] of its dtype -> [B, H, W, O]."""
  return _convolved(x, kernel)


@dense.defjvp
def _dense_jvp(primals, tangents):
  (x, kernel), (dx, dkernel) = primals, tangents
  y = _convolved(x, kernel)
  # As the transpose of `_of_kernel`, so that the backward pass is `_of_kernel`.
  by_kernel = jax.linear_transpose(lambda dy: _of_kernel(x, dy), y)
  return y, _convolved(dx, kernel) + by_kernel(dkernel)[0]
