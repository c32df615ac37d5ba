"""Foreign tensors, by their names, in the places of our parameters."""

import re
from collections.abc import Callable, Mapping

import jax
import numpy as np

from diffusion_jax import models
from diffusion_jax.system.errors import UserError

SHOWN = 3  # names in a message


def renamed(name: str, rules) -> str:
  """A name after each of the rules, (regular expression, replacement)."""
  for pattern, replacement in rules:
    name = re.sub(pattern, replacement, name)
  return name


def place(
  tensors: Mapping[str, np.ndarray],
  abstract,
  name_of: Callable[[str], str],
  to_ours: Callable[[str, np.ndarray], np.ndarray],
  what: str,
) -> dict:
  """Our parameters, of tensors that somebody else named and laid out.

  Args:
    tensors: by their names.
    abstract: our parameters' shapes.
    name_of: our name of a parameter -> theirs.
    to_ours: (our name, their array) -> the array as we lay it out.
    what: where the tensors come from, for the message.

  Returns:
    a nested dict of float32 NumPy arrays.

  Raises:
    UserError: some are missing, left over, no numbers, or of another shape;
      they are named.
  """
  wanted = {name: name_of(name) for name in models.names(abstract)}
  missing = [theirs for theirs in wanted.values() if theirs not in tensors]
  extra = sorted(tensors.keys() - set(wanted.values()))
  if missing or extra:
    told = [
      f'{len(names)} tensors {how} ({_shortened(names)})'
      for names, how in ((missing, 'missing'), (extra, 'more than it has'))
      if names
    ]
    raise UserError(
      f'{what}: {" and ".join(told)}: it is not of the network that its '
      'settings tell'
    )
  leaves = []
  for name, leaf in models.named(abstract).items():
    theirs = tensors[wanted[name]]
    array = to_ours(name, theirs)
    if array.shape != leaf.shape:
      raise UserError(
        f'{what}: {wanted[name]} is of shape {list(theirs.shape)}, which here '
        f'is {list(array.shape)}, and its settings ask for {list(leaf.shape)}'
      )
    if array.dtype.kind != 'f':
      raise UserError(
        f'{what}: {wanted[name]} is of {array.dtype}: weights are of floats'
      )
    leaves.append(np.ascontiguousarray(array, np.float32))
  return jax.tree.structure(abstract).unflatten(leaves)


def _shortened(names) -> str:
  more = len(names) - SHOWN
  return ', '.join(names[:SHOWN]) + (f' and {more} more' if more > 0 else '')
