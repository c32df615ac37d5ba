"""Fixtures of all tests."""

import jax
import pytest

# A rank that broadcasts by accident is a wrong loss that trains.
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture
def x64():
  """float64 in JAX, for mathematics that is compared to its closed form."""
  with jax.enable_x64(True):
    yield
