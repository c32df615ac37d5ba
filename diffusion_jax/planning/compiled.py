"""A compiled program: its memory, FLOPs and communication per step."""

import math
import re
import time
import types
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from diffusion_jax.planning import flops, hlo, kernels

# libtpu's compiler at low effort. Memory is then an estimate: 8% lower in total
# than at full effort for the CIFAR-10 step (fsdp 4 on v5e:2x2), 22% lower for
# digits.
FAST = {'exec_time_optimization_effort': -1.0}
UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


class Compiled(NamedTuple):
  """The memory that a program needs on one device, and its work per step.

  If the compiler refuses a program, all its bytes are in `temporaries`.

  Attributes:
    limit: memory of a device, in bytes.
    arguments: bytes of the arguments: the state and the batch.
    outputs: bytes of the outputs.
    aliased: bytes of the outputs that reuse donated arguments.
    temporaries: bytes of temporaries, mostly activations.
    code: bytes of the code.
    products: {'convolutions', 'matrix products'} -> FLOPs of the whole program
      over all devices, see `flops.products`.
    flops: all FLOPs on one device, as counted by XLA; None if it does not
      report them (for GPUs), or if a loop has products, because it counts a
      loop's body once.
    bytes_accessed: bytes moved between device and memory, likewise.
    kinds: kernels of each kind on one device, see `kernels.by_kind`.
    collectives: see `hlo.collectives`.
    seconds: compilation time.
    program: the executable, to be called if the devices are present.
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
  kinds: Sequence[kernels.Group] = ()
  collectives: Sequence[hlo.Collective] = ()
  seconds: float = 0.0
  program: jax.stages.Compiled | None = None

  @property
  def total(self) -> int:
    """Total bytes while the program runs."""
    added = self.outputs - self.aliased
    return self.arguments + added + self.temporaries + self.code

  @property
  def traffic(self) -> float:
    """Bytes to and from memory: XLA's count, or of the kernels' operands."""
    if self.bytes_accessed is not None:
      return self.bytes_accessed
    return sum(kind.bytes for kind in self.kinds)

  def work(self, num_devices: int) -> float:
    """FLOPs on one of the devices: XLA's count, or of the products alone."""
    if self.flops is not None:
      return self.flops
    return sum(self.products.values()) / num_devices


def device_bytes(tree) -> int:
  """Bytes of abstract arrays on one device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def compile(fn, args, limit: int, fast: bool = False) -> Compiled:
  """Compiles a jitted function without running it.

  Args:
    fn: a function from `jax.jit`.
    args: abstract arguments with shardings, which determine the devices.
    limit: memory of a device in bytes, if the compiler does not report it.
    fast: whether to compile at low effort, see FAST.
  """
  start = time.monotonic()
  traced = fn.trace(*args)
  lowered = traced.lower()
  try:
    program = lowered.compile(compiler_options=FAST if fast else None)
  except jax.errors.JaxRuntimeError as e:
    if not (exceeded := _exceeded(str(e))):
      raise
    used, limit = exceeded
    return Compiled(limit, temporaries=used)
  memory, cost = program.memory_analysis(), program.cost_analysis() or {}
  if flops.has_loops(traced.jaxpr):
    cost = {}
  num_devices = jax.tree.leaves(args)[0].sharding.mesh.size
  text = program.as_text()
  return Compiled(
    limit,
    # XLA leaves out those that the program does not read, such as a decoder
    # while training, but they are in memory, too.
    max(memory.argument_size_in_bytes, device_bytes(args)),
    memory.output_size_in_bytes,
    memory.alias_size_in_bytes,
    memory.temp_size_in_bytes,
    memory.generated_code_size_in_bytes,
    dict(flops.products(traced.jaxpr)),
    cost.get('flops'),
    cost.get('bytes accessed'),
    kernels.by_kind(kernels.kernels(text)),
    hlo.collectives(text, num_devices),
    time.monotonic() - start,
    program,
  )


def _exceeded(message) -> tuple[int, int] | None:
  """(bytes needed, bytes available), from libtpu's error message."""
  size = r'\(?([\d.]+)([KMGT]?)\)?'
  for form in (
    rf'temporaries {size} exceeds available HBM {size}',
    rf'Used {size} of {size} hbm',
  ):
    if found := re.search(form, message):
      used, unit, limit, limit_unit = found.groups()
      used, limit = float(used) * UNITS[unit], float(limit) * UNITS[limit_unit]
      return int(used), int(limit)
  return None


def describe(
  found: Compiled, arguments: dict, images: int, num_devices: int
) -> dict:
  """A compiled program as JSON.

  Args:
    found: the program.
    arguments: part of the arguments -> bytes per device; 0 = there is none.
    images: images per step.
    num_devices: size of the mesh.
  """
  return {
    # The parts add up to the total; padding is what devices add to arguments.
    'bytes': {
      **{name: size for name, size in arguments.items() if size},
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
    'kernels': [kind._asdict() for kind in found.kinds],
    'kernel_bytes_per_image': sum(kind.bytes for kind in found.kinds)
    * num_devices
    / images,
    'aliased': found.aliased,
    'outputs': found.outputs,
    'collectives': [one._asdict() for one in found.collectives],
    'compile_seconds': round(found.seconds, 1),
  }
