"""--config=NAME: the files of configs, the user's and the shipped ones."""

import importlib.util
import os
from pathlib import Path


def _config_folders() -> list[str]:
  spec = importlib.util.find_spec('diffusion_jax.configs')
  folders = list(spec.submodule_search_locations) if spec else []
  # A checkout that is not installed, used from another folder.
  return [*folders, str(Path(__file__).parents[2] / 'configs')]


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
