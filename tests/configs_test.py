"""Every shipped config loads, is documented, and builds what it says."""

import ast
import importlib
import json
import re
from pathlib import Path

import binaries
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from diffusion_jax import models, runs
from diffusion_jax.cli import config_files
from diffusion_jax.configs import default
from diffusion_jax.runs import completion
from diffusion_jax.runs import recipe as recipes
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import metrics, optim, sharding, state

CONFIGS = sorted((binaries.ROOT / 'configs').glob('[!_]*.py'))
PUBLISHED = [path for path in CONFIGS if path.stem != 'default']
CIFAR = binaries.ROOT.parent / 'shared' / 'data' / 'cifar10'


# What the runs of arXiv 2006.11239 share (section 4 and appendix B).
RECIPE = {
  'ema.decay': 0.9999, 'optim.warmup_steps': 5000, 'optim.clip_norm': 1.0,
  'optim.b1': 0.9, 'optim.b2': 0.999, 'optim.eps': 1e-8,
  'process.num_timesteps': 1000, 'process.beta_start': 1e-4,
  'process.beta_end': 0.02, 'process.schedule': 'linear',
  'loss.prediction': 'eps', 'model.channels': 128, 'model.num_blocks': 2,
  'model.attention_resolutions': (16,), 'model.num_heads': 1,
  'model.num_groups': 32,
}  # fmt: skip
RECIPE_256 = {
  **RECIPE, 'batch_size': 64, 'optim.lr': 2e-5, 'model.dropout': 0.0,
  'model.multipliers': (1, 1, 2, 2, 4, 4), 'data.image_size': 256,
  'data.channels': 3, 'sample.variance': 'fixedsmall',
}  # fmt: skip


# What all configs were resolved to before they started from `default`, and
# what each of them says.
BEFORE = {
  'seed': 0, 'microbatches': 1, 'steps_per_dispatch': 1, 'log_every': 100,
  'eval_every': 5000, 'data.on_device': False,
  'optim.moments_dtype': 'float32',
  'eval_images': 0, 'sample_every': 10000, 'checkpoint_every': 5000,
  'keep_last': 2, 'keep_every': 100000, 'mesh.data': -1, 'mesh.fsdp': 1,
  'mesh.tensor': 1, 'data.path': '', 'data.train_split': 'train',
  'data.heldout_split': 'test', 'data.heldout_every': 0, 'data.channels': 3,
  'model.name': 'unet', 'model.dtype': 'float32', 'sample.sampler': 'ddim',
  'sample.grid': 'uniform', 'sample.num_steps': 50, 'sample.clip': True,
  **RECIPE,
}  # fmt: skip
BEFORE_256 = {
  **BEFORE, **RECIPE_256, 'data.flip': True, 'sample.num_images': 16,
}  # fmt: skip
EACH = {
  ('cifar10',): {
    **BEFORE, 'num_steps': 800000, 'batch_size': 128, 'eval_images': 1280,
    'keep_every': 50000, 'data.name': 'tfds:cifar10', 'data.image_size': 32,
    'data.flip': True, 'model.multipliers': (1, 2, 2, 2),
    'model.dropout': 0.1, 'optim.lr': 2e-4, 'sample.num_images': 64,
    'sample.variance': 'fixedlarge',
  },
  ('digits',): {
    **BEFORE, 'num_steps': 3000, 'batch_size': 64, 'log_every': 50,
    'eval_every': 500, 'sample_every': 500, 'checkpoint_every': 500,
    'keep_every': 0, 'data.name': 'digits', 'data.image_size': 8,
    'data.channels': 1, 'data.flip': False, 'model.channels': 32,
    'model.multipliers': (1, 2), 'model.num_blocks': 1,
    'model.attention_resolutions': (4,), 'model.num_groups': 8,
    'model.dropout': 0.0, 'optim.lr': 2e-3, 'optim.warmup_steps': 100,
    'ema.decay': 0.995, 'sample.num_images': 64,
    'sample.variance': 'fixedlarge',
  },
  ('celebahq256',): {
    **BEFORE_256, 'num_steps': 500000, 'data.name': 'folder',
  },
  ('lsun', 'church'): {
    **BEFORE_256, 'num_steps': 1200000, 'data.name': 'tfds:lsun/church_outdoor',
    'data.heldout_split': 'validation',
  },
  ('lsun', 'bedroom'): {
    **BEFORE_256, 'num_steps': 2400000, 'data.name': 'tfds:lsun/bedroom',
    'data.heldout_split': 'validation', 'data.flip': False,
  },
  ('lsun', 'cat'): {
    **BEFORE_256, 'num_steps': 1800000, 'data.name': 'tfds:lsun/cat',
    'data.heldout_split': '',
  },
}  # fmt: skip
# Keys that are younger than those runs, with what they did.
YOUNGER = {
  'codec.name': 'pixels', 'conditioning.name': 'none',
  'loss.name': 'denoising', 'optim.name': 'adam', 'optim.decay': 'constant',
  'optim.decay_steps': 0, 'optim.end_lr': 0.0, 'optim.weight_decay': 0.0,
  'optim.decay_from': 0,
  'data.classes': 'auto', 'data.bits': 0, 'data.skip_broken': False,
  'model.remat': 'none', 'model.plain': (), 'model.patch_size': 2,
  'model.transformer_depths': (),
  'model.head_channels': 0, 'model.style': 'ddpm', 'model.time_scale': 1.0,
  'conditioning.num_classes': 0, 'conditioning.drop': 0.1,
  'sample.guidance': 1.0,
  'loss.level': 'auto', 'loss.law': 'uniform', 'loss.law_mean': 0.0,
  'loss.law_std': 0.0,
  'loss.weight': 'simple', 'loss.gamma': 0.0, 'loss.k': 1.0, 'loss.bias': 2.0,
  'loss.huber': 0.0, 'loss.variance': 'fixed', 'loss.variance_weight': 0.001,
  'loss.sigma_data': 0.5, 'process.sigma_min': 0.002,
  'process.sigma_max': 80.0, 'process.path': '', 'process.sha256': '',
  'process.zero_snr': False, 'process.shift': 1.0,
  'ema.decays': (), 'ema.profiles': (), 'data.augment': 0.0,
  'data.captions': 'auto',
  'super_resolution.factor': 0, 'super_resolution.by': 'mean',
  'super_resolution.noise': 0.0,
  'lora.rank': 0, 'lora.alpha': 0.0, 'lora.layers': ('attention',),
}  # fmt: skip


