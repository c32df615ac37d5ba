"""The objectives of autoencoders: known answers, meshes, pieces, resuming.

Encoder and decoder are matrices, so that the answers are known in closed form.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from diffusion_jax import conditioning, models, runs
from diffusion_jax.codecs import Codec, dito
from diffusion_jax.codecs.autoencoder import of_coder
from diffusion_jax.configs import default
from diffusion_jax.models import bottleneck, lpips
from diffusion_jax.models.autoencoder import Coder
from diffusion_jax.objectives import autoencoding, similarity
from diffusion_jax.objectives import dito as dito_objective
from diffusion_jax.process import schedules
from diffusion_jax.runs import (
  autoencoders,
  programs,
  recipe,
  validation,
)
from diffusion_jax.samplers import plan
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, sharding

SHAPE = (6, 4, 1)
SIZE, LATENTS, CODES = 24, 3, 5
BATCH, STEPS = 16, 5
PLAIN = {'l1': 0.0, 'l2': 1.0, 'ssim': 0.0, 'kl': 0.0, 'critic_weight': 0.0}

floats = Codec(lambda params, rows, keys: rows['image'], None, SHAPE)


def matrix(key, inputs, outputs):
  return {'kernel': jax.random.normal(key, (inputs, outputs)) / inputs**0.5}


def linear(regulariser='none') -> Coder:
  """Pictures -> [B, 1, 1, LATENTS] and back, by a matrix each."""
  outputs = LATENTS * (1 + (regulariser == 'kl'))

  def init(key):
    keys = jax.random.split(key, 3)
    params = {
      'encoder': matrix(keys[0], SIZE, outputs),
      'decoder': {'conv_out': matrix(keys[1], LATENTS, SIZE)},
    }
    if regulariser == 'vq':
      params['quantize'] = {'codebook': jax.random.normal(keys[2], (CODES, 3))}
    return params

  def encode(params, x):
    return (x.reshape(len(x), -1) @ params['encoder']['kernel'])[:, None, None]

  def decode(params, z):
    seen = z[:, 0, 0] @ params['decoder']['conv_out']['kernel']
    return seen.reshape(-1, *SHAPE)

  def snap(params, z):
    return z

  return Coder(init, encode, snap, decode, (1, 1, LATENTS), regulariser)


def judge() -> models.Model:
  """A critic of one hidden layer."""

  def apply(params, x):
    hidden = jnp.tanh(x.reshape(len(x), -1) @ params['in']['kernel'])
    return hidden @ params['out']['kernel']

  def init(key):
    one, two = jax.random.split(key)
    return {'in': matrix(one, SIZE, 8), 'out': matrix(two, 8, 2)}

  return models.Model(init, apply)


def perceptual() -> dict:
  """LPIPS of the first two stages, narrow."""
  keys = iter(jax.random.split(jax.random.key(5), 99))
  return jax.tree.map(
    lambda shape: abs(jax.random.normal(next(keys), shape)) / 8,
    lpips.shapes((3, 2)),
    is_leaf=lambda x: isinstance(x, tuple),
  )


def gaussian(count, seed=0):
  """Correlated pictures, float64 [count, *SHAPE]."""
  rng = np.random.default_rng(seed)
  spread = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0] * 0.8 ** np.arange(
    SIZE
  )
  return (rng.normal(size=(count, SIZE)) @ spread.T).reshape(-1, *SHAPE)


def keys(count):
  return jax.random.split(jax.random.key(7), count)


# --- known answers ------------------------------------------------------------


def test_a_linear_autoencoder_reaches_the_error_of_pca():
  x = gaussian(64)
  objective = autoencoding.create(linear(), floats, **PLAIN)
  rows = {'image': jnp.asarray(x, jnp.float32)}
  optimizer = optax.adam(optax.cosine_decay_schedule(0.03, 1500))

  def mean_loss(params):
    return jnp.mean(objective.loss(params, {}, rows, keys(64))[0])

  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(mean_loss)(params)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), value

  params = {'codec': linear().init(jax.random.key(1))}
  _, values = jax.jit(
    lambda params: jax.lax.scan(
      step, (params, optimizer.init(params)), None, 1500
    )
  )(params)
  flat = x.reshape(64, -1)
  # Without biases: the eigenvalues of the second moments.
  left = np.linalg.eigvalsh(flat.T @ flat / 64)[:-LATENTS].sum() / SIZE
  assert values[-1] == pytest.approx(left, rel=0.01)
  assert values[0] > 2 * left


def test_the_kl_term_is_its_closed_form():
  coder = linear('kl')
  params = {'codec': coder.init(jax.random.key(0))}
  x = gaussian(4)
  rows = {'image': jnp.asarray(x, jnp.float32)}
  with_kl, without = (
    autoencoding.create(coder, floats, **{**PLAIN, 'kl': kl}).loss(
      params, {}, rows, keys(4)
    )
    for kl in (0.5, 0.0)
  )
  kernel = np.asarray(params['codec']['encoder']['kernel'], np.float64)
  mean, log = np.split(x.reshape(4, -1) @ kernel, 2, axis=1)
  nats = 0.5 * (mean**2 + np.exp(log) - 1 - log).sum(axis=1)
  np.testing.assert_allclose(with_kl[1].by_row['kl'], nats, rtol=1e-5)
  difference = with_kl[0] - without[0]
  np.testing.assert_allclose(difference, 0.5 * nats / SIZE, rtol=1e-4)
  # The decoder sees a sample of the posterior, by the example's key.
  noise = bottleneck.sample(
    bottleneck.Posterior(jnp.zeros((4, 1, 1, LATENTS)), jnp.zeros(())),
    autoencoding.branch(keys(4), 'codec'),
  )
  z = mean + np.exp(0.5 * log) * noise[:, 0, 0]
  decoder = np.asarray(params['codec']['decoder']['conv_out']['kernel'])
  error = np.square(x.reshape(4, -1) - z @ decoder).mean(axis=1)
  np.testing.assert_allclose(without[0], error, rtol=1e-4)


def critical(**options):
  how = {
    **PLAIN, 'l1': 1.0, 'ssim': 0.3, 'lpips': 0.2, 'critic_weight': 0.5,
    **options,
  }  # fmt: skip
  return autoencoding.create(linear(), floats, judge(), **how)


def some_parts():
  return {
    'codec': linear().init(jax.random.key(0)),
    'critic': judge().init(jax.random.key(1)),
    'lpips': perceptual(),
  }


def test_its_gradient_is_that_of_the_terms_written_out():
  """And the ratio is that of the norms of two of these gradients."""
  params, x = some_parts(), jnp.asarray(gaussian(6), jnp.float32)

  def seen_by(params):
    coder = linear()
    return coder.decode(params['codec'], coder.encode(params['codec'], x))

  def pixels(params):
    seen = seen_by(params)
    alike = similarity.ssim(x + 1, seen + 1, 2.0)
    l1, l2 = (jnp.mean(f(x - seen)) for f in (jnp.abs, jnp.square))
    distance = lpips.apply(jax.lax.stop_gradient(params['lpips']), x, seen)
    return l1 + l2 + 0.3 * (1 - jnp.mean(alike)) + 0.2 * jnp.mean(distance)

  def deceiving(params):
    fixed = jax.lax.stop_gradient(params['critic'])
    return -jnp.mean(judge().apply(fixed, seen_by(params)))

  def hinge(params):
    fake = jax.lax.stop_gradient(seen_by(params))
    real, fake = (judge().apply(params['critic'], y) for y in (x, fake))
    return 0.5 * jnp.mean(jax.nn.relu(1 - real) + jax.nn.relu(1 + fake))

  weight = 0.5 * 3.0

  def written_out(params):
    return pixels(params) + weight * deceiving(params) + hinge(params)

  told, want = jax.jit(jax.value_and_grad(written_out))(params)
  objective = critical()
  extras = {'steps': jnp.int32(9), 'ratio': jnp.float32(3.0)}

  def whole(params):
    values, aux = objective.loss(params, extras, {'image': x}, keys(6))
    return jnp.mean(values), aux

  (value, aux), grads = jax.jit(jax.value_and_grad(whole, has_aux=True))(params)
  del grads['lpips'], want['lpips']  # which is not trained
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    grads, want,
  )  # fmt: skip
  assert value == pytest.approx(float(told), rel=1e-5)
  norms = [
    np.linalg.norm(
      jax.jit(jax.grad(f))(params)['codec']['decoder']['conv_out']['kernel']
    )
    for f in (pixels, deceiving)
  ]
  now = objective.update(extras, aux)
  assert now['ratio'] == pytest.approx(norms[0] / (norms[1] + 1e-4), rel=1e-4)
  assert now['steps'] == 10


def test_the_autoencoder_is_trained_by_the_critic_from_a_step_on():
  """Before, and in the first step of all, the critic learns alone."""
  params, x = some_parts(), jnp.asarray(gaussian(6), jnp.float32)
  objective = critical(critic_start=2, lpips=0.0)
  alone = objective.heldout(params, {}, {'image': x}, keys(6), None)
  for steps, counts in ((1, False), (2, True)):
    extras = {'steps': jnp.int32(steps), 'ratio': jnp.float32(1.0)}
    values, aux = objective.loss(params, extras, {'image': x}, keys(6))
    alike = np.allclose(values, alone + aux.by_row['critic_loss'], 1e-5)
    assert alike is not counts
    assert np.all(aux.by_row['critic_weight'] == 0.5 * counts)
  begun = objective.extras
  values, aux = critical(lpips=0.0).loss(params, begun, {'image': x}, keys(6))
  assert np.all(aux.by_row['critic_weight'] == 0)
  np.testing.assert_allclose(values, alone + aux.by_row['critic_loss'], 1e-5)


def test_a_codebook_at_decay_0_is_a_step_of_k_means():
  coder = linear('vq')
  objective = autoencoding.create(
    coder, floats, **{**PLAIN, 'decay': 0.0, 'revive': 0.0}
  )
  params = {'codec': coder.init(jax.random.key(0))}
  x = gaussian(40)
  rows = {'image': jnp.asarray(x, jnp.float32)}
  (_, aux), grads = jax.value_and_grad(
    lambda p: (
      lambda values, aux: (jnp.mean(values), aux)
    )(*objective.loss(p, objective.extras, rows, keys(40))),
    has_aux=True,
  )(params)  # fmt: skip
  assert not np.any(grads['codec']['quantize']['codebook'])
  assert np.any(grads['codec']['encoder']['kernel'])
  extras = objective.update(objective.extras, aux)
  book = objective.write(params, extras)['codec']['quantize']['codebook']
  before = np.asarray(params['codec']['quantize']['codebook'], np.float64)
  z = x.reshape(40, -1) @ np.asarray(params['codec']['encoder']['kernel'])
  nearest = np.square(z[:, None] - before).sum(-1).argmin(1)
  assert 1 < len(set(nearest)) < CODES
  for code in range(CODES):
    mine = z[nearest == code]
    want = mine.mean(0) if len(mine) else before[code]
    np.testing.assert_allclose(book[code], want, rtol=1e-4, atol=1e-5)


def test_ssim_is_the_mean_over_all_windows():
  rng = np.random.default_rng(0)
  a = rng.uniform(0, 255, (2, 14, 13, 2))
  b = np.clip(a + rng.normal(0, 30, a.shape), 0, 255)
  steps = np.arange(11) - 5
  weights = np.exp(-0.5 * (steps / 1.5) ** 2)
  weights = np.outer(weights, weights) / weights.sum() ** 2
  found = []
  for i in range(4):
    for j in range(3):
      window = np.s_[:, i : i + 11, j : j + 11]
      mean = lambda x, w=window: np.einsum('bijc,ij->bc', x[w], weights)  # noqa: E731
      ma, mb = mean(a), mean(b)
      va, vb, ab = (mean(x) for x in ((a**2), (b**2), a * b))
      top = (2 * ma * mb + 2.55**2) * (2 * (ab - ma * mb) + 7.65**2)
      below = (ma**2 + mb**2 + 2.55**2) * (va - ma**2 + vb - mb**2 + 7.65**2)
      found.append(top / below)
  want = np.mean(found, axis=(0, 2))
  got = similarity.ssim(a, b, 255.0, np)
  np.testing.assert_allclose(got, want, rtol=1e-12)
  to_float = [jnp.asarray(x / 127.5, jnp.float32) for x in (a, b)]
  np.testing.assert_allclose(similarity.ssim(*to_float, 2.0), want, rtol=1e-4)
  assert similarity.ssim(*to_float[:1] * 2, 2.0) == pytest.approx(1)
  error = np.square(a - b).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(
    similarity.psnr(a, b, 255.0, np), 10 * np.log10(255**2 / error)
  )


def test_a_diffusion_decoder_follows_the_flow_to_the_picture():
  """A network that knows the picture from its latents gives it exactly."""
  schedule, shape = schedules.flow(100), (4, 4, 2)
  z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 2)), 'float32')

  def network(params, x, label, cond, keys):
    return (x - cond['channels']) / label.reshape(-1, 1, 1, 1)

  for steps in (1, 7):
    decode = dito.decoder(network, schedule, 'flow', shape, steps)
    seen = decode({}, z, keys(3))
    np.testing.assert_allclose(seen, dito.enlarged(z, (4, 4)), atol=1e-4)
  assert np.array_equal(dito.enlarged(z, (4, 4))[:, ::2, 1::2], z)


def test_synchronised_noise_is_in_the_latents_at_earlier_times_only():
  """In their share of examples; the others are those without it."""
  count, steps, share = 4000, 10, 0.25
  seen = []

  def network(params, x, label, cond, keys):
    seen.append(np.asarray(cond['channels'], np.float64)[:, 0, 0])
    return x

  x = jnp.stack([jnp.full((count, 1, 1), 1e4), jnp.zeros((count, 1, 1))], -1)
  coder = linear()._replace(encode=lambda params, x: x)
  created = functools.partial(
    dito_objective.create, network, coder, floats, schedules.flow(steps),
    prediction='flow',
  )  # fmt: skip
  made, plain = created(synchronise=share), created()
  params, rows = {'codec': {}}, {'image': x}
  (_, aux), (_, usual) = (
    one.loss(params, {}, rows, keys(count)) for one in (made, plain)
  )
  t, before = np.asarray(aux.by_row['t']), np.asarray(usual.by_row['t'])
  z, clean = seen
  noise = z[:, 1] != 0
  assert np.array_equal(z[~noise], clean[~noise])
  assert np.array_equal(t[~noise], before[~noise])

  def near(mean, want, deviation, many):
    assert abs(mean - want) < 4.5 * deviation / np.sqrt(many)

  near(noise.mean(), share, np.sqrt(share * (1 - share)), count)
  tau = np.rint((1 - z[noise, 0] / 1e4) * steps) - 1
  u, many = (tau + 1) / steps, noise.sum()
  near(tau.mean(), (steps - 1) / 2, np.sqrt((steps**2 - 1) / 12), many)
  assert set(tau) == set(range(steps))
  eps = z[noise, 1] / u
  near(eps.mean(), 0, 1, many)
  near(np.square(eps).mean(), 1, np.sqrt(2), many)
  late = t[noise] - tau
  assert late.min() == 0
  assert t.max() == steps - 1
  # Uniform from tau on: the sum of means and of variances over examples.
  left = steps - tau
  spread = np.sqrt(np.mean((left**2 - 1) / 12))
  near(np.mean(late - (left - 1) / 2), 0, spread, many)

  index = jnp.arange(count)
  one, other = (
    x.heldout(params, {}, rows, keys(count), index) for x in (made, plain)
  )
  assert np.array_equal(one, other)


# --- training -----------------------------------------------------------------

CONFIG = {
  'seed': 3, 'microbatches': 1, 'ema': {'decay': 0.9, 'decays': (0.5,)},
  'optim': {
    'lr': 1e-2, 'warmup_steps': 2, 'clip_norm': 1.0, 'b1': 0.5,
    'part_lr': {'critic': 2e-2},
  },
}  # fmt: skip


def made() -> recipe.Recipe:
  """LPIPS, a codebook and a critic, the last two from the second step on."""
  coder, shape = linear('vq'), SHAPE
  objective = autoencoding.create(
    coder, floats, judge(), **{**PLAIN, 'l1': 1.0, 'ssim': 0.1, 'decay': 0.5,
    'revive': 0.5, 'critic_weight': 0.5, 'lpips': 0.3},
  )  # fmt: skip
  parts = {'codec': coder, 'critic': judge()}
  return recipe.Recipe(
    parts, {'lpips': perceptual()}, {'lpips': 'vgg.pth'},
    of_coder(coder, shape), conditioning.none(),
    schedules.linear(10), None, objective, reconstructs=True,
  )  # fmt: skip


class Run:
  """A few steps of training on a mesh."""

  def __init__(self, sizes=(1, 1, 1), microbatches=1):
    count = int(np.prod(sizes))
    self.mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:count])
    config = {**CONFIG, 'microbatches': microbatches}
    self.programs = programs.create(config, self.mesh, made())
    self.state = self.programs.create_state(self.mesh)
    self.metrics = []

  def train(self, until=STEPS):
    for step in range(int(self.state.step), until):
      images = gaussian(BATCH, step).astype(np.float32)
      batch = sharding.put_batch({'image': images}, self.mesh)
      self.state, row = self.programs.step_fn(
        self.state, self.programs.frozen, batch
      )
      self.metrics.append(jax.device_get(row))
    return self


@functools.cache
def alone():
  return Run().train()


def test_weights_and_codes_are_the_same_on_any_mesh_in_any_pieces():
  got, want = Run((2, 2, 2), 4).train(), alone()
  weights = [row['critic_weight'] for row in want.metrics]
  assert weights[0] == 0
  assert min(weights[1:]) > 0.01
  for a, b in zip(got.metrics, want.metrics, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    jax.device_get(got.state.extras), jax.device_get(want.state.extras),
  )  # fmt: skip
  assert min(row['lpips'] for row in want.metrics) > 1e-4
  # Codes that nothing was near to have been replaced, all averages have the
  # codebook, and the critic has its own rate.
  used = [row['codes_used'] for row in want.metrics]
  assert used[0] < 1
  assert max(used) > used[0]
  state = jax.device_get(want.state)
  book = state.params['codec']['quantize']['codebook']
  for tree in (state.ema_params, *state.averages.values()):
    assert np.array_equal(tree['codec']['quantize']['codebook'], book)


def test_a_run_resumes_bitwise(tmp_path):
  half = Run().train(until=2)
  given = half.programs.frozen, {'lpips': 'vgg.pth'}
  with checkpoint.Checkpoints(tmp_path, 3, 0, *given) as kept:
    kept.save(2, half.state)
  with (
    checkpoint.Checkpoints(tmp_path) as kept,
    pytest.raises(UserError, match=r'vgg\.pth as its frozen lpips'),
  ):
    kept.restore(2, half.programs.abstract)
  with checkpoint.Checkpoints(tmp_path, 3, 0, *given) as kept:
    half.state = kept.restore(2, half.programs.abstract)
  half.train()
  jax.tree.map(np.testing.assert_array_equal, half.state, alone().state)


def test_reconstructions_are_decoded_latents():
  """In uint8, whatever the mesh; a source's images are spread."""
  program = alone().programs
  images = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), np.uint8)
  indices = np.arange(4, dtype=np.uint32)
  params = jax.tree.map(lambda x: x, alone().state.params)
  seen, finite = program.draw_fn(params, indices, images)
  assert finite
  x = images.reshape(4, -1) / 127.5 - 1
  z = x @ np.asarray(params['codec']['encoder']['kernel'])
  want = z @ np.asarray(params['codec']['decoder']['conv_out']['kernel'])
  want = np.clip((want + 1) * 127.5, 0, 255).reshape(images.shape)
  assert seen.dtype == np.uint8
  assert np.abs(np.asarray(seen) - want).max() < 0.6
  params['codec']['decoder']['conv_out']['kernel'] *= np.nan
  assert not program.draw_fn(params, indices, images)[1]


