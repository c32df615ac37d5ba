"""The objective interface: the training loss, with one value per example."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# Each use of an example's key has its own branch. The order determines the
# noise of a run: add new ones at the end.
BRANCHES = (
  *('t', 'eps', 'dropout', 'codec', 'condition', 'revival'),
  'jitter',
)


def branch(keys: jax.Array, name: str) -> jax.Array:
  """[B] keys of examples -> [B] keys for one use, see BRANCHES."""
  number = BRANCHES.index(name)
  return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


class Aux(NamedTuple):
  """Auxiliary outputs of a loss.

  Attributes:
    by_row: name -> [B, ...], concatenated over microbatches.
    sums: name -> array, summed over rows and microbatches.
  """

  by_row: dict[str, Any]
  sums: dict[str, Any]


class Mean(NamedTuple):
  """A mean over rows that may be none: the host divides, so no device sees 0/0.

  Attributes:
    total: scalar, the sum of the values.
    count: scalar, the number of values, 0 or more.
  """

  total: Any
  count: Any


class Objective(NamedTuple):
  """An objective; training minimises the mean of its values over the batch.

  `params` holds all parts of the run by name, trained and frozen, and `keys`
  [B] are the examples' random keys, see `branch`.

  Attributes:
    loss: (params, extras, rows, keys) -> (values [B], Aux). The value of an
      example depends only on its row and key; a contrastive one's on all rows.
    heldout: (params, extras, rows, keys, index [B]) -> values [B]: the loss of
      held-out examples, given with their indices, always with the same noise,
      so that checkpoints are comparable.
    metrics: (values, by_row, sums) -> {name: scalar or Mean}, metrics to
      report.
    extras: the initial state of the objective, a dict of arrays.
    update: (extras, aux) -> extras, updates that state after each step.
    write: (params, extras) -> params, puts numbers that have no gradient, such
      as a codebook, into trained parts after each step, and into the averages
      of these; None for none.
    whole: keys [B] -> {name: [B]}, numbers of a whole batch, which a loss finds
      among its rows; None for none.
  """

  loss: Callable
  heldout: Callable
  metrics: Callable = lambda values, by_row, sums: {}
  extras: dict = {}  # noqa: RUF012, never written to
  update: Callable = lambda extras, aux: extras
  write: Callable | None = None
  whole: Callable | None = None
