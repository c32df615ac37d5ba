"""Train and sample diffusion models in JAX."""

import importlib.util
import sys
from pathlib import Path


def _add_configs():
  """Makes a checkout's configs/ importable as `diffusion_jax.configs`.

  In a checkout it is at the top level, where people look for it; in a wheel it
  is inside the package.
  """
  here = Path(__file__).parent
  if not (here / 'configs').exists():
    name, path = f'{__name__}.configs', here.parent / 'configs' / '__init__.py'
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)


_add_configs()

from diffusion_jax.runs.trained import Trained, load  # noqa: E402

__all__ = ['Trained', 'load']
__version__ = '0.1.0'
