"""The details of DDPM's U-Net that re-implementations get wrong, one by one.

Layers are compared with plain NumPy in float64; the way through the network is
read off the layers' calls. That the whole equals another implementation is
tested in unet_parity_test.py.
"""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity.unet import random_params

from diffusion_jax import models
from diffusion_jax.models import layers
from diffusion_jax.system.errors import UserError

PUBLISHED = {
  'cifar10': ((32, 32, 3), {}),
  'celebahq': ((256, 256, 3), {'multipliers': (1, 1, 2, 2, 4, 4)}),
}
SMALL = {
  'channels': 8,
  'multipliers': (1, 2),
  'num_blocks': 1,
  'attention_resolutions': (4,),
  'num_groups': 4,
  'dropout': 0.0,
}


@functools.cache
def published(name):
  """A published network and the shapes of its parameters."""
  image_shape, kwargs = PUBLISHED[name]
  model = models.create('unet', image_shape, **kwargs)
  return model, jax.eval_shape(model.init, jax.random.key(0))


@functools.cache
def small(**kwargs):
  """A network that is quick to compile, and random parameters."""
  model = models.create('unet', (8, 8, 3), **SMALL | kwargs)
  return model, random_params(model)


def noise(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype('f4')


def by_name(params):
  return dict(zip(models.names(params), jax.tree.leaves(params), strict=True))


def dtypes(params):
  return {str(leaf.dtype) for leaf in jax.tree.leaves(params)}


def layer(kind, *args, **kwargs):
  """A layer all of whose parameters are random and matter."""
  module = nnx.eval_shape(
    lambda: kind(*args, dtype=jnp.float32, rngs=nnx.Rngs(0), **kwargs)
  )
  generator = np.random.default_rng(1)

  def randomize(leaf):
    return jnp.asarray(0.5 * generator.standard_normal(leaf.shape), 'float32')

  nnx.update(module, jax.tree.map(randomize, nnx.state(module)))
  return module


# The layers again, plainly.


def plain_swish(x):
  return x / (1 + np.exp(-x))


def plain_linear(x, linear):
  kernel, bias = linear.kernel[...], linear.bias[...]
  return x.astype('f8') @ np.asarray(kernel, 'f8') + np.asarray(bias, 'f8')


def plain_conv(x, conv, *, stride=1, before=1):
  """3x3; `before` zeros above and left, one below and right."""
  kernel = np.asarray(conv.kernel[...], 'f8')
  x = np.pad(x.astype('f8'), [(0, 0), (before, 1), (before, 1), (0, 0)])
  h, w = ((size - 3) // stride + 1 for size in x.shape[1:3])
  y = np.asarray(conv.bias[...], 'f8')
  for i in range(3):
    for j in range(3):
      rows = slice(i, i + stride * h, stride)
      columns = slice(j, j + stride * w, stride)
      y = y + x[:, rows, columns] @ kernel[i, j]
  return y


def plain_norm(x, norm, num_groups, epsilon=1e-6):
  b, h, w, c = x.shape
  x = x.astype('f8').reshape(b, h * w, num_groups, -1)
  mean = x.mean((1, 3), keepdims=True)
  variance = x.var((1, 3), keepdims=True)
  x = ((x - mean) / np.sqrt(variance + epsilon)).reshape(b, h, w, c)
  return x * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])


# The way through the network.


class Call(NamedTuple):
  kind: str  # R: residual block, A: attention, D: downsample, U: upsample
  x: jax.Array
  y: jax.Array
  time: jax.Array | None


@pytest.fixture
def calls(monkeypatch):
  """The calls of layers, in order, that follow."""
  calls = []

  def watch(kind, layer):
    right = layer.__call__

    def watched(self, x, *args):
      y = right(self, x, *args)
      if isinstance(x, tuple):
        x = jnp.concatenate(x, axis=-1)
      calls.append(Call(kind, x, y, args[0] if args else None))
      return y

    monkeypatch.setattr(layer, '__call__', watched)

  watch('R', layers.ResBlock)
  watch('A', layers.Attention)
  watch('D', layers.Downsample)
  watch('U', layers.Upsample)
  return calls


def trace(model, params, image_shape):
  """Calls the layers without computing anything."""
  xt = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
  t = jax.ShapeDtypeStruct((2,), jnp.int32)
  # A new function, as what was traced already would not be traced again.
  return jax.eval_shape(lambda *args: model.apply(*args), params, xt, t)


