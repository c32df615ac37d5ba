"""What messages tell users to do exists, is tried by a test, and helps."""

import ast
import re

import binaries
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data, runs
from diffusion_jax.configs import default
from diffusion_jax.system.errors import UserError

PACKAGE = binaries.ROOT / 'diffusion_jax'
BINARIES = sorted(
  path.stem
  for path in PACKAGE.glob('*.py')
  if '\nif __name__' in path.read_text()
)
# Files and methods that look like keys.
NO_KEYS = {'data.json', 'data.pkl', 'model.apply'}
# Flags of other programs, of absl and of launch/*.sh, and a placeholder.
FOREIGN = {
  *('xla_gpu_deterministic_ops', 'xla_gpu_autotune_level', 'fresh', 'name'),
  *('abbrev', 'always', 'dirty', 'exclude', 'signal', 'helpfull', 'xla_dump'),
  'xla_force_host_platform_device_count',
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
  tasks = re.findall(r'^  (\w+)  ', binaries.run('edit', '--help').out, re.M)
  assert len(tasks) > 8
  running += [binaries.start('edit', task, '--help') for task in tasks]
  names = set()
  for one in running:
    names |= set(re.findall(r'^  --(?:\[no\])?(\w+)', one.end().out, re.M))
  return names | {f'no{name}' for name in names} | {'help', 'helpfull'}


def named_flags() -> set[str]:
  return {
    name
    for text in strings()
    for name in re.findall(r'(?<![\w-])--([a-z]\w++)(?![.{(-])', text)
  } - FOREIGN


def test_flags_that_messages_name_exist():
  named = named_flags()
  assert len(named) > 40
  assert named - {'config'} <= known_flags()


def test_config_keys_that_messages_name_exist():
  flat = runs.flatten(default.get_config().to_dict())
  known = {*flat, 'optim.part_lr', 'model.details'} | {
    f'{group}.{key}'
    for group, choices in default.CHOICES.items()
    for make in choices.values()
    for key in make()
  }
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


def picture(path, shape=(8, 8, 3)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full(shape, 100, np.uint8)).save(path)


def some_folder(root):
  for name in ('a', 'b', 'c'):
    picture(root / f'{name}.png')
  return str(root)


def beside_and_below(root):
  picture(root / 'cats' / 'd.png')
  return some_folder(root)


def of_two_sizes(root):
  picture(root / 'd.png', (9, 9, 3))
  return some_folder(root)


def array(root, shape, dtype=np.uint8):
  np.save(root / 'a.npy', np.ones(shape, dtype))
  return str(root / 'a.npy')


def channels_first(root):
  return array(root, (4, 3, 8, 8))


def of_16_pixels(root):
  return array(root, (4, 16, 16, 3))


# Images, a mistake, the remedy as the message puts it, and the same as
# arguments.
MISTAKES = [
  (beside_and_below, {'name': 'folder'}, 'set data.classes=none',
   {'classes': 'none'}),
  (some_folder, {'name': 'folder', 'heldout_every': 5},
   '0 to hold out none', {'heldout_every': 0}),
  (some_folder, {'name': 'folder', 'classes': 'folder'},
   'did you mean folders?', {'classes': 'folders'}),
  (some_folder, {'name': 'folder', 'channels': 4}, '3 (RGB)',
   {'channels': 3}),
  (some_folder, {'name': 'foldr'}, 'did you mean folder?', {'name': 'folder'}),
  (some_folder, {'name': 'arrays'}, "is of data.name 'folder'",
   {'name': 'folder'}),
  (of_16_pixels, {'name': 'folder'}, "of data.name 'arrays'",
   {'name': 'arrays', 'image_size': 16}),
  (of_16_pixels, {'name': 'arrays'}, 'set image_size and channels to theirs',
   {'image_size': 16}),
  (some_folder, {'name': 'digits'}, 'set name to arrays, folder or',
   {'name': 'folder'}),
  (lambda root: '', {'name': 'digits', 'image_size': 32},
   'set image_size=8 and channels=1', {'image_size': 8, 'channels': 1}),
]  # fmt: skip


@pytest.mark.parametrize(('images', 'mistake', 'told', 'remedy'), MISTAKES)
def test_a_remedy_for_data_helps(tmp_path, images, mistake, told, remedy):
  given = {
    'path': images(tmp_path), 'image_size': 8, 'channels': 3, **mistake
  }  # fmt: skip
  with pytest.raises(UserError, match=re.escape(told)):
    data.create(**given)
  assert len(data.create(**given | remedy)) > 1


def test_a_remedy_for_evaluation_helps(tmp_path):
  def read(**arguments):
    source = data.open_set(of_two_sizes(tmp_path), **arguments)
    return [source[i] for i in range(len(source))]

  with pytest.raises(UserError, match='--image_size=N crops'):
    read()
  assert len(read(image_size=8)) == 4


def test_channels_first_become_last_as_advised(tmp_path):
  path = channels_first(tmp_path)
  given = {'name': 'arrays', 'path': path, 'image_size': 8, 'channels': 3}
  with pytest.raises(UserError) as told:
    data.create(**given)
  advice = re.search(r'np\.moveaxis\(images, 1, -1\)', str(told.value))
  np.save(path, eval(advice[0], {'np': np, 'images': np.load(path)}))
  assert data.create(**given)[0]['image'].shape == (8, 8, 3)


def test_every_flag_that_messages_name_is_tried_by_a_test():
  """Alone, or as a keyword argument of the helpers that start binaries."""
  tests = '\n'.join(
    path.read_text()
    for path in (binaries.ROOT / 'tests').glob('*.py')
    if path.name != 'remedies_test.py'
  )
  assert not {
    name
    for name in named_flags() - {'keep_samples'}  # only in a docstring
    if not re.search(rf'--(no)?{name}\b|\b{name}=', tests)
  }
