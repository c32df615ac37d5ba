"""Fast forms of the network's operations equal the usual ones."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from parity.unet import random_params

from diffusion_jax import models
from diffusion_jax.models import (
  attention,
  layers,
  normalise,
  pointwise,
  upsampling,
)
from diffusion_jax.training import optim

SMALL = {
  'channels': 16, 'multipliers': (1, 2), 'num_blocks': 1, 'num_groups': 4,
  'attention_resolutions': (4,), 'num_heads': 2,
}  # fmt: skip


def noise(*shape, seed=0):
  values = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(values, jnp.float32)


def errors(found, wanted):
  """The largest error of each array, relative to its largest value.

  Some gradients are zero but for rounding, such as those of keys' biases.
  """
  found, wanted = map(jax.tree.leaves, (found, wanted))
  least = 1e-3 * max(np.abs(b).max() for b in wanted)
  return [
    float(np.abs(np.asarray(a, float) - b).max() / max(np.abs(b).max(), least))
    for a, b in zip(found, wanted, strict=True)
  ]


def same_derivatives(fn, plain, args, tolerance):
  """Value, forward and reverse derivatives, and those under vmap."""
  args = jax.tree.map(jnp.asarray, args)
  tangents = jax.tree.map(lambda x: noise(*x.shape, seed=7), args)

  @functools.partial(jax.jit, static_argnums=0)
  def derivatives(fn, args, tangents):
    y, forward = jax.jvp(fn, args, tangents)
    cotangents = noise(3, *y.shape, seed=8)
    pullback = jax.vjp(fn, *args)[1]
    return y, forward, jax.vmap(pullback)(cotangents)

  found = derivatives(fn, args, tangents)
  assert max(errors(found, derivatives(plain, args, tangents))) < tolerance


def plain_norm(xs, scale, bias, shift, groups, swish):
  layer = nnx.GroupNorm(
    len(scale), num_groups=groups, epsilon=1e-6, use_fast_variance=False,
    rngs=nnx.Rngs(0),
  )  # fmt: skip
  nnx.update(layer, {'scale': nnx.Param(scale), 'bias': nnx.Param(bias)})
  y = layer(jnp.concatenate(xs, axis=-1) + shift[:, None, None])
  return nnx.swish(y) if swish else y


@pytest.mark.parametrize('swish', [False, True])
@pytest.mark.parametrize('channels', [(8,), (4, 8), (10, 6, 4)])
def test_group_norm_equals_the_usual_form(channels, swish):
  c = sum(channels)
  xs = tuple(3 * noise(2, 5, 3, n, seed=n) + 1 for n in channels)
  args = xs, noise(c, seed=2), noise(c, seed=3), noise(2, c, seed=4)

  def ours(xs, scale, bias, shift):
    return normalise.group_norm(xs, scale, bias, 4, shift, swish)

  def plain(xs, scale, bias, shift):
    return plain_norm(xs, scale, bias, shift, 4, swish)

  same_derivatives(ours, plain, args, 3e-6)


@pytest.mark.parametrize('by_channel', [False, True])
def test_the_variance_is_accurate_far_from_zero(by_channel):
  """The mean is 100 standard deviations, of the group or of each channel."""
  mean = 100 * (noise(1, 1, 1, 8, seed=1) if by_channel else 1.0)
  x = mean + noise(2, 32, 32, 8)
  y = normalise.group_norm((x,), jnp.ones(8), jnp.zeros(8), 2)
  grouped = np.asarray(x, float).reshape(2, -1, 2, 4)
  exact = grouped.std(axis=(1, 3))
  spread = np.asarray(x).reshape(2, -1, 2, 4)[:, :, :, :1]
  found = spread.std(axis=(1, 3), dtype=float) / np.asarray(y, float).reshape(
    2, -1, 2, 4
  )[:, :, :, :1].std(axis=(1, 3))
  np.testing.assert_allclose(np.square(found / exact), 1, atol=1e-3)


def test_without_float32_digits_the_variance_needs_no_pivot():
  """In bfloat16 and 100 standard deviations from zero, values are multiples of
  1/2, and their rounding alone has added 1/48 to a variance of 1. The float32
  sums of 1,024 squares near 100**2 add errors of half a unit in the last place,
  2**-1 in sums of 1e7, as a random walk at most: 0.5 sqrt(1024) / 1024 < 0.02.
  """
  x = (100 + noise(2, 32, 32, 8)).astype(jnp.bfloat16)
  y = normalise.group_norm((x,), jnp.ones(8), jnp.zeros(8), 8)
  exact = np.asarray(x, float).std(axis=(1, 2))
  centered = (
    np.asarray(x, float) - np.asarray(x, float).mean((1, 2))[:, None, None]
  )
  found = np.sum(centered**2, (1, 2)) / np.sum(
    centered * np.asarray(y, float), (1, 2)
  )
  np.testing.assert_allclose(np.square(found / exact), 1, atol=0.02)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
  ('value', 'size'), [(1e4, (4, 4)), (123.0, (60, 52)), (5.3, (127, 121))]
)
def test_a_constant_map_becomes_the_bias(value, size, dtype):
  """In bfloat16 the sums of the last two round to a variance below 0.

  The mean rounds to 1e-7 of the value, and is multiplied by 1e-6 ** -0.5.
  """
  x = jnp.full((1, *size, 8), value, dtype)
  y = normalise.group_norm((x,), jnp.ones(8), jnp.arange(8.0), 4)
  np.testing.assert_allclose(
    y[0, 0, 0].astype('float32'), np.arange(8), atol=1e-3 + 3e-4 * value
  )


def test_upsampling_equals_repeating_and_convolving():
  def plain(x, kernel):
    repeated = x.repeat(2, axis=1).repeat(2, axis=2)
    return jax.lax.conv_general_dilated(
      repeated, kernel, (1, 1), 'SAME', dimension_numbers=upsampling.LAYOUT
    )

  args = noise(2, 4, 6, 3), noise(3, 3, 3, 5, seed=1)
  same_derivatives(upsampling.upsample_conv, plain, args, 3e-6)


@pytest.mark.parametrize('heads', [1, 2])
def test_attention_equals_that_of_jax(heads):
  args = [noise(2, 9, heads, 4, seed=i) for i in range(3)]
  plain = jax.nn.dot_product_attention
  same_derivatives(attention.attend, plain, tuple(args), 3e-6)


def test_attention_in_pieces_writes_few_logits(monkeypatch):
  """12 queries by 12 keys, of which 2 queries at once have their logits.

  The backward pass keeps none of them: it takes less memory than all logits.
  """
  args = tuple(noise(2, 12, 2, 4, seed=i) for i in range(3))
  plain = jax.nn.dot_product_attention

  def logits(attend, length):
    """Whether an array of all logits of a head is anywhere in the program."""
    shapes = [jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)] * 3
    made = jax.make_jaxpr(jax.grad(lambda *x: attend(*x).sum()))(*shapes)
    return f'{length},{length}]' in str(made)

  assert logits(attention.attend, 12)
  monkeypatch.setattr(attention, 'LARGEST', 24)
  same_derivatives(attention.attend, plain, args, 3e-6)
  assert not logits(attention.attend, 12)
  # 11 is prime: one query at once.
  odd = tuple(x[:, :11] for x in args)
  np.testing.assert_allclose(
    attention.attend(*odd), plain(*odd), rtol=0, atol=3e-6
  )


def test_a_projection_of_parts_is_that_of_the_whole():
  layer = nnx.Linear(10, 4, rngs=nnx.Rngs(0))
  layer.bias[...] = noise(4, seed=2)
  x, added = noise(2, 3, 3, 10), noise(2, 3, 3, 4)
  parts = x[..., :3], x[..., 3:4], x[..., 4:]
  found = pointwise.projected(layer, parts, added)
  np.testing.assert_allclose(found, layer(x) + added, atol=1e-5)


def test_a_1x1_convolution_is_a_product():
  args = noise(2, 3, 4, 5), noise(5, 6, seed=1)
  same_derivatives(pointwise.dense, jnp.matmul, args, 3e-6)


class Told(NamedTuple):
  """What `of_time` reads of a block."""

  number: int
  time: nnx.Linear


def test_the_time_of_all_blocks_is_that_of_each():
  widths = 4, 6, 4, 4
  blocks = [
    Told(number, layers.linear(8, width, rngs=nnx.Rngs(number)))
    for number, width in enumerate(widths)
  ]
  for block in blocks:
    block.time.bias[...] = noise(len(block.time.bias[...]), seed=block.number)
  time = noise(3, 8)
  found = layers.of_time(blocks[::-1], time)
  for block in blocks:
    wanted = block.time(nnx.swish(time))
    np.testing.assert_allclose(found[block.number], wanted, atol=1e-5)


def test_biases_are_cast_together():
  """All casts of vectors come after a product with a common number."""
  model = models.create('unet', (8, 8, 3), dtype='bfloat16', **SMALL)
  params = jax.eval_shape(model.init, jax.random.key(0))
  args = params, noise(2, 8, 8, 3), jnp.zeros(2)
  text = str(jax.make_jaxpr(model.apply)(*args))
  cast = r'(\w+):bf16\[\d+\] = convert_element_type\[.*?\] (\w+)\n'
  found = re.findall(cast, text)
  assert len(found) > 20
  for _, source in found:
    assert re.search(rf'\b{source}:f32\[\d+\] = mul ', text)


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_masks_of_16_bits_have_their_rate(rate):
  keys = jax.random.split(jax.random.key(3), 8)
  y = layers.dropout(jnp.ones((8, 64, 64, 16)), rate, keys, 0)
  deviation = np.sqrt(rate * (1 - rate) / y.size)
  assert abs(float((y == 0).mean()) - rate) < 5 * deviation + 2**-17
  np.testing.assert_allclose(y.mean(), 1, atol=5 * deviation / (1 - rate))


@functools.cache
def gradients(**kwargs):
  """Output and gradients of a small network without dropout."""
  model = models.create('unet', (8, 8, 3), **SMALL, **kwargs)
  params = random_params(model)
  xt, t = noise(2, 8, 8, 3), jnp.array([10, 900])

  def loss(params):
    y = model.apply(params, xt, t)
    return jnp.mean(jnp.square(y)), y

  return jax.jit(jax.grad(loss, has_aux=True))(params)


def test_all_measures_together_change_rounding_only():
  found, wanted = gradients(), gradients(plain=layers.MEASURES)
  assert max(errors(found, wanted)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('measure', layers.MEASURES)
def test_each_measure_changes_rounding_only(measure):
  assert max(errors(gradients(plain=(measure,)), gradients())) < 1e-4


@pytest.mark.slow
def test_measures_change_the_losses_of_20_steps_by_rounding_only():
  optimizer = optim.create(lr=2e-4, clip_norm=1.0)
  images, target = noise(20, 2, 8, 8, 3), noise(20, 2, 8, 8, 3, seed=1)
  t = jnp.array([10, 900])

  def losses(**kwargs):
    model = models.create('unet', (8, 8, 3), dropout=0.0, **SMALL, **kwargs)
    params = random_params(model)

    def step(carry, batch):
      params, state = carry
      x, y = batch
      loss, grads = jax.value_and_grad(
        lambda p: jnp.mean(jnp.square(model.apply(p, x, t) - y))
      )(params)
      updates, state = optimizer.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), loss

    def train(params):
      start = params, optimizer.init(params)
      return jax.lax.scan(step, start, (images, target))[1]

    return jax.jit(train)(params)

  found, wanted = losses(), losses(plain=layers.MEASURES)
  assert len(set(np.asarray(wanted))) == 20
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['blocks', 'all'])
def test_computing_again_changes_no_gradient(remat):
  assert max(errors(gradients(remat=remat), gradients())) < 1e-5
