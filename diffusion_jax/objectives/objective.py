"""What an objective is: what training minimises, one value for each example."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# Each use of an example's key has a branch of its own. The order is part of a
# run's numbers: add new ones at the end.
BRANCHES = ('t', 'eps', 'dropout', 'codec', 'condition')


def branch(keys: jax.Array, name: str) -> jax.Array:
  """[B] keys of examples -> [B] keys of one use of them, see BRANCHES."""
  number = BRANCHES.index(name)
  return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


class Aux(NamedTuple):
  """What a loss leaves beside its values.

  Attributes:
    by_row: name -> [B, ...], concatenated over microbatches.
    sums: name -> array, a sum over the rows, added over microbatches.
  """

  by_row: dict[str, Any]
  sums: dict[str, Any]


class Objective(NamedTuple):
  """What is minimised: the mean of its values over the global batch.

  `params` holds all parts of the run by name, trained and frozen ones, and
  `keys` [B] are the examples' random keys, see `branch`.

  Attributes:
    loss: (params, extras, rows, keys) -> (values [B], Aux). The values of an
      example depend on its row and key alone.
    heldout: (params, extras, rows, keys, index [B]) -> values [B]: the loss of
      examples of the held-out set by their number in it, always at the same
      noise, so that checkpoints compare.
    metrics: (values, by_row, sums) -> {name: scalar}, to be reported.
    extras: what the objective carries from step to step at step 0, a dict of
      arrays.
    update: (extras, sums) -> extras, after each step.
  """

  loss: Callable
  heldout: Callable
  metrics: Callable = lambda values, by_row, sums: {}
  extras: dict = {}  # noqa: RUF012, never written to
  update: Callable = lambda extras, sums: extras
