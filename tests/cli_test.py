"""Mistakes: one line, exit code 2, nothing written."""

import errno
import fcntl
import json
import os
import pwd
import subprocess
import sys
import time

import binaries
import jax
import pytest
from absl import flags as absl_flags
from ml_collections import ConfigDict

from configs import celebahq256, cifar10, digits, lsun
from diffusion_jax import runs, samplers
from diffusion_jax.cli import command, config_files, judges
from diffusion_jax.runs import completion, locking, validation
from diffusion_jax.system import files, numerics, terminal
from diffusion_jax.system.errors import UserError

DIGITS = '--config=configs/digits.py'


@pytest.fixture(autouse=True)
def usual(monkeypatch):
  """The suite optimises less than usual, which a start would mention."""
  monkeypatch.setattr(numerics, 'unusual', dict)


def changed(**values) -> ConfigDict:
  config = digits.get_config()
  config.update_from_flattened_dict(values)
  return config


# --- check ------------------------------------------------------------------


@pytest.mark.parametrize('config', [celebahq256, cifar10, digits, lsun])
@pytest.mark.parametrize('devices', [1, 4, 8, 64])
def test_shipped_configs_are_well(config, devices):
  assert validation.check(config.get_config(), range(devices)) == []


@pytest.mark.parametrize(
  ('values', 'devices', 'must'),
  [
    ({'batch_size': 63}, 2, ['batch_size=63', '2 x 1 = 2', '62', '64']),
    ({'batch_size': 0}, 1, ['batch_size=0']),
    (
      {'batch_size': 96, 'microbatches': 5},
      4,
      ['batch_size=96', 'microbatches x', '5 x 4 x 1 = 20', 'use 80 or 100'],
    ),
    ({'microbatches': 0}, 1, ['microbatches=0: at least 1']),
    ({'num_steps': 0}, 1, ['num_steps=0']),
    ({'log_every': -1}, 1, ['log_every=-1']),
    ({'mesh.data': 7}, 1, ['data=7', '1']),
    ({'mesh.fsdp': 3}, 8, ['fsdp=3', '8']),
    ({'mesh.data': -1, 'mesh.fsdp': -1}, 8, ['at most one']),
    ({'data.image_size': 9}, 1, ['data.image_size=9', 'multiple of 2']),
    ({'data.image_size': 0}, 1, ['data.image_size=0']),
    ({'data.channels': 4}, 1, ['data.channels=4', '1 (grey) or 3']),
    ({'model.num_groups': 5}, 1, ['model.num_groups=5', '32 channels']),
    ({'model.num_groups': 0}, 1, ['model.num_groups=0']),
    ({'model.num_heads': 3}, 1, ['model.num_heads=3', '32 channels']),
    ({'model.multipliers': ()}, 1, ['model.multipliers']),
    ({'model.multipliers': (1, 0)}, 1, ['model.channels=32 x 0']),
    ({'model.attention_resolutions': (16,)}, 1, ['has 16', '8, 4']),
    ({'model.dropout': 1.0}, 1, ['model.dropout=1.0', '[0, 1)']),
    ({'model.dtype': 'float16'}, 1, ["'float16'", 'bfloat16']),
    ({'model.num_blocks': 0}, 1, ['model.num_blocks=0']),
    ({'loss.prediction': 'noise'}, 1, ["'noise'", 'eps, x0, v']),
    ({'process.schedule': 'cosin'}, 1, ["'cosin'", 'linear']),
    ({'sample.variance': 'fixed'}, 1, ["'fixed'", 'fixedsmall, fixedlarge']),
    ({'process.num_timesteps': 1}, 1, ['process.num_timesteps=1']),
    ({'process.beta_end': 1.5}, 1, ['beta_end=1.5']),
    ({'optim.lr': 0.0}, 1, ['optim.lr=0.0']),
    ({'optim.clip_norm': -1.0}, 1, ['optim.clip_norm=-1.0']),
    ({'ema.decay': 1.0}, 1, ['ema.decay=1.0']),
    ({'sample.num_images': 0}, 1, ['sample.num_images=0']),
    ({'seed': -1}, 1, ['seed=-1']),
    ({'seed': 2**32}, 1, ['seed=4294967296']),
    ({'model.name': 'unt'}, 1, ["'unt'", 'unet']),
    ({'model.multipliers': (1, 1.5)}, 1, ['1.5', 'whole']),
    ({'optim.b1': 2.0}, 1, ['optim.b1=2.0']),
    ({'optim.eps': -1.0}, 1, ['optim.eps=-1.0']),
    ({'optim.lr': float('inf')}, 1, ['optim.lr=inf']),
  ],
)
def test_check_names_the_key_and_what_is_allowed(values, devices, must):
  messages = validation.check(changed(**values), range(devices))
  assert messages
  for word in must:
    assert word in messages[0]
  assert all('\n' not in message for message in messages)


