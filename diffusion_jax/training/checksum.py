"""Checksums of arrays, computed on their devices, whatever their sharding."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import models
from diffusion_jax.training import sharding


def of(tree) -> dict[str, int]:
  """A checksum for each array of a tree: {name: 0 .. 2**32 - 1}.

  The checksum is the sum mod 2**32 of m(b[i] ^ m(i)) over the elements, where
  b[i] are the bits of the element at position i of the flattened array and m is
  the bijection `_mix`. A sum does not depend on the order, so the mesh, the
  sharding and the number of processes do not matter, and every process gets the
  same result.

  A change of a single element is always detected: xor with a constant and m are
  bijections, so its term changes mod 2**32. Changes of several elements, such
  as a swap, go undetected with probability 2**-32.

  Args:
    tree: global arrays of any shape; a 64-bit element counts as two.
  """
  # One at a time: small programs that reduce over the devices can deadlock on
  # CPUs if they run concurrently.
  return {n: int(_checksum(leaf)) for n, leaf in models.named(tree).items()}


def sha256(tree) -> str:
  """SHA-256 of the arrays of a tree, in the order of their names.

  Args:
    tree: global arrays.
  """
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    digest.update(np.ascontiguousarray(sharding.to_host(leaf)).tobytes())
  return digest.hexdigest()


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

  Computed axis by axis: a reshape would gather sharded arrays.
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
