"""Who is named, when processes are missing, stand still, or are slow."""

import json
import os
import signal
import threading
import time

import binaries
import pytest
import tiny

from diffusion_jax.training import watchdog
from diffusion_jax.training.watchdog import Beat


def beat(process, **changes):
  well = Beat(process, f'host{process}, pid 7', 5, 100, 0.1, 0.01, ['a stack'])
  return well._replace(**changes)


def judged(*beats, silent=None):
  heard = {one.process: 0.0 for one in beats}
  return watchdog.judge(list(beats), {**heard, **(silent or {})}, 60, 30)


def test_all_is_well():
  assert not judged(beat(0), beat(1), beat(2, waited=0.2))
  assert not judged(beat(0, waited=0.2))


def test_a_missing_process_is_named_with_where_it_was():
  # The others wait for it, which is not their fault.
  found = judged(beat(0, still=90), beat(1, steps=99), silent={1: 31.0})
  assert found == {
    (1, 'missing'): (
      'watchdog: process 1 (host1, pid 7) is missing: silent for 31 s, last '
      'seen after 99 steps since its start, in\na stack'
    )
  }


def test_one_that_was_never_there():
  found = judged(beat(0), silent={1: 40.0})
  assert found[1, 'missing'].startswith('watchdog: process 1 is missing')
  assert 'is the workdir shared?' in found[1, 'missing']


def test_the_one_that_is_behind_stands_still():
  found = judged(
    beat(0, still=70), beat(1, still=71, steps=99), beat(2, still=70)
  )
  assert found.keys() == {(1, 'still')}
  told = found[1, 'still']
  assert 'process 1 (host1, pid 7) stands still for 71 s, and the' in told
  assert told.endswith('a stack')


def test_where_all_stand_still_no_host_is_blamed():
  found = judged(beat(0, still=70), beat(1, still=70))
  assert found.keys() == {(0, 'still')}
  assert 'all 2 stand still for 70 s: devices, or the' in found[0, 'still']


def test_a_slow_host_is_named():
  found = judged(beat(0, waited=0.02), beat(1, waited=0.6), beat(2))
  assert found.keys() == {(1, 'slow')}
  assert 'waits for data 60% of the time, the others 2%;' in found[1, 'slow']
  # All read from one slow disk: that is no host's fault.
  assert not judged(*(beat(i, waited=0.5) for i in range(3)))
  assert judged(beat(0, waited=0.5)).keys() == {(0, 'slow')}


class Held:
  """An iterator whose fourth element lets the test look first."""

  def __init__(self):
    self.go = threading.Event()

  def batches(self):
    yield from range(3)
    assert self.go.wait(60)
    yield 3


def test_data_that_do_not_come(tmp_path):
  """In one process, which has nobody to write for: with its own stack."""
  told, held = [], Held()
  with watchdog.Watchdog(
    tmp_path, 0, 1, still_secs=0.2, silent_secs=9, every_secs=0.02,
    tell=told.append,
  ) as dog:  # fmt: skip
    threading.Thread(target=release, args=(told, held)).start()
    for _ in dog.waiting(held.batches()):
      dog.step()
  assert 'process 0' in told[0]
  assert 'stands still' in told[0]
  assert 'after 3 steps since its start' in told[0]
  assert 'held.batches' in told[0]
  assert 'self.go.wait(60)' in told[0]
  assert len([line for line in told if 'stands still' in line]) == 1
  assert not list(tmp_path.iterdir())


def release(told, held):
  deadline = time.monotonic() + 30
  while not told and time.monotonic() < deadline:
    time.sleep(0.01)
  held.go.set()


def test_processes_find_each_other_in_the_workdir(tmp_path):
  """The second beats, then ends without a word; a third never comes."""
  told = []
  how = {'still_secs': 9, 'silent_secs': 0.3, 'every_secs': 0.02}
  first = watchdog.Watchdog(tmp_path, 0, 3, tell=told.append, **how)
  second = watchdog.Watchdog(tmp_path, 1, 3, tell=pytest.fail, **how)
  with first:
    with second:
      deadline = time.monotonic() + 30
      while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 'process 2 is missing' in told[0]
    while len(told) < 2 and time.monotonic() < deadline:
      time.sleep(0.01)
  assert 'process 1 (' in told[1]
  assert 'is missing' in told[1]
  assert len(told) == 2


