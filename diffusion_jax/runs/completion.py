"""Completes configs with missing keys, and finds unknown ones.

`configs/default.py` has every key. Runs' and users' configs that are older than
a key get its default.
"""

import copy
import difflib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax.configs import default

# Groups whose options depend on a choice: the key that makes the choice. The
# default config has the options of the default choice; others may differ.
CHOICES = {
  'codec': 'name',
  'conditioning': 'name',
  'loss': 'name',
  'model': 'name',
  'process': 'schedule',
}


def complete(config: MutableMapping) -> None:
  """Adds missing keys to a config, in place.

  Args:
    config: a ConfigDict, or a dict as read from JSON, with lists for tuples.
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
  """The problems with a config's keys, a line each; [] if valid."""
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
    # An empty group accepts any key, such as the name of a part.
    elif known[key] and _is_group(value) and _alike(key, value, known[key]):
      yield from _unknown(value, known[key], (*path, key))


def _alike(name, group, known) -> bool:
  """Whether a group has the same keys as in the default config."""
  choice = CHOICES.get(name)
  return _is_group(group) and (
    choice is None or group.get(choice, known[choice]) == known[choice]
  )


def _items(config):
  # A placeholder, to be set by a flag later, cannot be read.
  if isinstance(config, ConfigDict):
    return config.items(preserve_field_references=True)
  return config.items()


def _is_group(value) -> bool:
  return isinstance(value, dict | ConfigDict)


def _plain(value):
  """The value as read back from JSON."""
  if isinstance(value, ConfigDict):
    return {key: _plain(inner) for key, inner in value.items()}
  return list(value) if isinstance(value, tuple) else value
