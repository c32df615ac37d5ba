"""What the binaries share: answers to mistakes, progress, tables.

A mistake of the user gets one line on stderr and exit code 2, whatever raised
it: absl's flags, ml_collections, a check, a file. A bug keeps its traceback.
"""

import contextlib
import errno
import importlib.util
import json
import multiprocessing
import os
import re
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import app, flags, logging
from tqdm import tqdm

from diffusion_jax import distributed
from diffusion_jax.errors import UserError

# What absl and ml_collections raise for a mistake on the command line.
FLAG_ERRORS = (
  flags.Error,
  AttributeError,
  LookupError,
  TypeError,
  ValueError,
)

# Not bugs, wherever they are raised.
DISK = (
  *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
  *(errno.EACCES, errno.EPERM),
)


# Who started a binary may name a file there, to read its one line again: stderr
# is the user's, whose terminal shows bars only where nothing is in between.
ERROR_FILE = 'DIFFUSION_JAX_ERROR_FILE'


def fail(message: str) -> None:
  """One line on stderr, exit code 2, at once.

  Python's own exit waits for all threads, and those of a save that has failed
  wait for minutes.
  """
  print(f'error: {message}', file=sys.stderr, flush=True)
  if path := os.environ.get(ERROR_FILE):
    with contextlib.suppress(OSError):
      Path(path).write_text(message)
  distributed.leave(2, alone=True)


def run(main: Callable[[], None], doc: str, required: Sequence[str] = ()):
  """Runs a binary's main; the last line of its file.

  Args:
    main: called without arguments once the flags are parsed and well.
    doc: the binary's docstring, shown by --help.
    required: flags that must be given.
  """
  sys.modules['__main__'].__doc__ = doc
  sys.argv = _resolve_config(sys.argv)

  def parse(argv):
    if any(word in ('--help', '-h', '-help', '--helpfull') for word in argv):
      _help(doc, full='--helpfull' in argv)
    names = [word.split('=')[0] for word in argv[1:] if word[:2] == '--']
    for name in sorted(set(names)):
      if names.count(name) > 1:
        fail(f'{name} is given {names.count(name)} times')
    try:
      rest = flags.FLAGS(argv)
      for name in required:
        if not flags.FLAGS[name].value:
          raise UserError(f'--{name} is missing; see --help')
      if 'config' in required:
        # A file that is not there is an error only once it is touched.
        _ = flags.FLAGS.config.to_dict
      if rest[1:]:
        raise UserError(
          f'{rest[1]!r} is not a flag: every argument is --name=value'
        )
    except UserError as e:
      fail(str(e))
    except FLAG_ERRORS as e:
      cause = _raised_by_config(e)
      if cause and not isinstance(cause, UserError):
        raise cause from None  # a bug
      fail(_one_line(cause or e, argv))
    return rest

  def wrapped(argv):
    del argv
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)  # Orbax writes pages at INFO
    try:
      _call(main)
    except KeyboardInterrupt:
      print(
        '\ninterrupted; the same command goes on from what is kept',
        file=sys.stderr,
      )
      # Python's own end takes apart what XLA may still compute with. What was
      # to be saved is: contexts have ended.
      for child in multiprocessing.active_children():
        child.terminate()
      distributed.leave(130, alone=True)

  app.run(wrapped, flags_parser=parse)


def _call(main: Callable[[], None]) -> None:
  """Calls a binary's main, and answers to what it raises."""
  try:
    main()
    distributed.finish()
  except UserError as e:
    fail(str(e))
  except Exception as e:
    if isinstance(e, OSError) and e.errno in DISK:
      fail(f'{e.strerror}: {e.filename}' if e.filename else e.strerror)
    traceback.print_exc()
    distributed.leave(1)
    sys.exit(1)


def _help(doc: str, full: bool) -> None:
  """Prints the docstring and the binary's own flags; exits with 0."""
  lines = [doc.strip() + '\n\nFlags:']
  own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
  for flag in sorted(own, key=lambda flag: flag.name):
    default = flag.default
    if isinstance(default, list):
      default = ','.join(default) or None
    shown = '' if default is None else f' [{default}]'
    name = f'--[no]{flag.name}' if flag.boolean else f'--{flag.name}'
    text = textwrap.fill(
      f'{name:<16} {flag.help}{shown}',
      width=79,
      initial_indent='  ',
      subsequent_indent=' ' * 19,
    )
    lines.append(text)
  lines.append("\nIn brackets: defaults. absl's own flags: --helpfull.")
  if full:
    lines.append(flags.FLAGS.get_help())
  _print('\n'.join(lines))
  sys.exit(0)


def _raised_by_config(error: Exception) -> Exception | None:
  """What get_config raised, out of ml_collections' and absl's wrappings."""
  wrapped = 'Error whilst parsing config file'
  given, found, _ = str(error).removeprefix('flag ').partition(f': {wrapped}')
  if not found:
    return None
  while wrapped in str(error):
    error = error.__context__
  if 'get_config() takes 0' in str(error):
    return UserError(f'{given}: this config takes nothing after a colon')
  return error


def _one_line(error: Exception, argv: Sequence[str]) -> str:
  """A library's message, without its quotes and line breaks."""
  if isinstance(error, KeyError | AttributeError) and error.args:
    # ml_collections quotes its two lines, 'KEY\nDid you mean ...', twice over.
    text = str(error.args[0]).replace('\\n', ' ')
    key = re.search(r'\w+', text)[0]
    hint = re.search(r'Did you mean \W*(\w+)', text)
    given = next((w for w in argv if key in w.split('=')[0].split('.')), key)
    return f'{given}: there is no config key {key!r}' + (
      f'; did you mean {hint[1]}?' if hint else ''
    )
  text = ' '.join(line.strip() for line in str(error).splitlines())
  if isinstance(error, flags.UnrecognizedFlagError):
    text = text.replace(' ?', '?') + '; see --help'
  return text