def parts(calls, blocks_down):
  """The calls on the way down, in the middle, and on the way up."""
  places = [i for i, call in enumerate(calls) if call.kind == 'R']
  middle = places[blocks_down]
  return calls[:middle], calls[middle : middle + 3], calls[middle + 3 :]


def skips(down):
  """What the way down leaves for the way up."""
  after = [call.kind for call in down[1:]] + ['']
  left = [call.y for call, kind in zip(down, after, strict=True) if kind != 'A']
  return [down[0].x, *left]


def run(calls, model, params, xt, t):
  """The calls of the layers with their values."""

  @jax.jit
  def arrays(params, xt, t):
    model.apply(params, xt, t)
    return [call[1:] for call in calls]

  found = jax.tree.map(np.asarray, arrays(params, xt, t))
  return [
    Call(call.kind, *values) for call, values in zip(calls, found, strict=True)
  ]


# Parameters and detail 1, initial values.


@pytest.mark.parametrize(
  ('name', 'count'), [('cifar10', 35_746_307), ('celebahq', 113_673_219)]
)
def test_counts_of_the_published_networks(name, count):
  _, params = published(name)
  assert models.count(params) == count
  assert dtypes(params) == {'float32'}


@functools.cache
def initial():
  model = models.create('unet', (8, 8, 3), **SMALL | {'multipliers': (1, 1)})
  key = jax.random.key(0, impl='rbg')  # whose code compiles fast
  return model, jax.tree.map(np.asarray, model.init(key))


def test_kernels_are_uniform_by_fan_average_and_biases_zero():
  _, params = initial()
  for name, values in by_name(params).items():
    if name.endswith('kernel'):
      *receptive, inputs, outputs = values.shape
      fan = np.prod(receptive) * (inputs + outputs) / 2
      scale = 1e-10 if np.abs(values).max() < 1e-3 else 1.0
      limit = np.sqrt(3 * scale / fan)
      assert 0.9 * limit < np.abs(values).max() < 1.0001 * limit, name
      np.testing.assert_allclose(values.std(), limit / np.sqrt(3), rtol=0.2)
    else:
      assert (values == (1 if name.endswith('scale') else 0)).all(), name


def test_almost_zero_are_three_kinds_of_kernels_and_none_is_zero():
  _, params = initial()
  kernels = {k: v for k, v in by_name(params).items() if k.endswith('kernel')}
  small = {k for k, v in kernels.items() if np.abs(v).max() < 1e-3}
  pattern = (
    r'(.*(blocks/\d|middle\d)/conv2|.*attentions/\d/out'
    r'|middle_attention/out|conv_out)/kernel'
  )
  assert small == {k for k in kernels if re.fullmatch(pattern, k)}
  assert len(small) == 8 + 4 + 1
  assert all((v != 0).mean() > 0.99 for v in kernels.values())


def test_an_initial_network_predicts_almost_nothing():
  model, params = initial()
  out = jax.jit(model.apply)(params, noise(2, 8, 8, 3), np.array([0, 999]))
  assert 0 < np.abs(out).max() < 1e-3


# Detail 2, group norm.


@pytest.mark.parametrize('size', [1, 1e-3])
def test_group_norm(size):
  # At 1e-3 the variance is as small as the epsilon.
  norm = layer(layers.norm, 12, 4)
  x = size * (noise(2, 5, 5, 12) + 1)
  np.testing.assert_allclose(norm(x), plain_norm(x, norm, 4), atol=1e-5)


def test_thirty_two_groups_by_default(monkeypatch):
  groups, right = set(), layers.norm

  def norm(channels, num_groups, **kwargs):
    groups.add(num_groups)
    return right(channels, num_groups, **kwargs)

  monkeypatch.setattr(layers, 'norm', norm)
  models.create('unet', (8, 8, 3), channels=32, multipliers=(1,))
  assert groups == {32}


# Detail 3, residual blocks and the time that they are told.


