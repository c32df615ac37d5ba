"""No variable of the shell, and no setting of a program, changes a number.

Those that change the rounding are recorded and reported, and those that find
faults find none.
"""

import contextlib
import json
import os
import subprocess
import sys
import types

import binaries
import jax
import jax.numpy as jnp
import numpy as np
import PIL
import pytest
import tiny
from ml_collections import ConfigDict

import diffusion_jax
from diffusion_jax import runs
from diffusion_jax.system import numerics
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import metrics

HOW = {'num_samples': 3, 'num_steps': 2, 'sampler': 'ancestral'}
CHANGES = {
  'num_steps': 3, 'eval_every': 3, 'sample_every': 3, 'keep_every': 0,
}  # fmt: skip
# Together they change every setting; each alone changed losses or samples.
SHELLS = {
  'rbg_64_strict': {
    'JAX_DEFAULT_PRNG_IMPL': 'rbg',
    'JAX_ENABLE_X64': '1',
    'JAX_NUMPY_DTYPE_PROMOTION': 'strict',
  },
  'not_partitionable': {'JAX_THREEFRY_PARTITIONABLE': '0'},
}
# JAX reads the variables when it is imported.
TRAIN = """
import runpy, dense_network
runpy.run_module('diffusion_jax.train', run_name='__main__', alter_sys=True)
"""
LIBRARY = f"""
import sys, jax, numpy, diffusion_jax
before = dict(jax.config.values)
images = diffusion_jax.load(sys.argv[1]).sample(**{HOW})
assert dict(jax.config.values) == before
numpy.save(sys.argv[2], images)
"""


def run(*command, **environment):
  result = subprocess.run(
    [sys.executable, *map(str, command)],
    cwd=binaries.ROOT, capture_output=True, text=True, timeout=600,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', **environment,
         'PYTHONPATH': f'{binaries.ROOT}{os.pathsep}{binaries.ROOT}/tests'},
  )  # fmt: skip
  assert result.returncode == 0, result.stderr


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('plain')
  tiny.train(workdir, **CHANGES)
  return workdir