def test_beats_of_an_earlier_start_are_not_believed(tmp_path):
  (tmp_path / 'heartbeats').mkdir()
  old = tmp_path / 'heartbeats' / '1.json'
  old.write_text(json.dumps(beat(1, count=9000, waited=0.9)))
  told = []
  with watchdog.Watchdog(
    tmp_path, 0, 2, still_secs=9, silent_secs=0.2, every_secs=0.02,
    tell=told.append,
  ):  # fmt: skip
    assert not old.exists()
    deadline = time.monotonic() + 30
    while not told and time.monotonic() < deadline:
      time.sleep(0.01)
  assert told == [
    line for line in told if line.startswith('watchdog: process 1 is missing')
  ]


def test_a_damaged_beat_does_not_end_the_watch(tmp_path):
  told = []
  with watchdog.Watchdog(
    tmp_path, 0, 2, still_secs=9, silent_secs=0.3, every_secs=0.02,
    tell=told.append,
  ):  # fmt: skip
    damaged = tmp_path / 'heartbeats' / '1.json'
    damaged.write_text('[1, "h"]')
    deadline = time.monotonic() + 30
    while not told and time.monotonic() < deadline:
      time.sleep(0.01)
    damaged.unlink()
    while len(told) < 2 and time.monotonic() < deadline:
      time.sleep(0.01)
  assert 'heartbeats failed' in told[0]
  assert 'process 1 is missing' in told[1]


def test_a_slow_host_is_told_of_again_after_it_has_recovered(tmp_path):
  """The share is of several beats: one hiccup among them tells nothing."""
  told = []
  dog = watchdog.Watchdog(
    tmp_path, 0, 1, still_secs=9, silent_secs=9, every_secs=9,
    tell=told.append,
  )  # fmt: skip
  clock, waited = 0.0, 0.0
  dog._past.clear()
  dog._past.append((clock, waited))
  shares = [0.0] * 5 + [0.9] + [0.0] * 5 + [0.8] * 6 + [0.0] * 6 + [0.8] * 6
  with pytest.MonkeyPatch.context() as patch:
    for share in shares:
      clock, waited = clock + 10, waited + 10 * share
      dog._waited = dog._since = waited
      patch.setattr(watchdog.time, 'monotonic', lambda now=clock: now)
      dog._since = clock
      dog._look([dog._beat()])
  assert len(told) == 2
  assert 'is slow: it waits for data' in told[0]


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path):
  (tmp_path / 'heartbeats').write_text('in the way')
  told = []
  with watchdog.Watchdog(
    tmp_path, 0, 2, still_secs=9, silent_secs=9, every_secs=0.01,
    tell=told.append,
  ):  # fmt: skip
    time.sleep(0.2)
  assert len(told) == 1
  assert 'heartbeats failed' in told[0]


@pytest.mark.slow
def test_a_stopped_process_is_named_before_the_run_ends(tmp_path):
  """SIGSTOP, as of a host that hangs; JAX then ends the others."""
  processes = binaries.start_several(
    'train', *tiny.flags(tmp_path, num_steps=100_000, sample_every=0),
    '--heartbeat_secs=20',
  )  # fmt: skip
  processes[0].wait_until(lambda: len(tiny.losses(tmp_path)) >= 3)
  processes[1].send(signal.SIGSTOP)
  result = processes[0].end(limit=120)
  os.kill(processes[1].process.pid, signal.SIGCONT)
  processes[1].kill()
  assert result.code != 0
  assert 'watchdog: process 1 (' in result.err
  assert 'is missing: silent for 1' in result.err
  assert 'steps since its start, in' in result.err
