"""The TPU's attention kernel: step by step here, and compiled for TPUs."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models import attention, splash
from diffusion_jax.planning import slices
from diffusion_jax.training import sharding

SHAPE = 4, 256, 2, 8
HAS_LIBTPU = importlib.util.find_spec('libtpu') is not None


def mesh_of(*sizes):
  count = int(np.prod(sizes))
  return sharding.make_mesh(*sizes, devices=jax.devices()[:count])


def both(attend, *maps):
  *inputs, cotangent = maps
  value, back = jax.vjp(attend, *inputs)
  return value, *back(cotangent)


@pytest.mark.parametrize('sizes', [(1, 1, 1), (2, 1, 2)])
def test_values_and_gradients_are_those_of_the_plain_form(sizes):
  keys = jax.random.split(jax.random.key(0), 4)
  maps = [jax.random.normal(key, SHAPE) for key in keys]
  wanted = both(attention._in_pieces, *maps)
  with splash.over(mesh_of(*sizes)):
    found = jax.jit(
      lambda *maps: both(lambda *x: splash.attend(*x, True), *maps)
    )(*maps)
  for mine, theirs in zip(found, wanted, strict=True):
    np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_it_is_for_long_sequences_of_whole_batches_in_bfloat16():
  def fits(batch, length, dtype=jnp.bfloat16):
    return splash.fits(jax.ShapeDtypeStruct((batch, length, 8, 40), dtype))

  assert not fits(4, 1024)  # no mesh
  with splash.over(mesh_of(2, 2, 1)):
    assert fits(4, 1024)
    assert fits(8, 4096)
    assert not fits(4, 1024, jnp.float32)
    assert not fits(6, 1024)
    assert not fits(4, 256)
    assert not fits(4, 1025)
  assert not fits(4, 1024)


def test_it_is_compiled_for_tpus_alone():
  """On other devices, the plain form is the same bit by bit."""
  keys = jax.random.split(jax.random.key(0), 3)
  shape = 1, 1024, 1, 8
  maps = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
  with splash.over(mesh_of(1, 1, 1)):
    found = jax.jit(attention.attend)(*maps)
  np.testing.assert_array_equal(found, jax.jit(attention.attend)(*maps))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason='needs libtpu')
def test_each_chip_has_its_own_images_and_heads_and_no_logits():
  devices = slices.devices(slices.parse('v5e:2x4'))
  mesh = sharding.make_mesh(2, 2, 2, devices=devices)
  where = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(('data', 'fsdp'), None, 'tensor')
  )
  rows = jax.ShapeDtypeStruct((8, 2048, 4, 40), jnp.bfloat16, sharding=where)

  def fn(*maps):
    with splash.over(mesh):
      return both(lambda *x: attention.attend(*x, training=True), *maps)

  text = jax.jit(fn).lower(*[rows] * 4).compile().as_text()
  assert 'tpu_custom_call' in text
  assert '2048,2048' not in text
  assert 'all-gather' not in text
