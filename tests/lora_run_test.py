"""Runs that train LoRA: what is trained, kept, refused, and made of it."""

import hashlib
import json
import shutil

import binaries
import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny

from diffusion_jax import load, models, runs
from diffusion_jax.models import lora
from diffusion_jax.runs import low_rank, programs, recipe
from diffusion_jax.system import files
from diffusion_jax.training import checkpoint, sharding
from diffusion_jax.weights import lora as files_of

LORA = {'lora.rank': 2, 'lora.alpha': 3.0, 'lora.layers': "('all-linear',)"}
HOW = {
  **LORA, 'num_steps': 20, 'sample_every': 20, 'eval_every': 20,
  'checkpoint_every': 10, 'optim.lr': 0.03, 'ema.decay': 0.5,
}  # fmt: skip
LAYERS = ('hidden', 'out')


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  return tiny.trained(tmp_path_factory.mktemp('base') / 'base')


@pytest.fixture(scope='module')
def run(base, tmp_path_factory):
  """A finished run with LoRA, killed once, whose origin has moved."""
  workdir = tmp_path_factory.mktemp('run') / 'run'
  moved = shutil.copytree(base, workdir.parent / 'base')
  start = *tiny.flags(workdir, **HOW), f'--init_from={moved}'
  first = binaries.run('train', *start, '--config.num_steps=10')
  assert first.code == 0, first.err
  assert '2 layers are trained (LoRA of rank 2)' in first.err
  shutil.rmtree(moved)
  tiny.train(workdir, **HOW)
  return workdir


def kernels(params) -> dict:
  found = lora.kernels(jax.device_get(params['net']))
  return {layer: np.float64(found[layer]) for layer in LAYERS}


def saved(run, ema: bool) -> dict:
  """All parameters of the last checkpoint."""
  wanted, _ = low_rank.shapes(runs.read_config(run))
  abstract = sharding.abstract(wanted, tiny.one_device())
  folder = files.at(run) / 'checkpoints'
  return jax.device_get(checkpoint.load_params(folder, 20, abstract, ema=ema))


def test_only_low_rank_changes_are_trained(run, base):
  """Checkpoints and averages hold nothing else; the copy is the base's."""
  assert sorted(tiny.losses(run)) == list(range(1, 21))
  trained = load(base)
  copy = run / 'parts' / 'net.safetensors'
  tensors = safetensors.numpy.load_file(copy)
  wanted = models.named(jax.device_get(trained.params['net']))
  assert tensors.keys() == wanted.keys()
  for name, array in tensors.items():
    np.testing.assert_array_equal(array, wanted[name])
  facts = json.loads((run / 'parts' / 'net.json').read_text())
  digest = hashlib.sha256(copy.read_bytes()).hexdigest()
  assert facts['sha256'] == digest
  assert (facts['step'], facts['ema']) == (30, True)
  for ema in (True, False):
    tree = saved(run, ema)
    assert tree.keys() == {'lora'}
    assert {*models.named(tree['lora'])} == {
      f'{layer}/{part}' for layer in LAYERS for part in 'AB'
    }
    assert all(leaf.any() for leaf in jax.tree.leaves(tree))
  told = json.loads((run / 'init_from.json').read_text())
  assert told['taken'] == 0


def test_what_is_loaded_is_the_sum(run, base):
  trained = load(run)
  assert trained.params.keys() == {'net'}
  averaged = saved(run, True)['lora']
  for layer, found in kernels(trained.params).items():
    a, b = (np.float64(averaged[layer][part]) for part in 'AB')
    wanted = kernels(load(base).params)[layer] + 3 / 2 * a @ b
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  raw = load(run, ema=False)
  assert not np.allclose(
    kernels(raw.params)['out'], kernels(trained.params)['out']
  )
  hashes = {x.weights_sha256 for x in (raw, trained, trained.at(10))}
  assert len(hashes) == 3
  assert trained.at(10).at(20).weights_sha256 == trained.weights_sha256


def test_the_base_with_the_run_is_the_run(run, base, tmp_path):
  """By its folder, or by its file."""
  result = binaries.run('convert', f'--from={run}', f'--to={tmp_path}/out')
  assert result.code == 0, result.err
  assert 'pytorch_lora_weights.safetensors' in result.out
  assert {path.name for path in (tmp_path / 'out').iterdir()} == {files_of.FILE}
  how = {'sampler': 'ddim', 'num_steps': 3}
  wanted = load(run).sample(4, **how)
  plain = load(base)
  for path in (run, tmp_path / 'out', tmp_path / 'out' / files_of.FILE):
    changed = plain.with_lora(path)
    assert np.abs(changed.sample(4, **how).astype(int) - wanted).max() <= 1
  assert np.abs(plain.sample(4, **how).astype(int) - wanted).max() > 1
  by_file, by_run = (
    plain.with_lora(path, 0.5) for path in (tmp_path / 'out', run)
  )
  assert by_file.weights_sha256 == by_run.weights_sha256


