"""Published figures of TPUs and GPUs that need not be present."""

import re
from typing import NamedTuple

GIB = 2**30


class Card(NamedTuple):
  """What XLA's compiler for GPUs needs to know of a card.

  Attributes:
    name: the name that the driver gives, and JAX as `device_kind`.
    capability: compute capability, (major, minor).
    cores: streaming multiprocessors.
    lanes: float32 units of each.
    threads: threads that can be resident on each.
    shared: bytes of shared memory of each.
    shared_per_block: bytes of it that a block may ask for.
    l2: bytes of the second-level cache.
    clock: GHz, at boost.
    network_rate: bytes per second per card to other hosts, one way.
  """

  name: str
  capability: tuple[int, int]
  cores: int
  lanes: int
  threads: int
  shared: int
  shared_per_block: int
  l2: int
  clock: float
  network_rate: float


class Chip(NamedTuple):
  """The published figures of a chip.

  Attributes:
    memory: bytes of a GPU's memory; of a TPU, bytes that a program may use:
      libtpu 0.0.42 refuses more. The published capacities are 32, 16, 95 and
      32 GiB.
    flops: peak FLOPs per second in bfloat16.
    memory_rate: bytes per second between the chip and its memory.
    link_rate: bytes per second over all links to other chips, one way.
    axes: number of axes of the grid of chips; 1 for the GPUs of a host.
    most: maximum number of chips in a slice, or of GPUs in a host.
    closed: an axis whose length is a multiple of this is a ring; other axes are
      lines.
    card: more about a GPU; None for TPUs.
  """

  memory: int
  flops: float
  memory_rate: float
  link_rate: float
  axes: int
  most: int
  closed: int
  card: Card | None = None


# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; the links of v4 are from
# arXiv 2304.01433, table 4. Published link rates count both directions.
TPUS = {
  'v4': Chip(int(30.75 * GIB), 275e12, 1200e9, 300e9, 3, 4096, 4),
  'v5e': Chip(int(15.75 * GIB), 197e12, 819e9, 200e9, 2, 256, 16),
  'v5p': Chip(int(95.74 * GIB), 459e12, 2765e9, 600e9, 3, 6144, 4),
  'v6e': Chip(int(31.25 * GIB), 918e12, 1638e9, 400e9, 2, 256, 16),
}

# The data sheets at nvidia.com, of boards with SXM sockets where there are any:
# peaks without sparsity; NVLink (PCIe for L4) of which half is one way. Of the
# network: DGX A100, H100, H200 and B200, with one adapter per GPU of 200 or 400
# Gbit/s; for L4 Google's g2-standard-96, 100 Gbit/s for eight. What of the
# memory programs see, the cache and the clock: OpenXLA's target_config/specs;
# of L4, its data sheet, and nvidia-smi for the memory. Figures of the cores:
# table 'Technical Specifications per Compute Capability' of the CUDA
# programming guide.
AMPERE = ((8, 0), 108, 64, 2048, 164 * 1024, 163 * 1024, 40 << 20, 1.41, 25e9)
HOPPER = ((9, 0), 132, 128, 2048, 228 * 1024, 227 * 1024, 50 << 20, 1.98, 50e9)
GPUS = {
  'a100': Chip(
    85_100_068_864, 312e12, 2039e9, 300e9, 1, 8, 1,
    Card('NVIDIA A100-SXM4-80GB', *AMPERE),
  ),
  'a100-40gb': Chip(
    42_331_013_120, 312e12, 1555e9, 300e9, 1, 8, 1,
    Card('NVIDIA A100-SXM4-40GB', *AMPERE),
  ),
  'h100': Chip(
    84_942_979_072, 989.4e12, 3352e9, 450e9, 1, 8, 1,
    Card('NVIDIA H100 80GB HBM3', *HOPPER),
  ),
  'h200': Chip(
    151_397_597_184, 989.4e12, 4800e9, 450e9, 1, 8, 1,
    Card('NVIDIA H200', *HOPPER),
  ),
  'b200': Chip(
    191_514_411_008, 2250e12, 8000e9, 900e9, 1, 8, 1,
    Card('NVIDIA B200', (10, 0), 148, 128, 2048, 228 * 1024, 227 * 1024,
         132_644_864, 1.965, 50e9),
  ),
  'l4': Chip(
    23_034 << 20, 121e12, 300e9, 32e9, 1, 8, 1,
    Card('NVIDIA L4', (8, 9), 58, 128, 1536, 100 * 1024, 99 * 1024, 48 << 20,
         2.04, 1.5625e9),
  ),
}  # fmt: skip
CHIPS = TPUS | GPUS

# Other boards, and parts of a GPU, have another peak.
OTHER_BOARDS = {'PCIE', 'NVL', 'MIG'}


def peak(device_kind: str) -> float | None:
  """The published peak FLOPs per second of a device; None if not known.

  Args:
    device_kind: JAX's name, such as 'NVIDIA H200' or 'TPU v5 lite'.
  """
  # JAX calls a v5e 'TPU v5 lite' or 'TPU v5e', and a v5p 'TPU v5' or 'TPU v5p'.
  name = device_kind.removeprefix('TPU ').replace(' lite', 'e')
  if chip := TPUS.get('v5p' if name == 'v5' else name):
    return chip.flops
  # A GPU's name contains its key in GPUS.
  words = set(re.split('[ -]', device_kind.lower()))
  names = words & GPUS.keys()
  known = names and not words & {board.lower() for board in OTHER_BOARDS}
  return GPUS[names.pop()].flops if known else None


# Of all CUDA GPUs. The versions are the oldest that JAX 0.10 runs with.
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {card.shared}
  threads_per_core_limit: {card.threads}
  core_count: {card.cores}
  fpus_per_core: {card.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {memory_rate}
  l2_cache_size: {card.l2}
  clock_rate_ghz: {card.clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {card.shared_per_block}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{card.name}"
"""


def target(chip: Chip) -> str:
  """A GPU as XLA's compiler reads it: a GpuTargetConfigProto as text."""
  major, minor = chip.card.capability
  return TARGET.format(
    card=chip.card, major=major, minor=minor, memory=chip.memory,
    memory_rate=int(chip.memory_rate),
  )  # fmt: skip