def load(path: Path, *arguments):
  return config_files.load(':'.join([str(path), *arguments]))


def flat(name: str, *arguments) -> dict:
  config = load(binaries.ROOT / 'configs' / f'{name}.py', *arguments)
  return runs.flatten(config.to_dict())


def test_the_lists_above_are_whole():
  keys = set(flat('default'))
  for before in EACH.values():
    assert before.keys() | YOUNGER.keys() == keys


@pytest.mark.parametrize('name', EACH, ids=':'.join)
def test_resolved_configs_are_what_they_were(name):
  found = flat(*name)
  before = {key: found.pop(key) for key in EACH[name]}
  assert before == EACH[name]
  for key, value in before.items():
    assert type(value) is type(EACH[name][key]), key
  assert found.items() >= YOUNGER.items()


def test_a_config_is_what_its_file_returns():
  """Nothing has to be completed in what is shipped."""
  for path in CONFIGS:
    module = importlib.import_module(f'diffusion_jax.configs.{path.stem}')
    assert Path(module.__file__) == path
    assert module.get_config().to_dict() == load(path).to_dict()


def test_the_default_explains_every_key():
  """Beside its line, or above it, or above the lines that it stands with."""
  text = (binaries.ROOT / 'configs' / 'default.py').read_text()
  text, *others = text.partition('\ndef get_config():\n')[2].split('\n\n\n')
  for key in (*flat('default'), 'optim.part_lr', 'model.details'):
    assert text.count(f'  config.{key} = ') == 1, key
  for block in text.split('\n\n'):
    assert '#' in block, block
  for group, choices in default.CHOICES.items():
    for make in choices.values():
      (own,) = (x for x in others if x.startswith(f'def {make.__name__}('))
      for key in {*make()} - {*default.get_config()[group]}:
        assert len(re.findall(rf' (config\.{group}|loss)\.{key} = ', own)) == 1


@pytest.mark.parametrize('path', PUBLISHED, ids=lambda path: path.stem)
def test_header_says_what_how_and_how_long(path):
  header = ast.get_docstring(ast.parse(path.read_text()))
  for word in ('Reproduces:', 'Data:', 'Hardware:', 'Time:', 'Command:'):
    assert word in header
  assert f'--config=configs/{path.name}' in header


