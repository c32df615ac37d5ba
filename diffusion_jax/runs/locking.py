"""The lock on a run's folder against a second training process."""

import contextlib
import fcntl
from collections.abc import Iterator

from diffusion_jax.system import files, terminal
from diffusion_jax.system.errors import UserError

LOCK = '.lock'


@contextlib.contextmanager
def lock(workdir) -> Iterator[None]:
  """Creates the folder and locks it against a second training process.

  A kill releases the lock. Buckets have no locks, nor have some file systems
  (Lustre, NFS or FUSE, depending on how they are mounted): there users must
  make sure that no two processes train in the same folder.

  Raises:
    UserError: another process trains there, or the folder cannot be written.
  """
  try:
    made = files.make(workdir)
  except OSError as e:
    raise UserError(
      f'--workdir={workdir} cannot be created ({e.strerror})'
    ) from e
  if files.in_bucket(made):
    yield
    return
  with (made / LOCK).open('a') as file:
    try:
      _lock(file)
    except BlockingIOError as e:
      raise UserError(
        f'--workdir={workdir}: another process trains there; wait for it, or '
        'use another folder'
      ) from e
    except OSError as e:
      terminal.say(
        f'{workdir} is on a file system without locks ({e.strerror}): make '
        'sure that no other process trains there'
      )
    yield


def _lock(file) -> None:
  """Locks an open file; raises BlockingIOError if another process did."""
  how = fcntl.LOCK_EX | fcntl.LOCK_NB
  try:
    fcntl.flock(file, how)
  except BlockingIOError:
    raise
  except OSError:  # only BSD's locks are missing, perhaps
    try:
      fcntl.lockf(file, how)
    except PermissionError as e:  # POSIX allows EACCES in place of EAGAIN
      raise BlockingIOError(*e.args) from e
