"""Reads the weights of diffusers' networks, in the forms that tools leave them.

Weights are one file or several with an index, written by safetensors or by
torch.save. A training checkpoint may hold the network twice, raw and averaged,
next to the state of its optimizer, and wrappers put a prefix before each name
(module., _orig_mod., ema_model.). Nothing is executed, and no file outside of
the given folder is read.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import safetensors

from diffusion_jax.system import errors, files
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import named, pytorch

SAFE = '.safetensors'
PICKLED = ('.bin', '.pt', '.pth', '.ckpt')  # of torch.save
STEM = 'diffusion_pytorch_model'
WEIGHTS = STEM + SAFE
INDEX = '.index.json'
# The stems of files of safetensors and of torch.save.
DIFFUSERS, TRANSFORMERS = (STEM, STEM), ('model', 'pytorch_model')
SHARD = r'-\d+-of-(?!0*1\.)\d+\.'  # of several
VARIANT = rf'\.(?!.*-of-\d)([\w-]+)({SAFE}|\.bin)'  # after the stem

# Each U-Net that `unets` supports has exactly one parameter of this name.
ONE_EACH = 'conv_in.weight'
WRAPPER = '_orig_mod'  # of torch.compile, anywhere in a name
AVERAGED = re.compile(r'(^|[._])(ema|averaged?|shadow)([._]|$)', re.IGNORECASE)
RAW = re.compile(r'(^|[._])online([._]|$)')  # next to the average, within it

DTYPES = {
  **{'F64': '<f8', 'F32': '<f4', 'F16': '<f2', 'I64': '<i8', 'I32': '<i4'},
  **{'I16': '<i2', 'I8': 'i1', 'U8': 'u1', 'BOOL': '?', 'BF16': '<u2'},
}
POINTER = b'version https://git-lfs'


class State(NamedTuple):
  """The weights of a network.

  Attributes:
    tensors: name -> array: the averaged weights, or the only ones.
    raw: the raw weights next to the averaged ones; None if there are none.
    sha256: the hash of the files.
    names: the names of the files.
    notes: what was taken and assumed, one line each.
  """

  tensors: dict[str, np.ndarray]
  raw: dict[str, np.ndarray] | None
  sha256: str
  names: list[str]
  notes: list[str]


def is_weights(path) -> bool:
  """Whether a path has the suffix of a file of weights."""
  return files.at(path).suffix in (SAFE, *PICKLED)


def usual(stems: tuple[str, str]) -> tuple[str, ...]:
  """Names of files of weights, of which the first that exists is read.

  Args:
    stems: DIFFUSERS or TRANSFORMERS.
  """
  safe, pickled = stems[0] + SAFE, f'{stems[1]}.bin'
  return safe, safe + INDEX, pickled, pickled + INDEX


def read(
  path, one_each: str = ONE_EACH, stems: tuple[str, str] = DIFFUSERS
) -> State:
  """Reads the weights in a folder, or in a file.

  Args:
    path: a file of weights, or a folder that holds one: that of a usual name,
      the same in shards, as .bin or as a variant (fp16), or a single file of
      another name.
    one_each: the name of a parameter that each network has once.
    stems: of usual names, DIFFUSERS or TRANSFORMERS.

  Raises:
    UserError: there are no weights or several, or they are damaged.
  """
  path, notes = files.at(path), []
  if not path.is_file():
    path, notes = _found_in(path, stems)
  digest = hashlib.sha256()
  if path.suffix == '.json':
    names, tensors = _shards(path, digest)
    notes = [*notes, f'{len(names)} shards are read, as {path.name} lists them']
  else:
    names, tensors = [path.name], _tensors(path, digest)
  tensors, raw, more = networks(tensors, str(path), one_each)
  return State(tensors, raw, digest.hexdigest(), names, [*notes, *more])


def networks(
  tensors: Mapping[str, np.ndarray], what: str, one_each: str = ONE_EACH
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None, list[str]]:
  """Separates the networks of a training checkpoint, and removes prefixes.

  Args:
    tensors: name -> array.
    what: where they come from, for messages.
    one_each: the name of a parameter that each network has once.

  Returns:
    (the averaged or only weights, the raw ones next to averaged ones or None,
    what was taken, one line each).

  Raises:
    UserError: it is not clear which network to take.
  """
  clean = {_unwrapped(name): array for name, array in tensors.items()}
  if len(clean) < len(tensors):
    raise UserError(
      f'{what}: some tensors are there with and without {WRAPPER}'
    )
  heads = {
    name.removesuffix(one_each)
    for name in clean
    if f'.{name}'.endswith(f'.{one_each}')
  } or {''}
  found, left = {head: {} for head in heads}, []
  for name, array in clean.items():
    fitting = [head for head in heads if name.startswith(head)]
    if fitting:
      head = max(fitting, key=len)
      found[head][name.removeprefix(head)] = array
    else:
      left.append(name)
  averages = sorted(filter(_is_averaged, heads)) if len(heads) > 1 else []
  others = sorted(heads - {*averages}, key=lambda head: ('ema' in head, head))
  if len(heads) > 1 and len(averages) != 1:
    raise UserError(
      f'{what} holds {len(heads)} networks, under '
      f'{named.shortened(sorted(map(repr, heads)))}: save the one that you '
      'mean in a file of its own'
    )
  notes = []
  if averages:
    notes.append(
      f'the averaged weights are those under {averages[0]!r}, the raw ones '
      f'those under {others[0]!r}'
    )
  elif others[0]:
    notes.append(f'the prefix {others[0]!r} was removed from the names')
  if any(WRAPPER in name.split('.') for name in tensors):
    notes.append(f"the prefix '{WRAPPER}.' was removed from the names")
  if left:
    notes.append(
      f'{len(left)} other tensors are left out ({named.shortened(left)})'
    )
  if averages:
    return found[averages[0]], found[others[0]], notes
  return found[others[0]], None, notes


def _unwrapped(name: str) -> str:
  return '.'.join(part for part in name.split('.') if part != WRAPPER)


def _is_averaged(head: str) -> bool:
  return bool(AVERAGED.search(head)) and not RAW.search(head)


# --- files -------------------------------------------------------------------


def _found_in(folder, stems) -> tuple[files.Path, list[str]]:
  """The file or index of the weights in a folder, and what was assumed."""
  first, first_index, first_pickled, _ = usual(stems)
  for name in usual(stems):
    if (folder / name).is_file():
      return folder / name, []
  stem = f'({"|".join(stems)})'
  there = sorted(files.entries(folder)) if folder.is_dir() else []
  variants = [name for name in there if re.fullmatch(stem + VARIANT, name)]
  safe = [name for name in there if name.endswith(SAFE)]
  pickled = [name for name in there if name.endswith(PICKLED)]
  for names in (
    [name for name in variants if name.endswith(SAFE)],
    variants,
    [name for name in there if re.fullmatch(rf'{stem}.*\.index.*\.json', name)],
    safe,
    pickled,
  ):
    if shards := [name for name in names if re.search(SHARD, name)]:
      raise UserError(
        f'{folder} holds shards ({named.shortened(shards)}) without their '
        f'index, such as {first_index}: download it, too'
      )
    if len(names) == 1:
      return folder / names[0], [f'the weights are those of {names[0]}']
    if names:
      raise UserError(
        f'{folder} holds several files of weights ({named.shortened(names)}): '
        f'give one of them, such as {folder / names[0]}'
      )
  raise UserError(
    f'{folder} has no weights: give a folder with {first} (or {first_pickled}) '
    'in it, or a file of weights'
  )


def _shards(index, digest) -> tuple[list[str], dict[str, np.ndarray]]:
  """(names of the files, tensors) of an index."""
  try:
    listed = json.loads(index.read_text())['weight_map']
    names = sorted({*listed.values()})
  except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
    raise UserError(
      f'{index} is damaged and lists no shards: download it again'
    ) from e
  tensors = {}
  for name in names:
    # A plain name: a path could lead anywhere on the reader's disk.
    if not (re.fullmatch(r'[\w.-]+', name) and is_weights(name)):
      raise UserError(
        f'{index} points to {name[:100]!r}, which is not the name of a file of '
        'weights next to it: download the folder again'
      )
    if not (index.parent / name).is_file():
      raise UserError(
        f'{index.parent / name} is missing, which {index.name} lists: download '
        'it too'
      )
    one = _tensors(index.parent / name, digest)
    tensors |= {key: one[key] for key in one if listed.get(key) == name}
  if missing := sorted(listed.keys() - tensors.keys()):
    raise UserError(
      f'{index} lists {named.shortened(missing)}, which its shards do not '
      'hold: download the folder again'
    )
  return names, tensors


def _tensors(path, digest) -> dict[str, np.ndarray]:
  """The tensors of one file; adds its bytes to the hash."""
  content = files.content(path, 'download it again, or give another file')
  digest.update(content)
  return tensors_of(path, content)


def tensors_of(path, content: bytes) -> dict[str, np.ndarray]:
  """The tensors of a file: name -> array.

  Args:
    path: the file.
    content: its bytes.

  Raises:
    UserError: it is damaged, or something else than its name says.
  """
  if content.startswith(POINTER):
    raise UserError(
      f'{path} is only a pointer of Git LFS to the weights: run git lfs pull '
      'in its folder, or download the file itself'
    )
  if path.suffix != SAFE:
    return pytorch.read(path)
  with errors.one_line(
    f'{path} is not a complete safetensors file (', '): download it again'
  ):
    return {
      name: _array(path, name, **told)
      for name, told in safetensors.deserialize(content)
    }


def _array(path, name, dtype, shape, data) -> np.ndarray:
  if dtype not in DTYPES:
    raise UserError(
      f'{path}: {name[:100]} has the dtype {dtype}: save the weights in '
      'float32, float16 or bfloat16'
    )
  array = np.frombuffer(data, DTYPES[dtype]).reshape(shape)
  return named.from_bfloat16(array) if dtype == 'BF16' else array
