"""Our samplers beside the diffusers schedulers of the same name.

Live with `-m parity`, which needs torch and diffusers, else against what
diffusers gave when tests/golden/make_schedulers.py was run.
"""

import numpy as np
import pytest
from parity import schedulers

from diffusion_jax import samplers


def apart(way, name, steps, **options):
  """Of every step, relative to the largest |x|, on whole times.

  Both sides have one alpha, so the ratio is that of x / alpha too.
  """
  assert way.shape == (steps, *schedulers.SHAPE)
  ours = schedulers.way_ours(name, steps, **options)
  assert np.isfinite(ours).all()
  if name == 'unipc_2_bh1':
    assert np.isnan(way[-1]).all()
    ours, way = ours[:-1], way[:-1]
  return np.abs(ours - way).max((1, 2)) / np.abs(way).max((1, 2))


CASES = [(name, n) for name in schedulers.CASES for n in schedulers.STEPS]


@pytest.mark.parametrize(('name', 'steps'), CASES)
def test_a_scheduler_of_diffusers(name, steps):
  way = schedulers.way_golden(name, steps)
  assert apart(way, name, steps).max() < schedulers.TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize(('name', 'steps'), CASES)
def test_a_scheduler_of_diffusers_live(name, steps):
  way = schedulers.way_live(name, steps)
  assert apart(way, name, steps).max() < schedulers.TOLERANCE
  golden = schedulers.way_golden(name, steps)
  atol = 1e-5 * np.nanmax(np.abs(golden))
  np.testing.assert_allclose(way, golden, rtol=0, atol=atol)


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('pndm', {'variant': 'improved_euler'}),
    ('dpm_solver_3', {'variant': 'paper'}),
    ('dpmpp_3m', {'variant': 'exact'}),
    ('unipc_2_bh1', {'variant': 'bh2'}),
    ('unipc_3_bh2', {'order': 2}),
    ('ddim_eta1', {'eta': 0.99}),
  ],
)
def test_what_is_another_sampler_is_told_apart(name, options):
  """Ten times above the bar at the least: the comparison sees a coefficient."""
  way = schedulers.way_golden(name, 10)
  assert apart(way, name, 10, **options).max() > 10 * schedulers.TOLERANCE


def test_all_that_diffusers_has_is_compared():
  compared = {case.sampler for case in schedulers.CASES.values()}
  assert set(samplers.SAMPLERS) - compared == {
    'ancestral',  # see convert_test
    'predictor_corrector',
    *samplers.CALIBRATED,
    'adaptive',  # see adaptive_test
  }
