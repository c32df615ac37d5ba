"""Autoencoders, the bottlenecks between their halves, and the critic."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffusion_jax import models
from diffusion_jax.cli import config_files
from diffusion_jax.models import autoencoder, bottleneck, critic
from diffusion_jax.models.bottleneck import Posterior
from diffusion_jax.runs import validation

SHAPE = (8, 8, 3)
SMALL = {
  'channels': 4, 'multipliers': (1, 2), 'num_blocks': 1, 'num_groups': 2,
}  # fmt: skip
rng = np.random.default_rng(0)


def abstract(shape=SHAPE, **options):
  made = autoencoder.create(shape, **options)
  return made, jax.eval_shape(made.init, jax.random.key(0))


@pytest.mark.parametrize(
  ('options', 'numbers', 'tensors', 'shape'),
  [
    ({'multipliers': (1, 2, 4, 4)}, 83_653_863, 248, (32, 32, 4)),
    (
      {
        'multipliers': (1, 2, 4, 4),
        'latent_channels': 16,
        'quant_conv': False,
      },
      83_819_683,
      244,
      (32, 32, 16),
    ),
    (
      {
        'multipliers': (1, 2, 4),
        'latent_channels': 3,
        'regulariser': 'vq',
        'codes': 8192,
      },
      55_322_782,
      205,
      (64, 64, 3),
    ),
  ],
  ids=['stable diffusion', 'stable diffusion 3', 'VQ-f4'],
)
def test_published_networks_have_their_sizes(options, numbers, tensors, shape):
  made, params = abstract((256, 256, 3), **options)
  assert models.count(params) == numbers
  assert len(jax.tree.leaves(params)) == tensors
  assert made.shape == shape


@pytest.mark.parametrize(
  ('options', 'latents', 'encoded'),
  [
    ({}, 4, 8),
    ({'regulariser': 'vq', 'codes': 7, 'code_channels': 2}, 2, 2),
    ({'regulariser': 'fsq', 'levels': (5, 4, 2)}, 3, 3),
    ({'regulariser': 'norm', 'hybrid': 1, 'decoder': False}, 4, 4),
    ({'attention_resolutions': (8,), 'quant_conv': False}, 4, 8),
  ],
  ids=['kl', 'vq', 'fsq', 'norm', 'plain'],
)
def test_shapes(options, latents, encoded):
  made, params = abstract((8, 16, 3), **SMALL, **options)
  images = jax.ShapeDtypeStruct((2, 8, 16, 3), jnp.float32)
  z = jax.eval_shape(made.encode, params, images)
  assert made.shape == (4, 8, latents)
  assert z.shape == (2, 4, 8, encoded)
  z = jax.ShapeDtypeStruct((2, *made.shape), z.dtype)
  snapped = jax.eval_shape(made.snap, params, z)
  assert snapped.shape == z.shape
  assert (made.decode is None) == (options.get('decoder') is False)
  if made.decode:
    assert jax.eval_shape(made.decode, params, z) == images


def test_bfloat16_is_only_the_dtype_of_the_computation():
  made, params = abstract(**SMALL, dtype='bfloat16')
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
    np.dtype('float32')
  }
  images = jax.ShapeDtypeStruct((2, *SHAPE), jnp.float32)
  text = str(jax.make_jaxpr(made.encode)(params, images))
  assert 'bf16' in text
  assert jax.eval_shape(made.encode, params, images).dtype == jnp.float32


def test_blocks_of_a_hybrid_begin_as_the_identity_and_see_all_positions():
  block = models.fence(autoencoder.Transformer, (2, 3), 8, dtype=jnp.float32)
  params = jax.jit(block.init)(jax.random.key(0))
  x = rng.normal(size=(1, 2, 3, 8)).astype(np.float32)
  changed = x.copy()
  changed[:, 0, 0, :4] += 1
  apply = jax.jit(block.apply)
  np.testing.assert_allclose(apply(params, x), x, atol=1e-3)
  params['out']['kernel'] = np.ones((8, 8), np.float32)
  moved = np.abs(apply(params, x) - apply(params, changed))
  assert moved.min(axis=-1).all()


@pytest.mark.parametrize(
  ('options', 'told'),
  [
    ({'attention_resolutions': (7,)}, 'has 7, but the maps are of size 64, 32'),
    ({'hybrid': 1, 'channels': 1, 'num_groups': 1}, 'has 2 (codec.channels=1'),
    (
      {'regulariser': 'fsq', 'levels': (8, 5), 'quant_conv': False},
      'so it must be 2, or set codec.quant_conv=True',
    ),
    (
      {'regulariser': 'vq', 'code_channels': 2, 'quant_conv': False},
      'so it must be 2, or set codec.quant_conv=True',
    ),
    ({'regulariser': 'vq', 'quant_conv': False, 'hybrid': 1}, ''),
  ],
)
def test_structures_that_do_not_exist_are_one_line(options, told):
  config = config_files.load(config_files.shipped_config('emoji_autoencoder'))
  with config.unlocked():
    config.codec.multipliers = (1, 2)
    config.codec.update(options)
  found = validation.check_network(config)
  assert len(found) == bool(told)
  assert not told or told in found[0]


# --- posteriors --------------------------------------------------------------


def test_the_posterior_is_that_of_clipped_moments():
  moments = np.array([[1.0, -2.0, 100.0, -100.0]])
  mean, log_variance = bottleneck.posterior(moments)
  np.testing.assert_array_equal(mean, [[1, -2]])
  np.testing.assert_array_equal(log_variance, [[20, -30]])


def test_kl_is_its_closed_form():
  """Against the integral of p log(p / q), by quadrature."""
  mean, log_variance = np.array([0.3, -1.2, 0]), np.array([-1.5, 0.4, 1e-6])
  x = np.linspace(-12, 12, 20_001)[:, None]
  p = scipy.stats.norm(mean, np.exp(log_variance / 2))
  of_one = p.pdf(x) * (p.logpdf(x) - scipy.stats.norm.logpdf(x))
  want = of_one.sum() * (x[1, 0] - x[0, 0])
  got = bottleneck.kl(Posterior(mean[None], log_variance[None]))
  assert got.shape == (1,)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  # Near the prior it keeps its digits: m^2 / 2 + v^2 / 4.
  near = bottleneck.kl(Posterior(np.zeros((1, 1)), np.full((1, 1), 1e-3)))
  np.testing.assert_allclose(near, 1e-6 / 4, rtol=2e-3)


def test_a_posterior_sample_has_its_moments_and_depends_on_its_own_key():
  ones = np.ones((4000, 1), np.float32)
  given = Posterior(2 * ones, -ones)
  keys = jax.random.split(jax.random.key(0), 4000)
  z = bottleneck.sample(given, keys)
  assert abs(z.mean() - 2) < 0.05
  assert abs(z.var() - math.exp(-1)) < 0.03
  some = Posterior(*(x[7:9] for x in given))
  np.testing.assert_array_equal(bottleneck.sample(some, keys[7:9]), z[7:9])


# --- codebooks ---------------------------------------------------------------


def test_the_nearest_code_and_ties():
  z, codebook = rng.normal(size=(3, 5, 2)), rng.normal(size=(9, 2))
  codebook[4] = codebook[2]
  want = np.square(z[..., None, :] - codebook).sum(-1).argmin(-1)
  got = bottleneck.nearest(jnp.asarray(codebook), jnp.asarray(z))
  np.testing.assert_array_equal(got, want)
  assert got.dtype == jnp.int32
  assert bottleneck.nearest(codebook, codebook)[4] == 2


def test_straight_through_has_the_gradient_of_z():
  z = jnp.array([0.3, 1.7])
  value, gradient = jax.value_and_grad(
    lambda z: jnp.sum(jnp.square(bottleneck.straight_through(z, jnp.round(z))))
  )(z)
  assert value == 4
  np.testing.assert_array_equal(gradient, [0, 4])


def test_the_codebook_at_decay_0_is_a_step_of_k_means():
  codes, z = rng.normal(size=(6, 3)), rng.normal(size=(200, 3))
  codes[5] = 100  # nothing is near it
  index = np.square(z[:, None] - codes).sum(-1).argmin(-1)
  want = np.stack(
    [
      z[index == k].mean(0) if (index == k).any() else codes[k]
      for k in range(6)
    ]
  )
  counted = bottleneck.counted(index, jnp.asarray(z), 6)
  before = (jnp.full(6, 3.0), jnp.ones((6, 3)))
  average = bottleneck.averaged(before, counted, decay=0.0)
  got = bottleneck.codebook_of(average, codes)
  np.testing.assert_allclose(got, want, atol=1e-4)
  few = tuple(2.0**-30 * x for x in average)  # of smaller batches
  np.testing.assert_array_equal(bottleneck.codebook_of(few, codes), got)


def test_counts_and_sums_add_up_over_rows_and_have_no_gradient():
  z, index = rng.normal(size=(4, 2, 3)), rng.integers(0, 5, (4, 2))
  whole = bottleneck.counted(index, z, 5)
  halves = [
    bottleneck.counted(index[i], z[i], 5) for i in (slice(2), slice(2, 4))
  ]
  for got, *parts in zip(whole, *halves, strict=True):
    np.testing.assert_allclose(got, sum(parts), atol=1e-6)
  assert whole[0].sum() == 8
  np.testing.assert_allclose(whole[1].sum(0), z.sum((0, 1)), atol=1e-5)
  gradient = jax.grad(lambda z: bottleneck.counted(index, z, 5)[1].sum())(z)
  assert not gradient.any()


def test_averages_move_by_the_decay_and_keep_the_codes_of_their_ratio():
  average, batch = (
    (jnp.array([n]), jnp.array([[s]])) for n, s in ((10.0, 20.0), (30.0, 0.0))
  )
  counts, sums = bottleneck.averaged(average, batch, decay=0.9)
  np.testing.assert_allclose((counts[0], sums[0, 0]), (12, 18))
  book = bottleneck.codebook_of((counts, sums), jnp.zeros((1, 1)))
  np.testing.assert_allclose(book, 1.5, rtol=1e-6)


def test_dead_codes_become_candidates_in_order():
  counts, sums = jnp.array([5.0, 0.5, 9.0, 0.0, 1.0]), jnp.ones((5, 2))
  candidates = jnp.array([[1.0, 2.0], [3.0, 4.0]])
  new = bottleneck.revived((counts, sums), 2.0, candidates)
  np.testing.assert_array_equal(new[0], [5, 2, 9, 2, 1])
  np.testing.assert_allclose(
    bottleneck.codebook_of(new, sums)[np.array([1, 3])], candidates, rtol=1e-4
  )
  np.testing.assert_array_equal(new[1][jnp.array([0, 2, 4])], 1)
  alive = bottleneck.revived((counts, sums), 0.0, candidates)
  np.testing.assert_array_equal(alive[0], counts)


def test_perplexity_and_share():
  counts = jnp.array([2.0, 2.0, 0.0, 0.0])
  used = bottleneck.use_of(counts)
  np.testing.assert_allclose(used['perplexity'], 2, rtol=1e-6)
  assert used['codes_used'] == 0.5
  used = bottleneck.use_of(jnp.ones(8))
  np.testing.assert_allclose(used['perplexity'], 8, rtol=1e-6)


# --- levels ------------------------------------------------------------------


def test_every_code_of_levels_is_reached_and_numbered_once():
  levels = (8, 5, 2, 3)

  @jax.jit
  def compute(z, codes):
    bound = bottleneck.bounded(z, levels)
    values = bottleneck.rounded(bound, levels)
    return (
      bottleneck.bounded(0 * z[:1], levels),
      values,
      bottleneck.rounded(values, levels),
      bottleneck.level_index(codes, levels),
      bottleneck.level_index(bound, levels),
    )

  z = np.linspace(-6, 6, 241, dtype=np.float32)[:, None].repeat(4, 1)
  index, width = np.arange(math.prod(levels)), np.array(levels, 'f4') // 2
  digits = np.stack(np.unravel_index(index, levels, order='F'), axis=-1)
  codes = ((digits - width) / width).astype('f4')
  zero, values, again, numbered, reached = compute(z, codes)
  # Channels are bounded one by one, so all combinations are reached.
  for channel, number in enumerate(levels):
    found = np.unique(values[:, channel])
    assert len(found) == number
    np.testing.assert_allclose(np.diff(found), 1 / (number // 2), rtol=1e-6)
    assert set(np.unique(codes[:, channel])) == set(found)
  assert np.abs(values).max() == 1
  np.testing.assert_array_equal(numbered, index)
  np.testing.assert_array_equal(codes[reached], values)
  np.testing.assert_array_equal(again, values)
  np.testing.assert_allclose(zero, 0, atol=1e-6)


def test_values_out_of_range_get_the_last_level():
  got = bottleneck.rounded(jnp.array([[-9.0, -9.0], [9.0, 9.0]]), (5, 4))
  np.testing.assert_array_equal(got, [[-1, -1], [1, 0.5]])


def test_normed_has_unit_variance_over_the_channels():
  z = bottleneck.normed(rng.normal(3, 5, (2, 4, 4, 8)))
  np.testing.assert_allclose(z.mean(-1), 0, atol=1e-6)
  np.testing.assert_allclose(z.var(-1), 1, rtol=1e-6)


# --- snapping ----------------------------------------------------------------


def test_decoders_get_what_they_are_trained_on():
  z = jnp.asarray(rng.normal(size=(2, 4, 4, 2)), jnp.float32)
  make = functools.partial(
    autoencoder.create, SHAPE, latent_channels=2, **SMALL
  )
  codebook = jnp.array([[0.0, 0.0], [1.0, 1.0], [-1.0, 0.5]])
  snapped = make(regulariser='vq', codes=3).snap(
    {'quantize': {'codebook': codebook}}, z
  )
  assert {tuple(v) for v in np.asarray(snapped).reshape(-1, 2).tolist()} <= {
    tuple(v) for v in codebook.tolist()
  }
  assert set(np.unique(make(regulariser='fsq', levels=(3, 3)).snap({}, z))) == {
    -1,
    0,
    1,
  }
  np.testing.assert_allclose(
    make(regulariser='norm').snap({}, z).var(-1), 1, rtol=1e-2
  )
  np.testing.assert_array_equal(make().snap({}, z), z)


# --- the critic --------------------------------------------------------------


def test_the_critic_has_the_published_size():
  made = critic.create((256, 256, 3))
  params = jax.eval_shape(made.init, jax.random.key(0))
  assert models.count(params) == 2_765_633
  images = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
  logits = jax.eval_shape(made.apply, params, images)
  assert logits.shape == (2, 30, 30)


@pytest.mark.parametrize(
  ('side', 'strides', 'logits'),
  [(64, 3, 6), (32, 3, 2), (16, 2, 2), (8, 1, 2), (4, 0, 2), (3, 0, 1)],
)
def test_the_critic_halves_small_images_less_often(side, strides, logits):
  shape = (side, 2 * side, 3)
  assert critic.strides_of(shape) == strides
  made = critic.create(shape, channels=4)
  params = jax.eval_shape(made.init, jax.random.key(0))
  images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
  assert jax.eval_shape(made.apply, params, images).shape[:2] == (2, logits)


def test_logits_of_an_example_do_not_depend_on_the_others():
  made = critic.create(SHAPE, channels=4)
  params = jax.jit(made.init)(jax.random.key(0))
  images = rng.uniform(-1, 1, (3, *SHAPE)).astype(np.float32)
  apply = jax.jit(made.apply)
  whole = apply(params, images)
  np.testing.assert_allclose(apply(params, images[1:2]), whole[1:2], atol=1e-6)
  assert np.ptp(whole) > 0
