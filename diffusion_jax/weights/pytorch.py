"""Reads PyTorch weight files without PyTorch, and without executing anything.

Such a file is a pickle, a program that can call any function. Here only a few
names are allowed, each replaced by something inert; any other name is refused.
There are two layouts: a zip file, and the layout of torch.save before version
1.6, a stream of pickles followed by the bytes of the tensors.
"""

import io
import math
import pickle
import zipfile
from typing import NamedTuple

import numpy as np

from diffusion_jax.system import errors, files
from diffusion_jax.weights import named

_KINDS = {
  **{'Double': '<f8', 'Float': '<f4', 'Half': '<f2', 'Long': '<i8'},
  **{'Int': '<i4', 'Short': '<i2', 'Char': 'i1', 'Byte': 'u1', 'Bool': '?'},
}
STORAGES = {f'{kind}Storage': dtype for kind, dtype in _KINDS.items()}
_BFLOAT16 = '<u2'  # of no other kind
STORAGES['BFloat16Storage'] = _BFLOAT16

# The magic number of the older layout, and its only version.
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001

MOST_DICTS = 8  # within each other
MOST_ENTRIES = 10**6
LONGEST = 1000  # letters of a name


def read(path) -> dict[str, np.ndarray]:
  """Reads the tensors of a state dict written by torch.save.

  Args:
    path: the file, in either layout.

  Returns:
    {name: array}, in the file's order; the arrays are read-only views, and
    float32 copies of bfloat16. Entries that are not tensors are left out. Names
    in nested dicts are joined by dots: 'model.weight' for {'model': {'weight':
    ...}}.

  Raises:
    UserError: there is no such file, it is something else or damaged, or it
      refers to names that weights do not need.
  """
  data = files.content(path, 'give a file of PyTorch weights')
  with errors.one_line(
    f'{path} is not a PyTorch state dict (',
    '); nothing in it was executed: give the weights as published, or save '
    'only the state dict with torch.save',
  ):
    state, storages = (_zipped if data[:4] == b'PK\3\4' else _stream)(data)
    tensors = {
      name: named.from_bfloat16(array) if array.dtype == _BFLOAT16 else array
      for name, value in _flattened(state)
      for array in [_array(value, storages)]
    }
    if not tensors:
      raise ValueError('it holds no named tensors')
  return tensors


def _flattened(state) -> list[tuple[str, '_Tensor']]:
  """(name, tensor) of all tensors in dicts, to a depth of MOST_DICTS.

  Raises:
    ValueError: a small file claims to be huge, by dicts that contain each
      other or by long names.
  """
  found, waiting, count = [], [(None, state, 0)], 0
  while waiting:
    name, value, depth = waiting.pop()
    count += 1
    if count > MOST_ENTRIES or len(name or '') > LONGEST:
      raise ValueError('it has too many or too long names')
    if isinstance(value, _Tensor) and name is not None:
      found.append((name, value))
    elif isinstance(value, dict) and depth < MOST_DICTS:
      waiting += [
        (key if name is None else f'{name}.{key}', inner, depth + 1)
        for key, inner in reversed(value.items())
        if isinstance(key, str)
      ]
  return found


class _Storage(NamedTuple):
  key: str
  dtype: np.dtype
  count: int


class _Tensor(NamedTuple):
  storage: _Storage
  offset: int
  shape: tuple
  strides: tuple


class _State(dict):
  """An OrderedDict without the attributes of a state dict."""

  def __setstate__(self, state):
    pass


# The Python version: the C version allocates memory for any memo index.
class _Unpickler(pickle._Unpickler):
  """Only supports the elements of a state dict."""

  def __init__(self, file):
    super().__init__(file, encoding='utf-8')
    self.storages = {}

  def find_class(self, module, name):
    # New objects each time, because a pickle can modify them.
    if (module, name) == ('collections', 'OrderedDict'):
      return lambda *args: _State(*args)
    if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
      return lambda *args: _Tensor(*args[:4])
    if (module, name) == ('torch._utils', '_rebuild_parameter'):
      return lambda tensor, *_: tensor
    if module == 'torch' and name in STORAGES:
      return STORAGES[name]
    raise ValueError(
      f'it names {f"{module}.{name}"[:100]}, which weights do not need'
    )

  def persistent_load(self, pid):
    kind, dtype, key, _, count, *views = pid
    if (
      kind != 'storage'
      or not isinstance(key, str)
      or dtype not in STORAGES.values()
      or not isinstance(count, int)
      or any(view is not None for view in views)
    ):
      raise ValueError('it refers to something other than a plain storage')
    self.storages[key] = _Storage(key, np.dtype(dtype), count)
    return self.storages[key]


def _zipped(data: bytes):
  """(saved object, {key: bytes}) of the current layout."""
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    # torch.save writes entries that are not compressed and do not overlap.
    infos = archive.infolist()
    for info in infos:
      if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f'{info.filename[:100]} in it is compressed')
    if sum(info.file_size for info in infos) > len(data):
      raise ValueError('its entries are larger than the file')
    entries = {
      info.filename.partition('/')[2]: archive.read(info) for info in infos
    }
  if entries.get('byteorder', b'little') != b'little':
    raise ValueError('its numbers are big-endian')
  if 'data.pkl' not in entries:
    raise ValueError('a zip file without data.pkl')
  state = _Unpickler(io.BytesIO(entries['data.pkl'])).load()
  return state, {
    name.removeprefix('data/'): entry
    for name, entry in entries.items()
    if name.startswith('data/')
  }


def _stream(data: bytes):
  """(saved object, {key: bytes}) of the layout before PyTorch 1.6."""
  if not data.startswith(pickle.dumps(MAGIC, 2)):
    raise ValueError('it starts like no layout of torch.save')
  file = io.BytesIO(data)
  _, protocol, system = (_Unpickler(file).load() for _ in range(3))
  if protocol != PROTOCOL or not system['little_endian']:
    raise ValueError('its protocol is not 1001, or it is big-endian')
  unpickler = _Unpickler(file)
  state = unpickler.load()
  found = {}
  for key in _Unpickler(file).load():
    _, dtype, count = unpickler.storages[key]
    if int.from_bytes(file.read(8), 'little') != count:
      raise ValueError(f'storage {key[:100]} is of another size')
    found[key] = file.read(count * dtype.itemsize)
  return state, found


def _array(tensor: _Tensor, storages: dict[str, bytes]) -> np.ndarray:
  """A tensor as a view of its storage, after checking its bounds."""
  storage, offset, shape, strides = tensor
  flat = np.frombuffer(storages.get(storage.key, b''), storage.dtype)
  if len(flat) != storage.count:
    raise ValueError(f'storage {storage.key[:100]} is missing or cut off')
  if len(shape) != len(strides) or min(offset, *shape, *strides, 0) < 0:
    raise ValueError('a tensor has an invalid shape')
  if 0 in shape:
    return flat[:0].reshape(shape)
  end = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  # The second check rejects strides of 0, which would expand the storage.
  if end >= len(flat) or math.prod(shape) > len(flat):
    raise ValueError('a tensor is not within its storage')
  return np.lib.stride_tricks.as_strided(
    flat[offset:], shape, [s * flat.itemsize for s in strides], writeable=False
  )