@pytest.mark.parametrize('outputs', [8, 12])
@pytest.mark.parametrize('rate', [0.0, 0.5])
def test_residual_block(outputs, rate):
  block = layer(
    layers.ResBlock,
    8,
    outputs,
    time_dim=6,
    num_groups=4,
    dropout=rate,
    number=3,
  )
  x, time = noise(2, 6, 6, 8), noise(2, 6, seed=1)
  keys = jax.random.split(jax.random.key(0), 2)
  kept = layers.dropout(jnp.ones((2, 6, 6, outputs)), rate, keys, 3)

  h = plain_conv(plain_swish(plain_norm(x, block.norm1, 4)), block.conv1)
  h += plain_linear(plain_swish(time), block.time)[:, None, None]
  h = plain_swish(plain_norm(h, block.norm2, 4)) * np.asarray(kept)
  h = plain_conv(h, block.conv2)
  assert hasattr(block, 'shortcut') == (outputs != 8)
  h += plain_linear(x, block.shortcut) if outputs != 8 else x

  # Without a shortcut, blocks take a single map.
  xs = (x,) if outputs == 8 else (x[..., :5], x[..., 5:])
  found = block(xs, layers.of_time([block], time)[3], keys)
  np.testing.assert_allclose(found, h, rtol=1e-4, atol=1e-4)


def test_shortcuts_only_where_channels_change():
  _, params = published('cifar10')
  shapes = {name: leaf.shape for name, leaf in by_name(params).items()}
  blocks = [k.removesuffix('conv1/kernel') for k in shapes if 'conv1/k' in k]
  assert len(blocks) == 8 + 2 + 12
  for block in blocks:
    *_, inputs, outputs = shapes[f'{block}conv1/kernel']
    shortcut = shapes.get(f'{block}shortcut/kernel')
    assert shortcut == ((inputs, outputs) if inputs != outputs else None)


def test_time_is_raw_and_passes_two_layers(calls):
  model, params = small()
  t = np.array([3, 998])
  seen = run(calls, model, params, noise(2, 8, 8, 3), t)

  angles = np.outer(t, 10_000.0 ** -(np.arange(4) / 3))
  h = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
  for name in 'time1', 'time2':
    h = plain_swish(h) if name == 'time2' else h
    h = h @ params[name]['kernel'].astype('f8') + params[name]['bias']
  h = plain_swish(h)
  told = [call.time for call in seen if call.kind == 'R']
  by_block = {n: x for n, x in by_name(params).items() if '/time/' in n}
  kernels = [x for n, x in by_block.items() if n.endswith('kernel')]
  biases = [x for n, x in by_block.items() if n.endswith('bias')]
  assert len(told) == 8
  for time, kernel, bias in zip(told, kernels, biases, strict=True):
    np.testing.assert_allclose(time, h @ kernel + bias, atol=1e-4)


def test_time_is_four_times_as_wide():
  _, params = published('cifar10')
  assert params['time1']['kernel'].shape == (128, 512)
  assert params['time2']['kernel'].shape == (512, 512)


# Detail 4, the sinusoid.


def test_sinusoid_is_sin_then_cos():
  t = np.array([0, 1, 17, 999])
  i = np.arange(64)
  angles = np.outer(t, np.exp(-np.log(10_000) * i / 63))
  wanted = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
  found = np.asarray(layers.sinusoid(jnp.asarray(t), 128))
  np.testing.assert_allclose(found, wanted, atol=2e-4)  # angles are float32
  np.testing.assert_array_equal(found[0], [0] * 64 + [1] * 64)
  np.testing.assert_allclose(found[1, 63], np.sin(1e-4), rtol=1e-5)


# Details 5 and 6, resampling.


def test_downsampling_pads_after_only():
  down = layer(layers.Downsample, 4)
  x = noise(2, 8, 8, 4)
  wanted = plain_conv(x, down.conv, stride=2, before=0)
  assert wanted.shape == (2, 4, 4, 4)
  np.testing.assert_allclose(down(x), wanted, atol=1e-4)


