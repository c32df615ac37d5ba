"""Runs that moved, filled up or broke: what is whole goes on, with a word."""

import errno
import json
import os
import shutil

import binaries
import jax
import pytest
import tiny
from ml_collections import ConfigDict

import diffusion_jax
from configs import digits
from diffusion_jax import runs
from diffusion_jax.evaluation import follow
from diffusion_jax.runs import finetune, folder, recipe
from diffusion_jax.system import jsonl, numerics
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, metrics, saved, sharding

ROWS = [{'step': k, 'loss': k / 8} for k in range(1, 6)]
LINES = [json.dumps(row).encode() + b'\n' for row in ROWS]


@pytest.fixture(autouse=True)
def usual(monkeypatch):
  """The suite optimises less than usual, which a start would mention."""
  monkeypatch.setattr(numerics, 'unusual', dict)


def rows_of(tmp_path, content) -> list[int]:
  (tmp_path / 'metrics.jsonl').write_bytes(content)
  return [row['step'] for row in metrics.read(tmp_path / 'metrics.jsonl')]


# --- lines -------------------------------------------------------------------

TORN = {
  'a torn line': (LINES[0] + LINES[1][:9] + b'\n' + LINES[2], [1, 3]),
  'zeros of a power cut': (LINES[0] + b'\0' * 4096 + LINES[1], [1, 2]),
  'zeros on a line of their own': (LINES[0] + b'\0\0\n' + LINES[1], [1, 2]),
  'a row behind a torn one': (LINES[0] + LINES[1][:9] + LINES[2], [1, 3]),
  'no text': (LINES[0] + b'\xff\xfe\x80\n' + LINES[1], [1, 2]),
  'no row': (LINES[0] + b'{"loss": 1}\n[3]\n7\n' + LINES[1], [1, 2]),
  'words in a row': (LINES[0] + b'{"step": 2, "loss": "?"}\n', [1]),
  'no number of a step': (LINES[0] + b'{"step": true}\n', [1]),
  'endless brackets': (b'[' * 100_000 + b'\n' + LINES[1], [2]),
}
SILENT = {
  'nothing': (b'', []),
  'only an end': (b'\n', []),
  'a line being written': (LINES[0] + LINES[1][:12], [1]),
  'no last end': (LINES[0] + LINES[1].strip(), [1, 2]),
  'ends of Windows': (LINES[0].replace(b'\n', b'\r\n') + LINES[1], [1, 2]),
  'blank lines': (LINES[0] + b'\n\n' + LINES[1], [1, 2]),
}


@pytest.mark.parametrize('case', TORN)
def test_damaged_lines_are_left_out_with_a_word(tmp_path, capsys, case):
  content, whole = TORN[case]
  assert rows_of(tmp_path, content) == whole
  told = capsys.readouterr().err
  assert told.count('\n') == 1
  assert 'is damaged in line' in told
  assert rows_of(tmp_path, content) == whole
  assert not capsys.readouterr().err  # once


@pytest.mark.parametrize('case', SILENT)
def test_whole_lines_need_no_word(tmp_path, capsys, case):
  content, whole = SILENT[case]
  assert rows_of(tmp_path, content) == whole
  assert not capsys.readouterr().err


def test_a_start_loses_no_whole_row(tmp_path):
  content = LINES[0] + LINES[1][:9] + b'\n' + LINES[2] + LINES[3].strip()
  (tmp_path / 'metrics.jsonl').write_bytes(content)
  writer = metrics.Writer(tmp_path, 4)
  writer.write(5, {'loss': 5 / 8})
  writer.close()
  found = metrics.read(tmp_path / 'metrics.jsonl')
  assert found == [ROWS[0], ROWS[2], ROWS[3], ROWS[4]]


def test_a_line_is_appended_behind_a_torn_one(tmp_path):
  (tmp_path / 'starts.jsonl').write_text('{"step": 0, "ver')
  runs.note_start(tmp_path, {'step': 7})
  runs.note_start(tmp_path, {'step': 9})
  starts = jsonl.read(tmp_path / 'starts.jsonl', saved.has_step)
  assert [start['step'] for start in starts] == [7, 9]


# --- the config --------------------------------------------------------------


