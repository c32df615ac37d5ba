"""What is installed: every package, config and template, and nothing else.

A wheel of this project holds what `build_py` copies, so that is run, on the
checkout and on copies in which something was forgotten.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import binaries
import pytest

# Where the folders of a checkout lie once they are installed.
SHIPPED = {
  'diffusion_jax': Path('diffusion_jax'),
  'configs': Path('diffusion_jax', 'configs'),
}


def files(folder) -> set[Path]:
  """All files under a folder, but for what Python or an editor leaves."""
  return {
    path.relative_to(folder)
    for path in Path(folder).rglob('*')
    if path.is_file() and not path.name.endswith(('.pyc', '~', '.swp'))
  }


def wanted(tree) -> set[Path]:
  return {
    there / file
    for name, there in SHIPPED.items()
    for file in files(Path(tree) / name)
  }


def build(tree, folder) -> set[Path]:
  result = subprocess.run(
    [sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', folder],
    cwd=tree, capture_output=True, text=True, timeout=120,
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  return files(folder)


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  folder = tmp_path_factory.mktemp('built')
  return folder, build(binaries.ROOT, folder)


@pytest.fixture
def copy(tmp_path):
  """What setup.py reads, to be changed."""
  tree = tmp_path / 'tree'
  for name in SHIPPED:
    shutil.copytree(binaries.ROOT / name, tree / name)
  for name in ('setup.py', 'pyproject.toml', 'README.md'):
    shutil.copy(binaries.ROOT / name, tree)
  return tree


def test_all_of_the_package_and_nothing_else_is_shipped(built):
  assert built[1] == wanted(binaries.ROOT)
  assert Path('diffusion_jax/configs/digits.py') in built[1]
  assert not [path for path in built[1] if path.stem.endswith('_test')]


MINE = """
from diffusion_jax.configs import default, cifar10

def get_config():
  config = cifar10.get_config()
  config.optim.eps = 2 * default.get_config().optim.eps
  return config
"""
# Finds configs by name, by path, and one of the user's own.
PROGRAM = """
import importlib, sys
from pathlib import Path
from diffusion_jax import configs
from diffusion_jax.cli import config_files
for name in config_files.shipped_configs():
  module = importlib.import_module(f'diffusion_jax.configs.{name}')
  assert callable(module.get_config)
  assert Path(config_files.find_config(name)).samefile(module.__file__)
  print(module.__file__)
named, by_path, own = (
  config_files.load(config_files.find_config(name))
  for name in ('digits', sys.argv[1], sys.argv[2])
)
assert named.data.name == 'digits'
assert by_path.num_steps == 800_000
by_path.optim.eps *= 2
assert own.to_dict() == by_path.to_dict()
"""


def python(folder, *arguments, **environment) -> list[Path]:
  """Runs PROGRAM in a folder that is nothing to the project."""
  (folder / 'configs').mkdir()
  (folder / 'mine.py').write_text(MINE)
  x = shutil.copy(binaries.ROOT / 'configs' / 'cifar10.py', folder / 'configs')
  (folder / 'elsewhere').mkdir()
  result = subprocess.run(
    [sys.executable, *arguments, x, folder / 'mine.py'],
    cwd=folder / 'elsewhere', capture_output=True, text=True, timeout=120,
    env={**os.environ, 'PYTHONPATH': '', **environment},
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  return [Path(line) for line in result.stdout.splitlines()]


def shipped(folder) -> list[Path]:
  found = sorted(folder.glob('[!_]*.py'))
  assert len(found) >= 5
  return found


def test_configs_of_a_wheel(built, tmp_path):
  found = python(tmp_path, '-c', PROGRAM, PYTHONPATH=str(built[0]))
  assert found == shipped(built[0] / SHIPPED['configs'])


def test_configs_of_a_checkout_that_is_not_installed(tmp_path):
  found = python(tmp_path, '-c', PROGRAM, PYTHONPATH=str(binaries.ROOT))
  assert found == shipped(binaries.ROOT / 'configs')


@pytest.mark.slow
def test_configs_of_an_editable_install(copy, tmp_path):
  """Where nothing else is installed that could hide it."""
  build = (
    'import setuptools.build_meta as b, sys; b.build_editable(sys.argv[1])'
  )
  wheels, where = tmp_path / 'wheels', tmp_path / 'site'
  wheels.mkdir()
  result = subprocess.run(
    [sys.executable, '-c', build, wheels],
    cwd=copy, capture_output=True, text=True, timeout=120,
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  (wheel,) = wheels.glob('*.whl')
  with zipfile.ZipFile(wheel) as file:
    file.extractall(where)
  # With -S no .pth file of another install is read; this one comes first.
  start = 'import site, sys; site.addsitedir({!r}); sys.path.append({!r})\n'
  start = start.format(str(where), sysconfig.get_path('purelib'))
  found = python(tmp_path, '-S', '-c', start + PROGRAM)
  assert found == shipped(copy / 'configs')


def test_a_new_package_and_its_template_are_shipped(copy, tmp_path):
  new = copy / 'diffusion_jax' / 'somewhere' / 'deep'
  new.mkdir(parents=True)
  for folder in (new, new.parent):
    (folder / '__init__.py').touch()
  (new / 'page.jinja').write_text('<p>')
  (copy / 'configs' / 'mine.py').touch()
  shipped = build(copy, tmp_path / 'built')
  assert shipped == wanted(copy)
  assert Path('diffusion_jax/somewhere/deep/page.jinja') in shipped


def test_what_would_be_forgotten_is_seen(copy, tmp_path):
  """A folder without __init__.py, and data of a kind that is not listed."""
  (copy / 'diffusion_jax' / 'bare').mkdir()
  (copy / 'diffusion_jax' / 'bare' / 'code.py').touch()
  (copy / 'diffusion_jax' / 'data' / 'table.csv').touch()
  assert wanted(copy) - build(copy, tmp_path / 'built') == {
    Path('diffusion_jax/bare/code.py'),
    Path('diffusion_jax/data/table.csv'),
  }
