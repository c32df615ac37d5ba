"""The scripts in launch/: they parse, explain themselves, and refuse."""

import subprocess

import binaries
import pytest

SCRIPTS = sorted((binaries.ROOT / 'launch').glob('*.sh'))


def bash(*arguments):
  return subprocess.run(
    ['bash', *map(str, arguments)],
    cwd=binaries.ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.stem)
def test_scripts_parse(script):
  assert bash('-n', script).returncode == 0
  assert bash('-n', binaries.ROOT / '.ci' / 'run').returncode == 0


@pytest.mark.parametrize('name', ['local', 'test', 'prepare_data'])
def test_scripts_explain_themselves(name):
  result = bash(f'launch/{name}.sh', '--help')
  assert result.returncode == 0
  assert f'bash launch/{name}.sh' in result.stdout


@pytest.mark.parametrize('name', ['local', 'prepare_data'])
def test_unknown_arguments_are_refused_before_anything_is_installed(name):
  result = bash(f'launch/{name}.sh', '--frobnicate')
  assert result.returncode == 2
  assert '--frobnicate' in result.stderr
  assert 'installing' not in result.stdout


def test_fresh_removes_no_folder_of_others(tmp_path):
  (tmp_path / 'config.json').write_text('{"architectures": []}')
  (tmp_path / 'weights').write_text('dear')
  result = bash('launch/local.sh', '--fresh', tmp_path)
  assert result.returncode == 2
  assert 'not a run' in result.stderr
  assert (tmp_path / 'weights').read_text() == 'dear'


def test_readme_names_commands_that_exist():
  text = (binaries.ROOT / 'README.md').read_text()
  for script in ('local', 'test', 'prepare_data'):
    assert f'bash launch/{script}.sh' in text
