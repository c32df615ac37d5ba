"""Checksums of arrays, computed where they lie, whatever their layout."""

import jax
import jax.numpy as jnp

from diffusion_jax import models


def of(tree) -> dict[str, int]:
  """One number for each array of a tree: {name: 0 .. 2**32 - 1}.

  The number is the sum mod 2**32 of m(b[i] ^ m(i)) over the elements, b[i]
  being the bits of the element at position i of the flattened array and m the
  bijection of `_mix`. A sum has no order, so the mesh, the layout and the
  number of processes do not matter, and every process gets the same numbers.

  A change of any one element is seen for certain: ^ with a constant and m are
  bijections, so that its term, alone, becomes another number below 2**32. Of
  changes to several elements, a swap among them, one in 2**32 goes unseen.

  Args:
    tree: of global arrays, of any shape; 64 bits count as two elements.
  """
  # One after the other: small programs that all reduce over the devices can
  # block each other for ever on a CPU, where they would run at once.
  return {n: int(_checksum(leaf)) for n, leaf in models.named(tree).items()}


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
  if array.dtype == bool:
    array = array.astype(jnp.uint8)
  size = min(array.dtype.itemsize, 4)
  bits = jax.lax.bitcast_convert_type(array, f'uint{8 * size}')
  terms = _mix(bits.astype(jnp.uint32) ^ _mix(_positions(bits.shape)))
  return jnp.sum(terms, dtype=jnp.uint32)


def _positions(shape: tuple[int, ...]) -> jax.Array:
  """uint32 [*shape], 0, 1, 2, ... in C order, mod 2**32.

  Of each axis by itself: a reshape would gather what is split.
  """
  positions, stride = jnp.zeros(shape, jnp.uint32), 1
  for axis in reversed(range(len(shape))):
    along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    positions += along * jnp.uint32(stride % 2**32)
    stride *= shape[axis]
  return positions


def _mix(x: jax.Array) -> jax.Array:
  """MurmurHash3's finaliser (Appleby, public domain): uint32 -> uint32.

  A bijection: xor with a right shift of itself is one, and so is
  multiplication by an odd number mod 2**32.
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
