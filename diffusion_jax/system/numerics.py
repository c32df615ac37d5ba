"""The settings that numbers depend on: some are fixed, the others recorded.

Variables such as JAX_DEFAULT_PRNG_IMPL or JAX_ENABLE_X64 would silently change
the noise of a run, or of half of it. Binaries fix these settings for the whole
process; the library fixes them only while it samples, and then restores those
of the user's program. Both allow transfers between host and devices, which they
make on purpose; the training step, which makes none, keeps the shell's guard.

What changes only the rounding, such as XLA's flags or another JAX, stays as it
is. It is recorded with every result, and reported where it is unusual or
differs from that of earlier results.
"""

import contextlib
import os
import platform
import re
from collections.abc import Iterator

import jax
import jaxlib

from diffusion_jax.system.errors import UserError

SETTINGS = {
  'jax_default_prng_impl': 'threefry2x32',
  'jax_threefry_partitionable': True,  # the same noise on any mesh
  'jax_random_seed_offset': 0,
  'jax_enable_x64': False,
  'jax_numpy_dtype_promotion': 'standard',
}

# Settings that change the rounding, with their usual values.
ROUNDING = {
  'jax_default_matmul_precision': None,
  'jax_disable_jit': False,
  'jax_disable_most_optimizations': False,
  'jax_exec_time_optimization_effort': 0.0,
  'jax_explicit_x64_dtypes': 'WARN',
  'jax_optimization_level': 'UNKNOWN',
  'jax_softmax_custom_jvp': False,
  'jax_use_direct_linearize': True,
  'jax_use_shardy_partitioner': True,
}
# Variables of XLA, NVIDIA's libraries and NumPy that do the same.
VARIABLES = (
  'XLA_FLAGS',
  'LIBTPU_INIT_ARGS',
  'NVIDIA_TF32_OVERRIDE',
  'NPY_DISABLE_CPU_FEATURES',
  'NPY_ENABLE_CPU_FEATURES',
  'OPENBLAS_CORETYPE',
)
# Flags of XLA that change no number.
HARMLESS = ('--xla_dump', '--xla_force_host_platform_device_count')


def fix() -> None:
  """Applies SETTINGS to the whole process; call before any computation."""
  for name, value in SETTINGS.items():
    jax.config.update(name, value)
  jax.config.update('jax_transfer_guard', 'allow')


@contextlib.contextmanager
def guarded() -> Iterator[None]:
  """Applies the shell's transfer guards within the context; also a decorator.

  For binaries: `fix` lifts them.
  """
  guards = ('', '_host_to_device', '_device_to_device', '_device_to_host')
  with contextlib.ExitStack() as stack:
    for name in (f'transfer_guard{guard}' for guard in guards):
      if value := os.environ.get(f'JAX_{name.upper()}'):
        stack.enter_context(getattr(jax, name)(value))
    yield


@contextlib.contextmanager
def fixed() -> Iterator[None]:
  """Applies SETTINGS to this thread within the context; also a decorator.

  Raises:
    UserError: the program sets jax_random_seed_offset, which JAX cannot
      override for a context.
  """
  offset = jax.config.jax_random_seed_offset
  if offset:
    raise UserError(
      f'jax_random_seed_offset={offset} would change the noise of every seed: '
      'leave it at 0 and give another seed'
    )
  with (
    jax.default_prng_impl(SETTINGS['jax_default_prng_impl']),
    jax.threefry_partitionable(SETTINGS['jax_threefry_partitionable']),
    jax.enable_x64(SETTINGS['jax_enable_x64']),
    jax.numpy_dtype_promotion(SETTINGS['jax_numpy_dtype_promotion']),
    jax.transfer_guard('allow'),
  ):
    yield


def unusual() -> dict[str, str]:
  """The settings of this process that change the rounding, by variable."""
  found = {}
  for name, usual in ROUNDING.items():
    # Some are attributes, which see contexts; JAX's flags are not.
    value = getattr(jax.config, name, jax.config.values.get(name, usual))
    text = str(getattr(value, 'name', value))  # an enum's value is a number
    if text != str(usual):
      found[name.upper()] = text
  for name in VARIABLES:
    words = os.environ.get(name, '').split()
    if words := [word for word in words if not word.startswith(HARMLESS)]:
      found[name] = ' '.join(words)
  return found


def describe() -> dict[str, str]:
  """What numbers depend on besides config, data and weights, as JSON."""
  return {
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
    'device': device(),
    **{name.upper(): str(value) for name, value in SETTINGS.items()},
    **unusual(),
  }


def device() -> str:
  """The kind of device; of a CPU its model and how many threads XLA uses.

  Both change the order in which sums are taken.
  """
  kind = jax.devices()[0].device_kind
  if kind != 'cpu':
    return kind
  try:
    with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file:
      found = re.search(r'^model name\s*:\s*(.+)$', file.read(), re.MULTILINE)
  except OSError:  # not Linux
    found = None
  try:
    threads = len(os.sched_getaffinity(0))
  except AttributeError:  # not Linux
    threads = os.cpu_count()
  # XLA reads this variable first.
  threads = os.environ.get('NPROC') or threads
  model = found[1].strip() if found else platform.machine()
  return f'{kind}: {model}, threads: {threads}'


def check_alike(found: list[dict[str, str]]) -> None:
  """Raises UserError if the processes of a run would round differently.

  Args:
    found: `describe` of each process.
  """
  for i, one in enumerate(found):
    for name in sorted({*found[0], *one} - {'device'}):
      first, other = (x.get(name, 'unset') for x in (found[0], one))
      if first != other:
        raise UserError(
          f'{name} is {first} in process 0, but {other} in process {i}: give '
          'all processes the same versions and variables'
        )


def warning(before: dict[str, str], now: dict[str, str]) -> str:
  """A line about numbers that may differ by rounding; '' if there is nothing.

  Args:
    before: `describe` of the results that this process continues; {} if there
      are none, or if they have no such record.
    now: `describe` of this process.
  """
  if not before:
    told = ', '.join(f'{k}={v}' for k, v in unusual().items())
    return told and f'these settings change the rounding of all numbers: {told}'
  changes = ', '.join(
    f'{name} is {now.get(name, "unset")} (was {before.get(name, "unset")})'
    for name in sorted(before.keys() | now.keys())
    if now.get(name) != before.get(name)
  )
  return changes and (
    f'from here on, numbers may differ by rounding: {changes}'
  )
