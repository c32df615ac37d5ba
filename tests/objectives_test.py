"""Objectives: weights and laws by their formulas, bounds term by term.

And training in any pieces; what is learned is in known_answers_test.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax import models, samplers
from diffusion_jax.codecs import Codec
from diffusion_jax.conditioning import none
from diffusion_jax.objectives import denoising, laws, weights
from diffusion_jax.objectives.objective import branch
from diffusion_jax.process import gaussian, likelihood, schedules
from diffusion_jax.runs import programs, recipe, rules
from diffusion_jax.samplers import plan
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, sharding

S = np.exp(np.linspace(-12, 12, 25))
ALPHA, SIGMA = np.sqrt(S / (1 + S)), np.sqrt(1 / (1 + S))


def factor(weight, prediction, **options):
  how = gaussian.parametrisation(prediction)
  made = weights.create(weight, how, **options)
  return np.asarray(made(jnp.asarray(ALPHA), jnp.asarray(SIGMA)))


@pytest.mark.parametrize(
  ('weight', 'options', 'of_eps'),
  [
    ('min_snr', {}, np.minimum(S, 5) / S),
    ('min_snr', {'gamma': 2.0}, np.minimum(S, 2) / S),
    ('p2', {}, 1 / (1 + S)),
    ('p2', {'gamma': 0.5, 'k': 3.0}, (3 + S) ** -0.5),
    ('sigmoid', {'bias': 1.5}, 1 / (1 + np.exp(np.log(S) - 1.5))),
    ('truncated_snr', {}, np.maximum(S, 1) / S),
    ('edm', {'sigma_data': 0.5}, 1 + 4 / S),
  ],
)
def test_a_weight_is_one_function_of_the_snr(weight, options, of_eps, x64):
  """The papers' weights of eps, and the same of x0, v, flow and EDM's F."""
  np.testing.assert_allclose(
    factor(weight, 'eps', **options), of_eps, rtol=1e-12
  )
  gains = {
    'x0': 1, 'v': S + 1, 'flow': np.square(np.sqrt(S) + 1),
    'edm': S + 4,  # (alpha s)^2 + sigma^2 over (sigma s)^2
  }  # fmt: skip
  for prediction, gain in gains.items():
    np.testing.assert_allclose(
      factor(weight, prediction, **options), of_eps * S / gain, rtol=1e-12
    )


def slope_of_cosine(u):
  """-dl/du of alpha = cos(angle) / cos(angle at 0)."""
  angle, start = ((x + 0.008) / 1.008 * np.pi / 2 for x in (u, 0.0))
  sigma2 = 1 - (np.cos(angle) / np.cos(start)) ** 2
  return 2 * np.tan(angle) * np.pi / 2 / 1.008 / sigma2


def slope_of_edm(u):
  """l = -14 log r, where r is linear in t = T u - 1."""
  low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
  step = (high - low) / 999
  return 14 * 1000 * step / (low + step * (1000 * u - 1))


SLOPES = {'cosine': slope_of_cosine, 'edm': slope_of_edm}


@pytest.mark.parametrize('name', ['cosine', 'edm'])
def test_the_sigmoid_weight_is_one_integral_over_the_log_snr(name):
  """arXiv 2303.00848, eq. 1: the same for all schedules with the same ends.

  With u = t / T, the mean over u of sigmoid(b - l) (-dl/du) is the integral of
  sigmoid(b - l) over l, a difference of log(1 + exp(b - l)). A law of the log
  SNR has its own density in place of the slope.
  """
  schedule, bias = schedules.create(name, num_timesteps=1000), 1.5
  keys = jax.random.split(jax.random.key(0), 5000)
  x0 = jnp.zeros((5000, 1, 1, 1))

  def loss(weight, law):
    objective = denoising.create(
      lambda params, xt, *rest: 0 * xt, images(None), none(), schedule, 'eps',
      law=law, weight=weight, bias=bias,
    )  # fmt: skip
    rows = {'x0': x0, **(objective.whole(keys) if objective.whole else {})}
    return objective.loss({}, {}, rows, keys)

  def ratio(law):
    (plain, aux), (weighted, _) = (loss(w, law) for w in ('simple', 'sigmoid'))
    return np.asarray(weighted / plain, np.float64), np.asarray(aux.by_row['t'])

  found, t = ratio('stratified')
  logsnr = np.asarray(schedule.logsnr(np.arange(1000)), np.float64)
  first, last = np.logaddexp(0, bias - logsnr[[0, -1]])
  np.testing.assert_allclose(found.mean(), last - first, rtol=0.01)
  middle = (t > 50) & (t < 950)
  np.testing.assert_allclose(
    found[middle],
    (SLOPES[name]((t + 1) / 1000) / (1 + np.exp(logsnr[t] - bias)))[middle],
    rtol=1e-3,
  )
  found, t = ratio('lognormal')
  logsnr = np.asarray(schedule.logsnr(t), np.float64)
  np.testing.assert_allclose(found, 1 / (1 + np.exp(logsnr - bias)), rtol=1e-3)


def test_the_fall_of_a_flows_log_snr(x64):
  """2 / (u (1 - u)); 0 in pure noise. Its mean is the range."""
  schedule = schedules.flow(1000)
  u = np.arange(1, 1000) / 1000
  got = schedule.logsnr_rate(np.arange(1000), jnp.float64)
  np.testing.assert_allclose(got[50:949], 2 / (u * (1 - u))[50:949], rtol=2e-4)
  assert got[-1] == 0
  ends = schedule.logsnr(np.array([0, 998]), jnp.float64)
  np.testing.assert_allclose(got.mean(), ends[0] - ends[1], rtol=1e-12)
  np.testing.assert_allclose(
    schedule.logsnr_rate(499.5, jnp.float64), 8, rtol=1e-4
  )


def test_min_snr_is_the_same_for_eps_x0_and_v(x64):
  """arXiv 2303.09556: min(S, g) / S, min(S, g) and min(S, g) / (S + 1)."""
  for prediction, wanted in (
    ('eps', np.minimum(S, 5) / S),
    ('x0', np.minimum(S, 5)),
    ('v', np.minimum(S, 5) / (S + 1)),
  ):
    np.testing.assert_allclose(
      factor('min_snr', prediction), wanted, rtol=1e-12
    )
  np.testing.assert_allclose(
    factor('edm', 'edm', sigma_data=0.5), 1, rtol=1e-12
  )


def test_the_pseudo_huber_distance():
  error = np.array([0.0, 1e-6, 0.1, 3.0, -100.0])
  c = 0.3
  wanted = 2 * c * (np.sqrt(error**2 + c**2) - c)
  got = denoising.distance(jnp.asarray(error), c)
  np.testing.assert_allclose(got[2:], wanted[2:], rtol=1e-5)
  np.testing.assert_allclose(got[1], error[1] ** 2, rtol=1e-5)
  np.testing.assert_array_equal(
    denoising.distance(jnp.asarray(error)), np.float32(error) ** 2
  )


# --- laws --------------------------------------------------------------------

COUNT = 20_000
KEYS = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(
  jnp.arange(COUNT)
)


def drawn(name, schedule, extras=None, whole_times=False, **options):
  law = laws.create(name, schedule, whole_times=whole_times, **options)
  rows = law.whole(KEYS) if law.whole else {}
  return law, *law.draw(KEYS, extras or law.extras, rows)


@pytest.mark.parametrize(
  ('name', 'options', 'mean', 'std'),
  [
    ('lognormal', {}, -1.2, 1.2),
    ('logitnormal', {}, 0.0, 1.0),
    ('lognormal', {'mean': 0.5, 'std': 0.7}, 0.5, 0.7),
  ],
)
def test_a_normal_law_of_the_level(name, options, mean, std):
  """By Kolmogorov and Smirnov, and of the flow's time its logit."""
  schedule = (
    schedules.flow(1000) if name == 'logitnormal' else schedules.edm(1000)
  )
  law, t, factor = drawn(name, schedule, **options)
  assert factor is None
  level = -0.5 * np.asarray(schedule.logsnr(t), np.float64)
  assert stats.kstest(level, stats.norm(mean, std).cdf).pvalue > 1e-3
  spread = law.spread(jnp.arange(4000))
  level = -0.5 * np.asarray(schedule.logsnr(spread), np.float64)
  assert stats.kstest(level, stats.norm(mean, std).cdf).pvalue > 0.999


