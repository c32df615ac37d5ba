"""Published figures of chips, and TPU slices that need not be present."""

import importlib.util
import math
import os
import re
from typing import NamedTuple

from jax.experimental import topologies

from diffusion_jax.system.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
  """The published figures of a chip.

  Attributes:
    memory: bytes that a program may use; libtpu 0.0.42 refuses more. The
      published capacities are 32, 16, 95 and 32 GiB.
    flops: peak FLOPs per second in bfloat16.
    memory_rate: bytes per second between the chip and its memory.
    link_rate: bytes per second over all links to other chips, one way.
    axes: number of axes of the grid of chips.
    most: maximum number of chips in a slice.
    closed: an axis whose length is a multiple of this is a ring; other axes are
      lines.
  """

  memory: int
  flops: float
  memory_rate: float
  link_rate: float
  axes: int
  most: int
  closed: int


# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; the links of v4 are from
# arXiv 2304.01433, table 4. Published link rates count both directions.
CHIPS = {
  'v4': Chip(int(30.75 * GIB), 275e12, 1200e9, 300e9, 3, 4096, 4),
  'v5e': Chip(int(15.75 * GIB), 197e12, 819e9, 200e9, 2, 256, 16),
  'v5p': Chip(int(95.74 * GIB), 459e12, 2765e9, 600e9, 3, 6144, 4),
  'v6e': Chip(int(31.25 * GIB), 918e12, 1638e9, 400e9, 2, 256, 16),
}


# Peak FLOPs per second of GPUs, bfloat16 without sparsity: nvidia.com, the data
# sheets of the SXM boards.
GPUS = {'A100': 312e12, 'H100': 989.4e12, 'H200': 989.4e12}
# Other boards, and parts of a GPU, have another peak.
OTHER_BOARDS = {'PCIE', 'NVL', 'MIG'}


def peak(device_kind: str) -> float | None:
  """The published peak FLOPs per second of a device; None if not known.

  Args:
    device_kind: JAX's name, such as 'NVIDIA H200' or 'TPU v5 lite'.
  """
  # JAX calls a v5e 'TPU v5 lite' or 'TPU v5e', and a v5p 'TPU v5' or 'TPU v5p'.
  name = device_kind.removeprefix('TPU ').replace(' lite', 'e')
  if chip := CHIPS.get('v5p' if name == 'v5' else name):
    return chip.flops
  # A GPU's name contains its key in GPUS.
  words = set(re.split('[ -]', device_kind.upper()))
  names = words & GPUS.keys()
  return GPUS[names.pop()] if names and not words & OTHER_BOARDS else None


class Slice(NamedTuple):
  """A slice of connected chips.

  Attributes:
    name: such as 'v5e:4x4'.
    chip: the kind of chip.
    shape: number of chips along each axis.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    """Number of chips."""
    return math.prod(self.shape)


# What Google Cloud and GKE call the chips.
KINDS = {
  **{'v5litepod': 'v5e', 'v5lite': 'v5e', 'v5-lite-podslice': 'v5e'},
  **{'v4-podslice': 'v4', 'v5p-slice': 'v5p', 'v6e-slice': 'v6e'},
}
CORES = ('v4', 'v5p')  # 'v4-32' counts cores, two in a chip


def parse(name: str) -> Slice:
  """'v5e:4x4', 'v5e-16' or 'v5litepod-16' -> the slice.

  Raises:
    UserError: there is no such chip, or its slices have other axes.
  """
  text = name.strip().lower().removeprefix('tpu-')
  by_number = re.fullmatch(r'(.+)-(\d+)', text)
  given, sizes = by_number.groups() if by_number else text.partition(':')[::2]
  kind = KINDS.get(given, given)
  if kind not in CHIPS:
    raise UserError(
      f'--topology={name}: give a chip ({", ".join(CHIPS)}) and a slice, such '
      'as v5e:4x4, v5e-16 or v4:2x2x2'
    )
  chip = CHIPS[kind]
  if by_number:
    sizes = _usual(name, kind, int(sizes))
  if not re.fullmatch(r'[1-9]\d{0,3}(x[1-9]\d{0,3})*', sizes) or (
    sizes.count('x') + 1 != chip.axes
  ):
    raise UserError(
      f'--topology={name}: slices of {kind} have {chip.axes} axes, such as '
      f'{kind}:{"x".join(["2"] * chip.axes)}'
    )
  where = Slice(f'{kind}:{sizes}', chip, tuple(map(int, sizes.split('x'))))
  if where.size > chip.most:
    raise UserError(
      f'--topology={name}: {where.size} chips, but slices of {kind} have at '
      f'most {chip.most}'
    )
  return where


def _usual(name: str, kind: str, number: int) -> str:
  """The usual sizes of a slice of so many chips, or cores: '4x4'."""
  count = number // 2 if kind in CORES else number
  if (
    count < 1 or count & (count - 1) or count * (1 + (kind in CORES)) != number
  ):
    raise UserError(
      f'--topology={name}: only powers of two have a usual shape; give the '
      f'sizes, such as {kind}:{"x".join(["2"] * CHIPS[kind].axes)}'
    )
  doublings, axes = count.bit_length() - 1, CHIPS[kind].axes
  sizes = [2 ** ((doublings + axis) // axes) for axis in range(axes)]
  # Up to a host of four chips, the longer axes are the first ones.
  return 'x'.join(map(str, sizes if count > 4 else sizes[::-1]))


def devices(where: Slice) -> list:
  """The slice's devices to compile for, one per chip.

  Raises:
    UserError: libtpu, the compiler, is not installed or has no such slice.
  """
  if not importlib.util.find_spec('libtpu'):
    raise UserError(
      f'--topology={where.name}: the compiler for TPUs is not installed; pip '
      "install 'diffusion_jax[tpu]' installs it on any Linux machine"
    )
  # Without these, libtpu queries the cloud's metadata server, prints pages of
  # errors if there is none, and cannot be loaded by two processes.
  for name, value in (
    ('TPU_SKIP_MDS_QUERY', '1'), ('TPU_ACCELERATOR_TYPE', 'v5litepod-4'),
    ('TPU_WORKER_HOSTNAMES', 'localhost'), ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
  ):  # fmt: skip
    os.environ.setdefault(name, value)
  kind = where.name.split(':')[0]
  # The two cores of a chip act as one device.
  options = {'chip_config_name': 'megacore'} if kind in ('v4', 'v5p') else {}
  if where.size < 4:  # fewer chips than libtpu assumes per host
    options['chips_per_host_bounds'] = [1, 1, 1]
  try:
    found = topologies.get_topology_desc(
      platform='tpu', topology_name=where.name, **options
    ).devices
  except Exception as e:
    reason = str(e).splitlines()[0][:150]
    raise UserError(
      f'--topology={where.name}: libtpu has no such slice ({reason})'
    ) from e
  return list(found)