@pytest.fixture(scope='module')
def unet(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('unet')
  tiny.train(workdir, **CHANGES, **tiny.UNET)
  return workdir


def check_shell(plain, tmp_path, shell, **network):
  """Trains in that shell, and compares all to the run `plain`."""
  flags = tiny.flags(tmp_path, **CHANGES, **network)
  run('-c', TRAIN, *flags, **SHELLS[shell])
  assert tiny.losses(tmp_path) == tiny.losses(plain)
  jax.tree.map(
    np.testing.assert_array_equal,
    tiny.final_state(tmp_path),
    tiny.final_state(plain),
  )
  (grid,) = (plain / 'samples').glob('train_*.png')
  assert (tmp_path / 'samples' / grid.name).read_bytes() == grid.read_bytes()


def test_a_shell_changes_neither_training_nor_grids(plain, tmp_path):
  check_shell(plain, tmp_path, 'rbg_64_strict')


@pytest.mark.slow
@pytest.mark.parametrize('shell', SHELLS)
def test_a_shell_changes_no_unet(unet, tmp_path, shell):
  check_shell(unet, tmp_path, shell, **tiny.UNET)


@pytest.mark.slow
@pytest.mark.parametrize('shell', SHELLS)
def test_a_shell_changes_no_samples_of_the_library(unet, tmp_path, shell):
  """And the library leaves the program's settings as they are."""
  run('-c', LIBRARY, unet, tmp_path / 'images.npy', **SHELLS[shell])
  np.testing.assert_array_equal(
    np.load(tmp_path / 'images.npy'), diffusion_jax.load(unet).sample(**HOW)
  )


def test_a_start_records_what_its_numbers_depend_on(plain):
  found = runs.last_start(plain)['numerics']
  assert found == {**numerics.describe(), **found}
  assert found['jax'] == jax.__version__
  assert found['device'].startswith('cpu: ')
  assert found['JAX_DEFAULT_PRNG_IMPL'] == 'threefry2x32'
  assert found['JAX_ENABLE_X64'] == 'False'
  assert runs.last_start(plain)['versions']['pillow'] == PIL.__version__


@pytest.mark.slow
def test_a_run_that_goes_on_under_another_jax_says_so(tmp_path):
  tiny.trained(tmp_path / 'run')
  place = tmp_path / 'run' / 'starts.jsonl'
  start = runs.last_start(tmp_path / 'run')
  start['numerics']['jax'] = '0.1.2'
  place.write_text(json.dumps(start) + '\n{"torn')
  more = {'num_steps': 31, 'sample_every': 0}
  result = binaries.run('train', *tiny.flags(tmp_path / 'run', **more))
  assert result.code == 0, result.err
  (told,) = [x for x in result.err.splitlines() if 'numbers may' in x]
  assert told == (
    'from here on, numbers may differ by rounding: jax is '
    f'{jax.__version__} (was 0.1.2)'
  )


@pytest.mark.parametrize(
  ('name', 'value', 'told'),
  [
    ('XLA_FLAGS', '--xla_cpu_enable_fast_math=true', True),
    ('XLA_FLAGS', '--xla_dump_to=/tmp/x', False),
    ('XLA_FLAGS', '--xla_force_host_platform_device_count=8', False),
    ('NVIDIA_TF32_OVERRIDE', '0', True),
    ('NPY_DISABLE_CPU_FEATURES', 'AVX512F', True),
    ('PYTHONHASHSEED', '5', False),
    ('JAX_PLATFORMS', 'cpu', False),
  ],
)
def test_variables_that_change_the_rounding(monkeypatch, name, value, told):
  for variable in numerics.VARIABLES:
    monkeypatch.delenv(variable, raising=False)
  before = numerics.describe()
  monkeypatch.setenv(name, value)
  now = numerics.describe()
  changes = {name: value} if told else {}
  assert now == {**before, **changes}
  line = numerics.warning(before, now)
  assert (f'{name} is {value} (was unset)' in line) == told
  assert (f'{name}={value}' in numerics.warning({}, now)) == told
  assert not numerics.warning(now, now)  # it has been said


def test_fewer_threads_and_another_cpu_change_the_rounding(monkeypatch):
  before = numerics.describe()
  monkeypatch.setenv('NPROC', '61')
  now = numerics.describe()
  assert now['device'].endswith(', threads: 61')
  assert 'device is cpu: ' in numerics.warning(before, now)
  numerics.check_alike([before, now])  # hosts may differ in them


def test_settings_of_a_program_that_change_the_rounding():
  for change, told in (
    (jax.default_matmul_precision('bfloat16'), 'MATMUL_PRECISION=bfloat16'),
    (jax.disable_jit(), 'JAX_DISABLE_JIT=True'),
    (jax.softmax_custom_jvp(True), 'JAX_SOFTMAX_CUSTOM_JVP=True'),
  ):
    assert told not in numerics.warning({}, {})
    with change:
      assert told in numerics.warning({}, {})


def test_processes_that_would_round_differently_are_refused():
  here = numerics.describe()
  numerics.check_alike([here, dict(here), {**here, 'device': 'another'}])
  for change, told in (
    (
      {'jaxlib': '0.1.2'},
      f'jaxlib is {here["jaxlib"]} in process 0, but 0.1.2',
    ),
    ({'XLA_FLAGS': '--fast'}, 'XLA_FLAGS is unset in process 0, but --fast'),
  ):
    with pytest.raises(UserError, match=f'{told} in process 2: give') as error:
      numerics.check_alike([here, here, {**here, **change}])
    assert '\n' not in str(error.value)


def draw_no_grid(workdir):
  """In a process of its own, because binaries' flags would collide."""
  from diffusion_jax import train

  state = types.SimpleNamespace(averaged={})
  program = types.SimpleNamespace(
    frozen={},
    draw_fn=lambda params, indices: (None, np.False_),
    recipe=types.SimpleNamespace(reconstructs=None),
  )
  source = types.SimpleNamespace(encode_fn=None)
  config = ConfigDict(
    {'sample': {'num_images': 4}, 'super_resolution': {'factor': 0}}
  )
  with contextlib.redirect_stderr((workdir / 'told').open('w')):
    train._draw_grid(
      program, config, state, 7, tiny.one_device(), workdir, None, source
    )


def test_a_grid_that_is_not_finite_is_left_out_with_a_word(tmp_path):
  process = binaries.CONTEXT.Process(target=draw_no_grid, args=(tmp_path,))
  process.start()
  process.join()
  assert process.exitcode == 0
  assert (tmp_path / 'told').read_text() == (
    'the samples of step 7 are not finite: no grid is drawn\n'
  )
  assert not (tmp_path / 'samples').exists()


# --- switches that find faults ------------------------------------------------

SWITCHES = (
  'JAX_DEBUG_NANS',
  'JAX_DEBUG_INFS',
  'JAX_DEBUG_KEY_REUSE',
  'JAX_ENABLE_CHECKS',
  'JAX_CHECK_TRACER_LEAKS',
  'JAX_DISABLE_JIT',
  'JAX_NUMPY_RANK_PROMOTION=raise',
  'JAX_TRANSFER_GUARD=disallow',
  'JAX_TRANSFER_GUARD_HOST_TO_DEVICE=log',
  'JAX_LOG_COMPILES',
  'JAX_EXPLAIN_CACHE_MISSES',
)


@contextlib.contextmanager
def searching():
  with (
    jax.debug_nans(True),
    jax.debug_infs(True),
    jax.debug_key_reuse(True),
    jax.enable_checks(True),
    jax.numpy_rank_promotion('raise'),
  ):
    yield


@pytest.mark.parametrize(
  'make', [tiny.dense, pytest.param(tiny.shallow, marks=pytest.mark.slow)]
)
def test_a_healthy_step_passes_every_search(make):
  """Of 8 images, some quarters of the times have none."""
  state, step_fn, batch = tiny.run(tiny.one_device(), network=make())
  found = set()
  with searching():
    for _ in range(4):
      with jax.transfer_guard('disallow'):
        state, values = step_fn(state, batch)
      found.add(frozenset(metrics.divided(jax.device_get(values))))
  assert len(found) > 1  # a quarter was empty


@pytest.mark.parametrize(
  'setting',
  [
    lambda: jax.enable_x64(True),
    lambda: jax.numpy_dtype_promotion('strict'),
    lambda: jax.transfer_guard('disallow'),
  ],
)
def test_a_programs_settings_do_not_change_the_denoiser(plain, setting):
  trained = diffusion_jax.load(plain)
  x = np.random.default_rng(0).normal(size=(2, *trained.image_shape))
  x = jnp.asarray(x, jnp.float32)
  expected = trained.denoise(x, 7)
  with setting():
    found = trained.denoise(x, 7)
  assert found.x0.dtype == np.float32
  np.testing.assert_array_equal(found.x0, expected.x0)


def test_the_step_keeps_the_shells_guard(monkeypatch):
  """`fix` lifts it, because most transfers are meant."""
  add = numerics.guarded()(jax.jit(lambda x: x + 1))
  on_device = jnp.ones(3)
  add(np.ones(3, np.float32))
  monkeypatch.setenv('JAX_TRANSFER_GUARD_HOST_TO_DEVICE', 'disallow')
  np.testing.assert_array_equal(add(on_device), [2, 2, 2])
  with pytest.raises(Exception, match='Disallowed host-to-device transfer'):
    add(np.ones(3, np.float32))


@pytest.mark.slow
@pytest.mark.parametrize('switch', SWITCHES)
def test_a_switch_finds_no_fault(tmp_path, switch):
  name, _, value = switch.partition('=')
  shell = {name: value or '1'}
  changes = {
    'num_steps': 2, 'batch_size': 2, 'eval_every': 2, 'eval_images': 2,
    'sample_every': 2, 'sample.num_steps': 2, 'sample.num_images': 2,
    'keep_every': 0, **tiny.UNET,
  }  # fmt: skip
  workdir = tmp_path / 'run'
  run('-m', 'diffusion_jax.train', *tiny.flags(workdir, **changes), **shell)
  assert len(tiny.losses(workdir)) == 2
  run('-m', 'diffusion_jax.sample', f'--workdir={workdir}', '--sampler=ddim',
      '--num_steps=2', '--num_samples=2', **shell)  # fmt: skip


def draw():
  key = jax.random.key(3)
  return [
    jax.random.key_data(jax.random.split(key)),
    jax.random.normal(key, (5,)),
    jax.random.randint(key, (5,), 0, 1000),
    jnp.ones(2, jnp.int32) * jnp.ones(2, jnp.float32),
  ]


def test_each_setting_matters_and_is_fixed():
  """Otherwise the tests above would show nothing."""
  expected = draw()
  for change in (
    lambda: jax.default_prng_impl('rbg'),
    lambda: jax.threefry_partitionable(False),
    lambda: jax.enable_x64(True),
    lambda: jax.numpy_dtype_promotion('strict'),
  ):
    with change():
      try:
        found = draw()
      except jax.dtypes.TypePromotionError:
        found = []
      assert not same(found, expected)
      with numerics.fixed():
        assert same(draw(), expected)


def same(a, b):
  return len(a) == len(b) and all(
    x.dtype == y.dtype and x.shape == y.shape and np.array_equal(x, y)
    for x, y in zip(a, b, strict=True)
  )


def test_an_offset_of_seeds_is_refused_in_one_line():
  before = jax.config.jax_random_seed_offset
  jax.config.update('jax_random_seed_offset', 5)
  try:
    with pytest.raises(UserError, match='offset=5') as e, numerics.fixed():
      pass
    assert '\n' not in str(e.value)
    numerics.fix()
    assert jax.config.jax_random_seed_offset == 0
  finally:
    jax.config.update('jax_random_seed_offset', before)