# One of each kind; networks_test.py counts the parameters of published ones.
QUICK = ('celebahq256', 'cifar10', 'digits', 'emoji_autoencoder')


@pytest.mark.parametrize(
  'path',
  [
    pytest.param(
      path, id=path.stem, marks=[pytest.mark.slow] * (path.stem not in QUICK)
    )
    for path in CONFIGS
  ],
)
def test_state_traces_on_a_mesh(path):
  """Nothing is allocated: shapes, and a sharding for each leaf."""
  config = load(path)
  if config.conditioning.name == 'frozen_text':  # the encoder of 1.5
    options = {'width': 768, 'inner': 3072, 'num_heads': 12, 'length': 77}
    encoders = {'text': {'vocabulary': 49408, 'projection': 0, **options}}
    config.conditioning.encoders = ConfigDict(encoders)
  abstract = state.abstract_state(
    recipes.create(config).init,
    optim.create(**config.optim),
    sharding.make_mesh(2, 2, 2),
  )
  assert all(leaf.sharding for leaf in jax.tree.leaves(abstract))
  published = {
    'cifar10': 35_746_307,
    'cifar10_iddpm': 52_546_438,
    'cifar10_edm': 55_733_891,
    'imagenet64_adm': 295_905_222,
    'celebahq256': 113_673_219,
    'lsun': 113_673_219,
    'sd15_finetune': 859_520_964,
  }
  count = models.count(abstract.params)
  assert count == published.get(path.stem, count)


def test_all_configs_have_the_same_keys():
  """Those of a choice are of that choice, and details those that differ."""
  loaded = [load(path) for path in CONFIGS]
  free = (
    *('codec.', 'conditioning.', 'loss.', 'optim.part_lr.'), 'model.details',
  )  # fmt: skip
  keys = [
    {k for k in runs.flatten(x.to_dict()) if not k.startswith(free)}
    for x in loaded
  ]
  assert all(k == keys[0] for k in keys)
  for config in loaded:
    assert not completion.unknown(config) + completion.lacking(config)


def test_cifar10_is_the_papers_recipe():
  recipe = {
    **RECIPE, 'num_steps': 800_000, 'batch_size': 128, 'optim.lr': 2e-4,
    'model.dropout': 0.1, 'model.multipliers': (1, 2, 2, 2),
    'data.image_size': 32, 'data.flip': True, 'sample.variance': 'fixedlarge',
  }  # fmt: skip
  assert flat('cifar10').items() >= recipe.items()


def test_celebahq_is_the_papers_recipe():
  recipe = {**RECIPE_256, 'num_steps': 500_000, 'data.flip': True}
  assert flat('celebahq256').items() >= recipe.items()


@pytest.mark.parametrize(
  ('category', 'name', 'heldout', 'num_steps', 'flip'),
  [
    ('church', 'church_outdoor', 'validation', 1_200_000, True),
    ('bedroom', 'bedroom', 'validation', 2_400_000, False),
    ('cat', 'cat', '', 1_800_000, True),
  ],
)
def test_lsun_is_the_papers_recipe(category, name, heldout, num_steps, flip):
  recipe = {
    **RECIPE_256, 'num_steps': num_steps, 'data.flip': flip,
    'data.name': f'tfds:lsun/{name}', 'data.heldout_split': heldout,
  }  # fmt: skip
  assert flat('lsun', category).items() >= recipe.items()


def test_lsun_is_as_tfds_has_it():
  """The names that are prepared are TFDS's; its own source says which."""
  from tensorflow_datasets.image import lsun

  known = {config.name for config in lsun.Lsun.BUILDER_CONFIGS}
  for category in ('church', 'bedroom', 'cat'):
    name = flat('lsun', category)['data.name'].removeprefix('tfds:lsun/')
    assert name in known


# --- configs of users and of older runs ---------------------------------------


def written(folder, *lines, start='default.get_config()') -> Path:
  path = folder / 'mine.py'
  path.write_text(
    'from ml_collections import ConfigDict\n'
    'from diffusion_jax.configs import default, cifar10\n'
    f'def get_config():\n  config = {start}\n'
    + ''.join(f'  {line}\n' for line in lines)
    + '  return config\n'
  )
  return path


