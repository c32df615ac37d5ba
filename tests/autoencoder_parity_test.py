"""Autoencoders equal diffusers' with the same random weights.

The golden file holds what diffusers answered; the tests under the marker
`parity` ask it now, and fail where it is not installed.
"""

import pytest
from parity import autoencoders


@pytest.mark.parametrize(
  'name', ['vq', pytest.param('kl', marks=pytest.mark.slow)]
)
def test_equals_golden(name):
  autoencoders.compare(name, autoencoders.golden(name))


@pytest.mark.parity
@pytest.mark.parametrize('name', autoencoders.CASES)
def test_equals_diffusers(name):
  autoencoders.compare(name, autoencoders.live(name))
