"""The codec interface: maps rows of data to x0 and back."""

from collections.abc import Callable
from typing import NamedTuple


class Codec(NamedTuple):
  """A pair of pure functions between data and x0.

  Attributes:
    encode: (params, rows, keys) -> x0 float [B, *shape]. `params` holds all
      parts of the run, `rows` is a batch of data, and `keys` [B] are random
      keys for stochastic codecs (a posterior sample).
    decode: (params, x0, keys) -> data [B, ...], float; keys as above.
    shape: the shape of x0, without the batch.
    bound: x0 is in [-bound, bound], and samplers may clip it to that range;
      None if x0 must not be clipped.
    levels: number of values of an element of x0: 256 for 8-bit images; None for
      continuous x0, which have no bits per dimension.
    eight_bits: whether data are decoded to [0, 255], and may be rounded.
    decode_rows: examples that a device decodes at once, in turn; None for all.
  """

  encode: Callable
  decode: Callable
  shape: tuple[int, ...]
  bound: float | None = None
  levels: int | None = None
  eight_bits: bool = False
  decode_rows: int | None = None
