"""What messages tell users to do exists: flags, keys, scripts, binaries."""

import ast
import re

import binaries

from diffusion_jax import runs
from diffusion_jax.configs import default

PACKAGE = binaries.ROOT / 'diffusion_jax'
BINARIES = sorted(
  path.stem
  for path in PACKAGE.glob('*.py')
  if '\nif __name__' in path.read_text()
)
# Files and methods that look like keys.
NO_KEYS = {'data.json', 'data.pkl', 'model.apply'}
# Flags of other programs and of launch/*.sh, and a placeholder.
FOREIGN = {
  *('xla_gpu_deterministic_ops', 'xla_gpu_autotune_level', 'fresh', 'name'),
  *('abbrev', 'always', 'dirty', 'exclude', 'signal'),
}


def strings() -> list[str]:
  """All string literals of the package; a gap of an f-string is '{}'."""
  found = []
  for path in sorted(PACKAGE.rglob('*.py')):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
      if isinstance(node, ast.JoinedStr):
        found.append(''.join(
          part.value if isinstance(part, ast.Constant) else '{}'
          for part in node.values
        ))  # fmt: skip
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        found.append(node.value)
  return found


def known_flags() -> set[str]:
  running = [binaries.start(name, '--help') for name in BINARIES]
  names = set()
  for one in running:
    names |= set(re.findall(r'^  --(?:\[no\])?(\w+)', one.end().out, re.M))
  return names | {f'no{name}' for name in names} | {'help', 'helpfull'}


def test_flags_that_messages_name_exist():
  named = {
    name
    for text in strings()
    for name in re.findall(r'(?<![\w-])--([a-z]\w++)(?![.{(-])', text)
  }
  assert len(named) > 40
  assert named - FOREIGN - {'config'} <= known_flags()


def test_config_keys_that_messages_name_exist():
  flat = runs.flatten(default.get_config().to_dict())
  known = {*flat, 'optim.part_lr'}
  groups = '|'.join({key.split('.')[0] for key in flat if '.' in key})
  named = set()
  for text in strings():
    if ' ' in text and '.py' not in text and '\n' not in text:
      named |= set(re.findall(rf'\b((?:{groups})\.[a-z]\w+)', text))
      named |= set(re.findall(r'--config\.([a-z_.]+[a-z])=', text))
  assert len(named) > 15
  assert named - NO_KEYS <= known


def test_scripts_and_binaries_that_messages_name_exist():
  scripts, named = set(), set()
  for text in strings():
    scripts |= set(re.findall(r'bash (launch/\w+\.sh)', text))
    named |= set(re.findall(r'python -m diffusion_jax\.(\w+)', text))
  assert scripts
  assert all((binaries.ROOT / script).exists() for script in scripts)
  assert named
  assert named <= set(BINARIES)
