"""The binary: from a command to a folder of results, in pieces."""

import json
import shutil
import signal
import types

import binaries
import pytest
import tiny
from parity import inception as parity

from configs import digits
from diffusion_jax import runs
from diffusion_jax.evaluation import cards, inception
from diffusion_jax.reproduction import published, results
from diffusion_jax.training import checkpoint
from diffusion_jax.weights import inception as weights

SMALLER = {
  'model.name': 'unet',
  'model.channels': 4, 'model.num_groups': 2, 'model.multipliers': '(1,)',
  'model.attention_resolutions': '()', 'eval_every': 0, 'sample_every': 0,
  'batch_size': 8, 'checkpoint_every': 20, 'keep_every': 0,
  'process.num_timesteps': 4,
}  # fmt: skip
JUDGE = ('--features=pixels', '--num_samples=20', '--nomeasure')


def flags(workdir, *more, bits=False, **changes):
  return [
    *tiny.flags(workdir, **SMALLER, **changes), *JUDGE,
    '--bits' if bits else '--nobits',
    f'--cache={workdir.parent / "cache"}', *more,
  ]  # fmt: skip


def record_of(workdir):
  path = workdir / 'reproduction' / 'reproduction.json'
  return json.loads(path.read_text())


def kept(workdir):
  return checkpoint.steps(workdir / 'checkpoints')


@pytest.mark.slow
def test_in_pieces(tmp_path):
  """Cut while it trains, continued, and then there is nothing to do."""
  workdir = tmp_path / 'run'

  def given(*more, num_steps):
    return flags(workdir, *more, bits=True, num_steps=num_steps)

  # However slow the machine is, a call will come to its first step.
  for minutes in (0.15, 0.5, 2):
    cut = binaries.run(
      'reproduce', *given(f'--minutes={minutes}', '--json', num_steps=10**6)
    )
    assert cut.code == 0, cut.err
    if kept(workdir):
      break
  found = json.loads(cut.out)
  assert found['done'] is False
  assert found['left'] == [
    'training', 'samples and their distance', 'bits per dimension'
  ]  # fmt: skip
  at = kept(workdir)[-1]
  first_losses = tiny.losses(workdir)
  assert f'stopped by SIGTERM at step {at}, which is saved' in cut.err
  assert '$ python -m diffusion_jax.train --config=configs' in cut.err
  assert 'the loss cannot be compared: no published curve of digits' in cut.err

  last = at + 5
  result = binaries.run('reproduce', *given(num_steps=last))
  assert result.code == 0, result.err
  assert (
    'no verdict, because\n  no published score of this recipe is' in result.out
  )
  losses = tiny.losses(workdir)
  assert max(losses) == last
  assert {k: losses[k] for k in first_losses} == first_losses
  found = record_of(workdir)
  assert found['done']
  assert found['left'] == []
  train, evaluate, bits = found['stages']
  assert train['ended']
  assert len(train['seconds']) >= 2
  assert evaluate['name'] == f'evaluate step {last}'
  assert bits['name'] == 'bits'
  assert found['hardware'][-1]['device'] == 'cpu'
  assert found['rates']['images_per_sec'] > 0
  assert found['table'][0]['results'].keys() == {'frechet', 'bpd'}
  folder = workdir / 'reproduction'
  assert {path.name for path in folder.iterdir()} == {
    'config.json', 'curves.png', 'metrics.jsonl', 'report.html', 'samples.png',
    'starts.jsonl', 'reproduction.json', f'step{last}_samples.json', 'table.md',
    f'step{last}_bits.json',
  }  # fmt: skip
  assert sum(path.stat().st_size for path in folder.iterdir()) < 30e6

  again = binaries.run('reproduce', *given(num_steps=last))
  assert again.code == 0, again.err
  assert again.out == result.out
  assert '$ python' not in again.err
  assert record_of(workdir) == found
  assert tiny.losses(workdir) == losses
  check_what_a_verdict_looks_at(tmp_path, workdir)