@pytest.mark.parametrize(
  ('pixel', 'reaches'),
  [
    ((0, 0), {(0, 0): (0, 0)}),
    ((7, 7), {(3, 3): (1, 1)}),
    ((3, 5), {(1, 2): (1, 1)}),
    ((2, 3), {(1, 1): (0, 1), (0, 1): (2, 1)}),
  ],
)
def test_downsampling_of_an_impulse(pixel, reaches):
  down = layer(layers.Downsample, 1)
  impulse = np.zeros((1, 8, 8, 1), 'f4')
  impulse[0, *pixel, 0] = 1
  found = np.asarray(down(impulse) - down(np.zeros_like(impulse)))[0, ..., 0]
  wanted = np.zeros((4, 4))
  for place, tap in reaches.items():
    wanted[place] = down.conv.kernel[...][*tap, 0, 0]
  np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_upsampling_repeats_then_convolves():
  up = layer(layers.Upsample, 4)
  x = noise(2, 4, 4, 4)
  wanted = plain_conv(np.kron(x, np.ones((1, 2, 2, 1))), up.conv)
  np.testing.assert_allclose(up(x), wanted, atol=1e-4)


# Details 7 and 8, attention.


@pytest.mark.parametrize('num_heads', [1, 2])
def test_attention(num_heads):
  attention = layer(layers.Attention, 8, num_heads=num_heads, num_groups=4)
  x = noise(2, 3, 3, 8)
  normed = plain_norm(x, attention.norm, 4).reshape(2, 9, 8)
  q, k, v = (
    plain_linear(normed, linear).reshape(2, 9, num_heads, -1)
    for linear in (attention.query, attention.key, attention.value)
  )
  logits = np.einsum('bqhc,bkhc->bhqk', q, k) * (8 / num_heads) ** -0.5
  weights = np.exp(logits)
  weights /= weights.sum(-1, keepdims=True)
  assert weights.max() > 0.2  # far from a plain mean
  mixed = np.einsum('bhqk,bkhc->bqhc', weights, v).reshape(2, 3, 3, 8)
  wanted = x + plain_linear(mixed, attention.out)
  np.testing.assert_allclose(attention(x), wanted, atol=1e-5)


def test_one_head_by_default(monkeypatch):
  heads, right = set(), layers.Attention.__init__

  def init(self, *args, num_heads, **kwargs):
    heads.add(num_heads)
    right(self, *args, num_heads=num_heads, **kwargs)

  monkeypatch.setattr(layers.Attention, '__init__', init)
  models.create('unet', (8, 8, 3), channels=32, multipliers=(1,))
  assert heads == {1}


def test_the_middle_always_attends(calls):
  trace(*small(attention_resolutions=()), (8, 8, 3))
  assert ''.join(call.kind for call in calls) == 'RDRRARRRURR'


def test_order_of_layers_on_cifar10(calls):
  trace(*published('cifar10'), (32, 32, 3))
  down = 'RRDRARADRRDRR'
  up = 'RRRURRRURARARAURRR'
  assert ''.join(call.kind for call in calls) == down + 'RAR' + up
  attending = [call.x.shape[1] for call in calls if call.kind == 'A']
  assert attending == [16, 16, 4, 16, 16, 16]


# Detail 9, skips.


def test_twelve_skips_on_cifar10(calls):
  trace(*published('cifar10'), (32, 32, 3))
  down, _, up = parts(calls, 8)
  left = [x.shape[1:] for x in skips(down)]
  assert left == (
    [(32, 32, 128)] * 3
    + [(16, 16, 128)]
    + [(16, 16, 256)] * 2
    + [(8, 8, 256)] * 3
    + [(4, 4, 256)] * 3
  )
  inputs = [call.x.shape[-1] for call in up if call.kind == 'R']
  assert inputs == [512] * 8 + [384] + [384, 256, 256]


def test_each_skip_is_taken_once_and_last_first(calls):
  model, params = small(multipliers=(1, 2, 3), num_blocks=2)
  seen = run(calls, model, params, noise(1, 8, 8, 3), np.array([500]))
  down, middle, up = parts(seen, 6)
  stack = skips(down)
  assert len(stack) == 9
  before = middle[-1].y
  for call in up:
    if call.kind == 'R':
      joined = np.concatenate([before, stack.pop()], axis=-1)
      np.testing.assert_array_equal(call.x, joined)
    before = call.y
  assert not stack


# Dropout.


def test_dropout_keeps_the_mean():
  keys = jax.random.split(jax.random.key(0), 4)
  y = np.asarray(layers.dropout(jnp.ones((4, 32, 32, 16)), 0.2, keys, 0))
  np.testing.assert_allclose(np.unique(y), [0, 1.25], rtol=1e-5)
  kept = (y != 0).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(kept, 0.8, atol=0.02)  # 6 standard deviations