def test_a_config_without_a_key_is_told_which():
  config = digits.get_config()
  del config.optim.clip_norm
  (message,) = validation.check(config, range(1))
  assert 'optim.clip_norm' in message


# --- the command line -------------------------------------------------------


@pytest.mark.parametrize(
  ('arguments', 'must'),
  [
    ((DIGITS, '--config.modle.width=3'), ['modle', 'did you mean model?']),
    ((DIGITS, '--config.batch_size=many'), ['many', 'batch_size']),
    ((DIGITS, '--config.batch_size=63'), ['63']),
    ((DIGITS, '--config.data.name=nonesuch'), ['nonesuch', 'digits', 'tfds:']),
    ((DIGITS, '--config.data.name=arrays'), ['data.path']),
    ((DIGITS, '--config.sample.sampler=magic'), ['magic', 'ddim']),
    ((DIGITS, '--config.sample.sampler=adaptive'), ['adaptive', 'ddim']),
    ((DIGITS, '--config.sample.num_steps=5000'), ['5000', '1000']),
    ((DIGITS, '--config.data.train_split='), ['data.train_split']),
    ((DIGITS, '--config.data.train_split=val'), ['val', 'train, test or all']),
    ((DIGITS, '--config.model.name=unt'), ['unt', 'unet']),
    ((DIGITS, '--config.num_step=3'), ['--config.num_step=3', 'num_steps?']),
    ((DIGITS, '--config.model.multipliers=(1,"a")'), ['whole numbers']),
    ((DIGITS, '--config.learning_rate=1'), ['did you mean optim.lr?']),
    ((DIGITS, '--config.sample.sampler=dpm++'), ['did you mean dpmpp_2m?']),
    ((DIGITS, '--lr=1'), ['did you mean --config.optim.lr?']),
    ((DIGITS, '--config.data.path=/nope'), ['/nope', 'embedded']),
    (('--config=README.md',), ['README.md', 'no such']),
    ((DIGITS, '--wrkdir=x'), ['wrkdir', 'workdir']),
    ((DIGITS, 'stray'), ["'stray'"]),
    (('--config=configs/none.py',), ['none.py', 'digits']),
    (('--config=lsun:chuch',), ['lsun:chuch', 'church, bedroom, cat']),
    (('--config=lsun:',), ['lsun:', 'church, bedroom, cat']),
    (('--config=digits:big',), ['digits.py:big', 'takes no argument']),
    (('--config=lsun:bedroom', '--config.data.path={empty}'),
     ['lsun/bedroom', 'prepare_data.sh']),
    (('--config=configs/lsun.py:cat', '--config.data.path={empty}'),
     ['lsun/cat', 'prepare_data.sh']),
    (('--config=celebahq256',), ['data.path', 'folder']),
    ((DIGITS, '--config.sample.variance=large'), ['large', 'fixedlarge']),
    (('--config=configs/cifar10.py', '--config.data.path={empty}'),
     ['cifar10', 'prepare_data.sh']),
    ((DIGITS, '--config.conditioning.name=text'),
     ['no conditioning.ids', 'write config.conditioning = default.text()']),
    ((), ['--config']),
  ],
)  # fmt: skip
def test_training_answers_in_one_line(tmp_path, arguments, must):
  workdir = tmp_path / 'w'
  (tmp_path / 'empty').mkdir()
  arguments = [a.format(empty=tmp_path / 'empty') for a in arguments]
  result = binaries.run('train', *arguments, f'--workdir={workdir}', devices=2)
  for word in must:
    assert word in result.message
  assert not workdir.exists()
  assert list((tmp_path / 'empty').iterdir()) == []