def test_the_first_loss_is_that_of_the_base(base):
  """B is zero: of the same rows, and held-out ones, in any program."""
  config = runs.read_config(base)
  changed = {**config, 'lora': {'rank': 2, 'alpha': 0.0, 'layers': ['all']}}
  mesh = tiny.one_device()
  plain, other = (
    programs.create(one, mesh, recipe.create(one)) for one in (config, changed)
  )
  params = {'net': jax.tree.map(np.asarray, load(base).params['net'])}
  own = other.recipe.init(jax.random.key(1))
  batch, weight = tiny.images(4), np.ones(4, 'f4')
  losses = [
    program.loss_fn(given, program.recipe.objective.extras, batch, weight, 0)
    for program, given in ((plain, params), (other, {**params, **own}))
  ]
  assert losses[0] == losses[1]


@pytest.mark.parametrize(
  ('changes', 'told'),
  [
    ({}, ('lora.rank=2', '--init_from=RUN')),
    ({'lora.layers': "('query',)"}, ("'query'", 'hidden, out')),
    ({'lora.rank': 9}, ('lora.rank=9', 'at most 8')),
    ({'lora.rank': -1}, ('lora.rank=-1',)),
    ({'lora.layers': '()'}, ('lora.layers=()',)),
  ],
)
def test_what_cannot_be_trained_is_one_line(base, tmp_path, changes, told):
  flags = tiny.flags(tmp_path / 'run', **{**HOW, **changes})
  origin = [f'--init_from={base}'] * bool(changes)
  message = binaries.run('train', *flags, *origin).message
  for part in told:
    assert part in message
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_another_network_is_one_line(base, tmp_path):
  flags = tiny.flags(tmp_path / 'run', **HOW, **{'model.channels': 16})
  message = binaries.run('train', *flags, f'--init_from={base}').message
  assert 'has another network than the config' in message
  assert '--config=RUN/config.json' in message


def test_a_run_keeps_its_layers_and_its_copy(run, base, tmp_path):
  workdir = shutil.copytree(run, tmp_path / 'run')
  flags = tiny.flags(workdir, **{**HOW, 'lora.rank': 3, 'num_steps': 21})
  assert 'lora.rank: 2 there, 3 now' in binaries.run('train', *flags).message
  copy = workdir / 'parts' / 'net.safetensors'
  content = bytearray(copy.read_bytes())
  content[-1] ^= 1
  copy.write_bytes(content)
  flags = tiny.flags(workdir, **{**HOW, 'num_steps': 21})
  for binary, *more in (('train', *flags), ('sample', f'--workdir={workdir}')):
    message = binaries.run(binary, *more).message
    assert 'net.safetensors is not what was saved' in message
  message = binaries.run(
    'sample', f'--workdir={run}', f'--lora={base}:0.5'
  ).message
  assert 'a run without LoRA' in message


@pytest.mark.slow
def test_losses_do_not_depend_on_devices_or_kills(run, base, tmp_path):
  """In one go, and on eight devices, with the batch in two pieces."""
  killed = tiny.losses(run)
  start = f'--init_from={base}'
  for name, changes, devices in (
    ('once', {}, 1),
    ('moved', {'mesh.data': 4, 'mesh.fsdp': 2, 'microbatches': 2}, 8),
  ):
    flags = tiny.flags(tmp_path / name, **HOW, **changes)
    result = binaries.run('train', *flags, start, devices=devices)
    assert result.code == 0, result.err
    found = tiny.losses(tmp_path / name)
    if name == 'once':
      assert found == killed
    np.testing.assert_allclose(
      [found[k] for k in killed], list(killed.values()), rtol=3e-6
    )


@pytest.mark.slow
def test_a_run_begins_with_the_network_and_its_changes(run, tmp_path):
  """Be it trained itself, or by further LoRA."""
  for name, changes in (('whole', {'lora.rank': 0}), ('further', {})):
    workdir = tmp_path / name
    how = {**HOW, 'num_steps': 1, 'checkpoint_every': 1, **changes}
    result = binaries.run(
      'train', *tiny.flags(workdir, **how), f'--init_from={run}'
    )
    assert result.code == 0, result.err
  wanted = kernels(load(run).params)
  copy = lora.kernels(
    safetensors.numpy.load_file(tmp_path / 'further/parts/net.safetensors')
  )
  for layer, array in wanted.items():
    np.testing.assert_array_equal(copy[layer], array)
  assert 'taken' in json.loads((tmp_path / 'whole/init_from.json').read_text())
  # A step of warm-up changes nothing.
  for layer, found in kernels(
    load(tmp_path / 'whole', ema=False).params
  ).items():
    np.testing.assert_array_equal(found, wanted[layer])
  assert checkpoint.steps(tmp_path / 'whole' / 'checkpoints') == [1]
