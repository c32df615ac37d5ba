"""The compiled programs that outlive a run of the tests."""

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

LIMIT = 500e6  # bytes; those of one commit are about a tenth


def folder(otherwise) -> Path:
  """Where they lie; in `otherwise` if they cannot lie in the user's cache.

  DIFFUSION_JAX_TEST_CACHE is another folder. XLA compiles for the processor at
  hand, but its keys do not name it: our folder's name does.
  """
  chosen = os.environ.get('DIFFUSION_JAX_TEST_CACHE')
  path = Path(
    chosen or os.environ.get('XDG_CACHE_HOME') or '~/.cache',
    *([] if chosen else ['diffusion_jax_tests', _machine()]),
  )
  try:
    path = path.expanduser()
    path.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()
  except (OSError, RuntimeError):  # no home, or one that cannot be written
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
  """Removes halves of programs, and the oldest ones above LIMIT.

  JAX writes a program in place, and never again: a process that is killed
  meanwhile leaves a half, which would be compiled anew in each run.
  """
  checked = path / 'checked'
  since = checked.stat().st_mtime if checked.exists() else 0
  begin = time.time()
  sizes = []
  for entry in path.glob('*-cache'):
    with contextlib.suppress(FileNotFoundError):  # another run tidies too
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
  """Of a zlib stream; another compression's are left to its own check."""
  if program[:1] != b'\x78':
    return program != b''
  try:
    zlib.decompress(program)
  except zlib.error:
    return False
  return True