def test_ones_own_config_starts_from_a_shipped_one(tmp_path):
  path = written(
    tmp_path, 'config.optim.lr = 0.5', start='cifar10.get_config()'
  )
  expected = {**flat('cifar10'), 'optim.lr': 0.5}
  assert runs.flatten(load(path).to_dict()) == expected


def test_keys_that_a_config_lacks_have_their_defaults(tmp_path):
  path = written(
    tmp_path, 'config.optim = ConfigDict({"lr": 0.5})', 'config.seed = 3',
    start='ConfigDict()',
  )  # fmt: skip
  found = flat('default')
  assert runs.flatten(load(path).to_dict()) == {
    **found, 'optim.lr': 0.5, 'seed': 3
  }  # fmt: skip


def test_another_choice_has_options_of_its_own(tmp_path):
  """Those of the default codec are nothing to it."""
  path = written(
    tmp_path, 'config.codec = ConfigDict({"name": "other", "depth": 3})'
  )
  assert load(path).codec.to_dict() == {'name': 'other', 'depth': 3}


def test_a_known_choice_is_completed_and_checked(tmp_path):
  first = 'config.codec = ConfigDict({"name": "autoencoder", "channels": 8})'
  found = load(written(tmp_path, first)).codec
  assert found.to_dict() == {**default.autoencoder(), 'channels': 8}
  for line, must in (
    ('config.codec.chanels = 4', 'did you mean codec.channels?'),
    ('config.codec.channels = "4"', 'must be int, not str'),
    ('config.loss = default.autoencoding(); config.loss.sim = 1', 'loss.ssim?'),
  ):
    with pytest.raises(UserError, match=re.escape(must)):
      load(written(tmp_path, 'config.unlock()', first, line))


@pytest.mark.parametrize(
  ('line', 'must'),
  [
    ('config.optim.warmup = 3', ["'optim.warmup'", 'mean optim.warmup_steps?']),
    ('config.sed = 3', ["'sed'", 'did you mean seed?']),
    ('config.model.depth = 3', ["'model.depth'"]),
    ('config.loss.predictio = "v"', ['did you mean loss.prediction?']),
    (
      'del config.optim; config.optim = 3',
      ["'optim' is one value", 'not a group'],
    ),
    ('del config.seed; config.seed = config.mesh', ['not one value']),
    ('config.notes = ConfigDict({"a": 1})', ["'notes'"]),
  ],
)
def test_an_unknown_key_is_refused_with_a_hint(tmp_path, line, must):
  with pytest.raises(UserError) as error:
    load(written(tmp_path, 'config.unlock()', line))
  assert '\n' not in str(error.value)
  for word in (*must, 'mine.py'):
    assert word in str(error.value)


def test_a_part_may_have_any_name(tmp_path):
  path = written(tmp_path, 'config.optim.part_lr.codec = 1e-5')
  assert load(path).optim.part_lr.codec == 1e-5


def test_what_is_no_config_is_told(tmp_path):
  path = tmp_path / 'mine.py'
  for text, must in (
    ('', 'no function get_config'),
    ('def get_config():\n  pass', 'returns None'),
  ):
    path.write_text(text)
    with pytest.raises(UserError, match=must):
      load(path)
  broken = tmp_path / 'config.json'
  for text, must in (('{', 'unreadable'), ('[]', 'ConfigDict')):
    broken.write_text(text)
    with pytest.raises(UserError, match=must):
      load(broken)


@pytest.mark.parametrize(
  ('line', 'reason'),
  [
    ('config.data.image_size = (64, 48)',
     'image_size must be int, not tuple, or set it to a pair inside `with '
     'config.ignore_type():`'),
    ('config.num_steps = 1e5', 'num_steps must be int, not float'),
    ('config.optim = 3', 'optim must be a group of keys, not int'),
    ('config.optimm.lr = 1',
     "there is no config key 'optimm'; did you mean optim?"),
    ('config.num_steps = STEPS', "NameError: name 'STEPS' is not defined"),
    ('import nothing_here',
     "ModuleNotFoundError: No module named 'nothing_here'"),
    ('config.num_steps = 1 // 0', 'ZeroDivisionError: '),
  ],
)  # fmt: skip
def test_what_a_users_file_raises_is_one_line(tmp_path, line, reason):
  path = written(tmp_path, line)
  with pytest.raises(UserError) as error:
    load(path)
  told = str(error.value)
  assert told.startswith(f'--config={path}: line 5, {line!r}: {reason}')
  assert '\n' not in told