@pytest.mark.parametrize('name', ['linear', 'cosine', 'flow'])
def test_levels_are_uniform_between_whole_times(x64, name):
  """sqrt(alpha_bar) is, by Kolmogorov and Smirnov; and so are whole times."""
  schedule = schedules.create(name, num_timesteps=50, zero_snr=name == 'cosine')
  law, t, factor = drawn('levels', schedule)
  assert factor is None
  table = np.concatenate([[1.0], np.exp(0.5 * schedule.log_alpha_bar)])

  def shares(t):
    t = np.asarray(t, np.float64)
    assert t.min() > -1
    assert t.max() <= 49
    whole = np.ceil(t).astype(int)
    alpha = np.asarray(schedule.alpha(jnp.asarray(t), jnp.float64))
    low, high = table[whole + 1], table[whole]
    return whole, (alpha - low) / (high - low)

  whole, share = shares(t)
  assert stats.chisquare(np.bincount(whole)).pvalue > 1e-3
  for some in (whole >= 0, whole == 0, whole == 49):
    assert stats.kstest(share[some], stats.uniform.cdf).pvalue > 1e-3
  whole, share = shares(law.spread(jnp.arange(4000)))
  assert np.abs(np.bincount(whole) - 80).max() <= 2
  assert stats.kstest(share, stats.uniform.cdf).pvalue > 0.9


