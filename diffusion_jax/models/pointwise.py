"""Dense layers of maps, as 1x1 convolutions.

Convolutions of GPUs add a bias and another map as they write. They keep kernels
and their gradients as [O, I]; here the gradient is that of the convolution the
other way, from O to I, so that it comes as [I, O] and is not transposed.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models import convolution

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
  if convolution.is_for_backwards():
    back = jax.linear_transpose(lambda dy: _convolved(dy, kernel.T), y)
    return y, back(dx)[0] + by_kernel(dkernel)[0]
  return y, _convolved(dx, kernel) + by_kernel(dkernel)[0]


def projected(
  layer: nnx.Linear,
  xs: tuple[jax.Array, ...],
  added: jax.Array | None = None,
) -> jax.Array:
  """A dense layer over maps as if concatenated, plus another map.

  The concatenation is never written. As 1x1 convolutions, since those of GPUs
  can add a bias and a map, forwards and backwards.

  Args:
    layer: its parameters.
    xs: maps [B, H, W, C_i].
    added: [B, H, W, outputs], added to the result.
  """
  ends = list(itertools.accumulate(x.shape[-1] for x in xs))[:-1]
  bias = broadcast(layer.bias[...], xs[0])
  y = added
  for x, kernel in zip(xs, jnp.split(layer.kernel[...], ends), strict=True):
    product = dense(x, kernel.astype(x.dtype))
    if bias is not None:
      product, bias = product + bias, None
    y = product if y is None else product + y
  return y


def broadcast(bias: jax.Array, like: jax.Array) -> jax.Array:
  """A bias [C] in the dtype and with the rank of a map [..., C]."""
  return bias.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))