def test_errors_of_syntax_name_their_own_file(tmp_path, monkeypatch):
  path = tmp_path / 'mine.py'
  path.write_text('def get_config(:\n')
  with pytest.raises(UserError, match=f"{path}, line 1, 'def get_config"):
    load(path)
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'of_mine.py').write_text('\n\nx = = 1\n')
  path.write_text('import of_mine\n')
  with pytest.raises(UserError, match=r"of_mine\.py, line 3, 'x = = 1': inv"):
    load(path)


def test_a_bug_in_the_package_keeps_its_traceback(tmp_path, monkeypatch):
  def fail():
    raise ValueError('a bug')

  monkeypatch.setattr(config_files.completion, 'complete', lambda _: fail())
  with pytest.raises(ValueError, match='a bug'):
    load(written(tmp_path))


@pytest.mark.parametrize(
  ('line', 'told'),
  [
    ("config.num_steps = '100'", "num_steps='100' must be int, not str"),
    ('config.seed = True', 'seed=True must be int, not bool'),
    ('config.data = ConfigDict({"image_size": (8, "8")})',
     "data.image_size=(8, '8') must be int, not tuple"),
    ('config.model = ConfigDict({"multipliers": 2})',
     'model.multipliers=2 must be tuple, not int'),
  ],
)  # fmt: skip
def test_types_without_the_default_config_are_checked(tmp_path, line, told):
  path = written(tmp_path, line, start='ConfigDict()')
  with pytest.raises(UserError) as error:
    load(path)
  assert str(error.value).startswith(f'--config={path}: {told}')


def test_values_of_fitting_types_are_taken(tmp_path):
  lines = (
    'config.data = ConfigDict({"image_size": (16, 8)})',
    'config.model = ConfigDict({"multipliers": [1, 2]})',
    'config.optim = ConfigDict({"lr": 1})',
    'config.num_steps = placeholder(int)',
  )
  path = written(tmp_path, *lines, start='ConfigDict()')
  path.write_text(
    'from ml_collections.config_dict import placeholder\n' + path.read_text()
  )
  config = load(path)
  assert tuple(config.data.image_size) == (16, 8)
  with config.unlocked():
    config.num_steps = 7
  assert config.num_steps == 7


