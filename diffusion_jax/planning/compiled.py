"""A program compiled for devices: what it takes of them in a step."""

import math
import re
import time
from typing import NamedTuple

import jax

from diffusion_jax.planning import flops, hlo

# libtpu's compiler at low effort. Memory is then an estimate: in all 8% less
# than by default for the CIFAR-10 step (fsdp 4 on v5e:2x2), 22% less for the
# digits'.
FAST = {'exec_time_optimization_effort': -1.0}
UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


class TooLarge(Exception):
  """A program that the compiler refuses, since memory does not hold it.

  Attributes:
    used: bytes on a device that it would take, without its code.
    limit: bytes that there are.
  """

  def __init__(self, used: int, limit: int):
    super().__init__(f'{used} of {limit} bytes')
    self.used, self.limit = used, limit


class Compiled(NamedTuple):
  """What one device needs for a program, and does in a step of it.

  Attributes:
    arguments: bytes of what goes in: the state, and the batch.
    outputs: bytes of what comes out.
    aliased: bytes of the outputs that take the place of donated arguments.
    temporaries: bytes of all that lives only inside: activations, above all.
    code: bytes.
    product_flops: {'convolutions', 'matrix products'} -> FLOPs of the whole
      program over all devices, as of `flops.products`.
    flops: all FLOPs as XLA counts them, on one device; None where it does not
      say, or where products are in a loop, whose body it counts once.
    bytes_accessed: bytes that move between device and memory, likewise.
    collectives: as of `hlo.collectives`.
    seconds: that compiling took.
    program: what can be called, where the devices are there.
  """

  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int
  product_flops: dict
  flops: float | None
  bytes_accessed: float | None
  collectives: list[hlo.Collective]
  seconds: float
  program: jax.stages.Compiled | None = None

  @property
  def total(self) -> int:
    """Bytes in all, while it runs."""
    return (
      self.arguments
      + self.outputs
      - self.aliased
      + self.temporaries
      + self.code
    )


def device_bytes(tree) -> int:
  """Bytes that one device has of abstract arrays."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def compile(fn, args, *, options: dict | None = None) -> Compiled:
  """Compiles a jitted function; nothing is run.

  Args:
    fn: of `jax.jit`.
    args: abstract, with shardings that say for which devices.
    options: the compiler's, such as FAST.

  Raises:
    TooLarge: the compiler says that memory does not hold it.
  """
  start = time.monotonic()
  traced = fn.trace(*args)
  lowered = traced.lower()
  try:
    program = lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as e:
    exceeded = _exceeded(str(e))
    if not exceeded:
      raise
    raise TooLarge(*exceeded) from e
  memory, cost = program.memory_analysis(), program.cost_analysis() or {}
  if flops.has_loops(traced.jaxpr):
    cost = {}
  num_devices = jax.tree.leaves(args)[0].sharding.mesh.size
  return Compiled(
    memory.argument_size_in_bytes,
    memory.output_size_in_bytes,
    memory.alias_size_in_bytes,
    memory.temp_size_in_bytes,
    memory.generated_code_size_in_bytes,
    dict(flops.products(traced.jaxpr)),
    cost.get('flops'),
    cost.get('bytes accessed'),
    hlo.collectives(program.as_text(), num_devices),
    time.monotonic() - start,
    program,
  )


def _exceeded(message) -> tuple[int, int] | None:
  """(bytes with arguments, bytes that there are), of libtpu's refusal."""
  size = r'\(?([\d.]+)([KMGT]?)\)?'
  for form in (
    rf'temporaries {size} exceeds available HBM {size}',
    rf'Used {size} of {size} hbm',
  ):
    if found := re.search(form, message):
      used, used_unit, limit, limit_unit = found.groups()
      return (
        int(float(used) * UNITS[used_unit]),
        int(float(limit) * UNITS[limit_unit]),
      )
  return None
