"""Chips as their makers publish them, and slices of them that are not here."""

import importlib.util
import math
import os
import re
from typing import NamedTuple

from jax.experimental import topologies

from diffusion_jax.system.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
  """What is published of a chip.

  Attributes:
    memory: bytes that a program may use, as libtpu 0.0.42 refuses more. The
      published capacity is 32, 16, 95 and 32 GiB.
    flops: a second, bfloat16, at the peak.
    memory_rate: bytes a second between the chip and its memory.
    link_rate: bytes a second over all its links to other chips, one way.
    axes: of the grid that chips are connected in.
    most: chips in a slice.
    closed: an axis whose length is a multiple of this is a ring, shorter ones
      are lines.
  """

  memory: int
  flops: float
  memory_rate: float
  link_rate: float
  axes: int
  most: int
  closed: int


# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; the links of v4 are of
# arXiv 2304.01433, table 4. Published link rates are of both ways.
CHIPS = {
  'v4': Chip(int(30.75 * GIB), 275e12, 1200e9, 300e9, 3, 4096, 4),
  'v5e': Chip(int(15.75 * GIB), 197e12, 819e9, 200e9, 2, 256, 16),
  'v5p': Chip(int(95.74 * GIB), 459e12, 2765e9, 600e9, 3, 6144, 4),
  'v6e': Chip(int(31.25 * GIB), 918e12, 1638e9, 400e9, 2, 256, 16),
}


# FLOPs a second of GPUs, bfloat16 without sparsity, at the peak: nvidia.com,
# the data sheets of the SXM boards.
GPUS = {'A100': 312e12, 'H100': 989.4e12, 'H200': 989.4e12}
# Of boards of another form, and of a part of a GPU, the peak is another.
OTHER_BOARDS = {'PCIE', 'NVL', 'MIG'}
# What JAX calls TPUs; of a GPU's name, a part is its key.
TPU_KINDS = {
  'TPU v4': 'v4',
  'TPU v5 lite': 'v5e',
  'TPU v5e': 'v5e',
  'TPU v5': 'v5p',
  'TPU v5p': 'v5p',
  'TPU v6 lite': 'v6e',
  'TPU v6e': 'v6e',
}


def peak(device_kind: str) -> float | None:
  """FLOPs a second of a device, as published; None where it is not known.

  Args:
    device_kind: as JAX names it, such as 'NVIDIA H200' or 'TPU v5 lite'.
  """
  if kind := TPU_KINDS.get(device_kind):
    return CHIPS[kind].flops
  words = set(re.split('[ -]', device_kind.upper()))
  names = words & GPUS.keys()
  return GPUS[names.pop()] if names and not words & OTHER_BOARDS else None


class Slice(NamedTuple):
  """Chips that are connected.

  Attributes:
    name: such as 'v5e:4x4'.
    chip: one of them.
    shape: chips along each axis.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    """How many chips."""
    return math.prod(self.shape)


def parse(name: str) -> Slice:
  """'v5e:4x4' -> the slice.

  Raises:
    UserError: there is no such chip, or its slices have other axes.
  """
  kind, _, sizes = name.partition(':')
  if kind not in CHIPS:
    raise UserError(
      f'--topology={name}: a chip ({", ".join(CHIPS)}) and its slice, such as '
      'v5e:4x4 or v4:2x2x2'
    )
  chip = CHIPS[kind]
  if not re.fullmatch(r'[1-9]\d{0,3}(x[1-9]\d{0,3})*', sizes) or (
    sizes.count('x') + 1 != chip.axes
  ):
    raise UserError(
      f'--topology={name}: slices of {kind} have {chip.axes} axes, such as '
      f'{kind}:{"x".join(["2"] * chip.axes)}'
    )
  where = Slice(name, chip, tuple(map(int, sizes.split('x'))))
  if where.size > chip.most:
    raise UserError(
      f'--topology={name}: {where.size} chips, and slices of {kind} have at '
      f'most {chip.most}'
    )
  return where


def devices(where: Slice) -> list:
  """JAX devices of the slice, one a chip, to compile for.

  Raises:
    UserError: libtpu, which compiles, is not installed, or has no such slice.
  """
  if not importlib.util.find_spec('libtpu'):
    raise UserError(
      f'--topology={where.name}: the compiler for TPUs is not installed; pip '
      "install 'diffusion_jax[tpu]' brings it, to any Linux machine"
    )
  # Without, libtpu asks the cloud where it is, tells in pages that it was not
  # answered, and refuses to be loaded by two processes.
  for name, value in (
    ('TPU_SKIP_MDS_QUERY', '1'), ('TPU_ACCELERATOR_TYPE', 'v5litepod-4'),
    ('TPU_WORKER_HOSTNAMES', 'localhost'), ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
  ):  # fmt: skip
    os.environ.setdefault(name, value)
  kind = where.name.split(':')[0]
  # Two cores of a chip work as one device.
  options = {'chip_config_name': 'megacore'} if kind in ('v4', 'v5p') else {}
  if where.size < 4:  # less than the host that libtpu takes for granted
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
