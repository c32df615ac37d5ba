"""Kills, signals, full disks and lost data, done to real processes.

Whatever happened, the same command goes on, and the end is bitwise that of the
run that was left alone.
"""

import contextlib
import ctypes
import faulthandler
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import binaries
import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from diffusion_jax import runs
from diffusion_jax.system import interrupts
from diffusion_jax.training import checkpoint, preemption


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Left alone: 30 steps on one device."""
  return tiny.trained(tmp_path_factory.mktemp('runs') / 'digits')


@pytest.fixture(scope='module')
def unet(tmp_path_factory):
  """The same of a U-Net, whose steps take long enough to be met in one."""
  workdir = tmp_path_factory.mktemp('runs') / 'unet'
  train(workdir)
  return workdir


def flags_of(workdir, **changes):
  return tiny.flags(workdir, **tiny.UNET | changes)


def train(workdir, **changes):
  tiny.train(workdir, **tiny.UNET | changes)


def at(workdir) -> int:
  """The newest step in its metrics, 0 = none yet."""
  return max(tiny.losses(workdir), default=0)


def kept(workdir) -> list[int]:
  return checkpoint.steps(workdir / 'checkpoints')


def saving(workdir) -> list:
  """What a save that is under way, or was torn, looks like."""
  return list((workdir / 'checkpoints').glob('*.orbax-checkpoint-tmp'))


def assert_same(a, b):
  assert tiny.losses(a) == tiny.losses(b)
  jax.tree.map(
    np.testing.assert_array_equal, tiny.final_state(a), tiny.final_state(b)
  )


def goes_on_as(unet, workdir):
  train(workdir)
  assert_same(unet, workdir)


def stopped(process, code) -> str:
  """The one line that a run leaves when it is stopped by what happens."""
  result = process.end()
  assert result.code == code, result
  assert not result.out
  # Before it, what runs and how far; nothing else.
  told = (
    *('training on ', 'held out: ', 'there is no held-out', 'training: '),
    *('compiling the training step', 'resuming from checkpoint '),
    'these settings change the rounding',  # the suite optimises less
  )
  *before, last = result.err.splitlines()
  assert all(line.startswith(told) for line in before), result.err
  return last


# --- kill -9 ----------------------------------------------------------------


def kill(workdir, flags, seconds, inside=False) -> bool:
  """Starts, and kills after a new step and a pause; whether it tore a save."""
  before = at(workdir)
  process = binaries.start('train', *flags)
  process.wait_until(lambda: at(workdir) > before)
  if inside:
    process.wait_until(lambda: saving(workdir))
  time.sleep(seconds)
  assert process.process.is_alive(), 'it ended before the kill'
  process.kill()
  return bool(saving(workdir))


@pytest.mark.slow
def test_kill_9_inside_a_save_changes_no_bit(unet, tmp_path):
  workdir = tmp_path / 'killed'
  kill(workdir, flags_of(workdir), 0.0, inside=True)
  goes_on_as(unet, workdir)


@pytest.mark.slow
def test_thirty_kills_some_inside_a_save(tmp_path):
  """With a larger state, which takes a while to write."""
  alone, killed = tmp_path / 'alone', tmp_path / 'killed'
  large = {'model.channels': 2048, 'num_steps': 3000, 'sample_every': 0,
           'eval_every': 0, 'keep_every': 0}  # fmt: skip
  rng, torn = random.Random(0), 0
  for count in range(30):
    every = {'checkpoint_every': 1 + count % 3}
    flags = tiny.flags(killed, **large, **every)
    torn += kill(killed, flags, rng.uniform(0, 0.2), inside=count % 2)
  assert torn >= 5
  tiny.train(killed, **large, checkpoint_every=100)
  assert len((killed / 'starts.jsonl').read_text().splitlines()) == 31
  tiny.train(alone, **large, checkpoint_every=100)
  assert_same(alone, killed)


# --- signals ----------------------------------------------------------------


def test_sigterm_saves_and_ends_well(run, tmp_path):
  """And again while it saves, which loses nothing."""
  workdir = tmp_path / 'told'
  flags = tiny.flags(workdir, num_steps=10**6, checkpoint_every=0)
  process = binaries.start('train', *flags)
  process.wait_until(lambda: at(workdir) >= 4)
  process.send(signal.SIGTERM)
  process.wait_until(lambda: saving(workdir) or kept(workdir))
  with contextlib.suppress(ProcessLookupError):
    os.kill(process.process.pid, signal.SIGTERM)
  last, step = stopped(process, 0), at(workdir)
  assert last == (
    f'stopped by SIGTERM at step {step}, which is saved; the same command '
    'resumes'
  )
  assert kept(workdir) == [step]
  with runs.lock(workdir):
    pass  # it is free
  if step < 30:
    tiny.train(workdir)
    assert_same(run, workdir)
  else:  # where this process was slow to send the signal
    losses = tiny.losses(workdir)
    assert {k: losses[k] for k in range(1, 31)} == tiny.losses(run)


def test_the_first_ctrl_c_saves_and_the_second_ends_it(run, tmp_path):
  workdir = tmp_path / 'told'
  flags = tiny.flags(workdir, num_steps=10**6, checkpoint_every=0)
  process = binaries.start('train', *flags)
  process.wait_until(lambda: at(workdir) >= 4)
  process.send(signal.SIGINT)
  result = process.end()
  assert result.code == 130, result
  before, _, last = result.err.strip().rpartition('\n')
  assert before.endswith('saved; Ctrl-C again aborts')
  step = at(workdir)
  assert last == (
    f'stopped by Ctrl-C at step {step}, which is saved; the same command '
    'resumes'
  )
  assert kept(workdir) == [step]

  process = binaries.start('train', *flags)
  process.wait_until(lambda: at(workdir) > step)
  os.kill(process.process.pid, signal.SIGSTOP)  # so that both arrive together
  process.send(signal.SIGINT)
  os.kill(process.process.pid, signal.SIGCONT)
  process.wait_until(lambda: 'aborts' in told_so_far(process))
  with contextlib.suppress(ProcessLookupError):
    os.kill(process.process.pid, signal.SIGINT)
  assert process.end().code in (130, -signal.SIGINT)
  assert kept(workdir)[0] == step


def told_so_far(process) -> str:
  return Path(process.folder.name, 'err').read_text()


class Several:
  """Stands in for JAX's agreement of several processes on a step."""

  def __init__(self, others):
    self.others = others

  def reached_preemption_sync_point(self, step):
    return step == 3

  def process_allgather(self, value):
    return np.array([value, *self.others])