@pytest.mark.parametrize(
  'text',
  ['', '\0' * 99, '{"data": ', '[1]', '5', None],
  ids=['empty', 'zeros', 'torn', 'list', 'number', 'gone'],
)
def test_a_damaged_config_is_read_from_the_starts(tmp_path, capsys, text):
  config = digits.get_config()
  path = tmp_path / 'config.json'
  if text is not None:
    path.write_text(text)
    with pytest.raises(UserError, match='copy it from a backup'):
      runs.read_config(tmp_path)
  runs.note_start(tmp_path, {'step': 0})
  runs.note_start(tmp_path, {'step': 0, 'config': runs.to_plain(config)})
  assert runs.read_config(tmp_path) == runs.to_plain(config)
  assert 'starts.jsonl has its content' in capsys.readouterr().err
  (tmp_path / 'checkpoints/1').mkdir(parents=True)
  runs.check(tmp_path, config)
  with pytest.raises(UserError, match='seed: 0 there, 7 now'):
    runs.check(tmp_path, ConfigDict({**config.to_dict(), 'seed': 7}))


# --- checkpoints that are gone -----------------------------------------------


def a_run(workdir, step=30):
  """What a run of some steps leaves, but for its checkpoints."""
  config = digits.get_config()
  runs.write_config(workdir, config)
  runs.note_start(workdir, {'step': 0})
  rows = [json.dumps({'step': k, 'loss': 1.0}) for k in (10, 20, 30)]
  (workdir / 'metrics.jsonl').write_text('\n'.join(rows) + '\n')
  saved.note(workdir / 'checkpoints', step)
  return config


def lose(checkpoints, how):
  target = checkpoints.parent.parent / 'disk'
  if how == 'empty':
    checkpoints.mkdir()
  elif how == 'lost+found':
    (checkpoints / 'lost+found').mkdir(parents=True)
  elif how == 'dead link':
    checkpoints.symlink_to(target)
  elif how == 'not mounted':
    target.mkdir()
    checkpoints.symlink_to(target)


LOST = ['gone', 'empty', 'lost+found', 'dead link', 'not mounted']


@pytest.mark.parametrize('how', LOST)
def test_a_run_without_its_checkpoints_is_no_new_run(tmp_path, how):
  config = a_run(tmp_path / 'run')
  lose(tmp_path / 'run/checkpoints', how)
  for ask in (
    lambda: runs.check(tmp_path / 'run', config),
    lambda: checkpoint.find_step(tmp_path / 'run/checkpoints', None),
    lambda: follow.wait_for_first(tmp_path / 'run', 0.01),
  ):
    with pytest.raises(UserError, match='the run had reached step 30') as error:
      ask()
    assert '\n' not in str(error.value)
    assert ('broken link' in str(error.value)) == (how == 'dead link')


@pytest.mark.parametrize('code', [errno.ENOTCONN, errno.ESTALE, errno.EIO])
def test_a_mount_that_has_died_is_named(tmp_path, monkeypatch, code):
  config = a_run(tmp_path)

  def steps(directory):
    raise OSError(code, os.strerror(code), str(directory))

  monkeypatch.setattr(saved, 'steps', steps)
  with pytest.raises(UserError, match='checkpoints cannot be read') as error:
    runs.check(tmp_path, config)
  assert os.strerror(code) in str(error.value)


def test_checkpoints_that_are_a_file_are_told_before_training(tmp_path):
  runs.write_config(tmp_path, digits.get_config())
  (tmp_path / 'checkpoints').write_text('')
  with pytest.raises(UserError, match='checkpoints is a file'):
    runs.check(tmp_path, digits.get_config())


def test_a_damaged_config_of_a_run_that_never_began_may_be_deleted(tmp_path):
  (tmp_path / 'config.json').write_text('')
  (tmp_path / 'data.json').write_text('{}')
  with pytest.raises(UserError, match='or delete it, as there is no check'):
    runs.check(tmp_path, digits.get_config())
  (tmp_path / 'config.json').unlink()
  runs.check(tmp_path, digits.get_config())


def test_converted_weights_without_their_checkpoint_are_converted_again(
  tmp_path,
):
  (tmp_path / 'converted.json').write_text('{"from": "there", "step": 0}')
  runs.write_config(tmp_path, digits.get_config())
  with pytest.raises(UserError, match=r'is gone: .* convert the weights'):
    checkpoint.find_step(tmp_path / 'checkpoints', None)
  with pytest.raises(UserError, match='--init_from'):  # not to be trained
    runs.check(tmp_path, digits.get_config())


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path):
  config = a_run(tmp_path, step=0)
  (tmp_path / 'checkpoints/10.orbax-checkpoint-tmp').mkdir(parents=True)
  runs.check(tmp_path, config)


