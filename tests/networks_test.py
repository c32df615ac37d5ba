"""The networks of papers after DDPM: their blocks, sizes and initial values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import PartitionSpec as P
from microbatch_test import two_steps
from ml_collections import ConfigDict
from parity.unet import random_params
from unet_test import (
  layer,
  noise,
  plain_conv,
  plain_linear,
  plain_norm,
  plain_swish,
)

from diffusion_jax import models
from diffusion_jax.models import dit, layers, rules, styles
from diffusion_jax.planning import flops
from diffusion_jax.runs import validation
from diffusion_jax.system.errors import UserError

IMAGENET = {'label': 1000}
IDDPM = {
  'style': 'iddpm', 'num_blocks': 3, 'num_heads': 4,
  'attention_resolutions': (16, 8),
}  # fmt: skip
ADM = {
  'style': 'adm', 'channels': 192, 'multipliers': (1, 2, 3, 4),
  'num_blocks': 3, 'head_channels': 64, 'attention_resolutions': (32, 16, 8),
}  # fmt: skip
DDPMPP = {
  'style': 'ddpmpp', 'multipliers': (2, 2, 2), 'num_blocks': 4,
}  # fmt: skip
LATENT = (32, 32, 4)
# What is published, in millions: the paper's number, or what its code builds.
SIZES = {
  'DDPM, CIFAR-10': (35.7, (32, 32, 3), {}, 3, {}),
  'improved DDPM, ImageNet-64': (
    121, (64, 64, 3), {}, 6, IDDPM | {'multipliers': (1, 2, 3, 4)},
  ),
  'improved DDPM, ImageNet-64 by class': (
    273, (64, 64, 3), IMAGENET, 6,
    IDDPM | {'multipliers': (1, 2, 3, 4), 'channels': 192},
  ),
  'ADM, ImageNet-64': (296, (64, 64, 3), IMAGENET, 6, ADM),
  'DDPM++, CIFAR-10': (55.7, (32, 32, 3), {'vector': 9}, 3, DDPMPP),
  **{
    f'DiT-{size}/2': (
      count, LATENT, IMAGENET, 8,
      {'channels': channels, 'num_blocks': depth, 'num_heads': heads},
    )
    for size, count, channels, depth, heads in (
      ('S', 33, 384, 12, 6), ('B', 130, 768, 12, 12), ('L', 458, 1024, 24, 16),
      ('XL', 675, 1152, 28, 16),
    )
  },
}  # fmt: skip


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] * (SIZES[name][0] > 200))
    for name in SIZES
  ],
)
def test_networks_have_the_published_size(name):
  count, image_shape, doors, out_channels, arguments = SIZES[name]
  kind = 'dit' if name.startswith('DiT') else 'unet'
  model = models.create(kind, image_shape, doors, out_channels, **arguments)
  found = models.count(jax.eval_shape(model.init, jax.random.key(0)))
  digits = 1 if isinstance(count, float) else 0
  assert round(found / 1e6, digits) == count


@pytest.mark.parametrize(('size', 'giga'), [('S', 6.06), ('B', 23.01)])
def test_transformers_cost_what_the_paper_says(size, giga):
  """In multiply-adds, arXiv 2212.09748, table 4; counted as preflight does."""
  _, shape, doors, outputs, arguments = SIZES[f'DiT-{size}/2']
  model = models.create('dit', shape, doors, outputs, **arguments)
  params = jax.eval_shape(model.init, jax.random.key(0))
  cond = {'label': np.zeros(1, int)}
  traced = jax.make_jaxpr(
    lambda p, x: model.apply(p, x, cond['label'], None, cond)
  )(params, np.zeros((1, *shape), 'f4'))
  found = sum(flops.products(traced).values()) / 2
  assert found / 1e9 == pytest.approx(giga, rel=0.01)


# Blocks.


def mean_pooled(x):
  b, h, w, c = x.shape
  return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


RESIZED = {
  None: lambda x: x,
  'down': mean_pooled,
  'up': lambda x: np.kron(x, np.ones((1, 2, 2, 1))),
}


@pytest.mark.parametrize('plain', [(), layers.MEASURES], ids=['fast', 'plain'])
@pytest.mark.parametrize(
  ('style', 'resample'),
  [('iddpm', None), ('adm', 'down'), ('adm', 'up'), ('ddpmpp', 'down')],
)
def test_blocks_of_other_styles(style, resample, plain):
  how = styles.STYLES[style]
  block = layer(
    layers.ResBlock, 8, 8, time_dim=6, num_groups=4, dropout=0.0, number=0,
    style=how, resample=resample, plain=frozenset(plain),
  )  # fmt: skip
  x, time = noise(2, 4, 4, 8), noise(2, 6, seed=1)
  resized = RESIZED[resample]

  h = plain_swish(plain_norm(x, block.norm1, 4, how.epsilon))
  h = plain_conv(resized(h), block.conv1)
  told = plain_linear(plain_swish(time), block.time)[:, None, None]
  if how.scale_shift:
    h = plain_norm(h, block.norm2, 4, how.epsilon)
    h = h * (1 + told[..., :8]) + told[..., 8:]
  else:
    h = plain_norm(h + told, block.norm2, 4, how.epsilon)
  h = plain_conv(plain_swish(h), block.conv2)
  skip = resized(x.astype('f8'))
  if how.resampled_shortcut:
    skip = plain_linear(skip, block.shortcut)
  wanted = (skip + h) * how.skip_scale
  found = block((x,), layers.of_time([block], time)[0], None)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-4)


def test_a_scale_per_example_has_the_right_derivative():
  """The written-out derivative of the norm, against the plain one."""
  norm = layer(lambda **kw: layers.norm(8, 4, **kw))
  arguments = (noise(2, 4, 4, 8), noise(2, 8, seed=1), noise(2, 8, seed=2))
  weights = noise(2, 4, 4, 8, seed=3)

  def loss(plain, x, factor, offset):
    y = layers.normalised(
      norm, (x,), modulation=(factor, offset), plain=frozenset(plain)
    )
    return jnp.sum(y * weights)

  fast, plain = (
    jax.jit(jax.grad(functools.partial(loss, p), (0, 1, 2)))(*arguments)
    for p in ((), ('norm',))
  )
  for a, b in zip(fast, plain, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_both_sides_are_padded():
  down = layer(layers.Downsample, 4, style=styles.STYLES['adm'])
  x = noise(2, 8, 8, 4)
  wanted = plain_conv(x, down.conv, stride=2, before=1)
  np.testing.assert_allclose(down(x), wanted, atol=1e-4)


def test_sums_with_attention_are_scaled():
  how = {'num_heads': 2, 'num_groups': 4}
  plain = layer(layers.Attention, 8, **how)
  scaled = layer(layers.Attention, 8, style=styles.STYLES['ddpmpp'], **how)
  x = noise(2, 4, 4, 8)
  np.testing.assert_allclose(scaled(x), plain(x) * 0.5**0.5, atol=1e-5)


def test_features_of_the_time():
  t = np.array([0.0, 0.3, 1.0, 17.0], 'f4')
  i = np.arange(4)
  angles = np.outer(t, 10_000.0 ** (-i / 4))
  wanted = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
  found = layers.time_features(t, 8, 'cos_sin', 0)
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  fourier = np.asarray(layers.time_features(t, 512, 'fourier'))
  np.testing.assert_allclose(fourier[0], [1] * 256 + [0] * 256)
  # E cos(2 pi 16 f t) = exp(-(2 pi 16 t)^2 / 2) of a normal f.
  t = 0.01
  (features,) = layers.time_features(jnp.array([t]), 512, 'fourier')
  wanted = np.exp(-((2 * np.pi * 16 * t) ** 2) / 2)
  assert abs(features[:256].mean() - wanted) < 1e-3


def test_times_are_scaled():
  small = {
    'channels': 4, 'multipliers': (1,), 'num_blocks': 1, 'num_groups': 2,
    'attention_resolutions': (), 'dropout': 0.0,
    'details': {'middle_attention': False},
  }  # fmt: skip
  plain = models.create('unet', (4, 4, 1), **small)
  scaled = models.create('unet', (4, 4, 1), **small, time_scale=1000.0)
  params, x = random_params(plain), noise(1, 4, 4, 1)
  assert not any('attention' in name for name in models.names(params))

  @jax.jit
  def both(params, x):
    return (
      scaled.apply(params, x, jnp.array([0.25])),
      plain.apply(params, x, jnp.array([250])),
    )

  np.testing.assert_allclose(*both(params, x), atol=1e-6)


def test_attention_of_ddpmpp_follows_the_last_block_up():
  model = models.create('unet', (16, 16, 3), **DDPMPP | {'channels': 32})
  abstract = jax.eval_shape(model.init, jax.random.key(0))
  found = [
    name for name in models.names(abstract) if name.endswith('query/bias')
  ]
  assert [name for name in found if name.startswith('up')] == [
    'up/2/attentions/0/query/bias'
  ]
  assert sum(name.startswith('down/0') for name in found) == 4


# Initial values.


def test_initial_values_of_torch():
  key = jax.random.key(0)
  block = layers.ResBlock(
    8, 8, time_dim=6, num_groups=4, dropout=0.0, number=0,
    style=styles.STYLES['adm'], dtype=jnp.float32, rngs=models._Keys(key),
  )  # fmt: skip
  for of, inputs in (('conv1', 72), ('time', 6)):
    for parameter in (getattr(block, of).kernel, getattr(block, of).bias):
      largest = np.abs(parameter[...]).max()
      assert 0.5 * inputs**-0.5 < largest < inputs**-0.5
  assert not block.conv2.kernel[...].any()
  assert not block.conv2.bias[...].any()


# The transformer.

TINY = {'channels': 8, 'num_blocks': 2, 'num_heads': 2, 'patch_size': 2}


def test_a_transformer_begins_as_zero():
  """Its last layer and its gates: so each block begins as the identity."""
  model = models.create(
    'dit', (8, 4, 3), {'label': 3}, **TINY | {'num_blocks': 1}
  )
  params = jax.jit(model.init)(jax.random.key(0))
  zero = [n for n, x in models.named(params).items() if not np.any(x)]
  assert [name for name in zero if name.endswith('kernel')] == [
    'blocks/0/modulation/kernel', 'modulation/kernel', 'out/kernel',
  ]  # fmt: skip
  assert params['label']['embedding'].shape == (4, 8)


def test_patches_are_put_together_as_they_were_cut():
  model = dit.DiT(
    (8, 4, 3), doors={}, out_channels=3, **TINY,
    rngs=models._Keys(jax.random.key(0)),
  )  # fmt: skip
  x = noise(2, 8, 4, 3)
  cut = model._cut(x)
  assert cut.shape == (2, 8, 12)
  np.testing.assert_array_equal(cut[1, 5].reshape(2, 2, 3), x[1, 4:6, 2:4])
  np.testing.assert_array_equal(model._put_together(cut), x)


def test_a_transformer_is_split_over_all_axes():
  """Kernels over 'tensor' by outputs, and the rest over 'fsdp'."""
  from diffusion_jax.training import sharding

  model = models.create('dit', LATENT, IMAGENET, channels=384, num_blocks=1)
  abstract = jax.eval_shape(model.init, jax.random.key(0))
  mesh = sharding.make_mesh(2, 2, 2)
  specs = {
    name: sharding.spec_of(name, leaf.shape, mesh)
    for name, leaf in models.named(abstract).items()
    if leaf.size >= sharding.SMALL
  }
  split = [name for name, spec in specs.items() if name.endswith('/kernel')]
  assert len(split) == len(specs) - 1
  for name in split:
    assert specs[name] == P('fsdp', 'tensor'), name
  assert specs['label/embedding'] == P(None, 'fsdp')


def test_each_block_of_a_transformer_is_computed_again():
  xt, t = np.zeros((2, 4, 4, 1), 'f4'), np.array([3, 700])
  keys = jax.random.split(jax.random.key(0), 2)
  for remat, count in (('none', 0), ('blocks', 2), ('all', 2)):
    model = models.create('dit', (4, 4, 1), **TINY, dropout=0.5, remat=remat)
    params = jax.eval_shape(model.init, jax.random.key(0))
    traced = jax.make_jaxpr(model.apply)(params, xt, t, keys)
    names = [equation.primitive.name for equation in traced.eqns]
    assert names.count('checkpoint') + names.count('remat2') == count, names


@pytest.mark.slow
@pytest.mark.parametrize('name', ['adm', 'dit'])
def test_gradients_are_the_same_on_a_mesh_in_pieces(name):
  """Each leaf to 1e-4 of its size, where XLA goes wrong if left alone."""
  if name == 'dit':
    network = models.create(
      'dit', tiny.SHAPE, channels=128, num_blocks=2, num_heads=2, dropout=0.1
    )
  else:
    network = tiny.model(
      style=name, channels=64, attention_resolutions=(8,), num_groups=8
    )
  want = two_steps(network, (1, 1, 1), 1, batch=16)
  got = two_steps(network, (2, 2, 2), 2, batch=16)
  wanted = models.named(want.gradient)
  for each, value in models.named(got.gradient).items():
    if not each.endswith('key/bias'):  # attention does not depend on it
      error = np.linalg.norm(value - wanted[each])
      assert error < 1e-4 * np.linalg.norm(wanted[each]), each


# Mistakes.


def test_a_network_is_built_once(monkeypatch):
  monkeypatch.setattr(models, 'KEPT', {})
  built = []

  class Small(nnx.Module):
    def __init__(self, sides, doors, scale, rngs):
      built.append((sides, doors, scale))
      self.layer = layers.linear(2, 2, rngs=rngs)

    def __call__(self, x):
      return self.layer(x)

  def small(sides=(1, 2), doors=None, scale=1):
    return models.fence(Small, sides, doors=doors or {'a': 1}, scale=scale)

  first = small()
  assert small([1, 2]).apply is first.apply
  assert small(doors=ConfigDict({'a': 1})).apply is first.apply
  others = [
    small((2, 1)), small(scale=1.0), small(scale=True), small(doors={'b': 1}),
    small(doors={'a': 1, 'b': 1}), small(doors={'b': 1, 'a': 1}),
  ]  # fmt: skip
  assert len({made.apply for made in (first, *others)}) == 1 + len(others)
  assert len(built) == 1 + len(others)
  for scale in range(2, 2 + models.MOST_KEPT):
    small(scale=scale)
  assert len(models.KEPT) == models.MOST_KEPT
  assert small().apply is not first.apply


@pytest.mark.parametrize(
  ('changes', 'must'),
  [
    ({'style': 'edm'}, "model.style='edm': one of"),
    ({'style': 'edm'}, 'did you mean ddpmpp?'),
    ({'name': 'transformer'}, 'did you mean dit?'),
    ({'details': {'eps': 1e-5}}, "model.details='eps'"),
    ({'details': {'padding': 'left'}}, "model.details.padding='left'"),
    ({'details': {'scale_shift': 1}}, 'model.details.scale_shift=1'),
    ({'head_channels': 24}, 'model.head_channels=24 does not divide 256'),
    ({'head_channels': -1}, 'model.head_channels=-1'),
    ({'time_scale': 0.0}, 'model.time_scale=0.0: above 0'),
    ({'name': 'dit', 'num_heads': 3}, 'model.num_heads=3 does not divide'),
    ({'name': 'dit', 'channels': 6}, 'model.channels=6: a multiple of 4'),
    ({'name': 'dit', 'patch_size': 5}, 'model.patch_size=5 does not divide'),
    ({'name': 'dit', 'details': {'padding': 'end'}}, "model.details='padding'"),
  ],
)
def test_a_network_that_cannot_be_is_one_line(changes, must):
  from diffusion_jax.configs import default

  config = default.get_config()
  with config.unlocked():
    config.model.update(changes)
  found = [line for line in validation.check_network(config) if must in line]
  assert found
  assert '\n' not in found[0]


def test_all_styles_are_valid():
  for name, style in styles.STYLES.items():
    assert styles.create(name, style._asdict()) == style
  assert styles.create('adm', {'epsilon': 1}).epsilon == 1
  with pytest.raises(UserError, match='epsilon=True: must be a float'):
    styles.create('adm', {'epsilon': True})
  assert rules._details(styles.create, 'ddpm', {}) == (True, '')
