"""User errors: the exception, and helpers that keep the report to one line."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from absl import logging


class UserError(ValueError):
  """A mistake of the user: what was given, what is allowed, what to do.

  The message is one line. The binaries print it and exit with code 2. Any other
  exception is a bug and keeps its traceback.
  """


def one_of(option: str, value: Any, allowed: Collection) -> Any:
  """Returns the value of an option; raises UserError unless it is allowed."""
  if value not in allowed:
    known = ', '.join(map(str, allowed))
    raise UserError(f'{option}={value!r}: one of {known}')
  return value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Hides what libraries log about an error that is reported in one line."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


@contextlib.contextmanager
def one_line(before: str, after: str = '') -> Iterator[None]:
  """Turns the errors that damaged files cause into a UserError.

  Put only the reading of the file inside: every exception is turned into one,
  because the libraries that read files raise dozens, with no common class.

  Args:
    before: the UserError's message up to the reason, which is one line.
    after: the rest of the message.

  Raises:
    UserError: any exception was raised.
  """
  try:
    yield
  except UserError:  # already one line
    raise
  except Exception as e:
    reason = ' '.join(str(e).split())[:200] or type(e).__name__
    raise UserError(f'{before}{reason}{after}') from e