def test_a_workdir_is_needed_and_must_be_a_folder(tmp_path):
  assert '--workdir' in binaries.run('train', DIGITS).message
  file = tmp_path / 'file'
  file.write_text('mine')
  link = tmp_path / 'link'
  link.symlink_to(tmp_path / 'nothing')
  for workdir in (file, file / 'x', link):
    message = binaries.run('train', DIGITS, f'--workdir={workdir}').message
    assert str(workdir) in message
  assert file.read_text() == 'mine'


@pytest.mark.parametrize(
  'binary', ['train', 'sample', 'edit inpaint', 'edit denoise', 'edit']
)
def test_help_reads_well_and_is_no_error(binary):
  result = binaries.run(*binary.split(), '--help')
  assert result.code == 0
  assert not result.err
  assert f'python -m diffusion_jax.{binary}' in result.out
  assert '--workdir' in result.out
  assert max(map(len, result.out.splitlines())) <= 80
  assert 'None' not in result.out


def test_a_config_that_fails_is_one_line(tmp_path):
  broken = tmp_path / 'broken.py'
  broken.write_text("def get_config():\n  return int('x')\n")
  result = binaries.run('train', f'--config={broken}', f'--workdir={tmp_path}')
  assert f'--config={broken}: line 2, "return int(\'x\')": ' in result.message


@pytest.mark.parametrize('name', ['digits', 'digits.py', 'configs/digits.py'])
def test_shipped_configs_are_found_by_name(name):
  assert config_files.find_config(name).endswith('digits.py')


def test_configs_of_ones_own_come_first(tmp_path, monkeypatch):
  (tmp_path / 'digits.py').write_text('')
  monkeypatch.chdir(tmp_path)
  assert config_files.find_config('digits.py') == 'digits.py'
  assert config_files.find_config('nothing') is None


@pytest.mark.parametrize(
  ('key', 'meant'),
  [
    ('lr', 'optim.lr'),
    ('optim.learning_rate', 'optim.lr'),
    ('batch', 'batch_size'),
    ('epochs', 'num_steps'),
    ('steps', 'num_steps'),
    ('ema_decay', 'ema.decay'),
    ('image_size', 'data.image_size'),
    ('resolution', 'data.image_size'),
    ('model.dim', 'model.channels'),
    ('dropout', 'model.dropout'),
    ('weight-decay', 'optim.weight_decay'),
    ('num_step', 'num_steps'),
    ('modle', 'model'),
    ('optim.warmup_step', 'optim.warmup_steps'),
    ('qqqq', None),
  ],
)
def test_what_is_meant_by_an_unknown_key(key, meant):
  assert completion.suggest(key) == meant


def test_every_alias_leads_to_a_key_or_a_sampler():
  known = runs.flatten(digits.get_config().to_dict())
  assert set(completion.ALIASES.values()) <= known.keys()
  assert not known.keys() & completion.ALIASES.keys()
  assert set(samplers.ALIASES.values()) <= samplers.SAMPLERS.keys()
  assert not samplers.ALIASES.keys() & samplers.SAMPLERS.keys()


@pytest.mark.parametrize(
  ('value', 'meant'),
  [
    ('dpm++', 'dpmpp_2m'),
    ('DPM++ 2M', 'dpmpp_2m'),
    ('euler_a', 'ancestral'),
    ('DDPM', 'ancestral'),
    ('DDIM', 'ddim'),
    ('uni_pc', 'unipc'),
  ],
)
def test_what_is_meant_by_an_unknown_sampler(value, meant):
  with pytest.raises(UserError, match=f'did you mean {meant}\\?'):
    samplers.options(value)


