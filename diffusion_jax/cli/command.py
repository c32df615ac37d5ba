"""How every binary starts: flags, --help, --config, and error messages.

A user's mistake gives one line on stderr and exit code 2, whatever raised it:
absl's flags, ml_collections, a check, a file. A bug keeps its traceback.
"""

import errno
import multiprocessing
import os
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from diffusion_jax.cli import config_files
from diffusion_jax.runs import completion
from diffusion_jax.system import distributed, errors, numerics, terminal
from diffusion_jax.system.errors import UserError

flags.disclaim_key_flags()  # --config belongs to the binary

HELP = ('--help', '-h', '-help', '--helpfull')

# Raised by absl and ml_collections for a mistake on the command line.
FLAG_ERRORS = (flags.Error, AttributeError, LookupError, TypeError, ValueError)

# Errors of the file system, which are never bugs.
DISK = (
  *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
  *(errno.EACCES, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK),
  *(errno.ESTALE, errno.ENOTCONN, errno.ENAMETOOLONG, errno.EMFILE),
  *(errno.ENFILE, errno.ETIMEDOUT, errno.EXDEV),
)


def define_config(
  help: str = 'Config of the run: a file, or the name of a shipped config.',
  default: str | None = None,
) -> None:
  """Defines --config, and --print_config, which prints the resulting config.

  Args:
    help: what the binary uses it for.
    default: the name of a shipped config, or None.
  """
  config_flags.DEFINE_config_file('config', default, help)
  flags.DEFINE_bool(
    'print_config', False,
    'Print the whole config, including changes by other flags, as a file for '
    '--config, and exit.',
  )  # fmt: skip


def run(main: Callable[[], int | None], doc: str, required: Sequence[str] = ()):
  """Runs a binary's main. This is the last line of the binary's file.

  Args:
    main: called without arguments after the flags are parsed and checked;
      returns the exit code, None for 0.
    doc: the binary's docstring, which --help prints.
    required: names of flags that must be given.
  """
  sys.modules['__main__'].__doc__ = doc
  terminal.prepare()
  numerics.fix()
  warnings.filterwarnings('ignore', module='PIL')  # of remarks in image files
  distributed.skip_libtpu()
  sys.argv = _resolve_config(_last(sys.argv))

  def parse(argv):
    if any(word in HELP for word in argv):
      _help(doc, full='--helpfull' in argv)
    try:
      rest = flags.FLAGS(argv)
      if rest[1:]:
        raise UserError(
          f'{rest[1]!r} is not a flag: every argument is --name=value'
        )
      if 'print_config' in flags.FLAGS and flags.FLAGS.print_config:
        if flags.FLAGS.config is None:
          raise UserError('--config is missing; see --help')
        terminal.write(config_files.source(flags.FLAGS.config))
        sys.exit(0)
      need(*required)
    except UserError as e:
      terminal.fail(str(e))
    except FLAG_ERRORS as e:
      terminal.fail(_one_line(e, argv))
    return rest

  def wrapped(argv):
    del argv
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)  # Orbax writes pages at INFO
    try:
      return _call(main)
    except KeyboardInterrupt as e:
      kept = ''.join(f'; {note}' for note in getattr(e, '__notes__', []))
      told = f'\ninterrupted{kept}; run the same command again to resume'
      print(told, file=sys.stderr)
      # A normal exit would destroy objects that XLA may still use. Nothing is
      # left to save: all contexts have exited.
      for child in multiprocessing.active_children():
        child.terminate()
      distributed.leave(130, alone=True)

  app.run(wrapped, flags_parser=parse)


def _call(main: Callable[[], int | None]) -> int:
  """Calls a binary's main and handles its exceptions; returns its exit code."""
  try:
    code = main() or 0
    distributed.finish(code)
    return code
  except UserError as e:
    terminal.fail(str(e))
  except Exception as e:
    distributed.begin_to_leave()
    if told := _of_machine(e):
      terminal.fail(told)
    traceback.print_exc()
    distributed.leave(1)
    sys.exit(1)


def _of_machine(error: Exception) -> str:
  """The line about an error of the machine, which is no bug; otherwise ''."""
  if told := errors.out_of_memory(error):
    return f'{told}: {_smaller()}'
  if told := errors.no_device(error):
    wanted = os.environ.get('JAX_PLATFORMS')
    what = f'JAX_PLATFORMS={wanted}' if wanted else 'the devices'
    return (
      f'{what}: no such device can be used ({told}); check its driver and that '
      "JAX is installed for it, as with pip install '.[cuda]' or '.[tpu]', or "
      'set JAX_PLATFORMS=cpu'
    )
  if isinstance(error, OSError) and error.errno in DISK:
    at = f': {error.filename}' if error.filename else ''
    return f'{error.strerror}{at}'
  if isinstance(error, RuntimeError) and 'home directory' in str(error):
    return "'~' in a path needs HOME, which is not set: give the whole path"
  if isinstance(error, FileNotFoundError) and 'temporary' in str(error):
    return (
      f'{error.strerror or error}: set TMPDIR to a folder that can be written'
    )
  return ''


def _smaller() -> str:
  """What to do about memory, by the flags of this binary."""
  if 'batch_size' in flags.FLAGS:
    size = flags.FLAGS['batch_size'].value
    return f'give a smaller --batch_size (now {size}), or use more devices'
  config = flags.FLAGS['config'].value if 'config' in flags.FLAGS else None
  if config is None:
    return 'use a machine with more memory'
  now = f'microbatches={config.microbatches}, batch_size={config.batch_size}'
  return f'{errors.FIT}; now {now}'


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
    # Flags that may be given several times say so, and absl does again.
    told = re.sub(r';\s+repeat this option.*', '', flag.help)
    text = textwrap.fill(
      f'{name:<16} {told}{shown}',
      width=79,
      initial_indent='  ',
      subsequent_indent=' ' * 19,
    )
    lines.append(text)
  lines.append("\nDefaults are in brackets. --helpfull lists absl's flags too.")
  if full:
    lines.append(flags.FLAGS.get_help())
  terminal.write('\n'.join(lines))
  sys.exit(0)


