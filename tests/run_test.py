"""A whole run, through the binaries: train, kill, go on, sample."""

import json
import shutil
from pathlib import Path

import binaries
import numpy as np
import pytest
import tiny
from PIL import Image

from diffusion_jax import runs
from diffusion_jax.training import checkpoint, metrics


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return tiny.trained(tmp_path_factory.mktemp('runs') / 'digits')


def test_the_workdir_holds_what_was_promised(run):
  names = {path.name for path in run.iterdir()}
  assert {'config.json', 'checkpoints', 'metrics.jsonl', 'samples'} <= names
  assert any(name.startswith('events.out.tfevents') for name in names)
  assert checkpoint.steps(run / 'checkpoints') == [10, 20, 25, 30]
  rows = metrics.read(run / 'metrics.jsonl')
  assert [row['step'] for row in rows] == list(range(1, 31))
  for row in rows:
    assert {'loss', 'grad_norm', 'learning_rate'} <= row.keys()
  assert [r['step'] for r in rows if 'heldout_loss' in r] == [10, 20, 30]
  assert rows[-1]['images_per_sec'] > 0
  pictures = sorted(path.name for path in (run / 'samples').iterdir())
  assert pictures == ['train_00000015.png', 'train_00000030.png']


def test_it_learns(run):
  """The held-out loss, which is always of the same images and noise, falls."""
  rows = metrics.read(run / 'metrics.jsonl')
  values = [row['heldout_loss'] for row in rows if 'heldout_loss' in row]
  assert values[2] < values[1] < values[0] < 1


def test_it_ends_with_where_the_results_lie(run):
  again = tiny.train(run)
  assert str(run) in again.out.splitlines()[-1]
  assert 'step 30' in again.out


@pytest.mark.slow
def test_more_steps_go_on_and_another_seed_does_not(run, tmp_path):
  workdir = tmp_path / 'longer'
  shutil.copytree(run, workdir)
  before = tiny.losses(run)
  tiny.train(workdir, num_steps=33, checkpoint_every=0)
  after = tiny.losses(workdir)
  assert sorted(after) == list(range(1, 34))
  assert {k: after[k] for k in before} == before
  result = binaries.run('train', *tiny.flags(workdir, seed=77))
  assert 'seed: 0 there, 77 now' in result.message


@pytest.mark.slow
def test_a_broken_run_stops_and_names_the_last_good_checkpoint(tmp_path):
  result = binaries.run(
    'train',
    *tiny.flags(
      tmp_path, **{'optim.lr': 1e30, 'optim.warmup_steps': 0,
                   'checkpoint_every': 1},
    ),
  )  # fmt: skip
  lines = [k for k in result.err.splitlines() if k.startswith('error: ')]
  assert result.code == 2
  assert len(lines) == 1
  assert 'training stopped: ' in lines[0]
  kept = checkpoint.steps(tmp_path / 'checkpoints')
  assert not kept or f'checkpoint {kept[-1]} ' in lines[0]


@pytest.mark.slow
def test_another_mesh_goes_on_with_the_same_losses(run, tmp_path):
  """15 steps on one device, then on eight with the batch in two pieces.

  To 3e-6, as the sums round otherwise.
  """
  workdir = tmp_path / 'moved'
  tiny.train(workdir, num_steps=15)
  changes = {'mesh.data': 4, 'mesh.fsdp': 2, 'microbatches': 2}
  result = binaries.run('train', *tiny.flags(workdir, **changes), devices=8)
  assert result.code == 0, result.err
  alone, moved = tiny.losses(run), tiny.losses(workdir)
  assert moved.keys() == alone.keys()
  np.testing.assert_allclose(
    [moved[k] for k in alone], list(alone.values()), rtol=3e-6
  )


def test_two_trainers_do_not_share_a_workdir(run):
  with runs.lock(run):
    result = binaries.run('train', *tiny.flags(run, num_steps=31))
  assert 'another process trains there' in result.message
  assert runs.read_config(run)['num_steps'] == 30  # a refusal changes nothing
  assert sorted(tiny.losses(run)) == list(range(1, 31))
  tiny.train(run, num_steps=30)


