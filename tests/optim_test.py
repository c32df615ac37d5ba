"""Optimisers and their schedules against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding

from diffusion_jax import models, runs
from diffusion_jax.configs import digits
from diffusion_jax.runs import validation
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import optim, sharding

PARAMS = {
  'net': {
    'kernel': jnp.array([[1.0, -2.0], [0.5, 4.0]]),
    'bias': jnp.array([1.0, 2.0]),
  },
  'codec': {'kernel': jnp.full((2, 1), 3.0), 'scale': jnp.ones((2, 1))},
}


def like(value):
  return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), PARAMS)


def updates(optimizer, *gradients):
  """Each update, of parameters that stay."""
  state, found = optimizer.init(PARAMS), []
  for gradient in gradients:
    update, state = optimizer.update(gradient, state, PARAMS)
    found.append(update)
  return found


@pytest.mark.parametrize('norm', [optim.global_norm, optim._norm_of_stacks])
def test_the_norm_is_that_of_all_numbers(norm):
  rng = np.random.default_rng(0)
  shapes = {'a/bias': (5,), 'b/bias': (5,), 'b/scale': (5,), 'k/kernel': (3, 5)}
  tree = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
  want = np.linalg.norm(np.concatenate([x.ravel() for x in tree.values()]))
  np.testing.assert_allclose(jax.jit(norm)(tree), want, rtol=1e-6)


def test_a_stack_keeps_the_split_of_its_arrays():
  """No device holds all of an array, as FSDP promises."""
  mesh = sharding.make_mesh(1, 8, 1)
  tree = {
    name: jax.ShapeDtypeStruct(
      (256, 256), jnp.float32, sharding=NamedSharding(mesh, jax.P(None, 'fsdp'))
    )
    for name in ('a/kernel', 'b/kernel')
  }
  text = jax.jit(optim._norm_of_stacks).lower(tree).compile().as_text()
  assert 'all-gather' not in text
  assert 'all-reduce' in text


def test_the_default_is_ddpms_adam_bitwise():
  """The same numbers and the same tree, so that older checkpoints restore."""
  rate = optax.linear_schedule(0.0, 1e-3, 5)
  before = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(rate, 0.9, 0.999, 1e-8)
  )
  config = digits.get_config().optim
  with config.unlocked():
    config.update({'lr': 1e-3, 'warmup_steps': 5})
  now = optim.create(**config)
  assert jax.tree.structure(before.init(PARAMS)) == jax.tree.structure(
    now.init(PARAMS)
  )
  gradients = [like(0.1 * k - 0.2) for k in range(5)]
  jax.tree.map(
    np.testing.assert_array_equal,
    updates(before, *gradients),
    updates(now, *gradients),
  )
  bare = optim.create(1e-3)
  adam = optax.adam(optax.constant_schedule(1e-3))
  assert jax.tree.structure(bare.init(PARAMS)) == jax.tree.structure(
    adam.init(PARAMS)
  )


@pytest.mark.parametrize(
  ('decay', 'quarter'),
  [('cosine', 0.5 * (1 + np.cos(np.pi / 4))), ('linear', 0.75)],
)
@pytest.mark.parametrize('end', [0.0, 1e-5])
def test_a_decay_starts_after_warm_up_and_ends_where_it_says(
  decay, quarter, end
):
  rate = optim.learning_rate(1e-3, 100, decay, 500, end)
  found = [rate(k) for k in (0, 50, 100, 200, 300, 500, 501, 10**6)]
  expected = [
    0.0, 0.5e-3, 1e-3, end + (1e-3 - end) * quarter, end + (1e-3 - end) / 2,
    end, end, end,
  ]  # fmt: skip
  assert found[0] == 0
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize('decay', ['cosine', 'linear'])
def test_a_decay_without_warm_up_starts_at_lr(decay):
  rate = optim.learning_rate(1e-3, 0, decay, 10)
  np.testing.assert_allclose([rate(0), rate(5), rate(10)], [1e-3, 5e-4, 0],
                             rtol=1e-6, atol=1e-10)  # fmt: skip


@pytest.mark.parametrize('warmup', [0, 100])
def test_a_rate_is_constant_until_its_decay_begins(warmup):
  rate = optim.learning_rate(1e-3, warmup, 'linear', 500, 1e-4, decay_from=300)
  found = [rate(k) for k in (100, 200, 300, 400, 500, 600)]
  np.testing.assert_allclose(
    found, [1e-3, 1e-3, 1e-3, 5.5e-4, 1e-4, 1e-4], rtol=1e-5
  )
  np.testing.assert_allclose(rate(50), 5e-4 if warmup else 1e-3, rtol=1e-5)


def test_a_rate_of_a_traced_step_is_that_of_the_number():
  rate = optim.learning_rate(1e-3, 3, 'cosine', 9, 1e-5)
  steps = np.arange(12, dtype=np.int32)
  np.testing.assert_allclose(
    jax.jit(jax.vmap(rate))(steps), [rate(int(k)) for k in steps], rtol=1e-6
  )


def test_betas_and_epsilon_are_used():
  """The first two updates of Adam (arXiv 1412.6980, algorithm 1) by hand."""
  b1, b2, eps, lr, first, second = 0.5, 0.25, 0.125, 0.1, 2.0, -1.0
  found = updates(
    optim.create(lr, b1=b1, b2=b2, eps=eps), like(first), like(second)
  )
  m = (b1 * (1 - b1) * first + (1 - b1) * second) / (1 - b1**2)
  v = (b2 * (1 - b2) * first**2 + (1 - b2) * second**2) / (1 - b2**2)
  for update, value in zip(
    found,
    [-lr * first / (first + eps), -lr * m / (np.sqrt(v) + eps)],
    strict=True,
  ):
    jax.tree.map(
      lambda u, value=value: np.testing.assert_allclose(u, value, rtol=1e-5),
      update,
    )


def test_adamw_shrinks_kernels_alone_where_the_gradient_is_zero():
  """By learning rate x weight decay x parameter, of the step's rate."""
  optimizer = optim.create(0.1, warmup_steps=2, name='adamw', weight_decay=0.25)
  for factor, update in zip(
    (0.0, 0.5, 1.0), updates(optimizer, *[like(0.0)] * 3), strict=True
  ):
    for part in PARAMS:
      np.testing.assert_allclose(
        update[part]['kernel'],
        -0.1 * factor * 0.25 * PARAMS[part]['kernel'],
        rtol=1e-6,
      )
    assert not np.any(update['net']['bias'])
    assert not np.any(update['codec']['scale'])


