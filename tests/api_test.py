"""Public docstrings, which pdoc makes pages of, name arguments and errors."""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap

import pytest

import diffusion_jax

# Not the binaries: each has flags of its own, and cli shares them.
PACKAGES = [
  found.name
  for found in pkgutil.iter_modules(diffusion_jax.__path__)
  if found.ispkg and found.name not in ('cli', 'configs')
]


def functions(package) -> dict:
  """Name -> public function, of all modules of a package."""
  name = f'diffusion_jax.{package}'
  paths = importlib.import_module(name).__path__
  names = [name, *(m.name for m in pkgutil.walk_packages(paths, f'{name}.'))]
  found = {
    f'{module}.{key}': inspect.unwrap(item)
    for module in names
    for key, item in vars(importlib.import_module(module)).items()
    if key[0] != '_' and getattr(item, '__module__', '') == module
  }
  return {key: item for key, item in found.items() if inspect.isfunction(item)}


def problems(function) -> list[str]:
  """What a docstring leaves out.

  Few arguments may go without a section, if the text suffices.
  """
  doc, told = inspect.getdoc(function) or '', []
  section = re.search(r'^Args:\n((?:  .*\n|\n)*)', f'{doc}\n', re.M)
  named = re.findall(r'^  \*{0,2}(\w+): ', section[1], re.M) if section else []
  parameters = list(inspect.signature(function).parameters)
  if named != parameters and (section or len(parameters) > 3):
    told.append(f'Args has {named} of {parameters}')
  body = ast.parse(textwrap.dedent(inspect.getsource(function)))
  raised = (n for n in ast.walk(body) if isinstance(n, ast.Raise))
  if 'UserError' not in doc and any(
    'UserError(' in ast.unparse(node) for node in raised
  ):
    told.append('UserError is raised, and not told')
  return told


@pytest.mark.parametrize('package', PACKAGES)
def test_docstrings_name_arguments_and_errors(package):
  found = {name: problems(item) for name, item in functions(package).items()}
  assert {name: told for name, told in found.items() if told} == {}


def test_what_is_left_out_is_seen():
  def function(first, *rest, last=0):
    """Does it.

    Args:
      first: of three.
      last: of three.
    """
    raise UserError('x')  # noqa: F821

  assert len(problems(function)) == 2