# --- configs ------------------------------------------------------------------


def config(kind='autoencoding', **changes):
  given = default.get_config()
  given.codec = default.autoencoder()
  given.loss = default.autoencoding()
  if kind == 'dito':
    given.loss, given.process.schedule = default.dito(), 'flow'
    given.codec.update(decoder=False, regulariser='norm')
  given.update_from_flattened_dict(changes)
  return given


@pytest.mark.parametrize('kind', ['autoencoding', 'dito'])
def test_configs_are_valid(kind):
  assert validation.check(config(kind), jax.devices()[:1]) == []


@pytest.mark.parametrize(
  ('kind', 'changes', 'must'),
  [
    ('autoencoding', {'loss.critic_weight': -1.0}, '0 or more, finite'),
    ('autoencoding', {'codec.regulariser': 'kl2'}, 'kl, vq, fsq, norm'),
    ('autoencoding', {'codec.channels': 24}, 'does not divide 24 channels'),
    ('autoencoding', {'data.image_size': 30}, 'a multiple of 4'),
    (
      'autoencoding',
      {'conditioning.num_classes': 3, 'conditioning.name': 'label'},
      "it must be 'none'",
    ),
    ('autoencoding', {'codec.decoder': False}, 'needs a decoder'),
    ('autoencoding', {'loss.l1': 0.0, 'loss.ssim': 0.0}, 'above 0'),
    ('autoencoding', {'loss.lpips': -1.0}, '0 or more, finite'),
    ('autoencoding', {'loss.lpips': 1.0}, "loss.lpips_path=''"),
    (
      'autoencoding',
      {'loss.lpips': 1.0, 'loss.lpips_path': 'x', 'data.image_size': 8},
      'at least 16 pixels a side',
    ),
    ('autoencoding', {'loss.decay': 1.0}, 'in [0, 1)'),
    ('autoencoding', {'codec.levels': (8, 1)}, 'at least 2'),
    ('autoencoding', {'codec.multipliers': ()}, 'one or more whole numbers'),
    ('dito', {'codec.decoder': True}, 'codec.decoder=False'),
    ('dito', {'loss.variance': 'learned'}, "must be 'fixed'"),
    ('dito', {'loss.decode_steps': 0}, 'at least 1'),
    ('dito', {'loss.synchronise': 1.5}, 'in [0, 1]'),
    (
      'dito',
      {'loss.synchronise': 0.1, 'loss.law': 'stratified'},
      "loss.law='uniform'",
    ),
  ],
)
def test_what_cannot_be_is_said_in_one_line(kind, changes, must):
  (first, *_) = validation.check(config(kind, **changes), jax.devices()[:1])
  assert must in first
  assert '\n' not in first