# --- sampling ---------------------------------------------------------------


def sample(workdir, *arguments, devices=1):
  result = binaries.run(
    'sample', f'--workdir={workdir}', *arguments, devices=devices
  )
  assert result.code == 0, result.err
  return result


def test_sampling_leaves_npz_grid_and_pictures(run, tmp_path):
  out = tmp_path / 'out'
  result = sample(
    run, '--num_samples=10', '--sampler=ddim', '--num_steps=4', '--png',
    '--trajectory=3', f'--output={out}', '--json',
  )  # fmt: skip
  told = json.loads(result.out)
  assert told['output'] == str(out)
  assert told['grid'] == [999, 666, 333, 0, -1]
  with np.load(out / 'samples.npz') as archive:
    assert list(archive) == ['arr_0']
    images = archive['arr_0']
  assert images.shape == (10, 8, 8, 1)
  assert images.dtype == np.uint8
  assert len(set(map(bytes, images))) == 10
  assert len(list((out / 'png').iterdir())) == 10
  np.testing.assert_array_equal(
    Image.open(out / 'png' / '000007.png'), images[7, ..., 0]
  )
  width, height = Image.open(out / 'grid.png').size
  assert min(width, height) > 3 * 64
  assert Image.open(out / 'trajectory.png').size[0] > 5 * 64


@pytest.mark.parametrize(
  'devices', [1, pytest.param(8, marks=pytest.mark.slow)]
)
def test_an_interrupted_store_is_completed_not_redrawn(run, tmp_path, devices):
  few = [f'--output={tmp_path / "a"}', '--sampler=ddim', '--num_steps=3']
  sample(run, *few, '--num_samples=5', '--batch_size=2')
  parts = sorted((tmp_path / 'a' / 'parts').iterdir())
  stamps = [path.stat().st_mtime_ns for path in parts]
  sample(run, *few, '--num_samples=9', '--batch_size=7')
  assert [path.stat().st_mtime_ns for path in parts] == stamps
  whole = [f'--output={tmp_path / "b"}', '--sampler=ddim', '--num_steps=3']
  sample(run, *whole, '--num_samples=9', devices=devices)
  a, b = (np.load(tmp_path / name / 'samples.npz')['arr_0'] for name in 'ab')
  difference = np.abs(a.astype(int) - b)
  assert difference.max() <= 1
  assert (difference > 0).mean() < 1e-3


def test_default_is_the_papers_sampler_and_stores_have_names(run):
  result = sample(run, '--num_samples=1', '--grid=900,500,20', '--noema')
  assert 'step30_ancestral3' in result.out
  (path,) = (run / 'samples').glob('step30_ancestral3*')
  told = json.loads((path / 'store.json').read_text())
  assert told['grid'] == [900, 500, 20, -1]
  assert told['ema'] is False
  assert path.name.endswith('raw')
  shutil.rmtree(path)


@pytest.mark.slow
def test_any_checkpoint_of_the_run(run, tmp_path):
  drawn = {}
  for step in (10, 20):
    out = tmp_path / str(step)
    sample(
      run, f'--step={step}', '--num_samples=2', '--sampler=ddim',
      '--num_steps=2', f'--output={out}', '--noclip',
    )  # fmt: skip
    drawn[step] = np.load(out / 'samples.npz')['arr_0']
    assert json.loads((out / 'store.json').read_text())['step'] == step
  assert np.any(drawn[10] != drawn[20])


