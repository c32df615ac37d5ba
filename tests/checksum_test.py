"""Checksums: any change of one element is seen, and no layout matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax.training import checksum, sharding

DTYPES = ('float32', 'bfloat16', 'float16', 'int32', 'uint8', 'int8')


def mix(x):
  """Independent of the code: Python's integers."""
  x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
  x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
  return x ^ x >> 16


def by_hand(array):
  array = np.ascontiguousarray(array)
  bits = array.reshape(-1).view(f'uint{8 * min(array.dtype.itemsize, 4)}')
  return sum(mix(int(b) ^ mix(i)) for i, b in enumerate(bits)) % 2**32


def values(dtype, shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(0, 20, shape), dtype)


@pytest.mark.parametrize('dtype', [*DTYPES, 'bool'])
@pytest.mark.parametrize('shape', [(), (1,), (7,), (3, 4, 5), (0, 3)])
def test_it_is_the_sum_that_is_promised(dtype, shape):
  array = values(dtype, shape)
  assert checksum.of({'a': {'b': array}}) == {'a/b': by_hand(array)}


def test_64_bits_are_two_elements(x64):
  array = values('float64', (5, 3))
  assert checksum.of({'a': array}) == {'a': by_hand(array)}


@pytest.mark.parametrize('dtype', DTYPES)
def test_each_single_bit_counts(dtype):
  array = np.asarray(values(dtype, (2, 3)))
  seen = {checksum.of([array])['0']}
  width = 8 * array.dtype.itemsize
  for place in range(array.size):
    for bit in range(width):
      other = array.copy()
      other.reshape(-1).view(f'uint{width}')[place] ^= 1 << bit
      seen.add(checksum.of([jnp.asarray(other)])['0'])
  assert len(seen) == 1 + array.size * width


def test_exchanges_signs_and_shifts_count():
  """Changes of several elements, which a plain or a linear sum would miss."""
  array = np.asarray(values('float32', (64,)))
  others = [array.copy() for _ in range(4)]
  others[0][[3, 9]] = array[[9, 3]]
  others[1][[3, 9]] *= -1  # the top bits of two
  others[2] = np.roll(array, 1)
  others[3] = array[::-1]
  sums = {checksum.of([jnp.asarray(x)])['0'] for x in (array, *others)}
  assert len(sums) == 5


@pytest.mark.parametrize('sizes', [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_it_is_the_same_on_any_mesh(sizes, dtype):
  count = sizes[0] * sizes[1] * sizes[2]
  mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:count])
  array = np.asarray(values(dtype, (3, 16, 8)))
  wanted = checksum.of({'x': jnp.asarray(array)})
  for spec in (P(), P(None, 'fsdp', 'tensor'), P(None, ('data', 'fsdp'))):
    placed = jax.device_put(array, NamedSharding(mesh, spec))
    assert checksum.of({'x': placed}) == wanted