@pytest.mark.parametrize(
  ('own', 'others', 'name'),
  [
    ('SIGINT', [1], 'SIGINT'),
    ('', [3], 'SIGINT'),
    ('SIGTERM', [1], 'SIGTERM'),
    ('SIGTERM', [2], 'SIGHUP'),
    ('SIGINT', [4], 'SIGUSR1'),
    ('', [1], 'SIGTERM'),
  ],
)
def test_processes_agree_on_the_signal(monkeypatch, own, others, name):
  handlers = {number: signal.getsignal(number)
              for number in (signal.SIGINT, signal.SIGUSR1,
                             signal.SIGHUP)}  # fmt: skip
  monkeypatch.setattr(preemption, 'multihost_utils', Several(others))
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  try:
    signals = preemption.Signals()
    signals.name = own
    assert [signals.reached(step) for step in (1, 2, 3)] == [False, False, True]
    assert signals.name == name
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)


def test_ctrl_c_that_the_shell_ignores_stays_ignored():
  before = {number: signal.getsignal(number) for number in
            (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM,
             signal.SIGHUP)}  # fmt: skip
  try:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals = preemption.Signals()
    assert not signals.reached(1)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@pytest.mark.slow
def test_slurm_gets_its_job_back(tmp_path):
  """SIGUSR1 in the first compilation; then where the job cannot be requeued."""
  workdir, tool = tmp_path / 'slurm', tmp_path / 'scontrol'
  environment = {
    'SLURM_JOB_ID': '4711', 'PATH': f'{tmp_path}:{os.environ["PATH"]}',
  }  # fmt: skip
  tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
  tool.chmod(0o755)
  process = binaries.start('train', *flags_of(workdir), **environment)
  process.wait_until((workdir / 'starts.jsonl').exists)
  process.send(signal.SIGUSR1)
  last, step = stopped(process, 0), at(workdir)
  assert last == (
    f'stopped by SIGUSR1 at step {step}, which is saved; Slurm job 4711 is '
    'requeued'
  )
  assert kept(workdir) == [step]
  assert 1 <= step < 15
  assert (tmp_path / 'asked').read_text() == 'requeue 4711\n'

  tool.write_text('#!/bin/sh\nprintf "no such job\\nat all\\n" >&2; exit 1\n')
  process = binaries.start('train', *flags_of(workdir), **environment)
  process.wait_until(lambda: at(workdir) > step)
  process.send(signal.SIGUSR1)
  last, step = stopped(process, 0), at(workdir)
  assert last == (
    f'stopped by SIGUSR1 at step {step}, which is saved; Slurm job 4711 cannot '
    'be requeued (no such job at all): the same command resumes'
  )


