"""What a conditioner is: the way from rows of data to a condition."""

from collections.abc import Callable
from typing import NamedTuple


class Conditioner(NamedTuple):
  """What a network is told beside xt and t.

  A condition is a dict of doors, named by how the network takes them in and not
  by what they mean: 'label' int [B], 'vector' [B, d], 'tokens' [B, n, d] with
  'mask' [B, n], 'channels' [B, H, W, C].

  Attributes:
    condition: (params, rows, keys) -> {door: array}. `params` holds all parts
      of the run. With `keys` [B], each example drops its condition by its own
      key, as in training; with None, nothing is dropped. Where rows lack what a
      door needs, the door gets its null.
    doors: the names of the doors that it fills.
  """

  condition: Callable
  doors: tuple[str, ...] = ()
