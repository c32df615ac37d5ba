"""Microbatches: less memory, and no other change."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_jax import models
from diffusion_jax.training import sharding

# It compares the numbers of different programs.
pytestmark = pytest.mark.optimized


class Stepped(NamedTuple):
  """What two steps gave, on the host."""

  metrics: list
  gradient: dict  # of the first
  params: dict  # after the first
  temporary: int  # bytes that the compiled step needs on a device


def mesh_of(*sizes):
  return sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])


@functools.cache
def two_steps(network, sizes, microbatches, batch) -> Stepped:
  """Without warm-up and clipping."""
  mesh = mesh_of(*sizes)
  abstract, step_fn = tiny.program(
    mesh, warmup=0, clip=0.0, network=network, microbatches=microbatches
  )
  images = sharding.put_batch(tiny.images(batch), mesh)
  compiled = step_fn.lower(abstract, images).compile()
  state, first = compiled(tiny.random_state(abstract), images)
  # Adam's first moment is then a tenth of the gradient.
  gradient = jax.tree.map(lambda m: m / 0.1, copy(state.opt_state[0].mu))
  params = copy(state.params)
  _, second = compiled(state, images)
  temporary = compiled.memory_analysis().temp_size_in_bytes
  return Stepped([copy(first), copy(second)], gradient, params, temporary)


def copy(tree):
  """The donated state's values stay, on the host."""
  return jax.tree.map(np.array, tree)


# --- in float64, where a mistake cannot hide in rounding ---------------------


@functools.cache
def perceptron() -> models.Model:
  """A layer of 256 with dropout: its kernels are just large enough to split."""

  def init(key):
    del key
    return {
      'in': {'kernel': jnp.zeros((64, 256))},
      'out': {'kernel': jnp.zeros((256, 64))},
    }

  def apply(params, xt, t, keys, cond):
    inputs = xt.reshape(-1, 64) * jnp.cos(t)[:, None]
    hidden = jnp.tanh(inputs @ params['in']['kernel'])
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, shape=(256,)))(keys)
    return ((hidden * kept) @ params['out']['kernel']).reshape(xt.shape)

  return models.Model(init, apply)


@pytest.mark.parametrize(
  ('sizes', 'microbatches'),
  [
    ((1, 1, 1), 16),
    ((2, 2, 2), 4),
    *(
      pytest.param(*one, marks=pytest.mark.slow)
      for one in (((2, 4, 1), 2), ((1, 2, 4), 8))
    ),
  ],
)
def test_the_numbers_are_those_of_the_whole_batch(x64, sizes, microbatches):
  """Losses, gradients, parameters: to 1e-10, on any mesh.

  So each row keeps its own time, noise and dropout.
  """
  want = two_steps(perceptron(), (1, 1, 1), 1, batch=16)
  got = two_steps(perceptron(), sizes, microbatches, batch=16)
  assert jax.tree.leaves(want.params)[0].dtype == np.float64

  def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)

  jax.tree.map(close, got.gradient, want.gradient)
  jax.tree.map(close, got.params, want.params)
  for name in want.metrics[0]:
    close(got.metrics[0][name], want.metrics[0][name])
    close(got.metrics[1][name], want.metrics[1][name])
  assert want.metrics[0]['loss'] != want.metrics[1]['loss']


# --- the U-Net --------------------------------------------------------------

wide = functools.cache(tiny.wide)


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [(1, 1, 1), (2, 2, 2)])
def test_the_unet_agrees_to_rounding(sizes):
  """Metrics and the gradient as a whole to 1e-6, each of its leaves to 3e-6.

  float32 rounds at 6e-8, and 25 layers follow one another. Keys' biases are
  sums that cancel to nothing, because attention does not depend on them.
  """
  want = two_steps(wide(), (1, 1, 1), 1, batch=32)
  got = two_steps(wide(), sizes, 4, batch=32)
  for values, expected in zip(got.metrics, want.metrics, strict=True):
    assert values.keys() == expected.keys()
    for key, value in expected.items():
      np.testing.assert_allclose(values[key], value, rtol=1e-6)

  difference = jax.tree.map(np.subtract, got.gradient, want.gradient)
  lengths, errors = (
    np.array([np.linalg.norm(leaf) for leaf in jax.tree.leaves(tree)])
    for tree in (want.gradient, difference)
  )
  length = np.linalg.norm(lengths)
  zero = [name.endswith('key/bias') for name in models.names(difference)]
  assert np.linalg.norm(errors) < 1e-6 * length
  assert np.all(errors < np.where(zero, 1e-8 * length, 3e-6 * lengths))


@pytest.mark.slow
def test_memory_shrinks():
  """In 4 pieces the step needs less than half; the gradient's sum is new."""
  whole = two_steps(wide(), (1, 1, 1), 1, batch=32)
  pieces = two_steps(wide(), (1, 1, 1), 4, batch=32)
  assert pieces.temporary < whole.temporary / 2


def test_no_row_moves_between_devices():
  """Each row is in one piece, and its device there has it already."""
  mesh = mesh_of(2, 2, 2)
  rows = sharding.put_batch(np.arange(24, dtype=np.int32), mesh)
  split = jax.jit(lambda rows: sharding.split_batch(rows, 3, mesh))
  pieces = split(rows)
  assert pieces.shape == (3, 8)
  assert sorted(pieces.ravel().tolist()) == list(range(24))
  for before, after in zip(
    rows.addressable_shards, pieces.addressable_shards, strict=True
  ):
    assert before.device == after.device
    np.testing.assert_array_equal(before.data, after.data.ravel())
  text = split.lower(rows).compile().as_text()
  assert not re.search('all-|collective-', text)
