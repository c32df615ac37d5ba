"""Whole runs in a bucket, by the packages that would reach a real one."""

import json
import os

import binaries
import bucket
import numpy as np
import pytest
import tiny

import diffusion_jax
from diffusion_jax.system import files
from diffusion_jax.training import checkpoint

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not all(map(files._is_installed, files.PACKAGES)),
    reason="needs pip install '.[gcs]'",
  ),
]

FEW = {'num_steps': 20, 'checkpoint_every': 10}
DDIM = ['--num_samples=9', '--sampler=ddim', '--num_steps=3']


@pytest.fixture(scope='module')
def served():
  """What is in the bucket, and the environment of those who use it."""
  with bucket.served() as (objects, environment):
    before = dict(os.environ)
    os.environ.update(environment)  # for what this process reads of it
    yield objects, environment
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope='module')
def local(tmp_path_factory):
  """On a disk: 30 steps, of which these runs do the first 20."""
  return tiny.trained(tmp_path_factory.mktemp('runs') / 'digits')


@pytest.fixture(scope='module')
def run(served):
  """In a bucket: killed once before there was a checkpoint, once in a save."""
  objects, environment = served
  workdir = files.at(f'gs://{bucket.NAME}/runs/digits')
  flags = tiny.flags(workdir, **FEW)
  save = 'runs/digits/checkpoints/20/'

  def killed_when(holds):
    process = binaries.start('train', *flags, **environment)
    process.wait_until(holds)
    process.kill()

  killed_when(lambda: 'runs/digits/starts.jsonl' in objects)
  assert checkpoint.steps(workdir / 'checkpoints') == []
  killed_when(lambda: any(name.startswith(save) for name in list(objects)))
  torn = f'{save}commit_success.txt' not in objects
  assert checkpoint.steps(workdir / 'checkpoints') == [10, 20][: 2 - torn]
  # The rows up to a checkpoint were there before it.
  assert list(range(1, 11)) == [k for k in tiny.losses(workdir) if k <= 10]
  result = binaries.start('train', *flags, **environment).end()
  assert result.code == 0, result.err
  assert torn
  assert str(workdir) in result.out
  return workdir


def do(served, binary, *flags):
  result = binaries.start(binary, *flags, **served[1]).end()
  assert result.code == 0, result.err
  return result


def test_kills_change_no_loss(run, local):
  there, here = tiny.losses(local), tiny.losses(run)
  assert here == {k: there[k] for k in range(1, 21)}
  assert checkpoint.steps(run / 'checkpoints') == [10, 20]
  starts = (run / 'starts.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in starts] == [0, 0, 10]
  assert any(run.glob('events.out.tfevents.*'))
  assert not (run / '.lock').exists()


def test_its_samples_are_those_of_a_disk(served, run, local, tmp_path):
  outputs = tmp_path / 'out', run.parent / 'out'
  do(served, 'sample', f'--workdir={local}', '--step=20', *DDIM,
     f'--output={outputs[0]}')  # fmt: skip
  # Into the bucket from a run in it, in two parts.
  for few in (['--num_samples=4', *DDIM[1:]], DDIM):
    do(served, 'sample', f'--workdir={run}', *few, f'--output={outputs[1]}')
  a, b = (
    np.load((output / 'samples.npz').open('rb'))['arr_0'] for output in outputs
  )
  assert np.abs(a.astype(int) - b).max() <= 1
  assert len(list((outputs[1] / 'parts').iterdir())) == 2
  trained = diffusion_jax.load(str(run))
  c = trained.sample(9, sampler='ddim', num_steps=3)
  assert np.abs(c.astype(int) - b).max() <= 1


def test_it_is_judged_and_reported(served, run):
  result = do(served, 'evaluate', f'--workdir={run}', *DDIM,
              '--features=pixels', '--json')  # fmt: skip
  card = json.loads(result.out)
  assert files.at(card['path']).is_file()
  page = files.at(card['report']).read_text()
  assert 'step20_ddim3_seed0' in result.out
  do(served, 'report', f'--workdir={run}')
  assert (run / 'report.html').stat().length > len(page) / 2
  result = do(served, 'evaluate', f'--compare={run},{card["path"]}')
  assert result.out.count('digits') == 3


def test_another_run_begins_with_its_parameters(served, run):
  workdir = run.parent / 'tuned'
  flags = tiny.flags(workdir, num_steps=1, checkpoint_every=0)
  result = do(served, 'train', *flags, f'--init_from={run}')
  assert f'starting from the averaged parameters of {run}' in result.err
  origin = json.loads((workdir / 'init_from.json').read_text())
  assert (origin['workdir'], origin['step']) == (str(run), 20)


def test_two_processes_in_one_bucket(served, run):
  """They train as one, to 3e-6, and both keep what they draw."""
  workdir, results = run.parent / 'two', []
  few = tiny.flags(workdir, num_steps=4, checkpoint_every=2)
  for binary, flags in (
    ('train', few),
    ('sample', [f'--workdir={workdir}', *DDIM]),
  ):
    how = [
      f'--coordinator=localhost:{binaries.free_port()}',
      '--num_processes=2',
    ]
    processes = [
      binaries.start(
        binary, *flags, *how, f'--process_id={i}', **served[1]
      )
      for i in range(2)
    ]  # fmt: skip
    results += [process.end() for process in processes]
  assert [r.code for r in results] == [0] * 4, [r.err for r in results]
  one, two = tiny.losses(run), tiny.losses(workdir)
  np.testing.assert_allclose(
    [two[k] for k in range(1, 5)], [one[k] for k in range(1, 5)], rtol=3e-6
  )
  assert checkpoint.steps(workdir / 'checkpoints') == [2, 4]
  parts = workdir / 'samples' / 'step4_ddim3_seed0' / 'parts'
  assert len(list(parts.iterdir())) >= 2


def test_mistakes(served, run):
  env = served[1]
  for flags, told in (
    (tiny.flags('gs://theirs/run'), 'gs://theirs: there is no such bucket'),
    (tiny.flags(run, **FEW, seed=1), 'seed: 0 there, 1 now'),
  ):
    before = dict(served[0])
    result = binaries.start('train', *flags, **env).end()
    assert told in result.message
    assert served[0] == before
