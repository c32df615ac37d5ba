"""The conditioner interface: the network's inputs other than xt and t."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

NO_DOORS = MappingProxyType({})


class Conditioner(NamedTuple):
  """Computes the network's inputs other than xt and t.

  A condition is a dict of doors: inputs named by how the network takes them,
  not by their meaning: 'label' int [B], 'vector' [B, d], 'tokens' [B, n, d]
  with 'mask' [B, n], 'channels' [B, H, W, C].

  Attributes:
    condition: (params, rows, keys) -> {door: array}. `params` holds all parts
      of the run. With `keys` [B], the condition of each example is dropped at
      random by its own key, as in training; with None, nothing is dropped. If
      rows lack the data for a door, the door gets its null value, as an array
      with one row.
    doors: door -> its size: 'label' the number of classes, which is also the
      null label; 'vector' and 'tokens' d; 'channels' C.
    drop: the probability with which training drops an example's condition.
  """

  condition: Callable
  doors: Mapping[str, int] = NO_DOORS
  drop: float = 0.0