def _resolve_config(argv: list[str]) -> list[str]:
  """Turns --config=NAME into a file: as given, or one that is shipped."""
  resolved, words = [], iter(argv)
  for word in words:
    if word in ('--config', '-config'):
      word = f'--config={next(words, "")}'
    if word.startswith(('--config=', '-config=')):
      value = word.split('=', 1)[1]
      path, colon, argument = value.partition(':')
      found = find_config(path)
      if found is None:
        fail(
          f'--config={value}: there is no such file, and the shipped configs '
          f'are {", ".join(shipped_configs())}'
        )
      word = f'--config={found}{colon}{argument}'
    resolved.append(word)
  return resolved


def _config_folders() -> list[str]:
  spec = importlib.util.find_spec('diffusion_jax.configs')
  folders = list(spec.submodule_search_locations) if spec else []
  # A checkout that is not installed, used from another folder.
  return [*folders, str(Path(__file__).parent.parent / 'configs')]


def shipped_configs() -> list[str]:
  names = set()
  for folder in _config_folders():
    names |= {path.stem for path in Path(folder).glob('[!_]*.py')}
  return sorted(names)


def shipped_config(name: str) -> str | None:
  """The file of a shipped config, whatever lies in this folder."""
  candidates = [os.path.join(f, f'{name}.py') for f in _config_folders()]
  return next((path for path in candidates if os.path.isfile(path)), None)


def find_config(name: str) -> str | None:
  """The file of a config: a path, or the name of a shipped one."""
  base = name.removeprefix('configs/').removesuffix('.py')
  candidates = [name] * name.endswith('.py') + [f'{name}.py']
  there = (path for path in candidates if os.path.isfile(path))
  return next(there, None) or shipped_config(base)


# --- progress and results ---------------------------------------------------


class Progress:
  """A bar on a terminal, a line now and then elsewhere; on stderr.

  Args:
    title: what is counted.
    total: how many there will be.
    done: how many there are already.
    unit: of the count.
    seconds: between lines where there is no terminal.
  """

  def __init__(self, title, total, done=0, unit='steps', seconds=20.0):
    self._terminal = sys.stderr.isatty() and distributed.is_first()
    self._title, self._unit, self._seconds = title, unit, seconds
    self._done, self._first, self._total = done, done, total
    self._note, self._start, self._last = '', None, time.monotonic()
    self._bar = tqdm(
      total=total,
      initial=done,
      desc=title,
      unit=f' {unit}',
      disable=not self._terminal,
      dynamic_ncols=True,
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._bar.close()

  def update(self, count: int = 1, note: str = '') -> None:
    """Counts on; a note ('loss 0.03') stays until the next one."""
    self._done += count
    self._bar.update(count)
    if note:
      self._note = note
      self._bar.set_postfix_str(note, refresh=False)
    now = time.monotonic()
    if self._start is None:
      # The first takes the compilation, and would spoil the rate.
      self._start, self._first = now, self._done
    elif (
      not self._terminal
      and distributed.is_first()
      and (now - self._last > self._seconds or self._done == self._total)
    ):
      self._last = now
      rate = (self._done - self._first) / (now - self._start)
      left = tqdm.format_interval((self._total - self._done) / rate)
      print(
        f'{self._title}: {self._done}/{self._total} {self._unit}, '
        f'{rate:.3g} {self._unit}/s, {left} left'
        + (f', {self._note}' if self._note else ''),
        file=sys.stderr,
        flush=True,
      )


@contextlib.contextmanager
def waiting(title: str, seconds: float = 20.0) -> Iterator[None]:
  """Shows that something long is under way, whose end is not known; on stderr.

  Args:
    title: what is.
    seconds: between lines where there is no terminal.
  """
  terminal = sys.stderr.isatty()
  start, done = time.monotonic(), threading.Event()

  def told():
    return f'{title}: {time.monotonic() - start:.0f} s'

  def tell():
    while not done.wait(1.0 if terminal else seconds):
      print(told(), file=sys.stderr, end='\r' if terminal else '\n', flush=True)

  if not distributed.is_first():
    yield
    return
  say(title)
  thread = threading.Thread(target=tell, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
    if terminal:
      print('\r' + ' ' * len(told()), file=sys.stderr, end='\r', flush=True)


def at_least(**least: float) -> None:
  """Raises UserError for flags out of range: name = the least allowed."""
  for name, value in least.items():
    given = flags.FLAGS[name].value
    if given is not None and given < value:
      raise UserError(f'--{name}={given}: at least {value}')


def say(text: str) -> None:
  """A line for people, on stderr: what runs, not what came of it."""
  if distributed.is_first():
    print(text, file=sys.stderr, flush=True)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of aligned text: the first column to the left, numbers right."""
  widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

  def line(cells):
    first, *others = (
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return '  '.join([first, *others]).rstrip()

  return [line(cells) for cells in (heads, *rows)]


def report(result: dict, text: str, as_json: bool) -> None:
  """A binary's last word on stdout: a line for people, or JSON."""
  if distributed.is_first():
    _print(json.dumps(result, indent=2) if as_json else text)


def _print(text: str) -> None:
  try:
    print(text, flush=True)
  except BrokenPipeError:
    # Who read along has gone; Python's own flush at the end would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except OSError as e:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    fail(f'standard output cannot be written ({e.strerror})')
