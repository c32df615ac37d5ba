"""A program compiled for devices: what it takes of them in a step."""

import math
import re
import time
import types
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from diffusion_jax.planning import flops, hlo

# libtpu's compiler at low effort. Memory is then an estimate: in all 8% less
# than by default for the CIFAR-10 step (fsdp 4 on v5e:2x2), 22% less for the
# digits'.
FAST = {'exec_time_optimization_effort': -1.0}
UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


class Compiled(NamedTuple):
  """What one device needs for a program, and does in a step of it.

  A program that the compiler refuses has its bytes in `temporaries`.

  Attributes:
    limit: bytes that a device has for it.
    arguments: bytes of what goes in: the state, and the batch.
    outputs: bytes of what comes out.
    aliased: bytes of the outputs that take the place of donated arguments.
    temporaries: bytes of all that lives only inside: activations, above all.
    code: bytes.
    products: {'convolutions', 'matrix products'} -> FLOPs of the whole program
      over all devices, as of `flops.products`.
    flops: all FLOPs as XLA counts them, on one device; None where it does not
      say, or where products are in a loop, whose body it counts once.
    bytes_accessed: bytes that move between device and memory, likewise.
    collectives: as of `hlo.collectives`.
    seconds: that compiling took.
    program: what can be called, where the devices are there.
  """

  limit: int
  arguments: int = 0
  outputs: int = 0
  aliased: int = 0
  temporaries: int = 0
  code: int = 0
  products: Mapping = types.MappingProxyType({})
  flops: float | None = None
  bytes_accessed: float | None = None
  collectives: Sequence[hlo.Collective] = ()
  seconds: float = 0.0
  program: jax.stages.Compiled | None = None

  @property
  def total(self) -> int:
    """Bytes in all, while it runs."""
    added = self.outputs - self.aliased
    return self.arguments + added + self.temporaries + self.code


def device_bytes(tree) -> int:
  """Bytes that one device has of abstract arrays."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def compile(fn, args, limit: int, options: dict | None = None) -> Compiled:
  """Compiles a jitted function; nothing is run.

  Args:
    fn: of `jax.jit`.
    args: abstract, with shardings that say for which devices.
    limit: bytes that a device has, where the compiler does not say.
    options: the compiler's, such as FAST.
  """
  start = time.monotonic()
  traced = fn.trace(*args)
  lowered = traced.lower()
  try:
    program = lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as e:
    if exceeded := _exceeded(str(e)):
      used, limit = exceeded
      return Compiled(limit, temporaries=used)
    raise
  memory, cost = program.memory_analysis(), program.cost_analysis() or {}
  if flops.has_loops(traced.jaxpr):
    cost = {}
  num_devices = jax.tree.leaves(args)[0].sharding.mesh.size
  return Compiled(
    limit,
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


def describe(
  found: Compiled, arguments: dict, images: int, num_devices: int
) -> dict:
  """A compiled program as JSON can hold it.

  Args:
    found: the program.
    arguments: part of them -> bytes on a device.
    images: in a step.
    num_devices: of the mesh.
  """
  return {
    # The parts add up; padding is the devices' own, of the arguments.
    'bytes': {
      **arguments,
      'padding': found.arguments - sum(arguments.values()),
      'outputs': found.outputs - found.aliased,
      'temporaries': found.temporaries,
      'code': found.code,
      'total': found.total,
    },
    'product_flops_per_image': sum(found.products.values()) / images,
    'products': found.products,
    'xla_flops_per_image': found.flops and found.flops * num_devices / images,
    'bytes_accessed': found.bytes_accessed,
    'aliased': found.aliased,
    'outputs': found.outputs,
    'collectives': [one._asdict() for one in found.collectives],
    'compile_seconds': round(found.seconds, 1),
  }
