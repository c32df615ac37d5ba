"""Backward passes in the form that is fast in loops: the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_jax import models
from diffusion_jax.models import convolution


@pytest.fixture(scope='module')
def network():
  model = tiny.model(
    multipliers=(1,), attention_resolutions=(), dropout=0.0, channels=4
  )
  params = jax.tree.map(
    lambda x: jax.random.normal(jax.random.key(x.size), x.shape) / 8,
    jax.eval_shape(model.init, jax.random.key(0)),
  )
  apply = models.network_fn(model)
  x = jax.random.normal(jax.random.key(1), (2, *tiny.SHAPE))

  def f(params, x):
    return apply({models.NET: params}, x, jnp.array([3.0, 700]), {}, None)

  return f, params, x


def test_all_derivatives_are_the_same(network):
  f, params, x = network

  def derived():
    def of(params, x):
      y, pull = jax.vjp(f, params, x)
      return y, pull(y), jax.jvp(f, (params, x), (params, x))[1]

    return jax.jit(of)(params, x)

  plain = derived()
  with convolution.backwards():
    ours = derived()
  scale = float(jnp.abs(plain[0]).max())
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(ours), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * scale)


def test_the_backward_pass_in_a_loop_has_the_form_of_the_forward_pass():
  """All convolutions that keep the size: no kernel with its sides swapped."""
  kernel, x = jnp.ones((3, 3, 4, 6)), jnp.ones((2, 8, 8, 4))

  def backward(y):
    return jax.vjp(lambda x: convolution.same(x, kernel), x)[1](y)[0]

  def in_loop(y):
    def body(y, _):
      return jnp.pad(backward(y), [(0, 0)] * 3 + [(0, 2)]), None

    return jax.lax.scan(body, y, None, length=3)[0]

  def text():
    return jax.jit(lambda y: in_loop(y)).lower(jnp.ones((2, 8, 8, 6))).as_text()

  plain = text()
  with convolution.backwards():
    ours = text()
  assert 'x[0, 1, o, i]->' in plain
  assert 'x[0, 1, o, i]->' not in ours
  assert 'x[0, 1, i, o]->' in ours
