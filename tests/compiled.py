"""The folder of compiled programs that is kept between runs of the tests."""

import contextlib
import hashlib
import os
import platform
import sys
import tempfile
import time
import zlib
from pathlib import Path

from jaxlib import version

LIMIT = 500e6  # bytes; the programs of one commit are about a tenth


def folder(otherwise) -> Path:
  """The folder, which is made; `otherwise` if it cannot be written.

  It is DIFFUSION_JAX_TEST_CACHE, or one in the user's cache whose name has the
  processor's features: XLA compiles for them, but JAX's keys do not have them.
  """
  path = Path(
    os.environ.get('DIFFUSION_JAX_TEST_CACHE')
    or Path(
      os.environ.get('XDG_CACHE_HOME') or '~/.cache',
      'diffusion_jax_tests',
      _machine(),
    )
  )
  try:
    path = path.expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()
  except (OSError, RuntimeError):  # RuntimeError: there is no home
    return Path(otherwise)
  return path


def _machine() -> str:
  python = f'{sys.version_info.major}.{sys.version_info.minor}'
  processor = platform.machine() + platform.processor()
  with contextlib.suppress(OSError), open('/proc/cpuinfo') as lines:
    processor += next((line for line in lines if line.startswith('flags')), '')
  short = hashlib.sha256(processor.encode()).hexdigest()[:8]
  return f'{version.__version__}-{python}-{short}'


def tidy(path: Path) -> None:
  """Removes damaged programs, and the least recently used above LIMIT.

  JAX writes a program's file in place and never rewrites it. A process that is
  killed while it writes leaves a damaged file, which costs a warning and a
  compilation in every later run.
  """
  checked = path / 'checked'
  since = checked.stat().st_mtime if checked.exists() else 0
  begin = time.time()
  sizes = []
  for entry in path.glob('*-cache'):
    with contextlib.suppress(FileNotFoundError):  # another run removed it
      stat = entry.stat()
      if stat.st_mtime >= since and not _whole(entry.read_bytes()):
        entry.unlink()
      else:
        used = max(stat.st_atime, stat.st_mtime)
        sizes.append((used, stat.st_size, entry))
  room = LIMIT
  for _, size, entry in sorted(sizes, reverse=True):
    room -= size
    if room < 0:
      entry.unlink(missing_ok=True)
  checked.touch()
  os.utime(checked, (begin, begin))


def _whole(program: bytes) -> bool:
  """Whether a zlib stream can be read; JAX may use another compression."""
  if program[:1] != b'\x78':
    return program != b''
  try:
    zlib.decompress(program)
  except zlib.error:
    return False
  return True