def test_an_older_run_is_judged_by_its_rows_and_starts(tmp_path):
  config = a_run(tmp_path)
  os.remove(tmp_path / 'saved.json')
  runs.check(tmp_path, config)  # killed at 30, the first one is due at 1000
  config.checkpoint_every = 25
  runs.write_config(tmp_path, config)
  with pytest.raises(UserError, match='reached step 30'):
    runs.check(tmp_path, config)
  config.checkpoint_every = 1000
  runs.write_config(tmp_path, config)
  runs.note_start(tmp_path, {'step': 20})
  with pytest.raises(UserError, match='reached step 20'):
    runs.check(tmp_path, config)


@pytest.mark.slow
def test_the_binaries_tell_of_lost_checkpoints(tmp_path):
  run = tiny.trained(tmp_path / 'run')
  shutil.move(run / 'checkpoints', tmp_path / 'elsewhere')
  before = {p: p.read_bytes() for p in run.rglob('*') if p.is_file()}
  for result in (
    binaries.run('train', *tiny.flags(run, num_steps=31)),
    binaries.run('sample', f'--workdir={run}', '--num_samples=1'),
  ):
    assert 'the run had reached step 30' in result.message
  assert {p: p.read_bytes() for p in run.rglob('*') if p.is_file()} == before
  (run / 'checkpoints').symlink_to(tmp_path / 'elsewhere')
  tiny.train(run, num_steps=31)
  assert sorted(tiny.losses(run)) == list(range(1, 32))


# --- damaged checkpoints -----------------------------------------------------


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """(folder, abstract, state) of checkpoints at 1, 2 and 3."""
  place = tmp_path_factory.mktemp('made') / 'checkpoints'
  abstract, _ = tiny.program(tiny.one_device(), network=tiny.few_arrays())
  start = tiny.random_state(abstract)
  with checkpoint.Checkpoints(place) as kept:
    for step in (1, 2, 3):
      kept.save(step, start._replace(step=start.step + step))
  return place, abstract


def largest(path):
  found = [p for p in path.rglob('*') if p.is_file()]
  return max(found, key=lambda p: p.stat().st_size)


BREAK = {
  'cut': lambda p: os.truncate(largest(p), 100),
  'empty': lambda p: os.truncate(largest(p), 0),
  'missing': lambda p: largest(p).unlink(),
  'no metadata': lambda p: (p / '_CHECKPOINT_METADATA').unlink(),
  'nothing': lambda p: [shutil.rmtree(p), p.mkdir()],
}


@pytest.mark.parametrize('how', BREAK)
def test_a_torn_checkpoint_is_set_aside(made, tmp_path, capsys, how):
  place = shutil.copytree(made[0], tmp_path / 'checkpoints')
  BREAK[how](place / '3')
  with checkpoint.Checkpoints(place) as kept:
    back = kept.restore_newest(made[1])
    assert int(back.step) == 2
    kept.save(3, back._replace(step=back.step + 1))
  told = capsys.readouterr().err
  assert 'checkpoint 3 is unreadable' in told
  assert 'now 3.damaged, and the run goes on from checkpoint 2' in told
  assert checkpoint.steps(place) == [1, 2, 3]
  assert (place / '3.damaged').is_dir()
  with checkpoint.Checkpoints(place) as kept:
    assert int(kept.restore_newest(made[1]).step) == 3


@pytest.fixture(scope='module')
def torn(tmp_path_factory):
  """A finished run whose newest checkpoint is cut off."""
  run = tiny.trained(tmp_path_factory.mktemp('torn') / 'run')
  BREAK['cut'](run / 'checkpoints' / '30')
  return run


USED = 'checkpoint 25 is used in its place'


def test_the_library_loads_the_newest_whole_checkpoint(torn, capsys):
  trained = diffusion_jax.load(torn)
  assert trained.step == 25
  told = capsys.readouterr().err
  assert 'checkpoint 30 is unreadable' in told
  assert USED in told
  assert trained.at(None).step == 25
  capsys.readouterr()
  with pytest.raises(UserError, match='checkpoint 30 is unreadable'):
    trained.at(30)
  assert trained.at(20).step == 20
  assert not capsys.readouterr().err
  assert checkpoint.steps(torn / 'checkpoints') == [10, 20, 25, 30]