@pytest.mark.parametrize(
  ('given', 'kept', 'said'),
  [
    ('--seed=1 --seed=2', '--seed=2', '--seed is given 2 times'),
    ('--seed 1 --seed=2', '--seed=2', 'the last one counts, --seed=2'),
    ('--seed=1 --json --seed 2', '--json --seed 2', 'counts, --seed 2'),
    ('--ema --noema', '--noema', '--ema is given 2 times'),
    ('--config.a.b=1 --config.a.b=3', '--config.a.b=3', '--config.a.b is'),
    ('--seed=1 --seed=1', '--seed=1', ''),
    ('--seed=1 x --json x', '--seed=1 x --json x', ''),
  ],
)
def test_the_last_of_the_same_flags_counts(
  monkeypatch, capsys, given, kept, said
):
  values = absl_flags.FlagValues()
  absl_flags.DEFINE_integer('seed', 0, '', flag_values=values)
  absl_flags.DEFINE_bool('json', False, '', flag_values=values)
  absl_flags.DEFINE_bool('ema', True, '', flag_values=values)
  monkeypatch.setattr(command.flags, 'FLAGS', values)
  assert command._last(['train', *given.split()]) == ['train', *kept.split()]
  assert said in capsys.readouterr().err
  assert said or not capsys.readouterr().err


# --- the machine ------------------------------------------------------------


def raised(error):
  """The error as it arrives at the top, with its traceback."""
  try:
    raise error
  except Exception as e:
    return e


@pytest.mark.parametrize(
  ('error', 'must'),
  [
    (jax.errors.JaxRuntimeError(
      'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.25G '
      'of 15.75G hbm.\nTotal'), 'out of memory'),
    (jax.errors.JaxRuntimeError(
      'INTERNAL: Failed call: CUDA_ERROR_OUT_OF_MEMORY: out of memory'),
     'CUDA_ERROR_OUT_OF_MEMORY'),
    (MemoryError(), 'out of memory of the host'),
    (RuntimeError("Unable to initialize backend 'tpu': no libtpu"),
     'no libtpu'),
    (RuntimeError("Unable to initialize backend 'cuad': Backend 'cuad' is not "
                  'in the list of known backends'), 'cuad'),
    (RuntimeError('Unknown backend: gpu'), "pip install '.[cuda]'"),
    (OSError(errno.ENOTCONN, 'Transport endpoint is not connected', '/mnt/x'),
     'not connected: /mnt/x'),
    (OSError(errno.ESTALE, 'Stale file handle', '/nfs/x'), 'Stale'),
    (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"),
     'set TMPDIR'),
  ],
)  # fmt: skip
def test_errors_of_the_machine_are_one_line(error, must):
  told = command._of_machine(raised(error))
  assert must in told
  assert '\n' not in told


@pytest.fixture
def homeless(monkeypatch):
  """No HOME, and no entry for the user, as in containers."""

  def getpwuid(uid):
    raise KeyError(f'uid not found: {uid}')

  monkeypatch.setattr(pwd, 'getpwuid', getpwuid)
  for name in ('HOME', 'XDG_CACHE_HOME'):
    monkeypatch.delenv(name, raising=False)
  if not absl_flags.FLAGS.is_parsed():
    absl_flags.FLAGS.mark_as_parsed()


def test_a_home_that_is_not_there(homeless, monkeypatch, tmp_path):
  """The cache is asked for only where something is kept."""
  monkeypatch.setattr(absl_flags.FLAGS['cache'], 'value', None)
  with pytest.raises(UserError, match='HOME is not set: give --cache=DIR'):
    judges.cache()
  monkeypatch.setattr(absl_flags.FLAGS['features'], 'value', 'pixels')
  assert not judges.judge_of(None, None, (8, 8, 1)).keys
  monkeypatch.setattr(absl_flags.FLAGS['cache'], 'value', str(tmp_path / 'c'))
  assert judges.cache() == tmp_path / 'c'
  with pytest.raises(RuntimeError) as raised:
    files.at('~/run').expanduser()
  assert 'give the whole path' in command._of_machine(raised.value)


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
  (tmp_path / 'file').touch()
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  monkeypatch.setattr(absl_flags.FLAGS['cache'], 'value', None)
  with pytest.raises(UserError, match='--cache='):
    judges.cache()