def test_slurm_that_is_not_there_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  assert 'scontrol' in preemption.requeue('1')
  assert '\n' not in preemption.requeue('1')


@pytest.mark.slow
def test_fewer_and_fewer_devices(unet, tmp_path):
  """Stopped on eight, then on four, ended on one."""
  workdir = tmp_path / 'moved'
  for devices in (8, 4):
    process = binaries.start('train', *flags_of(workdir), devices=devices)
    goal = at(workdir) + 3
    process.wait_until(lambda goal=goal: at(workdir) >= goal)
    process.send(signal.SIGTERM)
    last = stopped(process, 0)
    assert f'at step {at(workdir)}, which' in last
  assert at(workdir) < 30
  train(workdir)
  alone, moved = tiny.losses(unet), tiny.losses(workdir)
  assert moved.keys() == alone.keys()
  np.testing.assert_allclose(
    list(moved.values()), list(alone.values()), rtol=3e-6
  )


@pytest.fixture
def signals():
  """Makes Signals in this process: (signals, [(name, seconds)], given up)."""
  numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
  before = [signal.getsignal(number) for number in numbers]
  ended = threading.Event()

  def make(stop_secs):
    told = []

    def give_up(*given):
      told.append(given)
      ended.set()

    return preemption.Signals(stop_secs=stop_secs, give_up=give_up), told, ended

  yield make
  for number, handler in zip(numbers, before, strict=True):
    faulthandler.unregister(number)
    signal.signal(number, handler)


def test_a_closed_terminal_saves_the_run(signals):
  signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may run the suite
  one, _, _ = signals(60)
  assert not one.reached(1)
  os.kill(os.getpid(), signal.SIGHUP)
  assert one.reached(2)
  assert one.name == 'SIGHUP'


def test_a_closed_terminal_that_nohup_ignores_stays_ignored(signals):
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  one, _, _ = signals(60)
  os.kill(os.getpid(), signal.SIGHUP)
  assert not one.reached(1)


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1'])
def test_a_step_that_never_ends_is_given_up(signals, name):
  one, told, ended = signals(0.2)
  one.reached(1)
  os.kill(os.getpid(), signal.Signals[name])
  assert ended.wait(60)
  assert told[0][0] == name
  assert told[0][1] >= 0.2


def test_a_step_that_ends_in_time_is_not_given_up(signals):
  one, told, ended = signals(0.5)
  assert not one.reached(1)
  os.kill(os.getpid(), signal.SIGTERM)
  assert one.reached(2)
  assert not ended.wait(1)
  assert not told


@pytest.mark.slow
def test_slow_steps_have_more_time(signals):
  one, told, ended = signals(0.1)
  one.reached(1)
  one._longest = 1.0
  os.kill(os.getpid(), signal.SIGTERM)
  assert ended.wait(60)
  assert told[0][1] >= 3
  one, told, ended = signals(0.1)
  ended.clear()
  one.patiently(
    lambda: (os.kill(os.getpid(), signal.SIGTERM), ended.wait(60))
  )()
  assert told[0][1] >= 1


def test_a_handler_written_in_c_survives_a_second_watch():
  """JAX's of SIGTERM, say, which tells the other processes."""
  libc = ctypes.CDLL(None)
  libc.signal.restype = ctypes.c_void_p
  libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
  own = ctypes.cast(libc.abs, ctypes.c_void_p).value
  before = libc.signal(signal.SIGUSR2, own)
  for _ in range(3):
    interrupts.watch(signal.SIGUSR2, lambda: None)
  faulthandler.unregister(signal.SIGUSR2)
  assert libc.signal(signal.SIGUSR2, before) == own


# --- disks and data ---------------------------------------------------------


def limit_files(process, size):
  """From now on no file of the process grows beyond `size` bytes."""
  pid = process.process.pid
  hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
  resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


@contextlib.contextmanager
def unwritable(folder):
  """Modes do not bind root, who has another way on some file systems."""
  if os.geteuid():
    folder.chmod(0o555)
  elif subprocess.run(['chattr', '+i', folder], capture_output=True).returncode:
    pytest.skip('root can write everywhere here')
  try:
    yield
  finally:
    if os.geteuid():
      folder.chmod(0o755)
    else:
      subprocess.run(['chattr', '-i', folder], check=True)


def names_the_whole_one(line, workdir):
  assert line.startswith('error: training stopped at step ')
  newest = kept(workdir)[-1]
  end = f'; checkpoint {newest} is complete; the same command resumes from it'
  assert line.endswith(end)


