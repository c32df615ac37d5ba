"""Names of GPUs, what XLA's compiler is told of them, and what can go wrong."""

import re

import pytest

from diffusion_jax.planning import chips, rates, slices
from diffusion_jax.planning.compiled import Compiled
from diffusion_jax.planning.hlo import Collective
from diffusion_jax.planning.kernels import Group
from diffusion_jax.system.errors import UserError


@pytest.mark.parametrize(
  ('names', 'same', 'shape'),
  [
    ('h100 H100:1 h100-1 1xh100 a3-highgpu-1g h100-sxm', 'h100:1', (1,)),
    ('h100:8 H100:8 8xH100 h100-80gb:8 nvidia-h100-80gb:8 h100-sxm5:8 '
     'nvidia-h100-mega-80gb:8 a3-highgpu-8g a3-megagpu-8g p5.48xlarge',
     'h100:8', (8,)),
    ('h100:2x8 2x8xh100', 'h100:2x8', (2, 8)),
    ('a100-80gb a100-sxm4-80gb nvidia-a100-80gb', 'a100:1', (1,)),
    ('a100-40gb:8 8xA100-40GB a2-highgpu-8g p4d.24xlarge', 'a100-40gb:8', (8,)),
    ('a2-ultragpu-4g', 'a100:4', (4,)),
    ('h200-141gb:8 a3-ultragpu-8g p5en.48xlarge', 'h200:8', (8,)),
    ('a4-highgpu-8g p6-b200.48xlarge', 'b200:8', (8,)),
    ('nvidia-l4', 'l4:1', (1,)),
  ],
)  # fmt: skip
def test_hosts_of_gpus_have_several_names(names, same, shape):
  for name in names.split():
    where = slices.parse(name)
    assert where.name in (same, same.removesuffix(':1')), name
    assert where.shape == shape, name
    assert where.chip == slices.parse(same).chip, name


@pytest.mark.parametrize(
  ('name', 'must'),
  [
    ('h100:9', 'such as h100:8 or h100:2x8'),
    ('h100-16', 'up to 8'), ('h100:0', 'up to 8'), ('h100:x', 'up to 8'),
    ('h100:2x2x8', 'up to 8'), ('h100:600x8', 'up to 512'),
    ('rtx4090', 'a100, a100-40gb, h100, h200, b200, l4'),
    ('h100-pcie', 'did you mean h100?'), ('v9:2x2', 'v4, v5e, v5p, v6e'),
  ],
)  # fmt: skip
def test_gpus_that_there_are_not(name, must):
  with pytest.raises(UserError, match=f'--topology={name}: ') as error:
    slices.parse(name)
  assert must in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('kind', chips.GPUS)
def test_the_figures_of_a_gpu_agree_with_each_other(kind):
  """Cores x lanes x 2 x clock is the float32 peak, a part of bfloat16's."""
  chip = chips.GPUS[kind]
  card = chip.card
  plain = card.cores * card.lanes * 2 * card.clock * 1e9
  assert 3.9 * plain <= chip.flops <= 33 * plain
  assert 20e9 < chip.memory < 200e9
  assert card.shared_per_block == card.shared - 1024
  assert card.l2 < chip.memory / 400
  assert card.network_rate < chip.link_rate
  assert chips.peak(card.name) == chip.flops


@pytest.mark.parametrize('kind', chips.GPUS)
def test_the_compiler_is_told_the_figures(kind):
  """XLA's recipe: every figure of the table is in the text, in place."""
  chip = chips.GPUS[kind]
  fields = dict(re.findall(r'(\w+): ("[^"]*"|\S+)', chips.target(chip)))
  assert fields['device_description_str'] == f'"{chip.card.name}"'
  assert int(fields['core_count']) == chip.card.cores
  assert int(fields['device_memory_size']) == chip.memory
  assert int(fields['memory_bandwidth']) == chip.memory_rate
  assert int(fields['l2_cache_size']) == chip.card.l2
  assert int(fields['shared_memory_per_core']) == chip.card.shared
  major, minor = chip.card.capability
  assert f'cuda_compute_capability {{ major: {major} minor: {minor} }}' in (
    chips.target(chip)
  )
  assert chips.target(chip).count('{') == chips.target(chip).count('}')


