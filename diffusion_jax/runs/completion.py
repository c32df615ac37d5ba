"""Keys that a config lacks, or has too many.

`configs/default.py` has every key. Configs that are older than a key, of runs
and of users, have its default.
"""

import copy
import difflib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.configs import default

# Groups with options of their own: the key that chooses them. The defaults are
# the options of the default choice; another has its own.
CHOICES = {
  'codec': 'name',
  'conditioning': 'name',
  'loss': 'name',
  'model': 'name',
  'process': 'schedule',
}


def complete(config: MutableMapping) -> None:
  """Gives a config the keys it lacks, in place.

  Args:
    config: a ConfigDict, or plain as read from JSON, where tuples are lists.
  """
  for path, value in _lacking(config, default.get_config()):
    group = config
    for key in path[:-1]:
      group = group[key]
    if isinstance(config, ConfigDict):
      with config.unlocked():
        group[path[-1]] = value
    else:
      group[path[-1]] = _plain(value)


def lacking(config: Mapping) -> list[str]:
  """The dotted keys of the default config that a config lacks."""
  return ['.'.join(p) for p, _ in _lacking(config, default.get_config())]


def unknown(config: Mapping) -> list[str]:
  """What is wrong with a config's keys, a line each; [] is well."""
  return list(_unknown(config, default.get_config()))


def _lacking(config, known, path=()) -> Iterator[tuple[tuple, Any]]:
  for key, value in known.items():
    if key not in config:
      yield (*path, key), copy.deepcopy(value)
    elif _is_group(value) and _alike(key, config[key], value):
      yield from _lacking(config[key], value, (*path, key))


def _unknown(config, known, path=()) -> Iterator[str]:
  for key, value in _items(config):
    name = '.'.join((*path, key))
    if key not in known:
      close = difflib.get_close_matches(key, list(known), 1)
      hint = '.'.join((*path, *close))
      yield f'there is no config key {name!r}' + (
        f'; did you mean {hint}?' if close else ''
      )
    elif _is_group(value) != _is_group(known[key]):
      kinds = ('one value', 'a group of keys')
      found, wanted = _is_group(value), _is_group(known[key])
      yield f'the config key {name!r} is {kinds[found]}, not {kinds[wanted]}'
    # An empty group takes any key, such as the name of a part.
    elif known[key] and _is_group(value) and _alike(key, value, known[key]):
      yield from _unknown(value, known[key], (*path, key))


def _alike(name, group, known) -> bool:
  """Whether the keys of a group are those of the default config."""
  choice = CHOICES.get(name)
  return _is_group(group) and (
    choice is None or group.get(choice, known[choice]) == known[choice]
  )


def _items(config):
  # A value that is still to be given by a flag cannot be read.
  if isinstance(config, ConfigDict):
    return config.items(preserve_field_references=True)
  return config.items()


def _is_group(value) -> bool:
  return isinstance(value, dict | ConfigDict)


def _plain(value):
  """As it reads back from JSON."""
  if isinstance(value, ConfigDict):
    return {key: _plain(inner) for key, inner in value.items()}
  return list(value) if isinstance(value, tuple) else value
