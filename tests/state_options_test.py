"""A smaller state: no average, a moment in bfloat16, a factored second one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_jax import runs
from diffusion_jax.configs import digits
from diffusion_jax.runs import programs, validation
from diffusion_jax.training import checkpoint, optim, sharding

NONE = {'ema.decay': 0.0}
HALF = {'optim.moments_dtype': 'bfloat16'}
FACTORED = {'optim.name': 'adafactor', 'optim.moments_dtype': 'bfloat16'}


def program(values, mesh=None):
  config = digits.get_config()
  config.update_from_flattened_dict({'optim.warmup_steps': 1, **values})
  assert not validation.check(config, range(1))
  return programs.create(
    config, mesh or tiny.one_device(), tiny.recipe(tiny.dense())
  )


def size(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  'values',
  [NONE, pytest.param(HALF, marks=SLOW), pytest.param(FACTORED, marks=SLOW)],
)
def test_a_checkpoint_of_a_smaller_state_resumes_exactly(tmp_path, values):
  made, mesh = program(values), tiny.one_device()
  batch = sharding.put_batch(tiny.images(), mesh) | {
    'label': jnp.zeros(tiny.BATCH, jnp.int32)
  }
  state, _ = made.step_fn(tiny.random_state(made.abstract), {}, batch)
  with checkpoint.Checkpoints(tmp_path) as kept:
    kept.save(1, state)
    kept.wait()
    restored = kept.restore_newest(made.abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    ends = [made.step_fn(one, {}, batch)[0] for one in (state, restored)]
  for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
  # What evaluation loads is what was trained.
  loaded = checkpoint.load_params(tmp_path, 1, made.abstract.averaged)
  assert jax.tree.structure(loaded) == jax.tree.structure(ends[0].params)


def test_the_state_is_as_small_as_the_docs_say():
  """Bytes a parameter, of a network wide enough for factors."""
  config = digits.get_config()
  config.model.channels, config.model.num_groups = 128, 32

  def bytes_of(values):
    config.update_from_flattened_dict(
      {'optim.name': 'adam', 'optim.moments_dtype': 'float32', 'ema.decay': 0.9}
    )
    config.update_from_flattened_dict(values)
    state = programs.create(config, tiny.one_device()).abstract
    return size(state) / (size(state.params) / 4)

  assert bytes_of({}) == pytest.approx(16, abs=0.01)
  assert bytes_of(NONE) == pytest.approx(12, abs=0.01)
  assert bytes_of(HALF) == pytest.approx(14, abs=0.01)
  assert bytes_of(NONE | FACTORED) == pytest.approx(6, abs=0.3)


def test_without_an_average_the_parameters_are_used():
  abstract = program(NONE).abstract
  assert abstract.ema_params == {}
  assert abstract.averaged is abstract.params
  kept = program({}).abstract
  assert kept.averaged is kept.ema_params


def test_an_older_run_whose_average_had_no_weight_goes_on(tmp_path):
  state = tiny.random_state(program({}).abstract)
  with checkpoint.Checkpoints(tmp_path) as kept:
    kept.save(1, state)
    kept.wait()
    restored = kept.restore_newest(program(NONE).abstract)
  assert restored.ema_params == {}
  jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)


def test_the_form_of_the_state_may_not_change():
  def plain(values):
    config = digits.get_config()
    config.update_from_flattened_dict(values)
    return runs.to_plain(config)

  assert not runs.fixed(plain({}), plain({'ema.decay': 0.5}))
  for values in (NONE, HALF, FACTORED):
    for pair in ((values, {}), ({}, values)):
      assert runs.fixed(*map(plain, pair)), values


def test_adafactor_trains():
  """On a quadratic, whose optimum is known."""
  params = {'net': {'kernel': jnp.ones((128, 128))}}
  optimizer = optim.create(
    0.05, name='adafactor', moments_dtype='bfloat16', clip_norm=1.0
  )

  @jax.jit
  def step(params, state):
    updates, state = optimizer.update(params, state, params)
    return jax.tree.map(jnp.add, params, updates), state

  state = optimizer.init(params)
  for _ in range(100):
    params, state = step(params, state)
  assert float(optim.global_norm(params)) < 0.1 * 128
