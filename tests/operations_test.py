"""benchmarks/operations.py: times of a profile joined with bytes of kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import operations
import pytest

from diffusion_jax.planning.kernels import Kernel


def kernel(name, shape='f32[2]', count=1, size=8):
  return Kernel(name, 'product', 'jit(f)/dot', shape, count, size)


def test_kernels_that_are_alike_are_one_operation():
  found = operations.joined(
    [kernel('a'), kernel('b', count=3), kernel('c', 'f32[3]', size=12)],
    {'a': 1.0, 'b': 2.0, 'other': 9.0},
  )
  assert [(one.shape, one.count, one.seconds, one.bytes) for one in found] == [
    ('f32[2]', 4, 3.0, 8 + 24),
    ('f32[3]', 1, 0.0, 12),
  ]


def test_the_ten_most_expensive_by_time_and_by_bytes():
  found = operations.joined(
    [kernel(f'{i}', f'f32[{i}]', size=100 - i) for i in range(20)],
    {f'{i}': float(i) for i in range(20)},
  )
  summary = operations.summary(found, images=2)
  assert [one['seconds'] for one in summary['by seconds']] == [
    float(i) for i in range(19, 9, -1)
  ]
  assert [one['bytes'] for one in summary['by bytes']] == [
    100 - i for i in range(10)
  ]
  assert summary['seconds'] == sum(range(20))
  assert summary['kernels'] == 20
  text = operations.tables(summary)
  assert text[0].startswith('20 kernels, 1.9e+05 ms and ')
  assert '10.0%' in next(line for line in text if 'f32[19]' in line)


def test_without_a_time_the_table_has_dashes():
  summary = operations.summary(operations.joined([kernel('a')], {}), images=1)
  assert '-' in operations.tables(summary)[3]


@pytest.mark.parametrize('size', [16, 64])
def test_a_program_is_profiled(size):
  """Its product takes time and moves three matrices, in each of the calls."""
  a = jnp.ones((size, size))
  program = jax.jit(jnp.matmul).lower(a, a).compile()
  calls = []

  def call(count):
    calls.append(count)
    for _ in range(count):
      np.asarray(program(a, a))

  found = operations.profiled(call, program)
  assert calls == [operations.CALLS]
  assert sum(one.bytes for one in found) == 3 * 4 * size**2
  assert sum(one.seconds for one in found) > 0