def check_what_a_verdict_looks_at(tmp_path, workdir):
  """Cards as evaluation writes them, beside a recipe of this very run."""
  folder, config = workdir / 'reproduction', runs.read_config(workdir)
  (card,) = map(cards.read, folder.glob('step*_samples.json'))
  (bits,) = map(cards.read, folder.glob('step*_bits.json'))
  # All but Inception, which takes minutes here: its part of the protocol.
  weights.write(tmp_path / 'inception.npz', parity.params())
  judge = inception.load(tmp_path / 'inception.npz')
  card['protocol'] |= judge.protocol
  card['results']['fid'] = card['results'].pop('frechet')
  well = (0.0, 1e9)
  recipe = published.Recipe(
    own={'fid': well, 'bpd': well}, num_train=1438, num_heldout=359
  )
  task = types.SimpleNamespace(
    recipe=recipe, config=config, shipped=config, workdir=workdir, origin=None,
    differences=[], incomparable=[], published_judge=True,
  )  # fmt: skip
  step = config['num_steps']
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(published, 'NUM_SAMPLES', 20)
    found = results.judge(task, step, [card, bits])
  assert found['reasons'] == []
  assert found['verdict'] == 'reproduced'


@pytest.mark.slow
@pytest.mark.parametrize(
  ('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 0)]
)
def test_a_signal_ends_it_and_what_it_started(tmp_path, number, code):
  workdir = tmp_path / 'run'
  running = binaries.start(
    'reproduce', *flags(workdir, '--json', num_steps=10**6)
  )
  running.wait_until(lambda: tiny.losses(workdir))
  running.send(number)
  result = running.end()
  assert result.code == code
  if code:
    assert result.err.endswith('run the same command again to resume\n')
  else:
    assert json.loads(result.out)['done'] is False
  (at,) = kept(workdir)[-1:]
  assert f'stopped by SIGTERM at step {at}' in result.err
  assert record_of(workdir)['left'][0] == 'training'


def test_the_plan_starts_nothing(tmp_path):
  """The parent asks for no device but the CPU's, whatever there may be."""
  workdir = tmp_path / 'run'
  running = binaries.start(
    'reproduce', *flags(workdir, '--plan', '--bits', '--curve=2'),
    JAX_PLATFORMS='cuda',
  )  # fmt: skip
  result = running.end()
  assert result.code == 0, result.err
  assert 'TPU v5e-8' in result.out
  assert 'an estimate, not a measurement' in result.out
  lines = [x for x in result.out.splitlines() if x.startswith('python -m')]
  assert [line.split()[2].split('.')[1] for line in lines] == [
    'train', 'evaluate', 'evaluate', 'evaluate'
  ]  # fmt: skip
  assert '--step=LAST' in lines[1]
  assert not list(tmp_path.iterdir())


LABELS = {'conditioning.name': 'label', 'conditioning.num_classes': 10}


def test_the_plan_of_a_conditional_config(tmp_path, capsys):
  """A guided evaluation costs two rows of the network."""
  found = []
  for more in ((), ('--guidance=2',)):
    given = flags(tmp_path / 'run', '--plan', '--json', *more, **LABELS)
    binaries.here('reproduce', *given)
    found.append(json.loads(capsys.readouterr().out))
  plain, guided = found
  assert guided['cost']['drawn'] == 2 * plain['cost']['drawn'] == 2 * 20 * 4
  (judged,) = (x for x in guided['stages'] if '--num_samples=20' in x)
  assert '--guidance=2' in judged
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_conditional_config(tmp_path):
  workdir = tmp_path / 'run'
  given = flags(workdir, '--guidance=2', bits=True, num_steps=3, **LABELS)
  result = binaries.run('reproduce', *given)
  assert result.code == 0, result.err
  record = record_of(workdir)
  assert record['stages']
  found = {}
  for path in (workdir / 'evaluations').glob('*.json'):
    card = cards.read(path)
    found |= card['subject'] | card['protocol']
  assert found['guidance'] == 2
  assert found['network_rows'] == 8
  assert len(found['label_counts']) == 10
  assert len(found['labels_sha256']) == 64


@pytest.mark.parametrize(
  ('changes', 'must'),
  [
    (['--features=/none.npz'], '/none.npz: there is no such file'),
    (['--features=inception'], 'is not there; --download fetches it'),
    (['--features=inception', '--taps=12'], '--taps=12: use some of 2048'),
    (['--from=.', '--train_minutes=3'], 'leave --train_minutes out'),
    (['--num_samples=1'], '--num_samples=1: at least 2'),
    (['--sampler=adaptive'], 'not known in advance'),
    (['--bits', '--config.data.heldout_split='], 'give --nobits'),
    (['--output=setup.py'], 'setup.py is a file'),
  ],
)
def test_mistakes_are_told_before_anything_starts(tmp_path, changes, must):
  names = [change.split('=')[0] for change in changes]
  names += ['--nobits'] * ('--bits' in changes)
  given = [f for f in flags(tmp_path / 'run') if f.split('=')[0] not in names]
  assert must in binaries.run('reproduce', *given, *changes).message
  assert not list(tmp_path.iterdir())


def test_an_output_among_what_belongs_to_others(tmp_path):
  workdir, notes = tmp_path / 'run', tmp_path / 'notes'
  notes.mkdir()
  (notes / 'mine.txt').write_text('x')
  other = tmp_path / 'other'
  other.mkdir()
  (other / 'config.json').write_text('{}')
  for output, must in (
    (workdir, 'is the run itself'),
    (workdir / 'checkpoints', 'is inside the run'),
    (other / 'reproduction', 'is inside the run'),
    (other, 'holds other files'),
    (notes, 'holds other files'),
  ):
    given = flags(workdir, f'--output={output}')
    assert must in binaries.run('reproduce', *given).message
  record = {'workdir': str(other), 'stages': []}
  (notes / 'reproduction.json').write_text(json.dumps(record))
  message = binaries.run(
    'reproduce', *flags(workdir, f'--output={notes}')
  ).message
  assert f'holds the results of {other}' in message
  assert not workdir.exists()


def test_a_workdir_of_another_run(tmp_path):
  workdir = tmp_path / 'run'
  (workdir / 'checkpoints' / '1').mkdir(parents=True)
  runs.write_config(workdir, digits.get_config())
  message = binaries.run('reproduce', *flags(workdir)).message
  assert 'holds a run of another config' in message
  message = binaries.run('reproduce', *flags(workdir, '--from=.')).message
  assert 'holds a run that does not come from .' in message


@pytest.mark.slow
def test_weights_that_come_in(tmp_path):
  """A run of ours goes out, comes in, is judged; and not a second time."""
  run = tmp_path / 'run'
  tiny.train(run, **tiny.UNET)
  folder = tmp_path / 'folder'
  out = binaries.run('convert', f'--from={run}', f'--to={folder}')
  assert out.code == 0, out.err
  workdir = tmp_path / 'imported'
  few = ('--sampler=ddim', '--num_steps=2', '--json')
  given = [
    *tiny.flags(workdir, **tiny.UNET), *JUDGE, '--nobits',
    f'--from={folder}', *few,
    f'--cache={tmp_path / "cache"}',
  ]  # fmt: skip
  first = binaries.run('reproduce', *given)
  assert first.code == 0, first.err
  record = json.loads(first.out)
  assert record['done']
  assert [one['name'] for one in record['stages']] == [
    'import', 'evaluate step 0',
  ]  # fmt: skip
  assert record['table'][-1]['system'].startswith('imported')
  assert (workdir / 'reproduction' / 'converted.json').exists()
  # Even where the record of it is gone, the run says where it comes from.
  shutil.rmtree(workdir / 'reproduction')
  again = binaries.run('reproduce', *given)
  assert again.code == 0, again.err
  assert 'diffusion_jax.convert' not in again.err
  message = binaries.run('reproduce', *flags(workdir)).message
  assert f'give --from={folder}' in message


def test_a_stage_that_fails_has_the_last_word(tmp_path):
  """Its line is ours, and so is its exit code; nothing is left behind."""
  result = binaries.run(
    'reproduce', *flags(tmp_path / 'run'), '--config.mesh.fsdp=3'
  )
  assert result.code == 2
  assert not result.out
  assert result.err.strip().splitlines()[-1].startswith('error: ')
  assert 'fsdp' in result.err.strip().splitlines()[-1]
  assert not (tmp_path / 'run').exists()
