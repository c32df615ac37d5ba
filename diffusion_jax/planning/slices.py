"""Slices of TPUs and hosts of GPUs: their names, and devices to compile for."""

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from diffusion_jax.planning import chips
from diffusion_jax.planning.chips import CHIPS, Chip
from diffusion_jax.system.errors import UserError, hint


class Slice(NamedTuple):
  """A slice of connected chips, or hosts with GPUs.

  Attributes:
    name: such as 'v5e:4x4', 'h100:8' or 'h100:2x8'.
    chip: the kind of chip.
    shape: number of TPUs along each axis; (GPUs,) or (hosts, GPUs of each).
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    """Number of chips."""
    return math.prod(self.shape)

  @property
  def memory(self) -> int:
    """Bytes that a program may use on each; of a GPU, what JAX reserves."""
    return int(self.chip.memory * (_reserved() if self.chip.card else 1))

  @property
  def notes(self) -> list[str]:
    """What compilation without the chips leaves open."""
    if not self.chip.card:
      return []
    return [
      'not known without a GPU: which algorithms run convolutions and products '
      '(nothing is autotuned), the workspace that these need, and their times',
      f'JAX reserves {_reserved():.0%} of the memory of a GPU; set '
      'XLA_CLIENT_MEM_FRACTION to change that',
    ]


# Other names of the chips: at Google Cloud, GKE and AWS, and of the boards.
KINDS = {
  **{'v5litepod': 'v5e', 'v5lite': 'v5e', 'v5-lite-podslice': 'v5e'},
  **{'v4-podslice': 'v4', 'v5p-slice': 'v5p', 'v6e-slice': 'v6e'},
  **dict.fromkeys(('a100-80gb', 'a100-sxm', 'a100-sxm4-80gb'), 'a100'),
  **dict.fromkeys(('tesla-a100', 'a100-sxm4-40gb'), 'a100-40gb'),
  **dict.fromkeys(('h100-80gb', 'h100-mega-80gb', 'h100-80gb-hbm3'), 'h100'),
  **dict.fromkeys(('h100-sxm', 'h100-sxm5'), 'h100'),
  **dict.fromkeys(('h200-141gb', 'h200-sxm'), 'h200'),
  **{'a2-highgpu': 'a100-40gb', 'a2-ultragpu': 'a100', 'a3-highgpu': 'h100'},
  **{'a3-megagpu': 'h100', 'a3-ultragpu': 'h200', 'a4-highgpu': 'b200'},
}
MACHINES = {
  'p4d.24xlarge': 'a100-40gb:8',
  'p4de.24xlarge': 'a100:8',
  'p5.48xlarge': 'h100:8',
  'p5en.48xlarge': 'h200:8',
  'p6-b200.48xlarge': 'b200:8',
}
CORES = ('v4', 'v5p')  # 'v4-32' counts cores, two in a chip
MOST_HOSTS = 512
PLUGINS = ('jax_plugins.xla_cuda12', 'jax_plugins.xla_cuda13')


def parse(name: str) -> Slice:
  """'v5e:4x4', 'v5e-16', 'v5litepod-16', 'h100:2x8' or '8xh100' -> the slice.

  Raises:
    UserError: there is no such chip, or its slices have other axes.
  """
  text = re.sub('^(tpu|nvidia)-', '', name.strip().lower())
  text = MACHINES.get(text, text)
  if turned := re.fullmatch(r'((?:\d+x)+)([a-z].*)', text):
    text = f'{turned[2]}:{turned[1][:-1]}'
  by_number = re.fullmatch(r'(.+)-(\d+)g?', text)
  given, sizes = by_number.groups() if by_number else text.partition(':')[::2]
  kind = KINDS.get(given, given)
  if kind not in CHIPS:
    raise UserError(
      f'--topology={name}: give a chip ({", ".join(CHIPS)}) and a slice, such '
      'as v5e:4x4, v5e-16, v4:2x2x2, h100, h100:8 or h100:2x8'
      f'{hint(given, CHIPS)}'
    )
  chip = CHIPS[kind]
  if chip.card:
    return _hosts(name, kind, sizes or '1')
  if by_number:
    sizes = _usual(name, kind, int(sizes))
  shape = _numbers(sizes)
  if len(shape) != chip.axes:
    raise UserError(
      f'--topology={name}: slices of {kind} have {chip.axes} axes, such as '
      f'{kind}:{"x".join(["2"] * chip.axes)}'
    )
  where = Slice(f'{kind}:{sizes}', chip, shape)
  if where.size > chip.most:
    raise UserError(
      f'--topology={name}: {where.size} chips, but slices of {kind} have at '
      f'most {chip.most}'
    )
  return where


def _numbers(sizes) -> tuple[int, ...]:
  """'2x8' -> (2, 8); () for anything else."""
  if not re.fullmatch(r'[1-9]\d{0,3}(x[1-9]\d{0,3})*', sizes):
    return ()
  return tuple(map(int, sizes.split('x')))


def _hosts(name: str, kind: str, sizes: str) -> Slice:
  chip, shape = CHIPS[kind], _numbers(sizes)
  *hosts, each = shape or (0,)
  count = math.prod(hosts)
  if not 0 < each <= chip.most or count > MOST_HOSTS or len(hosts) > 1:
    raise UserError(
      f'--topology={name}: give the GPUs of a host, up to {chip.most}, and of '
      f'several hosts their number, up to {MOST_HOSTS}, before it, such as '
      f'{kind}:{chip.most} or {kind}:2x{chip.most}'
    )
  return Slice(f'{kind}:{sizes}', chip, shape)


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


def _reserved() -> float:
  """The share of a GPU's memory that JAX reserves at its start."""
  names = ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')
  given = next(filter(None, map(os.environ.get, names)), '0.75')
  try:
    share = float(given)
  except ValueError:
    share = 0.0
  if not 0 < share <= 1:
    raise UserError(
      f'XLA_CLIENT_MEM_FRACTION={given}: give the share of a GPU that JAX may '
      'use, above 0 and at most 1'
    )
  return share


