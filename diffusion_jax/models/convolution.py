"""The 3x3 convolution of all networks, and which of its derivatives is fast.

XLA's CPU compiler brings convolutions into the form of its fast kernel outside
of loops only. A derivative in another form, with the channels of the kernel
swapped, takes 2 to 18 times as long in a loop, such as that of a sampler. JAX
gives the fast form to the forward-mode derivative. Derived as the transpose of
another convolution, the backward pass has it. The kernel's gradient has it as a
convolution whose channels are the images.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp

LAYOUT = ('NHWC', 'HWIO', 'NHWC')
_BACKWARDS = contextvars.ContextVar('backwards', default=False)


@contextlib.contextmanager
def backwards() -> Iterator[None]:
  """Networks that are traced inside have fast backward passes in loops."""
  token = _BACKWARDS.set(True)
  try:
    yield
  finally:
    _BACKWARDS.reset(token)


def is_for_backwards() -> bool:
  """Whether the network is traced inside of `backwards`."""
  return _BACKWARDS.get()


def general(x, kernel, strides, padding, **how) -> jax.Array:
  """`jax.lax.conv_general_dilated`, as nnx.Conv calls it.

  Args:
    x: [B, H, W, I].
    kernel: [K, K, I, O].
    strides: of H and W.
    padding: 'SAME', or others.
    **how: its other arguments.
  """
  keeps = padding == 'SAME' and {*strides} == {1} and kernel.shape[0] % 2
  if _BACKWARDS.get() and keeps and how.get('feature_group_count', 1) == 1:
    return _for_backwards(x, kernel)
  return jax.lax.conv_general_dilated(x, kernel, strides, padding, **how)


def same(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """A convolution that keeps the size, zero-padded.

  Args:
    x: [B, H, W, I].
    kernel: [K, K, I, O], K odd, of x's dtype.

  Returns:
    [B, H, W, O].
  """
  return general(x, kernel, (1, 1), 'SAME', dimension_numbers=LAYOUT)


def _plain(x, kernel):
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=LAYOUT
  )


@jax.custom_jvp
def _for_backwards(x, kernel):
  return _plain(x, kernel)


@_for_backwards.defjvp
def _jvp(primals, tangents):
  (x, kernel), (dx, dkernel) = primals, tangents
  y = _plain(x, kernel)
  # The transpose of the convolution that the backward pass is to be.
  back = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
  by_x = jax.linear_transpose(lambda dy: _plain(dy, back), y)
  by_kernel = jax.linear_transpose(lambda dy: _of_kernel(x, dy, kernel), y)
  return y, by_x(dx)[0] + by_kernel(dkernel)[0]


def _of_kernel(x, dy, kernel):
  """The gradient of the kernel: images are channels, and channels images."""
  pads = [(k // 2, k // 2) for k in kernel.shape[:2]]
  found = jax.lax.conv_general_dilated(
    x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1), pads,
    dimension_numbers=LAYOUT,
  )  # fmt: skip
  return found.transpose(1, 2, 0, 3)
