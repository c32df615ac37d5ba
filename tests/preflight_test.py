"""The preflight as people call it; and what it looks at before it compiles."""

import importlib.util
import json
import math
import sys
import threading

import binaries
import jax
import numpy as np
import pytest
import tiny

from configs import digits
from diffusion_jax.models import inception
from diffusion_jax.planning import checks, page, slices
from diffusion_jax.reproduction import cost
from diffusion_jax.runs import programs
from diffusion_jax.system import distributed
from diffusion_jax.training import sharding

TINY = [
  '--config=configs/digits.py', '--config.model.channels=8',
  '--config.model.num_groups=4', '--config.model.num_blocks=1',
  '--config.sample.num_steps=3',
]  # fmt: skip
HAS_LIBTPU = importlib.util.find_spec('libtpu') is not None
HAS_CUDA = slices.has_cuda()


def preflight(*flags, devices=1, limit=300):
  return binaries.run('preflight', *TINY, *flags, devices=devices, limit=limit)


@pytest.mark.slow
def test_of_this_machine(tmp_path):
  """On eight devices, parameters split over four: table and JSON agree."""
  flags = ['--config.mesh.fsdp=4', '--config.batch_size=16',
           '--sample_batch_size=30',
           f'--workdir={tmp_path / "new" / "run"}']  # fmt: skip
  result = preflight(*flags, '--json', '--measure', devices=8)
  assert result.code == 0, result.err
  found = json.loads(result.out)
  assert not list(tmp_path.iterdir())  # tried, and left as it was
  assert [check['name'] for check in found['checks']] == [
    'batch', 'data', 'workdir', 'versions', 'TensorFlow'
  ]  # fmt: skip
  assert all(check['well'] for check in found['checks'])
  assert found['mesh'] == {'data': 2, 'fsdp': 4, 'tensor': 1}
  train = found['train']
  parts = {**train['bytes']}
  assert parts.pop('total') == sum(parts.values())
  assert parts['batch'] == 16 // 8 * 64
  assert 0 <= parts['padding'] < 100  # of a CPU: the step, and its keys
  assert found['fits']
  assert parts['EMA'] == parts['parameters']
  assert parts['optimiser'] == pytest.approx(2 * parts['parameters'], rel=0.01)
  # So small a network is not split: its gradients are summed, with scalars.
  (sums,) = train['collectives']
  assert sums['kind'] == 'all-reduce'
  assert sums['bytes'] == pytest.approx(parts['parameters'], rel=0.1)
  assert train['aliased'] > 0.99 * train['outputs']
  assert found['sample']['batch_size'] == 32  # what the mesh divides
  assert found['sample']['num_steps'] == 3
  # Three evaluations of the network, of which training has one and its
  # gradient, twice as much.
  assert found['sample']['product_flops_per_image'] == pytest.approx(
    train['product_flops_per_image'], rel=0.02
  )

  timed = found['measured']
  assert timed['train']['images_per_sec'] == pytest.approx(
    16 / timed['train']['seconds_per_step']
  )
  assert timed['sample']['evaluations'] % (32 * 3) == 0
  assert timed['sample']['share_of_peak'] is None  # nobody publishes a CPU's
  assert found['environment']['num_devices'] == 8

  lines = list(page.lines(found))
  assert sum(line.startswith('measured: ') for line in lines) == 2
  assert lines[0].startswith('this machine: 8 cpu, data 2 x fsdp 4 x tensor 1')
  assert lines[-1].startswith('it fits: ')
  total = f'{train["bytes"]["total"]:,}'
  assert any(line.split()[:2] == ['total', total] for line in lines)
  assert 'ok        batch: 16 images on mesh data 2' in result.err
  assert 'compiling the training step, 16 images' in result.err


@pytest.mark.slow
def test_judging_is_inception():
  result = preflight('--nosampling', '--judging', '--json')
  assert result.code == 0, result.err
  found = json.loads(result.out)
  judge = found['judge']
  assert judge['batch_size'] == 256
  shapes = inception.shapes(['2048']).values()
  weights = sum(math.prod(shape) + shape[-1] for shape in shapes)
  assert judge['bytes']['weights'] == 4 * weights
  assert judge['bytes']['padding'] == 0
  assert judge['product_flops_per_image'] == pytest.approx(
    cost.INCEPTION_FLOPS, rel=0.01
  )
  assert 'judging by Inception, 256 images at once' in page.lines(found)


