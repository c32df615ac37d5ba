"""Every shipped config loads, is documented, and builds what it says."""

import ast
from pathlib import Path

import binaries
import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import models, runs
from diffusion_jax.runs import recipe as recipes
from diffusion_jax.training import metrics, optim, sharding, state

CONFIGS = sorted((binaries.ROOT / 'configs').glob('[!_]*.py'))
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


def load(path: Path, *arguments):
  scope = {}
  exec(compile(path.read_text(), str(path), 'exec'), scope)
  return scope['get_config'](*arguments)


def flat(name: str, *arguments) -> dict:
  config = load(binaries.ROOT / 'configs' / f'{name}.py', *arguments)
  return runs.flatten(config.to_dict())


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_header_says_what_how_and_how_long(path):
  header = ast.get_docstring(ast.parse(path.read_text()))
  for word in ('Reproduces:', 'Data:', 'Hardware:', 'Time:', 'Command:'):
    assert word in header
  assert f'--config=configs/{path.name}' in header


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_state_traces_on_a_mesh(path):
  """Nothing is allocated: shapes, and a sharding for each leaf."""
  config = load(path)
  abstract = state.abstract_state(
    recipes.create(config).init,
    optim.create(**config.optim),
    sharding.make_mesh(2, 2, 2),
  )
  assert all(leaf.sharding for leaf in jax.tree.leaves(abstract))
  published = {
    'cifar10': 35_746_307,
    'celebahq256': 113_673_219,
    'lsun': 113_673_219,
  }
  count = models.count(abstract.params)
  assert count == published.get(path.stem, count)


def test_all_configs_have_the_same_keys():
  keys = [runs.flatten(load(path).to_dict()).keys() for path in CONFIGS]
  assert all(k == keys[0] for k in keys)


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
