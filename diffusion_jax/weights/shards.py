"""Writes weights as safetensors, in one file or in several with an index.

The names are those that diffusers looks for; `states` reads all of them.
"""

from collections.abc import Mapping

import numpy as np
import safetensors.numpy

from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import named, states

LARGEST = 10**10  # bytes of a file, as diffusers writes them


def write(
  folder,
  tensors: Mapping[str, np.ndarray],
  variant: str = '',
  largest: int = LARGEST,
  name: str = states.STEM,
) -> list[str]:
  """Writes the weights of a network; returns the names of the files.

  Args:
    folder: where to write; created if it does not exist.
    tensors: name -> array.
    variant: such as 'fp16', a part of the names.
    largest: bytes of a file; a tensor that is larger has a file of its own.
    name: what the names of the files begin with.

  Raises:
    UserError: the folder holds weights in files of other names, which would be
      read in place of these.
  """
  folder, stem = files.make(folder), '.'.join(filter(None, [name, variant]))
  groups = _groups(tensors, largest)
  many = len(groups)
  names = [
    f'{stem}-{number:05}-of-{many:05}{states.SAFE}' if many > 1 else
    f'{stem}{states.SAFE}'
    for number in range(1, many + 1)
  ]  # fmt: skip
  index = '.'.join(filter(None, [name + states.SAFE, 'index', variant, 'json']))
  _refuse_others(folder, name, [*names, index] if many > 1 else names)
  for file_name, group in zip(names, groups, strict=True):
    content = safetensors.numpy.save(
      {key: tensors[key] for key in group}, {'format': 'pt'}
    )
    with files.replacing(folder / file_name) as file:
      file.write(content)
  if many == 1:
    return names
  listed = {
    key: file_name
    for file_name, group in zip(names, groups, strict=True)
    for key in group
  }
  total = sum(array.nbytes for array in tensors.values())
  files.write_json(
    folder / index, {'metadata': {'total_size': total}, 'weight_map': listed}
  )
  return [*names, index]


def _refuse_others(folder, stem, names) -> None:
  """Raises UserError if a folder holds weights in files of other names."""
  kinds = (states.SAFE, *states.PICKLED, '.json')
  others = [
    name
    for name in sorted(files.entries(folder))
    if name.startswith(stem) and name.endswith(kinds) and name not in names
  ]
  if others:
    raise UserError(
      f'{folder} holds other weights ({named.shortened(others)}), which may be '
      'read in place of the new ones: give a new folder, or remove them'
    )


def _groups(tensors, largest) -> list[list[str]]:
  """The names of the tensors of each file."""
  groups, size = [[]], 0
  for name, array in tensors.items():
    if groups[-1] and size + array.nbytes > largest:
      groups.append([])
      size = 0
    groups[-1].append(name)
    size += array.nbytes
  return groups
