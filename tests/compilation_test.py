"""The folder of compiled programs: a second start compiles nothing."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache

from diffusion_jax.system import compilation, numerics

NAMES = (
  *('jax_compilation_cache_dir', 'jax_enable_compilation_cache'),
  *compilation.SETTINGS,
)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
  """A process in which nobody has chosen a folder; the user's cache."""
  before = {name: getattr(jax.config, name) for name in NAMES}
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  for name in NAMES:
    monkeypatch.delenv(name.upper(), raising=False)
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()
  yield tmp_path
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture
def events():
  """The names of JAX's events from here on."""
  seen = []

  def listen(event, **about):
    seen.append(event.rpartition('/')[2])

  jax.monitoring.register_event_listener(listen)
  yield seen
  jax.monitoring.unregister_event_listener(listen)


def _start():
  """As if the process had just started."""
  jax.clear_caches()
  compilation_cache.reset_cache()
  jax.config.update('jax_compilation_cache_dir', None)
  compilation.keep()


def test_a_second_start_compiles_nothing(fresh, events):
  def work():
    return jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.ones((8, 8)))

  _start()
  first = work()
  assert 'cache_misses' in events
  events.clear()
  _start()
  second = work()
  assert events.count('cache_hits') > 0
  assert events.count('cache_hits') == events.count(
    'compile_requests_use_cache'
  )
  assert first == second
  assert compilation.folder().parent.parent == fresh / 'diffusion_jax'


def test_the_name_has_what_a_program_is_compiled_for(fresh, monkeypatch):
  names = {compilation.folder()}
  monkeypatch.setenv('NPROC', '97')  # threads that XLA uses
  names.add(compilation.folder())
  monkeypatch.setattr(numerics, 'device', lambda: 'another processor')
  names.add(compilation.folder())
  monkeypatch.setattr(compilation, '_features', lambda: 'flags: avx1024')
  names.add(compilation.folder())
  assert len(names) == 4


def test_jaxs_own_variables_count(fresh, monkeypatch):
  monkeypatch.setattr(compilation, 'folder', None)  # is not asked
  for value in ('elsewhere', ''):  # JAX takes '' for none
    jax.config.update('jax_compilation_cache_dir', value)
    compilation.keep()
    assert jax.config.jax_compilation_cache_dir == value
  jax.config.update('jax_compilation_cache_dir', None)
  jax.config.update('jax_enable_compilation_cache', False)
  compilation.keep()
  assert jax.config.jax_compilation_cache_dir is None


def test_a_setting_of_the_shell_stays(fresh, monkeypatch):
  name = 'jax_persistent_cache_min_compile_time_secs'
  monkeypatch.setenv(name.upper(), '7')
  jax.config.update(name, 7.0)  # JAX has read the variable
  compilation.keep()
  assert getattr(jax.config, name) == 7


@pytest.mark.parametrize('what', ['no home', 'a file in the way'])
def test_without_a_folder_one_line_is_said(fresh, what, monkeypatch, capsys):
  if what == 'no home':
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setattr('os.path.expanduser', lambda path: path)
  else:
    (fresh / 'diffusion_jax').touch()
  compilation.keep()
  line, end = capsys.readouterr().err.split('\n')
  assert line.startswith('compiled programs are not kept (')
  assert not end
  assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_is_not_shared_is_not_used(fresh, monkeypatch, capsys):
  monkeypatch.setattr(
    compilation.distributed, 'gather', lambda value: [value, False]
  )
  compilation.keep()
  assert 'the processes do not share a folder' in capsys.readouterr().err
  assert jax.config.jax_compilation_cache_dir is None
  assert not [p for p in compilation.folder().iterdir() if 'lock' not in p.name]


def test_what_a_kill_left_unfinished_is_deleted(fresh):
  compilation.keep()
  folder = compilation.folder()
  for name in ('whole-cache', 'whole-atime', 'half-cache'):
    (folder / name).write_bytes(bytes(8))
  _start()
  assert {p.name for p in folder.glob('*-cache')} == {'whole-cache'}


@pytest.mark.slow
def test_a_run_from_kept_programs_is_the_same_bit_by_bit(tmp_path):
  """Both starts are processes of their own, as a user's are."""

  def train(name, steps):
    environment = {
      key: value
      for key, value in os.environ.items()
      if not key.startswith('JAX_')
    }
    environment |= {
      'JAX_PLATFORMS': 'cpu',
      'XDG_CACHE_HOME': str(tmp_path / 'cache'),
      'JAX_DEBUG_LOG_MODULES': 'jax._src.compiler',
    }
    changes = {'num_steps': steps, 'eval_every': 0, **tiny.UNET}
    arguments = tiny.flags(tmp_path / name, **changes)
    done = subprocess.run(
      [sys.executable, '-m', 'diffusion_jax.train', *arguments],
      env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stderr

  cold = train('cold', 6)
  assert 'PERSISTENT COMPILATION CACHE MISS' in cold
  warm = train('warm', 6)
  assert 'PERSISTENT COMPILATION CACHE MISS' not in warm
  assert 'Persistent compilation cache hit' in warm
  train('parts', 3)
  train('parts', 6)
  a, *others = (
    jax.tree.leaves(tiny.final_state(tmp_path / name))
    for name in ('cold', 'warm', 'parts')
  )
  for b in others:
    for x, y in zip(a, b, strict=True):
      np.testing.assert_array_equal(x, y)