def test_adamw_without_decay_is_adam():
  jax.tree.map(
    np.testing.assert_array_equal,
    updates(optim.create(0.1, name='adamw'), like(0.5), like(-2.0)),
    updates(optim.create(0.1), like(0.5), like(-2.0)),
  )


def test_of_a_network_kernels_alone_decay():
  shapes = jax.eval_shape(tiny.model().init, jax.random.key(0))
  flags = dict(
    zip(
      models.names(shapes), jax.tree.leaves(optim.decayed(shapes)), strict=True
    )
  )
  assert flags.keys() == set(models.names(shapes))
  for name, is_decayed in flags.items():
    assert is_decayed == name.endswith('/kernel'), name


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
def test_a_part_has_its_own_rate(name):
  """Warm-up and weight decay scale with it; the other part stays."""
  how = {'warmup_steps': 2, 'clip_norm': 1.0, 'name': name}
  how['weight_decay'] = 0.25 if name == 'adamw' else 0.0
  gradients = [like(0.5), like(-2.0), like(0.125)]
  plain = updates(optim.create(0.1, **how), *gradients)
  slow = updates(optim.create(0.1, part_lr={'codec': 0.02}, **how), *gradients)
  for before, now in zip(plain, slow, strict=True):
    jax.tree.map(np.testing.assert_array_equal, before['net'], now['net'])
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(0.2 * a, b, rtol=1e-6),
      before['codec'],
      now['codec'],
    )
  assert np.any(slow[1]['codec']['kernel'])
  frozen = updates(
    optim.create(0.1, part_lr={'codec': 0.0}, **how), gradients[0]
  )
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen[0]['codec']))


def test_an_unknown_part_is_refused():
  with pytest.raises(UserError, match=r'part_lr\.codex: .* codec, net'):
    optim.create(0.1, part_lr={'codex': 0.02}).init(PARAMS)


@pytest.mark.parametrize(
  ('values', 'must'),
  [
    ({'name': 'adamax'}, ["optim.name='adamax'", 'adam, adamw']),
    ({'decay': 'step'}, ["optim.decay='step'", 'constant, cosine, linear']),
    ({'decay': 'cosine'}, ['optim.decay_steps=0', 'optim.warmup_steps=100']),
    (
      {'decay': 'linear', 'decay_steps': 100},
      ['optim.decay_steps=100', 'optim.warmup_steps=100'],
    ),
    ({'weight_decay': 0.1}, ['optim.weight_decay=0.1', 'adamw']),
    ({'weight_decay': -0.1, 'name': 'adamw'}, ['optim.weight_decay=-0.1']),
    ({'end_lr': -1e-3}, ['optim.end_lr=-0.001']),
    ({'end_lr': float('nan')}, ['optim.end_lr=nan']),
    ({'part_lr': {'codec': -1.0}}, ['optim.part_lr.codec=-1.0']),
  ],
)
def test_mistakes_are_named(values, must):
  config = digits.get_config()
  with config.unlocked():
    config.optim.update(values)
  (message, *_) = validation.check(config, range(1))
  assert '\n' not in message
  for word in must:
    assert word in message


@pytest.mark.slow
def test_a_run_with_all_of_it_goes_on_bitwise(tmp_path):
  how = {
    'optim.name': 'adamw', 'optim.weight_decay': 0.05, 'optim.decay': 'cosine',
    'optim.decay_steps': 8, 'optim.end_lr': 1e-4, 'optim.warmup_steps': 2,
    'eval_every': 0, 'sample_every': 0,
  }  # fmt: skip
  tiny.train(tmp_path / 'whole', num_steps=8, **how)
  tiny.train(tmp_path / 'halves', num_steps=4, **how)
  tiny.train(tmp_path / 'halves', num_steps=8, **how)
  assert tiny.losses(tmp_path / 'whole') == tiny.losses(tmp_path / 'halves')
  jax.tree.map(
    np.testing.assert_array_equal,
    tiny.final_state(tmp_path / 'whole'),
    tiny.final_state(tmp_path / 'halves'),
  )
  config = runs.read_config(tmp_path / 'whole')
  assert config['optim']['name'] == 'adamw'