def test_codec_and_loss_go_together():
  given = config()
  given.codec = default.get_config().codec
  (told,) = validation.check(given, jax.devices()[:1])
  assert "codec.name='autoencoder' goes together with" in told
  changed = default.get_config()
  changed.codec.name = 'autoencoder'
  (told,) = validation.check(changed, jax.devices()[:1])
  assert 'codec.channels' in told


def test_an_autoencoder_draws_no_samples():
  with pytest.raises(UserError, match='draws no samples'):
    plan.for_run(runs.to_plain(config()))
  with pytest.raises(UserError, match='draws no samples'):
    made().denoiser({}, {}, tiny.one_device())


def test_a_codebook_that_has_collapsed_is_said_once():
  codec = {'regulariser': 'vq', 'codes': 512, 'levels': ()}
  said = []
  watch = autoencoders.Watch(codec, said.append)
  watch.look(100, {'perplexity': 1.0})  # too early to tell
  watch.look(300, {})
  watch.look(300, {'perplexity': 200.0})
  assert said == []
  for step in (300, 325):
    watch.look(step, {'perplexity': 3.2})
  (line,) = said
  for word in ('step 300', '3.2 of 512', 'loss.revive', 'optim.lr'):
    assert word in line
  line = autoencoders.collapsed(
    300, {'perplexity': 1.5}, {'regulariser': 'fsq', 'levels': [8, 8]}
  )
  assert '1.5 of 64' in line
  assert 'codec.levels' in line