def _one_line(error: Exception, argv: Sequence[str]) -> str:
  """A library's error message without its quotes and line breaks."""
  if isinstance(error, KeyError | AttributeError) and error.args:
    # ml_collections quotes its two lines, 'KEY\nDid you mean ...', twice.
    text = str(error.args[0]).replace('\\n', ' ')
    key = re.search(r'\w+', text)[0]
    given = next((w for w in argv if key in w.split('=')[0].split('.')), key)
    names = given.split('=')[0].split('.')
    meant = completion.suggest('.'.join(names[1 : names.index(key) + 1]) or key)
    return f'{given}: there is no config key {key!r}' + (
      f'; did you mean {meant}?' if meant else ''
    )
  text = ' '.join(line.strip() for line in str(error).splitlines())
  if isinstance(error, flags.UnrecognizedFlagError):
    text = text.replace(' ?', '?') + '; see --help'
    # Not where absl suggests a flag that the binary has.
    if 'config' in flags.FLAGS and 'Did you mean' not in text:
      meant = completion.suggest(error.flagname)
      text += f'; did you mean --config.{meant}?' * bool(meant)
  return text


def _resolve_config(argv: list[str]) -> list[str]:
  """Replaces --config=NAME by a file: the one given, or a shipped one."""
  resolved, words = [], iter(argv)
  for word in words:
    if word in ('--config', '-config'):
      word = f'--config={next(words, "")}'
    if word.startswith(('--config=', '-config=')):
      value = word.split('=', 1)[1]
      path, colon, argument = value.partition(':')
      found = config_files.find_config(path)
      if found is None:
        terminal.fail(
          f'--config={value}: there is no such file, and the shipped configs '
          f'are {", ".join(config_files.shipped_configs())}'
        )
      word = f'--config={config_files.through(found)}{colon}{argument}'
    resolved.append(word)
  return resolved


def _last(argv: list[str]) -> list[str]:
  """Keeps the last of the flags that are given twice, as absl and shells do.

  So a flag of an alias or a script can be overridden. All of a flag that may
  be given several times are kept.
  """
  groups, words = [], iter(argv[1:])
  for word in words:
    name, given, _ = word.lstrip('-').partition('=')
    bare = next((n for n in (name, name.removeprefix('no')) if _switch(n)), '')
    spaced = word[0:1] == '-' and not given and not bare
    group = [word, *([next(words, '')] if spaced else [])]
    alone = word[:1] == '-' and not _is_several(name)
    groups.append((bare or name if alone else object(), group))
  last = dict(groups)
  for name, group in last.items():
    before = [other for same, other in groups if same == name][:-1]
    if any(other != group for other in before):
      terminal.say(
        f'--{name} is given {len(before) + 1} times: the last one counts, '
        f'{" ".join(group)}'
      )
  kept = [
    word for name, group in groups if last[name] is group for word in group
  ]
  return [*argv[:1], *kept]


def _is_several(name: str) -> bool:
  """Whether it is a flag that may be given several times."""
  return name in flags.FLAGS and isinstance(flags.FLAGS[name], flags.MultiFlag)


def _switch(name: str) -> bool:
  """Whether it is a flag without a value."""
  return name in flags.FLAGS and flags.FLAGS[name].boolean


def task(doc: str, tasks: Mapping[str, str]) -> str:
  """Takes the task off the command line of a binary that has several.

  Args:
    doc: the binary's docstring, which --help prints, followed by the tasks.
    tasks: name -> what it does.

  Returns:
    the name; the arguments behind it stay in sys.argv.
  """
  terminal.prepare()
  given = sys.argv[1] if len(sys.argv) > 1 else ''
  if given in HELP:
    width = max(map(len, tasks))
    rows = [f'  {name:<{width}}  {what}' for name, what in tasks.items()]
    terminal.write('\n'.join([doc.strip(), '', *rows]))
    sys.exit(0)
  known = ', '.join(tasks)
  if not given or given.startswith('-'):
    terminal.fail(f'the first argument is the task: one of {known}')
  if given not in tasks:
    hint = errors.hint(given, tasks)
    terminal.fail(f'there is no task {given!r}: one of {known}{hint}')
  del sys.argv[1]
  return given


def need(*names: str) -> None:
  """Raises UserError if one of these flags is missing."""
  for name in names:
    if not flags.FLAGS[name].value:
      raise UserError(f'--{name} is missing; see --help')


def at_least(**least: float) -> None:
  """Raises UserError for flags out of range: name = the minimum."""
  for name, value in least.items():
    given = flags.FLAGS[name].value
    if given is not None and given < value:
      raise UserError(f'--{name}={given}: at least {value}')


def refuse(names: Sequence[str], what: str) -> None:
  """Raises UserError for flags that are given but would be ignored.

  Args:
    names: the names of the flags.
    what: the operation that ignores them.
  """
  for name in names:
    if flags.FLAGS[name].present:
      raise UserError(f'--{name} does not apply to {what}: leave it out')


def seeds(*names: str) -> None:
  """Raises UserError for flags that are not valid seeds."""
  at_least(**dict.fromkeys(names, 0))
  for name in names:
    if (flags.FLAGS[name].value or 0) >= 2**32:
      raise UserError(f'--{name}={flags.FLAGS[name].value}: below 2**32')