def test_dropout_masks_depend_on_the_key_and_the_layer_only():
  keys = jax.random.split(jax.random.key(0), 4)
  x = jnp.ones((4, 8, 8, 8))
  masks = layers.dropout(x, 0.5, keys, 0)
  alone = layers.dropout(x[2:3], 0.5, keys[2:3], 0)
  np.testing.assert_array_equal(alone[0], masks[2])
  turned = layers.dropout(x, 0.5, keys[::-1], 0)
  np.testing.assert_array_equal(turned[::-1], masks)
  other = layers.dropout(x, 0.5, keys, 1)
  for i in range(4):
    assert (masks[i] != other[i]).any()
    assert (masks[i] != masks[i - 1]).any()


def test_each_block_drops_with_a_number_of_its_own(monkeypatch):
  drops = []

  def dropout(x, rate, keys, layer, plain):
    drops.append((rate, layer))
    return x

  monkeypatch.setattr(layers, 'dropout', dropout)
  trace(*published('cifar10'), (32, 32, 3))
  assert {rate for rate, _ in drops} == {0.1}
  assert len({layer for _, layer in drops}) == len(drops) == 22


def test_without_keys_or_at_rate_zero_nothing_is_dropped():
  x, keys = noise(2, 8, 8, 3), jax.random.split(jax.random.key(0), 2)
  assert layers.dropout(x, 0.5, None, 0) is x
  assert layers.dropout(x, 0.0, keys, 0) is x

  t = np.array([10, 900])
  (never, params), (often, _) = small(), small(dropout=0.5)
  wanted = jax.jit(never.apply)(params, x, t, keys)
  np.testing.assert_array_equal(jax.jit(often.apply)(params, x, t), wanted)
  dropped = jax.jit(often.apply)(params, x, t, keys)
  assert np.abs(dropped - wanted).max() > 0.01


def test_dropout_of_an_example_does_not_depend_on_the_others():
  xt, t = noise(2, 8, 8, 3), np.array([10, 900])
  keys = jax.random.split(jax.random.key(0), 2)
  model, params = small(dropout=0.5)
  apply = jax.jit(model.apply)
  out = apply(params, xt, t, keys)
  alone = apply(params, xt[1:], t[1:], keys[1:])
  np.testing.assert_allclose(alone[0], out[1], atol=1e-5)
  same = apply(params, xt, t, jnp.stack([keys[1], keys[1]]))
  np.testing.assert_array_equal(same[1], out[1])
  assert np.abs(same[0] - out[0]).max() > 0.01


# The network as a function.


def test_examples_do_not_see_each_other():
  model, params = small()

  def second(xt, t):
    return jnp.square(model.apply(params, xt, t)[1]).sum()

  gradients = jax.jit(jax.grad(second, argnums=(0, 1)))
  for gradient in gradients(noise(3, 8, 8, 3), jnp.array([1.0, 50.0, 900.0])):
    size = np.abs(gradient.reshape(3, -1)).max(axis=-1)
    assert size[1] > 1e-4
    assert size[0] == size[2] == 0


def test_bfloat16_inside_and_float32_outside(calls):
  xt, t = noise(2, 8, 8, 3), np.array([10, 900])
  model, params = small()
  half, _ = small(dtype='bfloat16')
  initial = jax.eval_shape(half.init, jax.random.key(0))
  assert dtypes(initial) == {'float32'}
  trace(half, params, (8, 8, 3))
  assert dtypes([call.y for call in calls]) == {'bfloat16'}

  exact = jax.jit(model.apply)(params, xt, t)
  rough = jax.jit(half.apply)(params, xt, t)
  assert dtypes([exact, rough]) == {'float32'}
  error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
  assert 1e-4 < error < 0.03


def test_fractional_times_are_between():
  model, params = small()
  xt, t = noise(1, 8, 8, 3).repeat(3, axis=0), np.array([20, 20.001, 21])
  out = np.asarray(jax.jit(model.apply)(params, xt, t))
  near, far = (np.linalg.norm(out[i] - out[0]) for i in (1, 2))
  assert 0 < near < 0.01 * far


def test_unknown_name():
  with pytest.raises(UserError, match=r"'vit'.*unet"):
    models.create('vit', (8, 8, 3))