@pytest.mark.slow
def test_samples_that_do_not_fit():
  message = last_line(
    preflight('--config.batch_size=16', '--sample_batch_size=20000000')
  )
  assert '--sample_batch_size=20000000 does not fit 1 cpu: ' in message
  assert 'draw fewer' in message


@pytest.mark.slow
def test_what_does_not_fit_is_one_line_with_what_would():
  message = last_line(preflight('--config.batch_size=4194304', '--nosampling'))
  assert 'batch_size=4194304 does not fit 1 cpu: ' in message
  assert ' more than its ' in message
  assert '--config.microbatches=' in message
  assert 'bfloat16' in message


def last_line(result):
  """After what was looked at comes one line, and nothing on stdout."""
  assert result.code == 2, result
  assert not result.out
  *before, last = result.err.strip().splitlines()
  assert all(
    line.startswith(('ok ', 'compiling ', 'E0', 'W0')) for line in before
  ), result.err
  assert last.startswith('error: ')
  return last


@pytest.mark.parametrize(
  ('flags', 'must'),
  [
    (['--topology=v9:2x2'], 'v4, v5e, v5p, v6e'),
    (['--topology=v5e:2x2x2'], 'have 2 axes'),
    (['--topology=v5e:2x2', '--measure'], 'leave --topology out'),
    (['--topology=v5e:2x2', '--coordinator=h:1'], 'is for one process'),
    (['--config.batch_size=13', '--config.mesh.fsdp=1'], 'not a multiple'),
    (['--sample_batch_size=0'], 'sample_batch_size'),
    (['--topology='], 'v4, v5e, v5p, v6e'),
    (['--topology=h100:2x16'], 'such as h100:8 or h100:2x8'),
    (['--topology=rtx4090'], 'a100, a100-40gb, h100, h200, b200, l4'),
    (['--topology=h100', '--measure'], 'leave --topology out'),
    (['--config.batch_size=1000000000000000'], 'at most 100000000'),
    (['--heartbeat_secs=0'], 'heartbeat_secs'),
  ],
)
def test_mistakes_are_one_line(flags, must):
  assert must in preflight(*flags, devices=8).message


@pytest.mark.skipif(HAS_LIBTPU, reason='libtpu is installed')
def test_without_the_compiler_for_tpus():
  message = preflight('--topology=v5e:2x2').message
  assert "pip install 'diffusion_jax[tpu]'" in message


@pytest.mark.slow
def test_a_workdir_with_too_long_a_name(tmp_path):
  message = last_line(preflight(f'--workdir={tmp_path / ("x" * 300)}'))
  assert 'cannot be written (File name too long)' in message


@pytest.mark.skipif(HAS_CUDA, reason='the CUDA plugin is installed')
def test_without_the_compiler_for_gpus():
  message = preflight('--topology=h100:8').message
  assert "pip install 'diffusion_jax[cuda]'" in message


def test_data_that_are_not_here():
  flags = ['--config.data.name=arrays', '--config.data.path=/none.npz']
  message = last_line(preflight(*flags))
  assert 'data: ' in message
  assert '/none.npz' in message


@pytest.mark.slow
def test_a_workdir_that_is_a_file(tmp_path):
  (tmp_path / 'file').write_text('')
  message = last_line(preflight(f'--workdir={tmp_path / "file" / "run"}'))
  assert 'workdir: ' in message


# --- what is looked at ------------------------------------------------------


def test_the_hash_of_the_data_tells_sets_apart(tmp_path):
  told = []
  for seed in (0, 0, 1):
    path = tmp_path / f'{len(told)}.npy'
    np.save(path, tiny.images(100, seed)['image'])
    data = {
      **digits.get_config().data.to_dict(), 'name': 'arrays', 'path': str(path)
    }  # fmt: skip
    found = checks.run({'data': data}, None)
    assert [check.well for check in found] == [True] * 3
    told.append(found[0].told.split('sha256 of 64 of them ')[1])
  assert told[0] == told[1] != told[2]


def test_tensorflow_is_noticed(monkeypatch):
  config = {'data': digits.get_config().data.to_dict()}
  assert checks.run(config, None)[-1].well
  monkeypatch.setitem(sys.modules, 'tensorflow', object())
  assert not checks.run(config, None)[-1].well


