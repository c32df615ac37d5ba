"""Describes the environment of a result: versions, devices and settings."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import jax

from diffusion_jax.system import numerics

PACKAGES = (
  *('diffusion_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint'),
  *('grain', 'numpy', 'scipy', 'diffrax', 'libtpu'),
  *('pillow', 'tensorflow-datasets'),  # which decode and resize images
)


def describe() -> dict:
  """Versions, revision, devices and settings that numbers depend on, as JSON.

  The git revision is None outside a checkout.
  """
  devices = jax.devices()
  return {
    'versions': {
      'python': platform.python_version(),
      **{name: _version(name) for name in PACKAGES},
    },
    'revision': _revision(),
    'device': devices[0].device_kind,
    'num_devices': len(devices),
    'num_processes': jax.process_count(),
    'numerics': numerics.describe(),
  }


def _version(package):
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None  # a checkout that is not installed


def _revision():
  root = Path(__file__).parents[2]
  # An installed package may be inside another project's checkout.
  if not (root / '.git').exists():
    return None
  try:
    result = subprocess.run(
      ['git', 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*'],
      cwd=root,
      capture_output=True,
      text=True,
      timeout=10,
      check=True,
    )
  except (OSError, subprocess.SubprocessError):
    return None  # git is missing, or refuses a checkout owned by another user
  return result.stdout.strip()
