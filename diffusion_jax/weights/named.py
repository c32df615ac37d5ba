"""Maps third-party tensors to our parameters by name."""

import re
from collections.abc import Callable, Mapping

import jax
import numpy as np

from diffusion_jax import models
from diffusion_jax.system.errors import UserError

SHOWN = 3  # names in a message


def renamed(name: str, rules) -> str:
  """Applies rules, (regular expression, replacement), to a name in order."""
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
  """Converts tensors with other names and layouts to our parameters.

  Args:
    tensors: their name -> array.
    abstract: our parameters' shapes.
    name_of: our name of a parameter -> their name.
    to_ours: (our name, their array) -> the array in our layout.
    what: where the tensors come from, for the message.

  Returns:
    A nested dict of float32 NumPy arrays.

  Raises:
    UserError: tensors are missing, left over, not floats, or of another shape;
      the message names them.
  """
  wanted = {name: name_of(name) for name in models.names(abstract)}
  missing = [theirs for theirs in wanted.values() if theirs not in tensors]
  extra = sorted(tensors.keys() - wanted.values())
  if missing or extra:
    told = [
      f'{len(names)} tensors {how} ({shortened(names)})'
      for names, how in ((missing, 'missing'), (extra, 'unexpected'))
      if names
    ]
    raise UserError(
      f'{what}: {" and ".join(told)}: it does not match the network of its '
      'settings'
    )
  leaves = []
  for name, leaf in models.named(abstract).items():
    theirs = tensors[wanted[name]]
    array = to_ours(name, theirs)
    if array.shape != leaf.shape:
      raise UserError(
        f'{what}: {wanted[name]} has the shape {list(theirs.shape)}, '
        f'{list(array.shape)} here, but its settings need {list(leaf.shape)}'
      )
    if array.dtype.kind != 'f':
      raise UserError(
        f'{what}: {wanted[name]} is {array.dtype}: weights must be floats'
      )
    leaves.append(np.ascontiguousarray(array, np.float32))
  return jax.tree.structure(abstract).unflatten(leaves)


def tensors_of(
  params,
  name_of: Callable[[str], str],
  to_theirs: Callable[[str, np.ndarray], np.ndarray],
) -> dict[str, np.ndarray]:
  """Converts our parameters to tensors with other names and layouts.

  Args:
    params: a nested dict of arrays.
    name_of: our name of a parameter -> their name.
    to_theirs: (our name, our array) -> the array in their layout.
  """
  return {
    name_of(name): np.ascontiguousarray(to_theirs(name, np.asarray(leaf)))
    for name, leaf in models.named(params).items()
  }


def from_bfloat16(halves: np.ndarray) -> np.ndarray:
  """float32 of bfloat16 numbers, which are its upper 16 bits.

  Args:
    halves: their bits, uint16.
  """
  return (halves.astype('<u4') << 16).view('<f4')


def shortened(names, count: int = SHOWN) -> str:
  """The first of some names, each of at most 100 letters, and 'N more'."""
  more = len(names) - count
  shown = ', '.join(name[:100] for name in names[:count])
  return f'{shown} and {more} more' if more > 0 else shown
