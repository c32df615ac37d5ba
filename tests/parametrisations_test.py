"""Parametrisations as functions of the log SNR, in closed form."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.process import gaussian, schedules
from diffusion_jax.system.errors import UserError

LEVEL = 1.3  # sigma / alpha


def at(level):
  """(alpha, sigma) of a level."""
  return 1 / np.sqrt(1 + level**2), level / np.sqrt(1 + level**2)


def test_coefficients_of_edm(x64):
  """arXiv 2206.00364, table 1, at sigma_data 0.5 and sigma 1.3."""
  alpha, sigma = at(LEVEL)
  how = gaussian.parametrisation('edm')
  # z = xt / alpha = 1 and F = 0, then z = 0 and F = 1.
  skip = how.denoised(0.0, alpha, alpha, sigma).x0
  out = how.denoised(1.0, 0.0, alpha, sigma).x0
  np.testing.assert_allclose(skip, 0.25 / (1.69 + 0.25), rtol=1e-12)
  np.testing.assert_allclose(out, 1.3 * 0.5 / np.sqrt(1.94), rtol=1e-12)
  np.testing.assert_allclose(skip, 0.128866, atol=5e-7)
  np.testing.assert_allclose(out, 0.466673, atol=5e-7)
  c_in = how.scale(alpha, sigma) * alpha
  np.testing.assert_allclose(c_in, 1 / np.sqrt(1.94), rtol=1e-12)
  np.testing.assert_allclose(how.gain(alpha, sigma), out, rtol=1e-12)
  table = schedules.from_logsnr(-2 * np.log([1.0, LEVEL]))
  label = how.label(table, jnp.array([1]))
  np.testing.assert_allclose(label, np.log(1.3) / 4, rtol=1e-6)
  np.testing.assert_allclose(label, 0.065591, atol=5e-7)


@pytest.mark.parametrize('s', [0.5, 1.3])
def test_edm_needs_no_network_for_gaussian_data(s, x64):
  """F = 0 is optimal for N(0, sigma_data^2): x0 is the posterior mean."""
  how = gaussian.parametrisation('edm', s)
  xt = jnp.linspace(-3, 3, 7)
  for level in (0.002, 0.3, LEVEL, 80.0):
    alpha, sigma = at(level)
    found = how.denoised(jnp.zeros_like(xt), xt, alpha, sigma)
    mean = alpha * s**2 / (alpha**2 * s**2 + sigma**2) * xt
    np.testing.assert_allclose(found.x0, mean, rtol=1e-12)
    np.testing.assert_allclose(
      found.eps, (xt - alpha * mean) / sigma, rtol=1e-9
    )


def test_v_is_edm_of_unit_data_with_the_sign_turned(x64):
  alpha, sigma = at(LEVEL)
  v, unit = gaussian.parametrisation('v'), gaussian.parametrisation('edm', 1.0)
  np.testing.assert_allclose(
    unit.target(0.3, -1.2, alpha, sigma), -v.target(0.3, -1.2, alpha, sigma)
  )
  assert gaussian.parametrisation(v) is v


def test_flow_is_the_straight_line(x64):
  """z = (1 - u) x0 + u eps is the input, u the label, eps - x0 the output."""
  schedule, t = schedules.flow(1000), np.array([0, 400, 999])
  u = (t + 1) / 1000
  x0, eps = np.random.default_rng(0).normal(size=(2, 3, 4))
  xt = gaussian.q_sample(schedule, jnp.asarray(x0), jnp.asarray(t), eps)
  z, label = gaussian.predict(
    lambda x, label: (x, label), schedule, xt, jnp.asarray(t), 'flow'
  )
  np.testing.assert_allclose(z, (1 - u[:, None]) * x0 + u[:, None] * eps)
  np.testing.assert_allclose(label, u, rtol=1e-6)
  found = gaussian.from_prediction(schedule, eps - x0, xt, t, 'flow')
  np.testing.assert_allclose(found.x0, x0, atol=1e-12)
  np.testing.assert_allclose(found.eps, eps, atol=1e-12)


@pytest.mark.parametrize('name', gaussian.PARAMETRISATIONS)
def test_an_error_of_the_output_is_an_error_of_x0(name, x64):
  how = gaussian.parametrisation(name)
  for level in (0.01, LEVEL, 50.0):
    alpha, sigma = (jnp.asarray(x) for x in at(level))
    one, two = (how.denoised(F, 0.7, alpha, sigma).x0 for F in (0.2, 1.2))
    np.testing.assert_allclose(
      abs(two - one), how.gain(alpha, sigma), rtol=1e-9
    )


@pytest.mark.parametrize('name', ['x0', 'v', 'flow'])
def test_pure_noise_is_defined(name, x64):
  schedule = schedules.flow(10)
  assert gaussian.parametrisation(name).noise_only
  xt, t = jnp.array([[0.3, -2.0]]), jnp.array([9])
  x0, eps, _ = gaussian.from_prediction(
    schedule, jnp.ones_like(xt), xt, t, name
  )
  assert jnp.isfinite(x0).all()
  np.testing.assert_allclose(eps, xt)


def test_a_learned_variance_is_the_second_half():
  schedule, xt = schedules.linear(10), jnp.ones((2, 3, 3, 1))
  raw = jnp.concatenate([jnp.zeros_like(xt), -jnp.ones_like(xt)], -1)
  found = gaussian.from_prediction(schedule, raw, xt, jnp.array([0, 9]), 'eps')
  np.testing.assert_array_equal(found.eps, jnp.zeros_like(xt))
  np.testing.assert_array_equal(found.fraction, jnp.zeros_like(xt))
  plain = gaussian.from_prediction(schedule, xt, xt, jnp.array([0, 9]), 'eps')
  assert plain.fraction is None


@pytest.mark.parametrize('kind', ['eps', 'v', 'flow'])
def test_a_network_can_be_told_the_level(kind):
  """sqrt(alpha_bar), also between steps (arXiv 2104.07636); nothing else."""
  schedule = schedules.linear(1000)
  plain = gaussian.parametrisation(kind)
  how = gaussian.parametrisation(kind, level='alpha')
  assert how._replace(label=None) == plain._replace(label=None)
  xt, t = jnp.ones((3, 2)), jnp.array([-0.25, 400.5, 999.0])
  told = []
  gaussian.predict(
    lambda x, label: told.append(label) or x, schedule, xt, t, how
  )
  np.testing.assert_allclose(
    told[0], np.exp(0.5 * schedule.host(t)[0]), rtol=1e-6
  )
  with pytest.raises(UserError, match="level='sigma'"):
    gaussian.parametrisation(kind, level='sigma')