def test_fine_tuning_starts_from_the_newest_whole_checkpoint(torn, capsys):
  origin = finetune.find(torn.parent / 'new', str(torn), None, True)
  assert origin.step == 30
  init = recipe.create(runs.read_config(torn)).init
  abstract = sharding.abstract(
    jax.eval_shape(init, jax.random.key(0)), tiny.one_device()
  )
  found, begun = finetune.load(origin, abstract)
  assert found == origin._replace(step=25)
  assert begun.taken
  assert not begun.left
  assert USED in capsys.readouterr().err
  with pytest.raises(UserError, match='checkpoint 30 is unreadable'):
    finetune.load(origin, abstract, 30)
  # Not a newer one than that of an earlier start.
  found, _ = finetune.load(origin._replace(step=20), abstract)
  assert found.step == 20


@pytest.mark.slow
@pytest.mark.parametrize('how', ['once', 'sweep', 'invert'])
def test_commands_take_the_newest_whole_checkpoint(torn, how):
  few = [f'--workdir={torn}', '--batch_size=8']
  judge = ['--num_samples=8', '--features=pixels', '--rounding=round']
  binary, flags, step = {
    'once': ('evaluate', [*judge, '--grid=500,100'], 'step25'),
    'sweep': ('evaluate', [*judge, '--sweep=ddim', '--sweep_evaluations=2'],
              'step 25'),
    'invert': ('invert', ['--num_images=4', '--num_steps=2'], 'step25'),
  }[how]  # fmt: skip
  result = binaries.run(binary, *few, *flags)
  assert result.code == 0, result.err
  assert USED in result.err
  assert step in result.out
  result = binaries.run(binary, *few, *flags, '--step=30')
  assert 'checkpoint 30 is unreadable' in result.message


def test_a_newer_checkpoint_that_is_gone_is_told(made, tmp_path, capsys):
  """It may have been moved away on purpose: the run goes on."""
  place = shutil.copytree(made[0], tmp_path / 'checkpoints')
  saved.note(place, 3)
  assert saved.note_start(place) == [1, 2, 3]
  assert not capsys.readouterr().err
  shutil.rmtree(place / '3')
  assert saved.note_start(place) == [1, 2]
  told = capsys.readouterr().err
  assert 'checkpoint 3 had been saved, but is no longer in' in told
  assert 'the steps after 2 are trained again' in told
  assert saved.note_start(place) == [1, 2]
  assert not capsys.readouterr().err


def test_all_torn_is_one_line_and_changes_nothing(made, tmp_path):
  place = shutil.copytree(made[0], tmp_path / 'checkpoints')
  for path in list(place.iterdir()):
    os.truncate(largest(path), 10)
  with (
    checkpoint.Checkpoints(place) as kept,
    pytest.raises(UserError, match='checkpoint 3 is unreadable') as error,
  ):
    kept.restore_newest(made[1])
  assert checkpoint.steps(place) == [1, 2, 3]
  # No remedy is another damaged one, nor a flag that training does not have.
  told = str(error.value)
  assert 'so are 2 older ones: copy a checkpoint from a backup' in told
  assert '--step' not in told


def test_whole_checkpoints_are_never_set_aside(made, tmp_path, monkeypatch):
  """Not for a lack of memory, nor for another network."""
  place = shutil.copytree(made[0], tmp_path / 'checkpoints')
  wider, _ = tiny.program(tiny.one_device(), network=tiny.few_arrays(width=128))
  with checkpoint.Checkpoints(place) as kept:
    with pytest.raises(UserError, match='another model'):
      kept.restore_newest(wider)

    def full(*_):
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')

    monkeypatch.setattr(kept._checkpointer, 'load', full)
    with pytest.raises(jax.errors.JaxRuntimeError):
      kept.restore_newest(made[1])
  assert checkpoint.steps(place) == [1, 2, 3]