@pytest.mark.parametrize(
  ('libtpu', 'well'), [('0.0.42.1', True), ('0.0.42', True), ('0.0.4', False),
                       ('0.0.40', False), ('0.0.420', False)],
)  # fmt: skip
def test_another_libtpu_than_jax_needs_is_noticed(monkeypatch, libtpu, well):
  versions = {'libtpu': libtpu, 'jax': '1.2.3'}
  monkeypatch.setattr(checks, '_version_of', versions.get)
  monkeypatch.setattr(
    checks.importlib.metadata, 'requires',
    lambda name: ['numpy>=2', 'libtpu==0.0.42.*; extra == "tpu"'],
  )  # fmt: skip
  check = checks.check('libtpu', checks._libtpu)
  assert check.well == well
  assert well or "pip install 'jax[tpu]==1.2.3'" in check.told


@pytest.mark.parametrize(
  ('there', 'platforms', 'chips', 'quiet'),
  [
    ({'libtpu'}, '', False, True),
    ({'libtpu'}, '', True, False),
    ({'libtpu'}, 'tpu', False, False),
    ({'libtpu', 'jax_plugins'}, '', False, False),
    (set(), '', False, False),
  ],
)
def test_libtpu_without_tpus_is_left_out(
  monkeypatch, there, platforms, chips, quiet
):
  set_to = []
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  monkeypatch.setattr(distributed, '_has_chips', lambda: chips)
  monkeypatch.setattr(
    distributed.importlib.util, 'find_spec', lambda name: name in there
  )
  monkeypatch.setattr(
    distributed.jax.config, 'update', lambda *given: set_to.append(given)
  )
  distributed.skip_libtpu()
  assert set_to == [('jax_platforms', 'cpu')] * quiet


class Processes:
  """Stands in for `distributed` in threads: gather is a barrier."""

  def __init__(self, count):
    self.barrier = threading.Barrier(count, timeout=60)
    self.values, self.local = [None] * count, threading.local()

  def index(self):
    return self.local.index

  def gather(self, value):
    self.values[self.local.index] = value
    self.barrier.wait()
    values = list(self.values)
    self.barrier.wait()
    return values

  def on_first(self, fn):
    return self.gather(fn() if not self.local.index else None)[0]


