"""User errors: the exception, and helpers that keep the report to one line."""

import contextlib
import difflib
import errno
import re
import traceback
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from absl import logging

# Of the many messages of XLA and its plugins, what those about memory and those
# about missing devices have in common.
_MEMORY = re.compile('RESOURCE_EXHAUSTED|out of memory|OUT_OF_MEMORY', re.I)
_DEVICES = re.compile(
  "unable to initialize backend|backend '.*' failed to initialize|"
  'unknown backend|not in the list of known backends',
  re.I,
)
_BYTES = re.compile(r'(?:allocat\w+|requires) ([\d.]+ ?\w*)')

# What to do when a training step does not fit.
FIT = (
  'raise microbatches, or lower batch_size (preflight --largest_batch finds '
  'the largest that fits)'
)


class UserError(ValueError):
  """A mistake of the user: what was given, what is allowed, what to do.

  The message is one line. The binaries print it and exit with code 2. Any other
  exception is a bug and keeps its traceback.
  """


def hint(
  value: Any, allowed: Collection, aliases: Mapping | None = None
) -> str:
  """'; did you mean X?' for a value like an allowed one, otherwise ''.

  Args:
    value: the value that is not allowed.
    allowed: the allowed values; only words can be alike.
    aliases: other projects' names -> allowed values.
  """
  plain = str(value).lower().strip().replace('-', '_').replace(' ', '_')
  words = [word for word in allowed if isinstance(word, str)]
  close = difflib.get_close_matches(plain.replace('+', 'p'), words, 1)
  meant = [*filter(None, [(aliases or {}).get(plain)]), *close]
  return f'; did you mean {meant[0]}?' if meant else ''


def one_of(
  option: str, value: Any, allowed: Collection, aliases: Mapping | None = None
) -> Any:
  """Returns the value of an option if it is allowed.

  Args:
    option: the option's name.
    value: its value.
    allowed: the allowed values.
    aliases: other projects' names -> allowed values, for the message.

  Raises:
    UserError: it is not.
  """
  if value not in allowed:
    known = ', '.join(map(str, allowed))
    meant = hint(value, allowed, aliases)
    raise UserError(f'{option}={value!r}: one of {known}{meant}')
  return value


def out_of_memory(error: BaseException) -> str:
  """'out of memory (...)' if this error or its cause says so, otherwise ''."""
  for one in _causes(error):
    if isinstance(one, UserError):
      return ''
    if isinstance(one, MemoryError) or (
      isinstance(one, OSError) and one.errno == errno.ENOMEM
    ):
      return f'out of memory of the host ({_line(one)})'
    if isinstance(one, RuntimeError | ValueError) and _MEMORY.search(str(one)):
      wanted = _BYTES.search(str(one))
      return f'out of memory ({wanted[0] if wanted else _line(one)})'
  return ''


def no_device(error: BaseException) -> str:
  """Why JAX found no device, if the error is about that; otherwise ''."""
  for one in _causes(error):
    frames = traceback.extract_tb(one.__traceback__)
    # An assertion is all that JAX says if no plugin of a platform is installed.
    where = frames[-1].filename if frames else ''
    if isinstance(one, AssertionError) and where.endswith('xla_bridge.py'):
      return 'JAX found none'
    if isinstance(one, RuntimeError) and _DEVICES.search(str(one)):
      return _line(one)
  return ''


def _causes(error) -> Iterator[BaseException]:
  while error is not None:
    yield error
    error = error.__cause__


def _line(error: BaseException) -> str:
  return ' '.join(str(error).split())[:200] or type(error).__name__


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