@pytest.mark.parametrize('name', EACH, ids=':'.join)
def test_an_older_run_goes_on(tmp_path, name):
  """Its config.json has none of the younger keys; they have their defaults."""
  config = load(binaries.ROOT / 'configs' / f'{name[0]}.py', *name[1:])
  older = runs.to_plain(config)
  for key in (*YOUNGER, 'optim.part_lr', 'model.details'):
    group, inner = key.split('.')
    del older[group][inner]
  del older['codec'], older['conditioning']
  (tmp_path / 'config.json').write_text(json.dumps(older))
  runs.check(tmp_path, config)
  assert runs.read_config(tmp_path) == runs.to_plain(config)
  (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
  with config.unlocked():
    config.loss.name = 'other'
  with pytest.raises(UserError, match=r'loss.name: denoising there, other now'):
    runs.check(tmp_path, config)


def test_a_runs_config_is_a_config(tmp_path):
  config = load(binaries.ROOT / 'configs' / 'digits.py')
  runs.write_config(tmp_path, config)
  assert load(tmp_path / 'config.json').to_dict() == config.to_dict()


# --- --print_config -----------------------------------------------------------


@pytest.mark.parametrize('name', EACH, ids=':'.join)
def test_a_printed_config_is_the_config(tmp_path, name):
  config = load(binaries.ROOT / 'configs' / f'{name[0]}.py', *name[1:])
  (tmp_path / 'printed.py').write_text(config_files.source(config))
  assert load(tmp_path / 'printed.py').to_dict() == config.to_dict()


def test_a_printed_config_has_the_comments_and_every_value(tmp_path):
  path = written(
    tmp_path, 'config.optim.part_lr.codec = 1e-5',
    'config.codec = ConfigDict({"name": "other", "depth": 3})',
    'config.optim.eps = float("inf")',
  )  # fmt: skip
  config = load(path)
  text = config_files.source(config)
  lines = text.splitlines()
  assert (
    '  config.batch_size = 128  # images per step, over all devices' in lines
  )
  at = lines.index('  config.microbatches = 1')
  assert lines[at - 2].startswith('  # Number of pieces')
  assert max(map(len, lines)) <= 80
  path.write_text(text)
  assert load(path).to_dict() == config.to_dict()


@pytest.mark.parametrize('binary', ['train', 'layout', 'preflight', 'convert'])
def test_binaries_print_what_they_would_use(tmp_path, binary):
  """With what flags change, without a workdir; it can be used again."""
  changes = {'optim.weight_decay': 0.5, 'model.multipliers': (1, 1)}
  result = binaries.run(
    binary, '--config=digits', '--print_config',
    *(f'--config.{key}={value}' for key, value in changes.items()),
  )  # fmt: skip
  assert result.code == 0, result.err
  assert not result.err
  (tmp_path / 'printed.py').write_text(result.out)
  found = runs.flatten(load(tmp_path / 'printed.py').to_dict())
  assert found == {**flat('digits'), **changes}


def test_print_config_wants_a_config_and_refuses_mistakes():
  assert '--config' in binaries.run('train', '--print_config').message
  message = binaries.run(
    'train', '--config=digits', '--print_config', '--config.optim.weight=1'
  ).message
  assert '--config.optim.weight=1' in message


def test_a_mistake_in_a_file_is_one_line_of_a_binary(tmp_path):
  path = written(tmp_path, 'config.optim.warmup = 3')
  result = binaries.run('train', f'--config={path}', f'--workdir={tmp_path}/w')
  assert 'did you mean optim.warmup_steps?' in result.message


# --- real data ----------------------------------------------------------------


@pytest.fixture(scope='module')
def real_cifar10(tmp_path_factory):
  """20 sheets of training images, 2 of test images, as an .npz."""
  if not CIFAR.is_dir():
    pytest.skip(f'no real CIFAR-10 at {CIFAR}')

  def sheets(split, count):
    pages = [
      np.asarray(Image.open(CIFAR / split / f'{i:03d}.webp').convert('RGB'))
      for i in range(count)
    ]
    return np.concatenate(
      [
        page.reshape(10, 32, 10, 32, 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(-1, 32, 32, 3)
        for page in pages
      ]
    )

  path = tmp_path_factory.mktemp('data') / 'cifar10.npz'
  np.savez(
    path, train_images=sheets('train', 20), test_images=sheets('test', 2)
  )
  return path


def train_cifar10(data, workdir, **changes):
  changes = {
    'data.name': 'arrays', 'data.path': data, 'log_every': 1,
    'checkpoint_every': 0, 'sample_every': 0, **changes,
  }  # fmt: skip
  result = binaries.run(
    'train', '--config=configs/cifar10.py', f'--workdir={workdir}',
    *(f'--config.{key}={value}' for key, value in changes.items()),
  )  # fmt: skip
  assert result.code == 0, result.err
  return metrics.read(workdir / 'metrics.jsonl')


@pytest.mark.slow
def test_a_narrow_network_learns_real_cifar10(real_cifar10, tmp_path):
  """300 steps of 16: the loss falls from 1 to below 0.15, held out too."""
  rows = train_cifar10(
    real_cifar10, tmp_path,
    **{'num_steps': 300, 'batch_size': 16, 'model.channels': 32,
       'model.num_blocks': 1, 'optim.warmup_steps': 50, 'optim.lr': 1e-3,
       'ema.decay': 0.98, 'eval_every': 300, 'eval_images': 200},
  )  # fmt: skip
  losses = [row['loss'] for row in rows]
  assert 0.9 < losses[0] < 1.1
  assert np.mean(losses[-30:]) < 0.15
  assert rows[-1]['heldout_loss'] < 0.15


@pytest.mark.slow
def test_the_full_network_takes_a_step_of_real_cifar10(real_cifar10, tmp_path):
  rows = train_cifar10(
    real_cifar10, tmp_path, num_steps=2, batch_size=8, eval_every=0
  )
  assert len(rows) == 2
  # At initialisation the network says nothing: the loss is E[eps^2] = 1.
  assert 0.9 < rows[0]['loss'] < 1.1
