"""Conditioning: labels, text or images -> the network's conditioning input."""

from collections.abc import Callable
from typing import NamedTuple

from diffusion_jax.system.errors import one_of


class Conditioner(NamedTuple):
  """Computes the network's inputs other than xt and t.

  A condition is a dict of doors: inputs named by how the network takes them,
  not by their meaning: 'label' int [B], 'vector' [B, d], 'tokens' [B, n, d]
  with 'mask' [B, n], 'channels' [B, H, W, C].

  Attributes:
    condition: (params, rows, keys) -> {door: array}. `params` holds all parts
      of the run. With `keys` [B], the condition of each example is dropped at
      random by its own key, as in training; with None, nothing is dropped. If
      rows lack the data for a door, the door gets its null value.
    doors: the names of the doors that it provides.
  """

  condition: Callable
  doors: tuple[str, ...] = ()


def none() -> Conditioner:
  """No condition: the network's only inputs are xt and t."""
  return Conditioner(lambda params, rows, keys: {})


# name -> (**options) -> Conditioner
CONDITIONERS = {'none': none}


def create(name: str, **options) -> Conditioner:
  """A conditioner by name.

  Args:
    name: a key of CONDITIONERS.
    **options: the conditioner's options.

  Raises:
    UserError: the name is not known.
  """
  one_of('conditioning.name', name, CONDITIONERS)
  return CONDITIONERS[name](**options)