@pytest.mark.parametrize(
  'error',
  [
    AssertionError(), RuntimeError('a bug'), ValueError('memory'),
    FileNotFoundError(errno.ENOENT, 'No such file', 'x'), KeyError('backend'),
  ],
)  # fmt: skip
def test_bugs_are_not_the_machine(error):
  assert command._of_machine(raised(error)) == ''


def test_the_cause_of_an_error_counts():
  error = RuntimeError('a worker failed')
  error.__cause__ = MemoryError()
  assert 'out of memory' in command._of_machine(error)


@pytest.mark.parametrize('platform', ['cuda', 'cuad,tpu'])
def test_a_platform_that_is_not_there_is_one_line(tmp_path, platform):
  for binary, flags in (
    ('train', [DIGITS, f'--workdir={tmp_path / "w"}']),
    ('fid', ['--samples=digits', '--reference=digits', '--features=pixels']),
  ):
    result = binaries.run(binary, *flags, JAX_PLATFORMS=platform)
    assert result.code == 2, result
    last = result.err.strip().splitlines()[-1]
    assert last.startswith(f'error: JAX_PLATFORMS={platform}: no such device')
    assert 'Traceback' not in result.err
  assert not (tmp_path / 'w').exists()


# --- workdirs -----------------------------------------------------------------


def begin(workdir, config):
  runs.check(workdir, config)
  with runs.lock(workdir):
    runs.write_config(workdir, config)


def test_a_run_goes_on_only_with_its_own_config(tmp_path):
  begin(tmp_path / 'w', digits.get_config())
  (tmp_path / 'w' / 'checkpoints' / '5').mkdir(parents=True)
  begin(tmp_path / 'w', digits.get_config())
  with pytest.raises(UserError) as error:
    begin(tmp_path / 'w', changed(seed=77, **{'optim.lr': 7e-3}))
  text = str(error.value)
  assert 'seed: 0 there, 77 now' in text
  assert 'optim.lr' not in text
  assert f'--workdir=NEW --init_from={tmp_path / "w"}' in text
  assert '\n' not in text
  assert runs.read_config(tmp_path / 'w')['seed'] == 0


def test_what_may_differ_may(tmp_path):
  begin(tmp_path, digits.get_config())
  new = {
    'num_steps': 9, 'log_every': 1, 'eval_every': 2, 'sample_every': 3,
    'checkpoint_every': 4, 'mesh.data': 1, 'mesh.fsdp': 1, 'data.path': '/x',
    'microbatches': 2,
  }  # fmt: skip
  begin(tmp_path, changed(**new))
  assert runs.flatten(runs.read_config(tmp_path)).items() >= new.items()
  # Another split is another data set.
  assert not runs.may_change('data.heldout_every')


@pytest.mark.parametrize(
  ('values', 'may'),
  [
    ({'optim.lr': 1e-4, 'optim.decay': 'cosine', 'optim.decay_steps': 9}, True),
    ({'optim.warmup_steps': 0, 'optim.b2': 0.99, 'optim.clip_norm': 2.0}, True),
    ({'ema.decay': 0.9, 'batch_size': 32}, True),
    ({'optim.clip_norm': 0.0}, False),
    ({'optim.name': 'adamw'}, False),
    ({'optim.part_lr.net': 1e-5}, False),
    ({'optim.lr': 1e-4, 'model.channels': 64}, False),
    ({'process.num_timesteps': 500}, False),
    ({'data.heldout_every': 7}, False),
  ],
)
def test_what_may_change_on_purpose(tmp_path, values, may):
  begin(tmp_path, digits.get_config())
  (tmp_path / 'checkpoints' / '40').mkdir(parents=True)
  other = digits.get_config()
  with other.unlocked():
    other.update_from_flattened_dict(values)
  if not may:
    with pytest.raises(UserError, match='--init_from='):
      runs.check(tmp_path, other)
    return
  runs.check(tmp_path, other)
  resumed, broken = runs.begin(tmp_path, other, 40, goes_on=True)
  assert resumed == f'resuming from checkpoint 40 of {tmp_path}'
  assert broken.startswith('from step 40 on, the run differs from ')
  noted = json.loads((tmp_path / 'starts.jsonl').read_text())
  assert noted['step'] == 40
  assert noted['changed'].keys() == values.keys()
  for key, value in values.items():
    assert key in broken
    assert noted['changed'][key][1] == value
  assert runs.flatten(runs.read_config(tmp_path)).items() >= values.items()
  assert len(runs.begin(tmp_path, other, 41, goes_on=True)) == 1