@pytest.mark.parametrize(
  ('size', 'must'),
  [
    pytest.param(2**17, 'checkpoint ', id='checkpoints'),
    pytest.param(0, 'File too large: ', id='everything'),
  ],
)
@pytest.mark.slow
def test_files_that_cannot_grow_end_it_in_one_line(unet, tmp_path, size, must):
  workdir = tmp_path / 'full'
  process = binaries.start('train', *flags_of(workdir))
  process.wait_until(lambda: 5 in kept(workdir))
  # stderr is a file too.
  limit_files(process, size or (workdir / 'metrics.jsonl').stat().st_size)
  last = stopped(process, 2)
  names_the_whole_one(last, workdir)
  assert must in last
  goes_on_as(unet, workdir)


@pytest.mark.slow
def test_a_full_disk(unet, tmp_path):
  disk = tmp_path / 'disk'
  disk.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=16m', 'none', disk]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('no file system can be mounted here')
  try:
    workdir = disk / 'run'
    process = binaries.start('train', *flags_of(workdir))
    process.wait_until(lambda: 5 in kept(workdir))
    filler = ['dd', 'if=/dev/zero', f'of={disk / "filler"}', 'bs=4096']
    assert subprocess.run(filler, capture_output=True).returncode
    last = stopped(process, 2)
    names_the_whole_one(last, workdir)
    assert 'No space left on device' in last
    (disk / 'filler').unlink()
    goes_on_as(unet, workdir)
  finally:
    subprocess.run(['umount', '-l', disk], check=True)


@pytest.mark.slow
def test_a_workdir_that_cannot_be_written(unet, tmp_path):
  """From some moment on, and then from the start."""
  workdir = tmp_path / 'fixed'
  process = binaries.start('train', *flags_of(workdir))
  process.wait_until(lambda: kept(workdir))
  with unwritable(workdir / 'checkpoints'):
    last = stopped(process, 2)
    names_the_whole_one(last, workdir)
    assert 'cannot be written (' in last
  with unwritable(workdir):
    result = binaries.run('train', *flags_of(workdir))
    assert 'cannot be written' in result.message
  goes_on_as(unet, workdir)


@pytest.mark.slow
def test_a_folder_of_images_that_vanishes(tmp_path):
  pictures, workdir = tmp_path / 'pictures', tmp_path / 'run'
  pictures.mkdir()
  images = tiny.images(600)['image']
  for index, image in enumerate(images):
    Image.fromarray(image[..., 0]).save(pictures / f'{index:03}.png')
  flags = {'data.name': 'folder', 'data.path': pictures, 'checkpoint_every': 2}
  process = binaries.start('train', *flags_of(workdir, **flags))
  process.wait_until(lambda: kept(workdir))
  pictures.rename(tmp_path / 'away')
  last = stopped(process, 2)
  names_the_whole_one(last, workdir)
  assert 'image ' in last
  assert str(pictures) in last
  (tmp_path / 'away').rename(pictures)
  train(workdir, **flags)
  assert sorted(tiny.losses(workdir)) == list(range(1, 31))


@pytest.mark.slow
def test_an_array_file_that_is_cut_or_vanishes(tmp_path):
  """What vanishes is there until the run ends; what is cut is missed."""
  path, workdir = tmp_path / 'images.npy', tmp_path / 'run'
  np.save(path, tiny.images(600)['image'])
  shutil.copy(path, tmp_path / 'copy.npy')
  flags = {'data.name': 'arrays', 'data.path': path, 'checkpoint_every': 2}
  process = binaries.start('train', *flags_of(workdir, **flags))
  process.wait_until(lambda: kept(workdir))
  os.truncate(path, 1000)
  last = stopped(process, 2)
  names_the_whole_one(last, workdir)
  assert 'has become shorter' in last
  shutil.copy(tmp_path / 'copy.npy', path)
  process = binaries.start('train', *flags_of(workdir, **flags))
  newest = kept(workdir)[-1]
  process.wait_until(lambda: at(workdir) > newest)
  path.unlink()
  result = process.end()
  assert result.code == 0, result.err
  assert sorted(tiny.losses(workdir)) == list(range(1, 31))


@pytest.mark.slow
def test_ctrl_c_while_images_are_drawn_is_one_line(unet, tmp_path):
  """XLA computes in threads that Python's own end would take apart."""
  output = tmp_path / 'out'
  flags = ('--num_samples=1000000', '--batch_size=64', '--sampler=ddim')
  drawing = binaries.start(
    'sample', f'--workdir={unet}', f'--output={output}', *flags
  )
  drawing.wait_until(lambda: list(output.glob('parts/*.npy')))
  drawing.send(signal.SIGINT)
  ended = drawing.end()
  assert ended.code == 130, ended
  assert 'Fatal' not in ended.err
  assert ended.err.strip().endswith(
    f'images are kept in {output}; run the same command again to resume'
  )
