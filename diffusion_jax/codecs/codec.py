"""What a codec is: the way from rows of data to x0, and back."""

from collections.abc import Callable
from typing import NamedTuple


class Codec(NamedTuple):
  """Between data and what is diffused, as pure functions.

  Attributes:
    encode: (params, rows, keys) -> x0 float [B, *shape]. `params` holds all
      parts of the run, `rows` is a batch as the data give it, and `keys` [B]
      are random keys, for codecs that draw (a posterior sample).
    decode: (params, x0, keys) -> data [B, ...], float; keys as above.
    shape: of x0, without the batch.
    bound: x0 lies in [-bound, bound], and samplers may clip it there; None
      where nothing may be clipped.
    levels: how many values a number of the data can take, 256 for 8-bit images,
      whose decoded data lie in [0, 255]; None for continuous data, which have
      no bits per dimension.
  """

  encode: Callable
  decode: Callable
  shape: tuple[int, ...]
  bound: float | None = None
  levels: int | None = None