@pytest.mark.parametrize(
  ('arguments', 'must'),
  [
    (['--num_samples=0'], 'num_samples=0'),
    (['--batch_size=-1'], 'batch_size=-1'),
    (['--num_samples=some'], 'some'),
    (['--sampler=magic'], 'magic'),
    (['--sampler=ddim', '--num_steps=5000'], '5000'),
    (['--sampler=ddim', '--num_steps=0'], 'num_steps=0'),
    (['--sampler=ddim', '--eta=1.5'], 'eta=1.5'),
    (['--eta=0.5'], 'eta=0.5: ancestral has no such option'),
    (['--variance=large'], 'large'),
    (['--grid=1,2,3'], 'strictly decrease'),
    (['--grid=sideways'], 'sideways'),
    (['--step=11'], '10, 20, 25, 30'),
    (['--frobnicate=1'], 'frobnicate'),
    (['--output=/dev/null/x'], '/dev/null'),
    (['--output='], '--output is empty'),
    (['--output={run}/checkpoints/99'], 'inside the run'),
    (['--grid=999,500', '--num_steps=7'], 'num_steps=7'),
    (['--num_samples=10', '--trajectory=20'], 'trajectory=20'),
    (['--num_samples=200000000000'], '200000000000'),
    (['--seed=4294967296'], '2**32'),
  ],
)
def test_sampling_answers_in_one_line(run, arguments, must):
  before = sorted(map(str, run.rglob('*')))
  arguments = [a.format(run=run) for a in arguments]
  result = binaries.run('sample', f'--workdir={run}', *arguments)
  assert must in result.message
  assert sorted(map(str, run.rglob('*'))) == before


def test_sampling_of_no_run(tmp_path):
  empty = tmp_path / 'empty'
  result = binaries.run('sample', f'--workdir={empty}')
  assert str(empty) in result.message
  assert 'train first' in result.message
  assert not empty.exists()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_or_named(run, tmp_path):
  """Training goes on from the one before; samples are of that one, too."""
  workdir = tmp_path / 'damaged'
  shutil.copytree(run, workdir)
  for path in (workdir / 'checkpoints' / '30').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  few = ['--num_samples=1', '--grid=500']
  result = binaries.run('sample', f'--workdir={workdir}', '--step=30', *few)
  assert 'checkpoint 30 is unreadable' in result.message
  result = binaries.run('sample', f'--workdir={workdir}', *few)
  assert result.code == 0, result.err
  assert 'checkpoint 30 is unreadable' in result.err
  assert 'checkpoint 25 is used in its place' in result.err
  assert '1 images from step 25' in result.out
  again = tiny.train(workdir)
  assert 'checkpoint 30 is unreadable' in again.err
  assert tiny.losses(workdir) == tiny.losses(run)
  assert checkpoint.steps(workdir / 'checkpoints') == [10, 20, 25, 30]


@pytest.mark.slow
def test_flipped_bits_are_found_by_all(run, tmp_path):
  """All over the file that holds the arrays: the average has its share."""
  workdir = tmp_path / 'damaged'
  shutil.copytree(run, workdir)
  for step in (10, 20, 25, 30):
    files = (workdir / 'checkpoints' / str(step)).glob('state/**/d/*')
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    for place in range(500, len(data), 997):
      data[place] ^= 1
    largest.write_bytes(data)
  before = (workdir / 'config.json').read_text()
  other = tiny.flags(tmp_path / 'other')
  for result in (
    binaries.run('train', *tiny.flags(workdir, num_steps=40)),
    binaries.run('sample', f'--workdir={workdir}', '--num_samples=1'),
    binaries.run('train', *other, f'--init_from={workdir}'),
  ):
    assert 'error: checkpoint 30 is unreadable (' in result.message
  assert (workdir / 'config.json').read_text() == before
  assert not (tmp_path / 'other').exists()


@pytest.mark.slow
def test_another_protocol_needs_an_output_outside_the_store(run, tmp_path):
  out = f'--output={tmp_path / "o"}'
  some = ['--num_samples=2', '--sampler=ddim', '--num_steps=2', out]
  sample(run, *some)
  result = binaries.run('sample', f'--workdir={run}', *some, '--seed=3')
  assert 'seed=0, not 3' in result.message
  assert Path(tmp_path / 'o' / 'samples.npz').exists()
  result = binaries.run(
    'sample', f'--workdir={run}', f'--output={tmp_path / "o" / "new"}'
  )
  assert 'inside the sample store' in result.message
