"""Config files for --config: the user's own and the shipped ones.

Every binary reads its config through this module: `command` makes
ml_collections load it, and its `get_config` loads the user's file, adds missing
keys with their defaults, and rejects unknown keys.
"""

import inspect
import json
import math
import os
import re
import runpy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from diffusion_jax import configs
from diffusion_jax.configs import default
from diffusion_jax.runs import completion
from diffusion_jax.system import terminal
from diffusion_jax.system.errors import UserError

# What ml_collections says of a value of another type than the key's.
CAST = re.compile(
  "field '(.+?)'.* type <class '(.+?)'>.* type <class '(.+?)'>", re.DOTALL
)
KEY = re.compile(r'  (config\.[\w.]+) = .*?(  # .*)?')


def shipped_configs() -> list[str]:
  return sorted(
    path.stem
    for folder in configs.__path__
    for path in Path(folder).glob('[!_]*.py')
  )


def shipped_config(name: str) -> str | None:
  """The path of a shipped config, ignoring the working directory."""
  candidates = [os.path.join(f, f'{name}.py') for f in configs.__path__]
  return next((path for path in candidates if os.path.isfile(path)), None)


def find_config(name: str) -> str | None:
  """The path of a config, given as a path or as the name of a shipped one."""
  base = name.removeprefix('configs/').removesuffix('.py')
  candidates = [name] * name.endswith(('.py', '.json')) + [f'{name}.py']
  there = (path for path in candidates if os.path.isfile(path))
  return next(there, None) or shipped_config(base)


def load(given: str) -> ConfigDict:
  """Loads a config and completes it with the default of every missing key.

  Args:
    given: the path of a Python file with get_config(), optionally followed by
      :ARGUMENT, or of a run's config.json.

  Raises:
    UserError: the file does not define a valid config.
  """
  path, colon, argument = given.partition(':')
  config = (_read if path.endswith('.json') else _call)(
    path, *[argument] * bool(colon)
  )
  if not isinstance(config, ConfigDict):
    raise UserError(
      f'--config={given}: its get_config() returns {config!r:.50}, not a '
      'ConfigDict'
    )
  wrong = completion.unknown(config) or completion.of_other_types(config)
  if wrong:
    raise UserError(f'--config={given}: {wrong[0]}')
  completion.complete(config)
  return config


def _call(path, *arguments):
  try:
    get_config = runpy.run_path(path).get('get_config')
    if get_config is None:
      raise UserError(f'--config={path} has no function get_config()')
    if arguments and not inspect.signature(get_config).parameters:
      raise UserError(
        f'--config={path}:{arguments[0]}: this config takes no argument: give '
        f'--config={path}'
      )
    return get_config(*arguments)
  except UserError:
    raise
  except Exception as e:
    if not (told := _of_user(path, e)):
      raise
    raise UserError(f'--config={path}: {told}') from e


def _of_user(path, error: Exception) -> str:
  """Where a user's own file failed, and why; '' for a bug in this package."""
  if Path(path).resolve().parent in (
    Path(f).resolve() for f in configs.__path__
  ):
    return ''
  if isinstance(error, SyntaxError):
    line = (error.text or '').strip()
    return f'{error.filename}, line {error.lineno}, {line!r}: {error.msg}'
  *_, last = frames = traceback.extract_tb(error.__traceback__)
  own = [frame for frame in frames if frame.filename == path]
  if not own:
    return ''
  reason = _of_key(error) if 'ml_collections' in last.filename else ''
  reason = reason or ' '.join(f'{type(error).__name__}: {error}'.split())
  return f'line {own[-1].lineno}, {own[-1].line!r}: {reason}'


def _of_key(error: Exception) -> str:
  """What is wrong with a key, from the messages of ml_collections."""
  text = str(error.args[0]) if error.args else ''
  if isinstance(error, AttributeError | KeyError) and (
    key := re.search(r'\w+', text)
  ):
    meant = completion.suggest(key[0])
    return f'there is no config key {key[0]!r}' + (
      f'; did you mean {meant}?' if meant else ''
    )
  if found := CAST.search(text):
    return f'{found[1]} {completion.mistyped(*found.groups())}'
  return ''


def _read(path, *arguments):
  if arguments:
    raise UserError(f'--config={path}:{arguments[0]}: leave out the colon')
  try:
    config = json.loads(Path(path).read_text())
  except (OSError, ValueError) as e:
    raise UserError(f'--config={path} is unreadable ({e})') from e
  return ConfigDict(_tuples(config)) if isinstance(config, dict) else config


def _tuples(value):
  if isinstance(value, dict):
    return {key: _tuples(inner) for key, inner in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def get_config(given: str) -> ConfigDict:
  """Like `load`, but exits on errors, because ml_collections wraps them."""
  try:
    return load(given)
  except UserError as e:
    terminal.fail(str(e))
  except Exception:
    traceback.print_exc()  # a bug in the user's file or in this package
    sys.exit(1)


def through(found: str) -> str:
  """The value of --config that makes ml_collections call `get_config`."""
  return f'{__file__}:{found}'


def given(value: str) -> str:
  """The inverse of `through`: PATH or PATH:ARGUMENT from such a value."""
  return value.removeprefix(f'{__file__}:')


def source(config: ConfigDict) -> str:
  """A config as a Python file for --config, with default.py's comments.

  Args:
    config: the complete config.
  """
  lines = Path(default.__file__).read_text().splitlines()
  comments = {}
  for name, told in _comments(lines):  # first those of the default choices
    comments.setdefault(name, told)
  order = list(comments)

  def place(name):
    return order.index(name) if name in order else len(order)

  def written(name, value) -> Iterator[str]:
    above, behind = comments.get(name, ([], ''))
    yield from above
    if not isinstance(value, dict):
      yield f'  {name} = {_literal(value)}{behind}'
      return
    yield f'  {name} = ConfigDict()'
    for key in sorted(value, key=lambda key: place(f'{name}.{key}')):
      yield from written(f'{name}.{key}', value[key])

  values = config.to_dict()
  body = [
    line
    for key in sorted(values, key=lambda key: place(f'config.{key}'))
    for line in written(f'config.{key}', values[key])
  ]
  head = ['from ml_collections import ConfigDict', '', '', 'def get_config():']
  return '\n'.join([*head, '  config = ConfigDict()', *body, '  return config'])


def _comments(lines) -> Iterator[tuple[str, tuple[list[str], str]]]:
  """Yields (config.KEY, (lines above it, comment after it)) in order."""
  above = []
  for line in lines:
    key = KEY.fullmatch(line)
    if key:
      yield key[1], (above, key[2] or '')
    is_above = not line or line.startswith('  #')
    above = [*above, line] if is_above else []


def _literal(value) -> str:
  if isinstance(value, float) and not math.isfinite(value):
    return f"float('{value}')"
  return repr(value)