def together_in_threads(monkeypatch, workdirs, look):
  """What each of several processes finds, each with a workdir of its own."""
  processes, found = Processes(len(workdirs)), [None] * len(workdirs)
  monkeypatch.setattr(checks, 'distributed', processes)

  def one(index):
    processes.local.index = index
    found[index] = look(workdirs[index])

  threads = [
    threading.Thread(target=one, args=(i,)) for i in range(len(workdirs))
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found[0] is not None
  assert all(one == found[0] for one in found)
  return found[0]


def test_a_workdir_that_hosts_do_not_share(monkeypatch, tmp_path):
  shared, own = tmp_path / 'a' / 'b', tmp_path / 'own'

  def look(workdir):
    return checks.check('workdir', checks._workdir, workdir)

  check = together_in_threads(monkeypatch, [shared] * 3, look)
  assert check.well
  assert 'by all 3 processes' in check.told
  assert not list(tmp_path.iterdir())
  found = together_in_threads(
    monkeypatch, [shared, shared, own],
    lambda workdir: look(workdir)._replace(told=''),
  )  # fmt: skip
  assert not found.well
  assert not list(tmp_path.iterdir())


def test_versions_that_differ(monkeypatch):
  versions = iter([{'jax': '1', 'flax': '2'}, {'jax': '1', 'flax': '3'}])
  monkeypatch.setattr(
    checks.environment, 'describe',
    lambda: {'versions': next(versions), 'revision': 'abc'},
  )  # fmt: skip
  check = together_in_threads(
    monkeypatch,
    [None] * 2,
    lambda _: checks.check('versions', checks._versions),
  )
  assert not check.well
  assert 'flax ' in check.told
  assert 'install the same version on all hosts' in check.told


@pytest.mark.slow
def test_two_processes_look_together(tmp_path):
  results = binaries.run_several(
    'preflight', *TINY, '--config.batch_size=16', '--nosampling', '--json',
    f'--workdir={tmp_path / "run"}',
  )  # fmt: skip
  assert [r.code for r in results] == [0, 0], [r.err for r in results]
  assert 'by all 2 processes' in results[0].err
  assert json.loads(results[0].out)['num_devices'] == 2
  assert not results[1].out
  assert not list(tmp_path.iterdir())


# --- with the compiler for TPUs -----------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="needs pip install '.[tpu]'")
def test_of_a_slice():
  """The digits' network, split over a v5e:2x2: what chips exchange is theory.

  Of P bytes of parameters, S of them split: gathers S, scatters S, sums P - S.
  """
  result = binaries.run(
    'preflight', '--config=configs/digits.py', '--config.batch_size=16',
    '--config.mesh.data=1', '--config.mesh.fsdp=4', '--topology=v5e:2x2',
    '--fast', '--nosampling', '--json', limit=900,
  )  # fmt: skip
  assert result.code == 0, result.err
  found = json.loads(result.out)['train']
  bytes_of = {one['kind']: one['bytes'] for one in found['collectives']}
  assert bytes_of.keys() == {'all-gather', 'reduce-scatter', 'all-reduce'}
  assert found['aliased'] > 0.99 * found['outputs']
  program = programs.create(
    digits.get_config(), sharding.make_mesh(devices=jax.devices()[:1])
  )
  leaves = jax.tree.leaves(program.abstract.params)
  whole = 4 * sum(leaf.size for leaf in leaves)
  split = 4 * sum(leaf.size for leaf in leaves if leaf.size >= sharding.SMALL)
  assert bytes_of['all-gather'] == pytest.approx(split, rel=0.1)
  assert bytes_of['reduce-scatter'] == pytest.approx(split, rel=0.1)
  assert bytes_of['all-reduce'] == pytest.approx(whole - split, rel=0.1)
  assert found['xla_flops_per_image'] == pytest.approx(
    found['product_flops_per_image'], rel=0.1
  )


# --- with the compiler for GPUs -----------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not HAS_CUDA, reason="needs pip install '.[cuda]'")
@pytest.mark.parametrize('platforms', ['cpu', '', 'cuda'])
def test_of_gpus(platforms):
  """Eight H100s, whatever JAX_PLATFORMS says: convolutions are theory.

  Of n convolutions of 3x3 in the network there are n forward, n gradients of
  kernels, and n - 1 of inputs, because nobody asks for that of the images.
  """
  result = binaries.run(
    'preflight', *TINY, '--config.batch_size=16', '--topology=8xh100',
    '--config.model.dtype=bfloat16', '--sample_batch_size=16', '--json',
    JAX_PLATFORMS=platforms, limit=900,
  )  # fmt: skip
  assert result.code == 0, result.err
  found = json.loads(result.out)
  assert found['device'] == 'NVIDIA H100 80GB HBM3'
  assert found['num_devices'] == 8
  assert len(found['notes']) == 2
  train = found['train']
  parts = {**train['bytes']}
  assert parts.pop('total') == sum(parts.values())
  assert train['aliased'] > 0.99 * train['outputs']
  (sums,) = train['collectives']
  assert (sums['kind'], sums['group']) == ('all-reduce', 8)
  # Gradients are bfloat16 where the compute is.
  assert 0.4 < sums['bytes'] / parts['parameters'] < 1.1
  config = digits.get_config()
  config.model.update(channels=8, num_groups=4, num_blocks=1)
  program = programs.create(
    config, sharding.make_mesh(devices=jax.devices()[:1])
  )
  leaves = jax.tree.leaves(program.abstract.params)
  convolutions = sum(leaf.shape[:2] == (3, 3) for leaf in leaves)
  count = {kind['name']: kind['count'] for kind in train['kernels']}
  assert count['convolution'] == convolutions
  assert count['convolution, gradient of the kernel'] == convolutions
  assert count['convolution, gradient of the input'] == convolutions - 1
  # Three steps of sampling are three evaluations.
  count = {kind['name']: kind['count'] for kind in found['sample']['kernels']}
  assert count['convolution'] == 3 * convolutions
  predicted = found['predicted']
  assert predicted['compute_seconds'] == pytest.approx(
    2 * train['product_flops_per_image'] / 989.4e12
  )
  assert predicted['memory_seconds'] == pytest.approx(
    2 * train['kernel_bytes_per_image'] / 3352e9
  )
  text = '\n'.join(page.lines(found))
  assert 'not known without a GPU' in text
  assert 'gradient of the kernel' in text
