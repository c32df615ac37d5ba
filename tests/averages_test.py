"""Further averages of the parameters, and their reconstruction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_jax import runs
from diffusion_jax.configs import digits
from diffusion_jax.runs import averaged, programs, validation
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import averages, checkpoint, sharding

WIDTHS = (0.05, 0.1)
MIDDLES = (np.arange(100_000) + 0.5) / 100_000  # to integrate over [0, 1]
EMA = {'decay': 0.9, 'decays': (0.5,), 'profiles': WIDTHS}


def config(**ema):
  made = digits.get_config()
  made.optim.warmup_steps = 1
  made.ema.update(ema)
  return made


def program(**ema):
  made = config(**ema)
  assert not validation.check(made, range(1))
  return programs.create(made, tiny.one_device(), tiny.recipe(tiny.dense()))


def brute(width, step, path):
  """The average of path[0], path[1], ... (of steps 1, 2, ...) at a step."""
  gamma, whole = averages.gamma_of(width), 0.0
  for t in range(1, step + 1):
    decay = (1 - 1 / t) ** (gamma + 1)
    whole = decay * whole + (1 - decay) * path[t - 1]
  return whole


def path(steps):
  """A walk of a thousand parameters: float64 [steps, 1000]."""
  moves = np.random.default_rng(0).standard_normal((steps, 1000))
  return np.cumsum(moves, axis=0) / np.sqrt(steps) + 3


@pytest.mark.parametrize('width', [0.002, 0.05, 0.13, 0.28, 12**-0.5])
def test_the_exponent_and_the_width_of_a_profile(width):
  """The width is the deviation of the weights t^gamma over [0, 1]."""
  gamma = averages.gamma_of(width)
  assert averages.width_of(gamma) == pytest.approx(width, rel=1e-12)
  weights = (gamma + 1) * MIDDLES**gamma / len(MIDDLES)
  mean = weights @ MIDDLES
  deviation = np.sqrt(weights @ (MIDDLES - mean) ** 2)
  assert deviation == pytest.approx(width, rel=1e-5)


def test_inner_products_are_integrals():
  gammas, steps = [0.5, 3.0, 17.0, 6.0], [40.0, 100.0, 70.0, 100.0]
  found = averages.inner((gammas, steps), (gammas, steps))
  for i, (a, s) in enumerate(zip(gammas, steps, strict=True)):
    for j, (b, t) in enumerate(zip(gammas, steps, strict=True)):
      end = min(s, t)
      tau = MIDDLES * end
      profiles = (a + 1) * tau**a / s ** (a + 1) * (b + 1) * tau**b
      integral = np.mean(profiles) / t ** (b + 1) * end
      assert found[i, j] == pytest.approx(integral, rel=1e-6)


def test_a_kept_average_is_its_own_reconstruction():
  steps = [40, 80, 120]
  fit = averages.fit(0.1, 120, [0.05] * 3 + [0.1] * 3, steps * 2)
  np.testing.assert_allclose(fit.weights, [0, 0, 0, 0, 0, 1], atol=1e-8)
  assert fit.error < 1e-7


def test_more_snapshots_reconstruct_better():
  """Of an explicit sequence of parameters, as well as the fit promises."""
  parameters = path(480)
  wanted, errors = brute(0.13, 480, parameters), []
  for count in (1, 2, 4, 8):
    steps = [480 * (k + 1) // count for k in range(count)]
    snapshots = [(width, at) for width in WIDTHS for at in steps]
    fit = averages.fit(0.13, 480, *zip(*snapshots, strict=True))
    made = sum(
      weight * brute(width, at, parameters)
      for weight, (width, at) in zip(fit.weights, snapshots, strict=True)
    )
    errors.append(np.abs(made - wanted).mean())
    assert fit.weights.sum() == pytest.approx(1, abs=1e-9)
  assert errors[3] < errors[2] < errors[1] / 2 < errors[0]
  assert errors[3] < 0.002


@pytest.fixture(scope='module')
def states():
  """Four updates: the state at steps 0 to 4, as NumPy; and the program."""
  made, mesh = program(**EMA), tiny.one_device()
  batch = sharding.put_batch(tiny.images(), mesh) | {
    'label': jnp.zeros(tiny.BATCH, jnp.int32)
  }
  now = tiny.random_state(made.abstract)
  kept = [jax.device_get(now)]
  for _ in range(4):
    now, _ = made.step_fn(now, {}, batch)
    kept.append(jax.device_get(now))
  return made, kept


def flat(tree):
  return np.concatenate([x.ravel() for x in jax.tree.leaves(tree)], dtype=float)


def test_all_averages_are_updated_in_the_step(states):
  _, kept = states
  walk = [flat(state.params) for state in kept[1:]]
  assert kept[-1].averages.keys() == {
    'decay0.5', 'profile0.05', 'profile0.1'
  }  # fmt: skip
  for step, state in enumerate(kept[1:], 1):
    for width in WIDTHS:
      np.testing.assert_allclose(
        flat(state.averages[f'profile{width}']), brute(width, step, walk),
        rtol=1e-5, atol=1e-7,
      )  # fmt: skip
  expected = flat(kept[0].params)
  for new in walk:
    expected = 0.5 * expected + 0.5 * new
  np.testing.assert_allclose(
    flat(kept[-1].averages['decay0.5']), expected, rtol=1e-5, atol=1e-7
  )


def test_a_state_without_further_averages_is_what_it_was():
  """Its entries, in memory and on disk, have not changed."""
  plain = program().abstract
  assert plain.averages == {}
  assert [*plain.entries] == [
    'step', 'params', 'ema_params', 'opt_state', 'extras'
  ]  # fmt: skip


@pytest.fixture(scope='module')
def saved(states, tmp_path_factory):
  """A folder with the checkpoints of steps 1 to 4."""
  made, kept = states
  folder = tmp_path_factory.mktemp('averages')
  where = jax.tree.map(lambda leaf: leaf.sharding, made.abstract)
  with checkpoint.Checkpoints(folder, keep_last=9) as there:
    for step, state in enumerate(kept):
      if step:
        there.save(step, jax.device_put(state, where))
    there.wait()
    restored = there.restore(4, made.abstract)
  jax.tree.map(np.testing.assert_array_equal, restored, kept[-1])
  return folder


def load(states, folder, step, asked):
  made, _ = states
  params, facts = averaged.load(
    folder, step, made.abstract.params, EMA, asked
  )  # fmt: skip
  return flat(jax.device_get(params)), facts


def test_averages_are_loaded_by_name(states, saved):
  _, kept = states
  for asked, tree in (
    (True, kept[3].ema_params),
    (False, kept[3].params),
    ('decay:0.9', kept[3].ema_params),
    ('decay:0.5', kept[3].averages['decay0.5']),
    ('0.05', kept[3].averages['profile0.05']),
  ):
    found, facts = load(states, saved, 3, asked)
    np.testing.assert_array_equal(found, flat(tree))
    assert facts == ({'ema_profile': asked} if isinstance(asked, str) else {})


def test_others_are_reconstructed_from_checkpoints(states, saved):
  found, facts = load(states, saved, 4, '0.08')
  walk = [flat(state.params) for state in states[1][1:]]
  assert facts['ema_averages'] == 8
  assert 0.02 < facts['ema_error'] < 0.04
  wanted = brute(0.08, 4, walk)
  assert np.abs(found - wanted).mean() < 0.01 * np.abs(wanted).mean()


@pytest.mark.parametrize(
  ('asked', 'ema', 'told'),
  [
    ('wide', {}, 'a relative width above 0'),
    ('0.29', {}, 'at most 0.28'),
    ('decay:1.5', {}, 'decay:0.999'),
    ('decay:0.7', {}, 'decay:0.9, decay:0.5'),
    ('0.1', {'profiles': ()}, '--config.ema.profiles="(0.05, 0.1)"'),
    ('0.25', {}, 'keep_every'),
  ],
)
def test_averages_that_cannot_be_had_are_one_line(
  states, saved, asked, ema, told
):
  made, _ = states
  with pytest.raises(UserError, match='--ema_profile') as error:
    averaged.load(saved, 1, made.abstract.params, EMA | ema, asked)
  assert told in str(error.value)
  assert '\n' not in str(error.value)


def test_a_run_goes_on_with_the_averages_it_has():
  plain = [
    runs.to_plain(config(**ema))
    for ema in ({}, {'profiles': WIDTHS}, {'decays': (0.9,)})
  ]
  assert not runs.fixed(plain[1], plain[1])
  for other in plain[1:]:
    assert runs.fixed(plain[0], other)
    assert runs.fixed(other, plain[0])


@pytest.mark.parametrize(
  ('key', 'value'),
  [('decays', (0.9, 0.9)), ('decays', (1.0,)), ('profiles', (0.05, 0.3))],
)
def test_averages_of_a_config_that_make_no_sense(key, value):
  (told, *_) = validation.check(config(**{key: value}), range(1))
  assert told.startswith(f'ema.{key}=')
