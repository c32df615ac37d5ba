"""The folder of compiled programs: where it is, and what is removed from it."""

import os
import zlib

import compiled


def test_the_folder_can_be_chosen_and_need_not_be_there(tmp_path, monkeypatch):
  monkeypatch.setenv('DIFFUSION_JAX_TEST_CACHE', str(tmp_path / 'a' / 'b'))
  assert compiled.folder('other') == tmp_path / 'a' / 'b'
  assert (tmp_path / 'a' / 'b').is_dir()
  (tmp_path / 'file').touch()
  monkeypatch.setenv('DIFFUSION_JAX_TEST_CACHE', str(tmp_path / 'file' / 'b'))
  assert str(compiled.folder('other')) == 'other'


def test_the_users_cache_is_the_default(tmp_path, monkeypatch):
  monkeypatch.delenv('DIFFUSION_JAX_TEST_CACHE')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  found = compiled.folder('other')
  assert found.is_dir()
  assert found.parent == tmp_path / 'diffusion_jax_tests'


def test_damaged_and_least_recently_used_programs_go(tmp_path, monkeypatch):
  program = zlib.compress(os.urandom(1000))
  for age, name in enumerate(('newest', 'newer', 'old', 'oldest')):
    path = tmp_path / f'{name}-cache'
    path.write_bytes(program)
    os.utime(path, (1e9 - age, 1e9 - age))
  (tmp_path / 'half-cache').write_bytes(program[:500])
  (tmp_path / 'empty-cache').touch()
  monkeypatch.setattr(compiled, 'LIMIT', 3.5 * len(program))
  compiled.tidy(tmp_path)
  left = {path.name for path in tmp_path.glob('*-cache')}
  assert left == {'newest-cache', 'newer-cache', 'old-cache'}


def test_a_program_is_checked_once(tmp_path, monkeypatch):
  path = tmp_path / 'program-cache'
  path.write_bytes(zlib.compress(b'machine code'))
  os.utime(path, (1e9, 1e9))
  compiled.tidy(tmp_path)
  monkeypatch.setattr(compiled, '_whole', None)
  compiled.tidy(tmp_path)
  assert path.exists()