def test_a_program_may_use_what_jax_reserves(monkeypatch):
  for name in ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'):
    monkeypatch.delenv(name, raising=False)
  where = slices.parse('h100:8')
  assert where.memory == int(0.75 * where.chip.memory)
  assert any('75%' in note for note in where.notes)
  monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', '.5')
  assert where.memory == where.chip.memory // 2
  monkeypatch.setenv('XLA_CLIENT_MEM_FRACTION', '.9')
  assert where.memory == int(0.9 * where.chip.memory)
  for wrong in ('much', '0', '2'):
    monkeypatch.setenv('XLA_CLIENT_MEM_FRACTION', wrong)
    with pytest.raises(UserError, match=f'MEM_FRACTION={wrong}: give'):
      _ = where.memory
  tpu = slices.parse('v5e:2x2')
  assert tpu.memory == tpu.chip.memory
  assert tpu.notes == []


def test_without_the_compiler_for_gpus(monkeypatch):
  def missing(name):
    raise ModuleNotFoundError(name)

  for find in (lambda name: None, missing):
    monkeypatch.setattr(slices.importlib.util, 'find_spec', find)
    with pytest.raises(UserError, match=r'pip install .diffusion_jax\[cuda\]'):
      slices.devices(slices.parse('h100:8'))


def test_a_plugin_that_cannot_compile_without_a_gpu(monkeypatch):
  def old(**given):
    assert given['platform'] == 'cuda'
    assert given['topology'] == '1x2x8'
    assert 'NVIDIA H100' in given['target_config']
    raise RuntimeError('topology not implemented\nmore')

  monkeypatch.setattr(slices, 'has_cuda', lambda: True)
  monkeypatch.setattr(slices.topologies, 'get_topology_desc', old)
  with pytest.raises(UserError, match='topology not implemented') as error:
    slices.devices(slices.parse('h100:2x8'))
  assert '\n' not in str(error.value)
  assert 'pip install -U' in str(error.value)


def test_time_of_gpus_at_published_rates():
  """Products, kernels' bytes, and what hosts send over their adapters."""
  program = Compiled(
    0,
    products={'convolutions': 16 * 989.4e12, 'matrix products': 0},
    kinds=[Group('elementwise fusion', 3, int(2 * 3352e9))],
    collectives=[Collective('all-reduce', 16, 1, int(400e9))],
  )
  found = rates.predict(slices.parse('h100:2x8'), program)
  assert found['compute_seconds'] == pytest.approx(1)
  assert found['memory_seconds'] == pytest.approx(2)
  # Of each byte 15/16 are sent twice, by eight adapters of 50 GB/s.
  assert found['exchange_seconds'] == pytest.approx(2 * 15 / 16)
  assert found['seconds'] == pytest.approx(2 + 2 * 15 / 16)
  # Inside a host by NVLink, 450 GB/s.
  inside = program._replace(
    collectives=[Collective('all-gather', 8, 1, int(450e9))]
  )
  found = rates.predict(slices.parse('h100:8'), inside)
  assert found['exchange_seconds'] == pytest.approx(7 / 8)


def test_xlas_count_goes_before_our_own():
  program = Compiled(
    0, products={'convolutions': 8.0}, flops=5.0, bytes_accessed=7.0,
    kinds=[Group('copy', 1, 3)],
  )  # fmt: skip
  assert program.work(2) == 5.0
  assert program.traffic == 7.0
  assert program._replace(flops=None).work(2) == 4.0
  assert program._replace(bytes_accessed=None).traffic == 3
