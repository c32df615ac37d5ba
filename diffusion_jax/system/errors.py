"""A user's mistake, told once: the exception, and quiet for all others."""

import contextlib
from collections.abc import Iterator

from absl import logging


class UserError(ValueError):
  """A mistake of the user: what was given, what is allowed, what to do.

  The message is one line. The binaries print it and exit with code 2; a bug of
  ours is any other exception, and keeps its traceback.
  """


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Hides what libraries log of a mistake that is told in one line here."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)