def test_times_before_the_first_step_are_in_the_first_quarter():
  t = jnp.array([-0.5, 10.0, 999.0])
  found = denoising.by_quarter(jnp.array([1.0, 2.0, 4.0]), t, 1000)
  assert [float(found[f'loss_q{q}'].total) for q in (1, 4)] == [3, 4]
  assert [float(found[f'loss_q{q}'].count) for q in (1, 4)] == [2, 1]


def test_strata_have_one_time_each():
  _, t, factor = drawn('stratified', schedules.linear(COUNT))
  assert factor is None
  np.testing.assert_allclose(t, np.arange(COUNT), atol=1)  # by rounding
  law, t, _ = drawn('stratified', schedules.linear(1000))
  assert np.abs(np.bincount(t) - COUNT // 1000).max() <= 1
  whole = law.whole(KEYS)[laws.STRATUM]
  assert whole.min() >= 0
  assert np.std(whole * COUNT - np.arange(COUNT)) > 0.28  # uniform in its part


@pytest.mark.parametrize('whole_times', [True, False])
def test_importance_follows_the_second_moment(whole_times):
  """In proportion to its root; the factor makes means those of uniform."""
  schedule = schedules.linear(1000)
  law = laws.create('importance', schedule, whole_times=whole_times)
  _, t, factor = drawn('importance', schedule, whole_times=whole_times)
  np.testing.assert_allclose(factor, 1, rtol=1e-4)  # nothing was seen yet
  t = jnp.arange(1000) if whole_times else jnp.linspace(0, 999, 1000)
  values = 1 + 9 * (t >= 500).astype(jnp.float32)
  extras = law.update(law.extras, law.sums(t, values))
  _, t, factor = drawn('importance', schedule, extras, whole_times=whole_times)
  assert jnp.issubdtype(t.dtype, jnp.integer) == whole_times
  late = np.asarray(t) >= 499.5
  share = 0.99 * 10 / 11 + 0.01 / 2
  assert abs(late.mean() - share) < 4 * np.sqrt(share * (1 - share) / COUNT)
  np.testing.assert_allclose(factor[late], 0.5 / share, rtol=5e-3)
  np.testing.assert_allclose(factor[~late], 0.5 / (1 - share), rtol=5e-3)
  assert abs(np.mean(factor * (1 + 9 * late)) - 5.5) < 0.1


def test_a_rounding_of_the_moments_moves_a_time_by_a_rounding():
  schedule = schedules.linear(1000)
  law = laws.create('importance', schedule)
  t = jnp.linspace(0, 999, 1000)
  extras = law.update(law.extras, law.sums(t, 1 + t / 100))
  moved = jax.tree.map(lambda x: x * np.float32(1 + 2e-7), extras)
  one, two = (law.draw(KEYS, x, {})[0] for x in (extras, moved))
  np.testing.assert_allclose(one, two, atol=2e-3)


# --- the bound ---------------------------------------------------------------


def images(levels):
  return Codec(
    lambda params, rows, keys: rows['x0'], lambda params, x0, keys: x0,
    (2, 2, 1), 1.0, levels,
  )  # fmt: skip


def twice(params, xt, label, cond, keys):
  """x0 shrunk, and fractions of all signs."""
  return jnp.concatenate([0.8 * xt, jnp.sin(9 * xt)], -1)


@pytest.mark.parametrize('levels', [256, None])
@pytest.mark.parametrize('variance', ['learned', 'fixedlarge'])
def test_the_bound_in_the_loss_is_the_evaluations_term_by_term(
  variance, levels
):
  schedule = schedules.cosine(8)
  learned = variance == 'learned'
  objective = denoising.create(
    twice if learned else lambda p, xt, *rest: 0.8 * xt, images(levels), none(),
    schedule, 'x0', law='stratified', weight='bound',
    variance='learned' if learned else 'fixed', step_variance='fixedlarge',
  )  # fmt: skip
  rng = np.random.default_rng(0)
  x0 = jnp.asarray(rng.integers(0, 256, (8, 2, 2, 1)) / 127.5 - 1, jnp.float32)
  keys = jax.random.split(jax.random.key(0), 8)
  rows = {'x0': x0, **objective.whole(keys)}
  values, aux = objective.loss({}, {}, rows, keys)
  np.testing.assert_array_equal(aux.by_row['t'], np.arange(8))

  def denoise(xt, t):
    out = twice({}, xt, t, {}, None) if learned else 0.8 * xt
    return gaussian.from_prediction(schedule, out, xt, t, 'x0')

  steps = likelihood.prepare(schedule, [*range(7, -2, -1)], variance)
  eps = jax.vmap(lambda key: jax.random.normal(key, (2, 2, 1)))(
    branch(keys, 'eps')
  )
  found = likelihood.term(
    denoise, steps, 7 - jnp.arange(8), x0, eps, levels == 256
  )
  np.testing.assert_allclose(values, 8 * found.bits, rtol=1e-5)


def test_a_learned_term_is_the_divergence_of_two_gaussians(x64):
  """By numerical integration, at a fraction for each dimension."""
  schedule = schedules.linear(10)
  x0, eps = np.random.default_rng(0).normal(size=(2, 1, 3))
  fraction = np.array([[-0.2, 0.4, 1.3]])

  def denoise(xt, t):
    return gaussian.Denoised(0.5 * xt, xt, jnp.asarray(fraction))

  steps = likelihood.prepare(schedule, [*range(9, -2, -1)], 'learned')
  for i, t in ((2, 7), (9, 0)):
    found = likelihood.term(
      denoise, steps, i, jnp.asarray(x0), jnp.asarray(eps), False
    )
    log_alpha_bar, sigma2 = schedule.host(t)
    xt = np.exp(0.5 * log_alpha_bar) * x0 + np.sqrt(sigma2) * eps
    c0, _, vq = gaussian.posterior_coefficients(schedule, t, t - 1)
    low = vq if t else gaussian.step_variance(schedule, 1, 0, 'fixedsmall')
    high = gaussian.step_variance(schedule, t, t - 1, 'fixedlarge')
    v = np.exp(fraction * np.log(high) + (1 - fraction) * np.log(low))
    off = c0 * (x0 - 0.5 * xt)
    nats = (
      0.5 * (np.log(v / vq) - 1 + vq / v + off**2 / v)
      if t
      else (0.5 * (np.log(2 * np.pi * v) + off**2 / v))
    )
    np.testing.assert_allclose(found.bits, nats.mean() / np.log(2), rtol=1e-9)


def test_the_hybrid_loss_trains_the_mean_by_the_error_only():
  schedule = schedules.cosine(8)
  x0 = jax.random.normal(jax.random.key(1), (16, 2, 2, 1)) / 2
  keys = jax.random.split(jax.random.key(0), 16)

  def gradient(variance, weight='simple'):
    def network(params, xt, *rest):
      mean = params['mean'] * xt
      if variance == 'fixed':
        return mean
      return jnp.concatenate([mean, params['variance'] * xt], -1)

    objective = denoising.create(
      network, images(None), none(), schedule, 'v', variance=variance,
      weight=weight,
    )  # fmt: skip
    return jax.grad(
      lambda p: objective.loss(p, {}, {'x0': x0}, keys)[0].mean()
    )({'mean': jnp.float32(0.5), 'variance': jnp.float32(0.3)})

  plain, hybrid, bound = (
    gradient('fixed'), gradient('learned'), gradient('learned', 'bound')
  )  # fmt: skip
  np.testing.assert_allclose(hybrid['mean'], plain['mean'], rtol=1e-5)
  assert plain['variance'] == 0
  np.testing.assert_allclose(
    hybrid['variance'], 0.001 * bound['variance'], rtol=1e-4
  )
  assert bound['mean'] != 0


@pytest.mark.parametrize(
  ('fraction', 'fixed'), [(0.0, 'fixedsmall'), (1.0, 'fixedlarge')]
)
def test_the_ends_of_a_learned_variance_are_the_fixed_ones(fraction, fixed):
  """In ancestral steps of any length."""
  schedule = schedules.linear(100)
  x = jax.random.normal(jax.random.key(2), (4, 3))
  keys = jax.random.split(jax.random.key(0), 4)

  def denoise(xt, t):
    return gaussian.Denoised(0.3 * xt, xt, jnp.full_like(xt, fraction))

  one, two = (
    samplers.solve(
      samplers.ancestral(variance), denoise, schedule, [99, 60, 13, 2, -1], x,
      keys,
    )
    for variance in ('learned', fixed)
  )  # fmt: skip
  np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_a_variance_that_was_not_learned_is_one_line():
  schedule, x = schedules.linear(10), jnp.zeros((1, 2))
  with pytest.raises(UserError, match='needs a network trained'):
    samplers.solve(
      samplers.ancestral('learned'), lambda xt, t: gaussian.Denoised(xt, xt),
      schedule, [9, -1], x, jax.random.split(jax.random.key(0), 1),
    )  # fmt: skip
  config = {'loss': {'variance': 'fixed'}}
  with pytest.raises(UserError, match='use variance=fixedlarge'):
    plan.check_variance('learned', config)
  plan.check_variance('learned', {'loss': {'variance': 'learned'}})
  made = plan.create(schedule, sampler='ddim', num_steps=2)
  assert plan.ignores_variance(made, {'loss': {'variance': 'learned'}})
  assert not plan.ignores_variance(made, config)
  made = plan.create(schedule, num_steps=2, variance='learned')
  assert not plan.ignores_variance(made, {'loss': {'variance': 'learned'}})


# --- in any pieces -----------------------------------------------------------

BATCH, STEPS = 16, 4
OBJECTIVES = {
  'learned': {
    'prediction': 'v', 'law': 'importance', 'variance': 'learned',
    'weight': 'min_snr',
  },
  'flow': {'prediction': 'flow', 'law': 'stratified', 'huber': 0.1},
  'edm': {'prediction': 'edm', 'law': 'lognormal'},
  'importance': {'prediction': 'x0', 'law': 'importance'},
}  # fmt: skip


def network(outputs):
  def init(key):
    one, two = jax.random.split(key)
    return {
      'in': {'kernel': jax.random.normal(one, (4, 64))},
      'out': {'kernel': jax.random.normal(two, (64, outputs)) / 64},
    }

  def apply(params, xt, label, keys=None, cond=None):
    label = jnp.broadcast_to(label, xt.shape[:1])[:, None].astype(xt.dtype)
    hidden = jnp.concatenate([xt, label / 10], 1) @ params['in']['kernel']
    return jnp.tanh(hidden) @ params['out']['kernel']

  return models.Model(init, apply)


class Run:
  def __init__(self, name, sizes=(1, 1, 1), microbatches=1):
    options = OBJECTIVES[name]
    net = network(6 if options.get('variance') else 3)
    schedule = {'flow': schedules.flow, 'edm': schedules.edm}.get(
      name, schedules.cosine
    )(60)
    codec = Codec(
      lambda params, rows, keys: rows['vector'], lambda params, x0, keys: x0,
      (3,),
    )  # fmt: skip
    objective = denoising.create(
      models.network_fn(net), codec, none(), schedule, **options
    )
    made = recipe.Recipe(
      {'net': net}, {}, {}, codec, none(), schedule, options['prediction'],
      objective,
    )  # fmt: skip
    devices = jax.devices()[: int(np.prod(sizes))]
    self.mesh = sharding.make_mesh(*sizes, devices=devices)
    config = {
      'seed': 3, 'microbatches': microbatches, 'ema': {'decay': 0.9},
      'optim': {'lr': 1e-2, 'warmup_steps': 2, 'clip_norm': 1.0},
      'sample': {
        'sampler': 'ddim', 'grid': 'uniform', 'num_steps': 5, 'clip': False,
      },
    }  # fmt: skip
    self.programs = programs.create(config, self.mesh, made)
    self.state = self.programs.create_state(self.mesh)
    self.losses = []

  def train(self, until=STEPS):
    for step in range(int(self.state.step), until):
      rows = np.random.default_rng(step).normal(size=(BATCH, 3))
      batch = sharding.put_batch({'vector': np.float32(rows)}, self.mesh)
      self.state, metrics = self.programs.step_fn(self.state, {}, batch)
      self.losses.append(float(metrics['loss']))
    return self


@pytest.mark.parametrize(
  ('name', 'meshes'),
  [
    ('learned', [((8, 1, 1), 2)]),
    *(
      pytest.param(
        name, [((8, 1, 1), 1), ((1, 1, 1), 4)], marks=pytest.mark.slow
      )
      for name in OBJECTIVES
    ),
  ],
)  # fmt: skip
def test_the_curve_is_the_same_in_any_pieces(name, meshes, tmp_path):
  """On eight devices, in microbatches, and resumed half way."""
  alone = Run(name).train()
  assert np.isfinite(alone.losses).all()
  for sizes, microbatches in meshes:
    other = Run(name, sizes, microbatches).train()
    np.testing.assert_allclose(other.losses, alone.losses, rtol=3e-6)
    for a, b in zip(
      jax.tree.leaves(other.state.extras),
      jax.tree.leaves(alone.state.extras),
      strict=True,
    ):
      np.testing.assert_allclose(a, b, rtol=1e-5)
  end = alone.state
  alone.state = alone.programs.create_state(alone.mesh)
  alone.train(until=2)
  with checkpoint.Checkpoints(tmp_path) as kept:
    kept.save(2, alone.state)
  with checkpoint.Checkpoints(tmp_path) as kept:
    alone.state = kept.restore(2, alone.programs.abstract)
  alone.train()
  jax.tree.map(np.testing.assert_array_equal, alone.state, end)
  if name == 'learned':
    assert end.extras['count'].sum() > 3 * BATCH


# --- what does not go together -----------------------------------------------


@pytest.mark.parametrize(
  ('loss', 'sample', 'schedule', 'must'),
  [
    ({'prediction': 'eps'}, {}, 'flow', 'loss.prediction=eps'),
    ({'prediction': 'edm'}, {}, 'flow', 'loss.prediction=edm'),
    ({'weight': 'bound', 'law': 'lognormal'}, {}, 'linear', 'law=lognormal'),
    ({'variance': 'learned', 'law': 'logitnormal'}, {}, 'linear', 'learned'),
    ({'weight': 'bound', 'law': 'levels'}, {}, 'linear', 'law=levels'),
    ({'weight': 'bound', 'huber': 0.1}, {}, 'linear', 'loss.huber=0.1'),
    ({}, {'variance': 'learned'}, 'linear', 'sample.variance=learned'),
    ({'law_mean': -0.8}, {}, 'linear', 'loss.law_mean=-0.8'),
  ],
)
def test_what_does_not_go_together_is_one_line(loss, sample, schedule, must):
  plain = {
    'prediction': 'v', 'law': 'uniform', 'weight': 'simple', 'huber': 0.0,
    'variance': 'fixed', 'law_mean': 0.0, 'law_std': 0.0,
  }  # fmt: skip
  made = schedules.create(schedule, num_timesteps=10)
  rules.check({'loss': plain, 'sample': {}}, made)
  with pytest.raises(UserError) as error:
    rules.check({'loss': {**plain, **loss}, 'sample': sample}, made)
  assert must in str(error.value)
  assert 'use loss.' in str(error.value) or 'set loss.' in str(error.value)
  assert '\n' not in str(error.value)