def devices(where: Slice) -> list:
  """The slice's devices to compile for, one per chip.

  No device of this machine is used from then on but its CPU.

  Raises:
    UserError: the compiler is not installed, or has no such slice.
  """
  # Otherwise JAX would reserve a GPU or TPU that is here for small programs.
  jax.config.update('jax_platforms', 'cpu')
  return _gpus(where) if where.chip.card else _tpus(where)


def _gpus(where) -> list:
  if not has_cuda():
    raise UserError(
      f'--topology={where.name}: the compiler for GPUs is not installed; pip '
      "install 'diffusion_jax[cuda]' installs it on any Linux machine"
    )
  *hosts, each = where.shape
  try:
    found = topologies.get_topology_desc(
      platform='cuda', topology_name=where.name,
      target_config=chips.target(where.chip),
      topology=f'1x{hosts[0] if hosts else 1}x{each}',
    ).devices  # fmt: skip
  except Exception as e:
    raise UserError(
      f'--topology={where.name}: the CUDA plugin of jax {jax.__version__} '
      f'cannot compile for it ({_reason(e)}); pip install -U '
      "'diffusion_jax[cuda]' installs the newest"
    ) from e
  return list(found)


def has_cuda() -> bool:
  """Whether JAX's plugin for CUDA is installed, which has the compiler."""
  try:
    found = map(importlib.util.find_spec, PLUGINS)
    return any(spec is not None for spec in found)
  except ModuleNotFoundError:  # there is no plugin at all
    return False


def _reason(error) -> str:
  return (str(error) or type(error).__name__).splitlines()[0][:150]


def _tpus(where) -> list:
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
    raise UserError(
      f'--topology={where.name}: libtpu has no such slice ({_reason(e)})'
    ) from e
  return list(found)
