"""The scripts in launch/: they parse, explain themselves, and refuse."""

import shutil
import subprocess

import binaries
import pytest

SCRIPTS = [
  *sorted((binaries.ROOT / 'launch').glob('*.sh')),
  binaries.ROOT / 'launch' / 'slurm.sbatch',
]
NAMED = ['local', 'ten_minutes', 'test', 'prepare_data', 'tpu_pod', 'worker']


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


@pytest.mark.skipif(not shutil.which('shellcheck'), reason='no shellcheck')
def test_shellcheck_finds_nothing():
  # SC1091: .venv/bin/activate is not there to be read.
  result = subprocess.run(
    ['shellcheck', '--exclude=SC1091', *SCRIPTS],
    cwd=binaries.ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert result.returncode == 0, result.stdout


@pytest.mark.parametrize('name', NAMED)
def test_scripts_explain_themselves(name):
  result = bash(f'launch/{name}.sh', '--help')
  assert result.returncode == 0
  assert f'bash launch/{name}.sh' in result.stdout
  # All of the comment at the top, and no command.
  assert not result.stdout.rstrip().endswith('pipefail')
  script = (binaries.ROOT / 'launch' / f'{name}.sh').read_text()
  comment = script.split('\nset -euo pipefail')[0].splitlines()[1:]
  assert result.stdout.split() == [
    word for line in comment for word in line.removeprefix('#').split()
  ]


@pytest.mark.parametrize('name', ['local', 'prepare_data', 'tpu_pod', 'worker'])
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


def test_the_table_names_all_launchers():
  folder = binaries.ROOT / 'launch'
  table = (folder / 'README.md').read_text().split('\n\n')[1]
  for path in folder.iterdir():
    if path.name not in ('README.md', 'environment.sh', 'prepare_data.py'):
      assert f'`{path.name}`' in table