def test_other_things_among_checkpoints_do_no_harm(made, tmp_path):
  place = shutil.copytree(made[0], tmp_path / 'checkpoints')
  for name in ('.DS_Store', '7', '3.damaged', 'notes.txt'):
    (place / name).write_text('no checkpoint')
  for name in ('lost+found', '007', 'old', '.nfs', '٣'):
    (place / name).mkdir()
  assert checkpoint.steps(place) == [1, 2, 3]
  with checkpoint.Checkpoints(place, keep_last=1) as kept:
    back = kept.restore_newest(made[1])
    assert int(back.step) == 3
    kept.save(4, back._replace(step=back.step + 1))
  assert checkpoint.steps(place) == [4]
  assert {'.DS_Store', 'lost+found', 'old'} <= {p.name for p in place.iterdir()}


def test_a_new_run_has_nothing_to_restore(tmp_path):
  with checkpoint.Checkpoints(tmp_path / 'checkpoints') as kept:
    assert kept.restore_newest(None) is None


# --- the folder of a new run -------------------------------------------------


@pytest.mark.parametrize(
  'name',
  [
    'log.txt', '.DS_Store', 'slurm-4711.out', 'nohup.out', 'job.sh', 'x.log',
    'train.o12345', 'train.e12345', 'stdout', 'my_config.py', 'README.md',
    'events.out.tfevents.1.host', 'core.17', '.nfs0001', 'Thumbs.db',
    'lost+found/', 'logs/', '.snapshot/', 'wandb/', 'checkpoints/',
    'run.sbatch',
  ],
)  # fmt: skip
def test_a_run_begins_beside_what_a_launch_leaves(tmp_path, name):
  path = tmp_path / name
  path.mkdir() if name.endswith('/') else path.write_text('')
  assert folder.in_the_way(tmp_path) == []
  runs.check(tmp_path, digits.get_config())


@pytest.mark.parametrize(
  'name',
  [
    'photo.png', 'thesis.tex', 'samples.npz', 'src/', 'checkpoints/10/',
    'metrics.jsonl', 'weights.safetensors', 'samples/', 'class_0/',
  ],
)  # fmt: skip
def test_what_is_in_the_way_is_named(tmp_path, name):
  path = tmp_path / name
  path.mkdir(parents=True) if name.endswith('/') else path.write_text('')
  (tmp_path / 'log.txt').write_text('')
  first = name.split('/')[0]
  with pytest.raises(UserError, match=f'in the way: {first}'):
    runs.check(tmp_path, digits.get_config())


# --- what may change ---------------------------------------------------------


@pytest.mark.parametrize(
  'key', ['keep_last', 'eval_images', 'sample.num_images', 'sample.num_steps',
          'sample.sampler', 'sample.clip', 'data.heldout_split'],
)  # fmt: skip
def test_what_changes_no_trained_number_may_change(key):
  assert runs.may_change(key)


def test_the_variance_of_samples_stays_where_the_bound_is_trained():
  config, other = digits.get_config(), digits.get_config()
  config.sample.variance, other.sample.variance = 'fixedlarge', 'fixedsmall'
  for weight, kept in (('simple', []), ('bound', ['sample.variance'])):
    config.loss.weight = other.loss.weight = weight
    found = runs.fixed(*map(runs.to_plain, (config, other)))
    assert [line.split(':')[0] for line in found] == kept


@pytest.mark.parametrize(
  ('key', 'value', 'is_kept'),
  [
    ('lr', 1e-5, True),
    ('clip_norm', 5.0, True),
    ('clip_norm', 0.0, False),
    ('name', 'adamw', False),
    ('part_lr', {'net': 1e-4}, False),
  ],
)
def test_the_optimiser_keeps_the_form_of_its_state(key, value, is_kept):
  """As docs/resume.md says."""
  old = runs.to_plain(digits.get_config())
  new = {**old, 'optim': {**old['optim'], key: value}}
  assert (runs.fixed(old, new) == []) == is_kept


def test_another_meaning_of_the_held_out_loss_is_told(tmp_path):
  config = digits.get_config()
  runs.write_config(tmp_path, config)
  config.eval_images = 7
  (_, told) = runs.begin(tmp_path, config, 9, True)
  assert told.endswith('heldout_loss is over other images after step 9')
  config.keep_last = 7
  assert len(runs.begin(tmp_path, config, 9, True, 'other images')) == 1
  last = jsonl.read(tmp_path / 'starts.jsonl')[-1]
  assert last['data'] == 'other images'
  assert last['config'] == runs.to_plain(config)
