"""Safe reading of arrays from untrusted .npy and .npz files.

Nothing is unpickled, and the size in a header is checked against the size of
the file before any memory is allocated.
"""

import io
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

import numpy as np

from diffusion_jax.system.errors import UserError

# No array of numbers has a longer header.
_MAX_HEADER_BYTES = 16384
# Deflate's limit, 1032, plus room for a few bytes of block headers.
_MAX_COMPRESSION = 1040
# The exceptions that NumPy and zipfile raise for damaged files.
DAMAGED = (
  *(OSError, EOFError, ValueError, LookupError, RuntimeError, SyntaxError),
  *(TypeError, AttributeError, ArithmeticError, MemoryError),
  *(tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


class Header(NamedTuple):
  """The header of a .npy stream."""

  shape: tuple[int, ...]
  dtype: np.dtype
  order: str  # 'C' or 'F'
  offset: int  # bytes before the data


def read_member(
  archive: zipfile.ZipFile,
  name: str,
  where: str,
  check_fn: Callable[[Header, str], None],
  mapped: bool = False,
) -> np.ndarray:
  """Reads one array of a .npz file after checking its header.

  Args:
    archive: the file.
    name: the name of the array.
    where: what to call the array in errors.
    check_fn: called with (header, where); raises if the array is unsuitable.
    mapped: whether to memory-map the array unless it is compressed, so that it
      may be larger than the memory. The archive must be a local file.

  Raises:
    UserError: the array is damaged, or compressed in a way NumPy does not use.
  """
  info = archive.getinfo(f'{name}.npy')
  with archive.open(info) as stream:
    header = read_header(stream, where)
  check_fn(header, where)
  check_bytes(header, info.file_size, where)
  # The two that NumPy writes; both bound how much a small file can expand to.
  if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise UserError(
      f'{where} is compressed in a way that NumPy does not use: write it with '
      'np.savez or np.savez_compressed'
    )
  if info.file_size > _MAX_COMPRESSION * info.compress_size + 1024:
    raise UserError(
      f'{where} claims {info.file_size} bytes in {info.compress_size} '
      'compressed ones: the file is damaged'
    )
  with archive.open(info) as stream:
    is_plain = info.compress_type == zipfile.ZIP_STORED and header.order == 'C'
    if not (mapped and is_plain):
      return np.lib.format.read_array(stream, allow_pickle=False)
    while stream.read(2**20):  # raises BadZipFile if a bit has flipped
      pass
  return np.memmap(
    archive.filename,
    header.dtype,
    'r',
    _start(archive, info) + header.offset,
    header.shape,
  )


def _start(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
  """The position of a member's bytes in the file."""
  fixed = 30  # bytes, the last four are the lengths of the name and of the rest
  archive.fp.seek(info.header_offset)
  lengths = struct.unpack('<HH', archive.fp.read(fixed)[-4:])
  return info.header_offset + fixed + sum(lengths)


def read_header(stream: BinaryIO, where: str) -> Header:
  """Parses the header of a .npy stream, reading a bounded number of bytes.

  Args:
    stream: the stream, at its beginning.
    where: what to call the array in errors.

  Raises:
    UserError: the array holds Python objects.
    ValueError: the header is damaged; NumPy raises many others, too.
  """
  head = io.BytesIO(stream.read(_MAX_HEADER_BYTES))
  version = np.lib.format.read_magic(head)
  if version == (1, 0):
    fields = np.lib.format.read_array_header_1_0(head)
  elif version == (2, 0):
    fields = np.lib.format.read_array_header_2_0(head)
  else:  # 3.0 is for Unicode field names, which plain arrays do not have
    raise ValueError(f'npy version {version}, need (1, 0) or (2, 0)')
  shape, is_fortran, dtype = fields
  if dtype.hasobject:
    raise UserError(
      f'{where} holds pickled Python objects, which are never loaded: write a '
      'plain array of numbers'
    )
  if min(shape, default=0) < 0:
    raise ValueError(f'shape {shape}')
  return Header(shape, dtype, 'F' if is_fortran else 'C', head.tell())


def check_bytes(header: Header, num_bytes: int, where: str) -> None:
  """Raises UserError unless the array fills its file exactly."""
  needed = header.offset + math.prod(header.shape) * header.dtype.itemsize
  if needed != num_bytes:
    raise UserError(
      f'{where} is damaged: {header.dtype} {list(header.shape)} takes '
      f'{needed} bytes, but it has {num_bytes}'
    )
