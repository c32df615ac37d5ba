"""Compiled programs are kept in a folder, so that a restart compiles nothing.

JAX's persistent compilation cache does the work; this module chooses the
folder. JAX's keys contain the program, the versions and the kind of device, but
not the processor's features and the number of threads, for which XLA compiles
programs of a CPU. So the folder's name has them.
"""

import contextlib
import hashlib
import os
import uuid
from pathlib import Path

import filelock
import jax
import jaxlib

from diffusion_jax.system import distributed, numerics, terminal

# Bytes, above which the least recently used programs are deleted. A limit also
# makes JAX lock the folder, so that several processes can use it at once.
LIMIT = 2 * 2**30
SETTINGS = {
  'jax_compilation_cache_max_size': LIMIT,
  'jax_persistent_cache_min_compile_time_secs': 0.0,  # small ones add up
  # Their folder would be part of the keys.
  'jax_persistent_cache_enable_xla_caches': 'none',
}
LOCK = '.lockfile'  # JAX's name


def keep() -> None:
  """Keeps the programs that this process compiles, and takes kept ones.

  JAX_COMPILATION_CACHE_DIR chooses another folder, and
  JAX_ENABLE_COMPILATION_CACHE=0 switches it off; JAX reads both. Where nothing
  can be kept, a line says so and the process compiles.

  Call it in all processes, after `distributed.initialize`. Several processes
  need the folder in common: only process 0 writes, and on GPUs all processes
  must compile a program together, or none.
  """
  chosen = jax.config.jax_compilation_cache_dir is not None
  if chosen or not jax.config.jax_enable_compilation_cache:
    return
  path, wrong = None, ''
  try:
    path = _prepared(folder())
  except (OSError, RuntimeError) as e:  # RuntimeError: there is no home
    wrong = getattr(e, 'strerror', None) or str(e)
  if not _in_common(path):
    wrong = wrong or 'the processes do not share a folder'
    terminal.say(
      f'compiled programs are not kept ({wrong}); '
      'JAX_COMPILATION_CACHE_DIR=FOLDER keeps them there, '
      'JAX_ENABLE_COMPILATION_CACHE=0 hides this line'
    )
    return
  for name, value in SETTINGS.items():
    if name.upper() not in os.environ:
      jax.config.update(name, value)
  jax.config.update('jax_compilation_cache_dir', str(path))


def folder() -> Path:
  """The folder for this version, kind of device, processor and its threads.

  Raises:
    RuntimeError: there is no home directory.
  """
  caches = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
  machine = numerics.device() + _features()
  short = hashlib.sha256(machine.encode()).hexdigest()[:8]
  platform = jax.default_backend()
  name = f'{jaxlib.__version__}-{platform}-{short}'
  return caches.absolute() / 'diffusion_jax' / 'compiled' / name


def _features() -> str:
  """The features of the processor; '' if they are unknown."""
  with contextlib.suppress(OSError), open('/proc/cpuinfo') as lines:
    return next((x for x in lines if x.startswith(('flags', 'Features'))), '')
  return ''


def _prepared(path: Path) -> Path:
  """Creates the folder; deletes entries that were not written to the end.

  JAX would never replace those, and a warning in every run would follow.

  Raises:
    OSError: it cannot be written, or not be locked (filelock.Timeout).
  """
  path.mkdir(parents=True, exist_ok=True, mode=0o700)
  with filelock.FileLock(path / LOCK, timeout=10):
    for entry in path.glob('*-cache'):
      # JAX writes this file last.
      if not entry.with_name(f'{entry.name[:-6]}-atime').exists():
        entry.unlink()
  return path


def _in_common(path: Path | None) -> bool:
  """Whether all processes have a folder, and it is the same one."""
  name = distributed.gather(f'.{uuid.uuid4().hex}')[0]
  created = False
  with contextlib.suppress(OSError):
    if path and distributed.is_first():
      (path / name).touch()
      created = True
  distributed.gather(None)  # it is there
  seen = distributed.gather(bool(path) and (path / name).exists())
  if created:
    (path / name).unlink()
  return all(seen)
