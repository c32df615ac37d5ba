"""What is installed: every package, config and template, and nothing else.

A wheel of this project holds what `build_py` copies, so that is run, on the
checkout and on copies in which something was forgotten.
"""

import os
import shutil
import subprocess
import sys
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


def test_shipped_configs_are_found_without_a_checkout(built, tmp_path):
  """By name, from another folder, in what was built."""
  program = """
import importlib
from pathlib import Path
from diffusion_jax.cli import config_files
for name in config_files.shipped_configs():
  module = importlib.import_module(f'diffusion_jax.configs.{name}')
  assert callable(module.get_config)
  print(config_files.find_config(name))
"""
  result = subprocess.run(
    [sys.executable, '-c', program],
    cwd=tmp_path, capture_output=True, text=True, timeout=120,
    env={**os.environ, 'PYTHONPATH': str(built[0])},
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  found = {Path(line) for line in result.stdout.splitlines()}
  folder = built[0] / SHIPPED['configs']
  assert found == set(folder.glob('[!_]*.py'))
  assert len(found) >= 2


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