def test_a_run_without_a_checkpoint_takes_the_corrected_config(tmp_path):
  begin(tmp_path, digits.get_config())
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": 1.0}\n')
  other = changed(seed=7, **{'model.channels': 64})
  runs.check(tmp_path, other)
  (line,) = runs.begin(tmp_path, other, 0, goes_on=False)
  assert 'has no checkpoint yet, so it takes this config' in line
  assert 'model.channels: 32 there, 64 now' in line
  assert runs.read_config(tmp_path)['seed'] == 7


def test_a_relative_data_path_is_kept_as_an_absolute_one(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for given, kept in (('photos', str(tmp_path / 'photos')), ('', ''),
                      ('/a/b', '/a/b')):  # fmt: skip
    runs.write_config(tmp_path, changed(**{'data.path': given}))
    assert runs.read_config(tmp_path)['data']['path'] == kept


def test_a_foreign_folder_is_left_alone(tmp_path):
  (tmp_path / 'thesis.tex').write_text('mine')
  with pytest.raises(UserError, match=r'no config\.json'):
    begin(tmp_path, digits.get_config())
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']
  with pytest.raises(UserError, match='train first'):
    runs.read_config(tmp_path)
  (tmp_path / 'config.json').write_text('{"a": 1}')
  with pytest.raises(UserError, match='not a run'):
    runs.read_config(tmp_path)
  (tmp_path / 'config.json').write_text('{"a')
  with pytest.raises(UserError, match='unreadable'):
    runs.read_config(tmp_path)


def test_a_kill_before_the_config_was_whole_is_no_foreign_folder(tmp_path):
  (tmp_path / 'config.json.host-1.tmp').write_text('{"se')
  begin(tmp_path, digits.get_config())
  assert runs.read_config(tmp_path)['seed'] == 0


def without(monkeypatch, number, *calls):
  """A file system on which some calls of fcntl fail with an errno."""

  def fail(*_):
    raise OSError(number, os.strerror(number))

  for call in calls:
    monkeypatch.setattr(fcntl, call, fail)


@pytest.mark.parametrize(
  'number',
  [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO, errno.EINVAL],
)
def test_a_file_system_without_locks_is_said(
  tmp_path, monkeypatch, capsys, number
):
  without(monkeypatch, number, 'flock', 'lockf')
  with runs.lock(tmp_path):
    told = capsys.readouterr().err
  assert len(told.splitlines()) == 1
  assert f'without locks ({os.strerror(number)})' in told


def test_where_flock_is_missing_a_posix_lock_is_taken(
  tmp_path, monkeypatch, capsys
):
  without(monkeypatch, errno.ENOSYS, 'flock')
  with runs.lock(tmp_path):
    pass
  assert not capsys.readouterr().err
  hold = (
    'import fcntl, sys; f = open(sys.argv[1], "a"); fcntl.lockf(f, 6); '
    'print(flush=True); sys.stdin.read()'
  )
  other = subprocess.Popen(
    [sys.executable, '-c', hold, tmp_path / locking.LOCK],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
  )  # fmt: skip
  with other:
    assert other.stdout.readline()
    with (
      pytest.raises(UserError, match='another process trains there'),
      runs.lock(tmp_path),
    ):
      pass
    other.stdin.close()
  with runs.lock(tmp_path):  # the other has ended
    pass


def test_progress_waits_for_a_slow_second_step(capsys):
  with terminal.Progress('counting', 10, seconds=-1) as progress:
    progress.reach(1)
    progress.reach(1)
    progress.reach(2)
  assert 'counting: 2/10' in capsys.readouterr().err


def test_progress_off_a_terminal_prints_lines(capsys):
  with terminal.Progress('counting', 10, 4, 'things', seconds=0) as progress:
    for _ in range(6):
      progress.update(note='loss 1')
  lines = capsys.readouterr().err.splitlines()
  assert lines[-1].startswith('counting: 10/10 things, ')
  assert lines[-1].endswith('left, loss 1')


def test_progress_begins_with_what_takes_long(capsys):
  with terminal.Progress('counting', 3, begin='boiling') as shown:
    assert capsys.readouterr().err == 'boiling\n'
    shown.reach(1)
    time.sleep(0.01)
    shown.reach(3, 'done')
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('counting: 3/3 steps')


def test_ctrl_c_tells_what_is_kept():
  stopped = KeyboardInterrupt()
  shown = terminal.Progress('drawing', 9, kept=lambda done: f'{done} are kept')
  shown.update(4)
  shown.__exit__(KeyboardInterrupt, stopped, None)
  assert stopped.__notes__ == ['4 are kept']


def test_report_is_json_when_asked(capsys):
  terminal.report({'a': 1}, 'text', as_json=True)
  assert json.loads(capsys.readouterr().out) == {'a': 1}
  terminal.report({'a': 1}, 'text', as_json=False)
  assert capsys.readouterr().out == 'text\n'


# --- terminals ----------------------------------------------------------------

WORK = """
import contextlib, os, sys
from diffusion_jax.system import terminal
terminal.prepare()
terminal.say('Fréchet \\udce9')
with terminal.Progress('work', 3, seconds=0) as progress:
  for _ in range(3):
    progress.update(note='é')
with open(sys.argv[1], 'w') as file:  # after it, nothing may be written there
  for number in (1, 2):
    with contextlib.suppress(OSError):
      os.write(number, b'of a library')
  file.write('done')
terminal.write('Fréchet \\udce9')
"""


def work(tmp_path, redirect, **environment):
  """Runs WORK in a shell: (its exit code, what it wrote on stdout)."""
  (tmp_path / 'work.py').write_text(WORK)
  done = subprocess.run(
    ['bash', '-c', f'"$0" work.py done {redirect}', sys.executable],
    cwd=tmp_path, capture_output=True, timeout=600,
    env={**os.environ, 'PYTHONPATH': str(binaries.ROOT), **environment},
  )  # fmt: skip
  assert (tmp_path / 'done').read_text() == 'done', done.stderr
  assert b'Traceback' not in done.stderr
  return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
  ('redirect', 'code'),
  [
    ('2>&-', 0), ('>&-', 0), ('>&- 2>&- <&-', 0), ('2>/dev/full', 0),
    ('>/dev/full', 2), ('2>&1 | true; exit ${PIPESTATUS[0]}', 0),
  ],
)  # fmt: skip
def test_output_that_nobody_takes_loses_no_work(tmp_path, redirect, code):
  assert work(tmp_path, redirect)[0] == code


@pytest.mark.slow
@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'utf-8'])
def test_characters_that_a_terminal_lacks_are_escaped(tmp_path, encoding):
  code, out = work(tmp_path, '', PYTHONIOENCODING=encoding, TERM='dumb')
  assert code == 0
  assert b'Fr' in out
  assert out.rstrip().endswith(b'\\udce9')


def test_status_lines_that_cannot_be_written_end_nothing():
  reader, writer = os.pipe()
  os.close(reader)
  with terminal._Unheard(writer, 'w') as file:
    assert file.write(b'lost') == 4
  with open('/dev/full', 'wb') as full:
    file = terminal._Unheard(full.fileno(), 'w', closefd=False)
    assert file.write(b'lost') == 4


def test_a_dumb_terminal_gets_lines(monkeypatch):
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
  monkeypatch.setenv('TERM', 'dumb')
  assert not terminal._is_terminal()
  monkeypatch.setenv('TERM', 'xterm')
  assert terminal._is_terminal()
