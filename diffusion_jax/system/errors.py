"""A user's mistake, told once: the exception, and quiet for all others."""

import contextlib
from collections.abc import Callable, Iterator

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


@contextlib.contextmanager
def one_line(kinds, message: Callable[[str], str]) -> Iterator[None]:
  """Turns errors of damaged files into a UserError.

  Args:
    kinds: classes of errors.
    message: the reason, in one line -> the UserError's message.

  Raises:
    UserError: one of those errors was raised.
  """
  try:
    yield
  except UserError:  # a ValueError too, and in one line already
    raise
  except kinds as e:
    reason = ' '.join(str(e).split())[:200] or type(e).__name__
    raise UserError(message(reason)) from e
