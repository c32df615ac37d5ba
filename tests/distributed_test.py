"""Several processes: how they meet, and that they do what one does."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import binaries
import jax
import numpy as np
import pytest
import tiny

from diffusion_jax.runs import store
from diffusion_jax.system import cluster, distributed, farewell, meeting
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, metrics, sharding

# It compares the numbers of different programs.
pytestmark = pytest.mark.optimized

# --- meeting -----------------------------------------------------------------


def meet_all(calls, seconds=10, address=None):
  """Runs meet() in a thread each; returns what each raised, or None."""
  address = address or f'localhost:{binaries.free_port()}'
  raised = [None] * len(calls)

  def join(place, total, index, after):
    time.sleep(after)
    try:
      meeting.meet(address, total, index, seconds)
    except UserError as e:
      raised[place] = str(e)

  threads = [
    threading.Thread(target=join, args=(place, *call))
    for place, call in enumerate(calls)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(seconds + 20)
    assert not thread.is_alive()
  return raised


@pytest.mark.parametrize('order', [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_all_come_in_any_order(order):
  assert meet_all([(4, i, 0.1 * k) for k, i in enumerate(order)]) == [None] * 4


def test_a_missing_one_is_named_to_all():
  raised = meet_all([(4, 0, 0), (4, 1, 0), (4, 3, 0)], seconds=1)
  for told in raised:
    assert 'process 2 of 4 did not join within 1 s' in told
    assert 'check that it was started' in told
    assert '\n' not in told


def test_a_missing_first_one_is_named():
  (told,) = meet_all([(2, 1, 0)], seconds=1)
  assert 'process 0 was not found at localhost:' in told
  assert 'the port is open' in told


def test_two_of_one_number():
  for told in meet_all([(3, 0, 0), (3, 1, 0.1), (3, 1, 0.3)], seconds=3):
    assert told == 'two processes have --process_id=1: give each its own'


def test_another_number_of_processes():
  for told in meet_all([(2, 0, 0), (3, 1, 0.1)], seconds=3):
    assert told.startswith('process 1 was started with --num_processes=3')


def test_one_that_was_killed_and_started_again_is_let_in():
  port = binaries.free_port()
  raised = []

  def join(index):
    try:
      meeting.meet(f'localhost:{port}', 3, index, 10)
    except UserError as e:
      raised.append(str(e))

  threads = [threading.Thread(target=join, args=(0,))]
  threads[0].start()
  time.sleep(0.3)
  with socket.create_connection(('localhost', port)) as killed:
    killed.sendall(b'diffusion_jax 1 3\n')
    time.sleep(0.3)
  with socket.create_connection(('localhost', port)) as stranger:
    stranger.sendall(b'GET / HTTP/1.1\n')
  threads += [threading.Thread(target=join, args=(i,)) for i in (1, 2)]
  for thread in threads[1:]:
    thread.start()
  for thread in threads:
    thread.join(20)
  assert not raised


def test_a_port_in_use():
  with socket.create_server(('', 0)) as server:
    address = f'localhost:{server.getsockname()[1]}'
    with pytest.raises(UserError, match='cannot be used'):
      meeting.meet(address, 2, 0, 1)


def slurm(**values):
  """The variables of a Slurm step."""
  usual = {'JOB_ID': 8195, 'STEP_NODELIST': 'a1', 'PROCID': 2, 'LOCALID': 0}
  return {f'SLURM_{k}': str(v) for k, v in {**usual, **values}.items()}


@pytest.mark.parametrize(
  ('nodes', 'host'),
  [
    ('tpu', 'tpu'), ('a1,b2', 'a1'), ('a[01-15],b2', 'a01'),
    ('a[07,09-15]', 'a07'), ('b2,a[01-15]', 'b2'), ('gpu-3[4]', 'gpu-34'),
    ('n[2-3].cluster.org', 'n2.cluster.org'), ('r[1-2]n[3,5-6]', 'r1n3'),
    ('cn-0[1-2],x', 'cn-01'), ('10.0.0.1', '10.0.0.1'),
  ],
)  # fmt: skip
def test_slurm_names_the_first_host(nodes, host):
  place = cluster.find(slurm(STEP_NODELIST=nodes, NTASKS=4))
  assert place[1:4] == (4, 2, f'{host}:61443')


@pytest.mark.parametrize(
  'environment',
  [
    {},
    slurm(NTASKS=1),
    # `srun --pty bash` in an allocation of four tasks
    slurm(NTASKS=4, STEP_NUM_TASKS=1, PROCID=0),
    # A batch script, and what someone exported by hand.
    {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'},
    slurm(NTASKS='4(x2)'),
    slurm(JOB_ID='', NTASKS=4),
    {'WORLD_SIZE': '4', 'RANK': '1'},
    {'RANK': '1', 'MASTER_ADDR': 'a', 'MASTER_PORT': '1'},
    {'OMPI_COMM_WORLD_SIZE': '1', 'OMPI_COMM_WORLD_RANK': '0'},
  ],
)
def test_who_runs_alone(environment):
  assert cluster.find(environment) is None


def test_steps_of_one_job_use_different_ports():
  ports = [
    cluster.find(slurm(NTASKS=4, STEP_ID=step)).coordinator for step in range(9)
  ]
  assert len(set(ports)) == 9
  assert ports[0] == 'a1:61443'


MPI = {
  'OMPI_COMM_WORLD_SIZE': '8', 'OMPI_COMM_WORLD_RANK': '5',
  'OMPI_COMM_WORLD_LOCAL_SIZE': '4', 'OMPI_COMM_WORLD_LOCAL_RANK': '1',
}  # fmt: skip
TORCH = {
  'WORLD_SIZE': '8', 'RANK': '5', 'LOCAL_WORLD_SIZE': '4', 'LOCAL_RANK': '1',
  'MASTER_ADDR': 'fe80::1', 'MASTER_PORT': '29500',
}  # fmt: skip


@pytest.mark.parametrize(
  ('environment', 'host'),
  [
    (TORCH, '[fe80::1]:29500'),
    # Its agent uses the port.
    ({**TORCH, 'TORCHELASTIC_RUN_ID': 'none'}, '[fe80::1]:29501'),
    ({**MPI, 'OMPI_MCA_orte_hnp_uri': '15.0;tcp://10.9.0.1,10.8.0.1:3491'},
     '10.9.0.1'),
    # Each of mpiexec's daemons is a task of Slurm.
    ({**slurm(NTASKS=2, PROCID=1), 'SLURM_JOB_NODELIST': 'n[3-4]', **MPI},
     'n3'),
    ({**MPI, 'OMPI_COMM_WORLD_LOCAL_SIZE': '8'}, 'localhost'),
    ({'PMI_SIZE': '8', 'PMI_RANK': '5', 'MPI_LOCALNRANKS': '8',
      'MPI_LOCALRANKID': '1'}, 'localhost'),
    (MPI, 'None'),
  ],
)  # fmt: skip
def test_other_launchers_tell_the_place(environment, host):
  place = cluster.find(environment)
  assert place[1:3] == (8, 5)
  assert str(place.coordinator).startswith(host)
  assert place.local_index == 1


def place(local_count, local_index=1):
  return cluster.Place('Slurm', 8, 5, 'a:1', local_count, local_index)


@pytest.mark.parametrize(
  ('found', 'environment', 'gpus'),
  [
    (None, {'CUDA_VISIBLE_DEVICES': '0,1'}, None),
    # Each has its own: --gpus-per-task
    (place(4), {'CUDA_VISIBLE_DEVICES': '0'}, None),
    (place(4), {'CUDA_VISIBLE_DEVICES': 'GPU-8f2e'}, None),
    (place(2), {'CUDA_VISIBLE_DEVICES': '0,1', 'SLURM_GPUS_ON_NODE': '4'},
     None),
    (place(2), {'CUDA_VISIBLE_DEVICES': '0,1', 'SLURM_GPUS_PER_TASK': '2'},
     None),
    # All see all: --gpus-per-node
    (place(4), {'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, [1]),
    (place(None), {'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, [1]),
    (place(2), {'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, [2, 3]),
    (place(2), {'CUDA_VISIBLE_DEVICES': '4,5,6,7', 'SLURM_GPUS_PER_TASK': '2'},
     [2, 3]),  # --gpu-bind=none
    (place(2), {'SLURM_GPUS_ON_NODE': '8'}, [4, 5, 6, 7]),
    # One process for all of a node's.
    (place(1, 0), {'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, None),
    # Nothing is known, or nothing is to be seen.
    (place(4), {}, [1]),
    (place(4), {'CUDA_VISIBLE_DEVICES': ''}, None),
    (place(4), {'JAX_LOCAL_DEVICE_IDS': '3'}, None),
    (place(4), {'CUDA_VISIBLE_DEVICES': '0,1', 'JAX_PLATFORMS': 'cpu'}, None),
  ],
)  # fmt: skip
def test_gpus_of_a_process(found, environment, gpus):
  assert cluster.devices(found, environment) == gpus


def test_more_processes_than_gpus_is_one_line():
  with pytest.raises(UserError, match='4 processes on this host see 2 GPUs'):
    cluster.devices(place(4), {'CUDA_VISIBLE_DEVICES': '0,1'})


@pytest.mark.parametrize(
  ('text', 'node', 'count'),
  [('4(x2)', 1, 4), ('4(x2),1', 2, 1), ('2,3', 1, 3), ('', 0, None),
   ('2', 7, None)],
)  # fmt: skip
def test_slurm_tells_the_tasks_of_a_node(text, node, count):
  environment = slurm(NTASKS=8, STEP_TASKS_PER_NODE=text, NODEID=node)
  assert cluster.find(environment).local_count == count


@pytest.fixture
def launched(monkeypatch):
  """Sets flags and variables, and returns the place that is found."""

  def find(environment, **given):
    for name in (*TORCH, *MPI):
      monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    for name in ('coordinator', 'num_processes', 'process_id'):
      monkeypatch.setattr(distributed.FLAGS[name], 'value', given.get(name))
    return distributed._place()

  if not distributed.FLAGS.is_parsed():
    distributed.FLAGS.mark_as_parsed()
  return find


def test_flags_go_before_a_launcher(launched):
  assert launched(TORCH, num_processes=1) is None
  assert launched(TORCH, coordinator='b:9').coordinator == 'b:9'
  all_three = {'coordinator': 'b:9', 'num_processes': 2, 'process_id': 1}
  assert launched(TORCH, **all_three) == ('', 2, 1, 'b:9', 4, 1)
  assert launched(MPI, coordinator='b:9')[1:4] == (8, 5, 'b:9')
  with pytest.raises(UserError, match='give --coordinator=HOST:PORT, or'):
    launched(MPI)
  with pytest.raises(UserError, match=r'in brackets, \[::1\]:9'):
    launched({}, **{**all_three, 'coordinator': '::1:9'})


def test_a_missing_task_of_a_launcher_is_no_flag():
  """The message must not ask for flags that nobody needs there."""
  started = distributed._started(cluster.find(slurm(NTASKS=4)))
  address = f'localhost:{binaries.free_port()}'
  with pytest.raises(UserError, match='started by Slurm, whose variables name'):
    meeting.meet(address, 4, 0, 0.1, started)
  with pytest.raises(UserError, match='--num_processes=1 runs this one alone'):
    meeting.meet(address, 4, 2, 0.1, started)


def test_a_name_that_no_host_has():
  for host in ('no-such-host.invalid', 'x' * 70):
    with pytest.raises(UserError, match='does not know the name') as error:
      meeting.meet(f'{host}:8476', 2, 1, 0.5)
    assert '--coordinator=HOST:PORT' in str(error.value)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason='no IPv6 here')
def test_hosts_that_speak_ipv6_only():
  address = f'[::1]:{binaries.free_port()}'
  assert meet_all([(2, 0, 0), (2, 1, 0)], address=address) == [None, None]


def test_hosts_without_ipv6(monkeypatch):
  create = socket.create_server

  def fail(address, **how):
    if how.get('family') == socket.AF_INET6:
      raise OSError(errno.EADDRNOTAVAIL, 'Cannot assign requested address')
    return create(address, **how)

  monkeypatch.setattr(socket, 'has_dualstack_ipv6', lambda: True)
  monkeypatch.setattr(socket, 'create_server', fail)
  assert meet_all([(2, 0, 0), (2, 1, 0)]) == [None, None]


@pytest.mark.parametrize(
  ('flags', 'must'),
  [
    (['--coordinator=h:1'], 'without --num_processes, --process_id'),
    (['--process_id=1'], 'without --coordinator, --num_processes'),
    (['--coordinator=h:1', '--num_processes=2', '--process_id=2'], '= 1'),
    (['--coordinator=h', '--num_processes=2', '--process_id=1'], 'HOST:PORT'),
    (['--coordinator=h:x', '--num_processes=2', '--process_id=0'], 'HOST:PORT'),
  ],
)
def test_flags_that_do_not_fit_are_one_line(tmp_path, flags, must):
  result = binaries.run('train', *tiny.flags(tmp_path / 'w'), *flags)
  assert must in result.message
  assert not (tmp_path / 'w').exists()


def test_alone_nobody_is_asked():
  assert distributed.is_first()
  assert distributed.on_first(lambda: {'a': [1, None]}) == {'a': [1, None]}
  distributed.leave(3)
  distributed.finish()


# --- leaving -----------------------------------------------------------------


def part(index, others, seconds, code=2, heard=None):
  """A process's farewell; returns how long it took."""
  for other in others:
    other.setblocking(False)
  started = time.monotonic()
  bond = farewell.Bond(index, others, heard or threading.Event())
  farewell.part(bond, code, seconds)
  return time.monotonic() - started


def closing(connection, after):
  """Closes it later, as the kernel does when a process ends."""
  thread = threading.Timer(after, connection.close)
  thread.start()
  return thread


def test_process_0_waits_for_all_others():
  here, there = zip(*(socket.socketpair() for _ in range(3)), strict=True)
  threads = [closing(s, 0.3 * i) for i, s in enumerate(there)]
  assert 0.5 < part(0, here, 60) < 50
  for thread in threads:
    thread.join()


def test_process_0_does_not_wait_for_one_that_never_goes():
  (here, there), (left, gone) = socket.socketpair(), socket.socketpair()
  gone.close()
  assert 0.5 <= part(0, [here, left], 0.5) < 30
  assert there.recv(9) == b'2\n'


def test_process_0_does_not_wait_for_those_that_were_killed():
  """One has gone before, one with words unread; nobody is there in the end."""
  (here, there), (left, gone) = socket.socketpair(), socket.socketpair()
  left.send(b'unread')
  gone.close()
  closing(there, 0).join()
  assert part(0, [here, left], 60) < 50
  assert part(0, [], 60) < 50


def bound(others, index, seconds):
  """What binds a process: (bond, [(who, code)], set at the end)."""
  ended, event = [], threading.Event()

  def end(who, code):
    ended.append((who, code))
    event.set()

  return farewell.bind(others, index, end, seconds), ended, event


def test_the_others_follow_process_0_after_a_while():
  first, other = socket.socketpair()
  bond, ended, event = bound([other], 1, 0.3)
  started = time.monotonic()
  assert part(0, [first], 0) < 30
  assert event.wait(60)
  assert bond.heard.is_set()
  assert ended == [(0, 2)]
  assert time.monotonic() - started >= 0.3


def test_process_0_follows_one_of_the_others():
  """And tells it, so that it need not wait any longer."""
  here, there = zip(*(socket.socketpair() for _ in range(2)), strict=True)
  _, ended, event = bound(here, 0, 0.3)
  last, _, _ = bound([there[1]], 2, 60)
  threading.Timer(1, lambda: part(0, here, 0)).start()
  assert part(2, [there[1]], 60, code=130, heard=last.heard) < 50
  assert event.wait(60)
  assert ended == [(2, 130)]


def test_a_good_end_takes_nobody_along():
  first, other = socket.socketpair()
  bond, ended, _ = bound([first], 0, 0)
  assert part(1, [other], 60, code=0) < 50
  other.close()
  assert bond.heard.wait(60)
  assert not ended


def test_a_process_that_dies_is_left_to_jax():
  first, other = socket.socketpair()
  bond, ended, _ = bound([other], 1, 0)
  first.close()
  assert bond.heard.wait(60)
  assert not ended


def test_a_pod_where_process_0_is_out_of_reach(monkeypatch):
  """Found by JAX, but not by their connections: nobody is awaited."""
  address = f'localhost:{binaries.free_port()}'
  monkeypatch.setattr(farewell, 'PATIENCE', 0.3)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(distributed, 'gather', lambda value: [address] * 2)
  for index in (0, 1):
    monkeypatch.setattr(distributed, 'index', lambda index=index: index)
    distributed._join_in_pod()
  assert distributed._bond is None


def test_a_pod_knows_an_address_of_process_0():
  address = farewell.own_address()
  raised = meet_all([(2, 0, 0), (2, 1, 0)], address=address)
  assert raised == [None, None]


@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_local_rows_are_each_row_once(sizes):
  array = sharding.put_batch(np.arange(16.0), sharding.make_mesh(*sizes))
  rows, values = sharding.local_rows(array)
  assert rows.tolist() == list(range(16))
  np.testing.assert_array_equal(values, rows)


# --- two real processes ------------------------------------------------------


def rows(workdir):
  return {row['step']: row for row in metrics.read(workdir / 'metrics.jsonl')}


FEW = {'num_steps': 2, 'eval_every': 2, 'sample_every': 0,
       'checkpoint_every': 2}  # fmt: skip


@pytest.fixture(scope='module')
def both(tmp_path_factory):
  """The workdirs of a run by one process, and of the same by two."""
  folder = tmp_path_factory.mktemp('runs')
  # Optimising three programs would take most of the time.
  plain = {binaries.OPTIONS: 'True'}
  one = binaries.run('train', *tiny.flags(folder / 'one', **FEW), **plain)
  assert one.code == 0, one.err
  results = binaries.run_several(
    'train', *tiny.flags(folder / 'two', **FEW), **plain
  )
  assert [r.code for r in results] == [0, 0], [r.err for r in results]
  # One process writes, and talks to people.
  assert 'trained to step 2' in results[0].out
  assert not results[1].out
  return folder / 'one', folder / 'two'


def test_two_processes_train_as_one(both):
  one, two = map(rows, both)
  assert list(one) == list(two) == [1, 2]
  for step in one:
    for name in ('loss', 'heldout_loss', 'grad_norm'):
      if name in one[step]:
        assert two[step][name] == pytest.approx(one[step][name], rel=3e-6)
  assert len((both[1] / 'starts.jsonl').read_text().splitlines()) == 1


@pytest.mark.slow
def test_one_goes_on_where_two_stopped_and_back(both, tmp_path):
  """2 processes -> 1 -> 2: the losses of one that was never stopped."""
  more = {**FEW, 'num_steps': 4, 'sample_every': 6}
  result = binaries.run('train', *tiny.flags(both[1], **more))
  assert result.code == 0, result.err
  more['num_steps'] = 6
  results = binaries.run_several('train', *tiny.flags(both[1], **more))
  assert [r.code for r in results] == [0, 0], [r.err for r in results]
  tiny.train(both[0], **more)
  one, two = map(rows, both)
  assert list(one) == list(two) == list(range(1, 7))
  drawn = [path.name for path in (both[1] / 'samples').iterdir()]
  assert drawn == ['train_00000006.png']
  for step in one:
    assert two[step]['loss'] == pytest.approx(one[step]['loss'], rel=3e-6)


@pytest.mark.slow
def test_two_processes_sample_and_judge_as_one(both, tmp_path):
  how = ['--num_samples=13', '--batch_size=4', '--sampler=ddim',
         '--num_steps=3']  # fmt: skip
  images = {}
  for name in ('alone', 'together'):
    flags = [f'--workdir={both[0]}', *how, f'--output={tmp_path / name}']
    if name == 'alone':
      results = [binaries.run('sample', *flags)]
    else:
      results = binaries.run_several('sample', *flags, '--trajectory=2')
    assert all(r.code == 0 for r in results), [r.err for r in results]
    images[name] = store.load(tmp_path / name, 13).astype(int)
  assert np.abs(images['alone'] - images['together']).max() <= 1
  assert (tmp_path / 'together' / 'trajectory.png').exists()
  # Each process has kept its own rows: parts of at most two images.
  assert (
    max(end - first for first, end, _ in store.parts(tmp_path / 'together'))
    == 2
  )

  flags = [
    f'--workdir={both[0]}', *how, '--features=pixels', '--rounding=round'
  ]  # fmt: skip
  results = binaries.run_several(
    'evaluate', *flags, f'--output={tmp_path / "together"}'
  )
  assert all(r.code == 0 for r in results), [r.err for r in results]
  assert 'Fréchet distance' in results[0].out
  assert not results[1].out
  alone = binaries.run('evaluate', *flags, f'--output={tmp_path / "together"}')
  assert results[0].out.splitlines()[:8] == alone.out.splitlines()[:8]


def test_a_mistake_is_told_by_all_and_hangs_none(both, tmp_path):
  results = binaries.run_several('train', *tiny.flags(both[0], seed=7))
  for result in results:
    assert result.code == 2
    assert 'seed: 0 there, 7 now' in result.err
  with binaries_lock(both[0]):
    results = binaries.run_several(
      'train', *tiny.flags(both[0], **FEW, log_every=2)
    )
  for result in results:
    assert result.code == 2
    assert 'another process trains there' in result.err


def binaries_lock(workdir):
  from diffusion_jax import runs

  return runs.lock(workdir)


def end_all(*flags, send=(), began=None, number=signal.SIGINT):
  """Runs tests/ending.py in two processes; returns how they ended."""
  processes = binaries.start_several(
    'ending', *flags, *([f'--began={began}'] if began else [])
  )
  if began:
    processes[0].wait_until(began.exists)
  for index in send:
    processes[index].send(number)
  results = [process.end() for process in processes]
  for result in results:
    assert 'Fatal' not in result.err, result.err
    assert 'coordination' not in result.err, result.err
  return results


def test_ctrl_c_ends_all_with_one_code(tmp_path):
  """One of them may be in a collective by then, which never comes to an end.

  It then ends because the other does, and says so.
  """
  results = end_all('--how=loop', send=(0, 1), began=tmp_path / 'began')
  assert [r.code for r in results] == [130, 130], results
  own = 'run the same command again to resume'
  followed = 'exited with code 130; this process exits, too'
  assert any(own in r.err for r in results), results
  assert all(own in r.err or followed in r.err for r in results), results


@pytest.mark.slow
@pytest.mark.parametrize('who', [0, 1])
def test_sigterm_ends_a_process_that_waits_for_ever(tmp_path, who):
  """In a collective that the other never joins; and then the other, too."""
  results = end_all(
    '--how=hang', f'--who={1 - who}', send=(who,), began=tmp_path / 'began',
    number=signal.SIGTERM,
  )  # fmt: skip
  assert [r.code for r in results] == [143, 143], results
  assert 'stopped by SIGTERM' in results[who].err
  assert f'process {who} exited with code 143' in results[1 - who].err


@pytest.mark.slow
def test_ctrl_c_of_process_0_alone(tmp_path):
  results = end_all('--how=loop', send=(0,), began=tmp_path / 'began')
  assert [r.code for r in results] == [130, 130], results
  assert 'process 0 exited with code 130' in results[1].err


@pytest.mark.slow
@pytest.mark.parametrize(
  ('how', 'code', 'told'),
  [('mistake', 2, 'error: it is the way'), ('crash', 1, 'Error: a bug')],
)
@pytest.mark.parametrize('who', ['0,1', '0', '1'])
def test_mistakes_and_crashes(how, code, told, who):
  """Of both, and of one while the other waits for it in a collective."""
  results = end_all(f'--how={how}', f'--who={who}')
  for index, result in enumerate(results):
    assert result.code == code, results
    if str(index) in who:
      assert told in result.err
    else:
      assert f'process {who} exited with code {code}' in result.err
      assert 'Traceback' not in result.err


@pytest.mark.slow
@pytest.mark.parametrize('who', ['0', '1'])
def test_one_that_is_late_is_awaited_at_a_good_end(who):
  results = end_all('--how=end', f'--who={who}')
  assert [r.code for r in results] == [0, 0], results


@pytest.mark.slow
def test_ctrl_c_while_two_train(tmp_path):
  processes = binaries.start_several(
    'train', *tiny.flags(tmp_path, num_steps=100_000, sample_every=0)
  )
  processes[0].wait_until(lambda: len(rows(tmp_path)) >= 3)
  for process in processes:
    process.send(signal.SIGINT)
  results = [process.end() for process in processes]
  assert [r.code for r in results] == [130, 130], [r.err for r in results]
  for result in results:
    assert 'coordination' not in result.err, result.err


@pytest.mark.slow
@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1'])
def test_one_that_is_told_to_go_takes_all_to_one_step(tmp_path, name):
  """The second of two is told; what they saved goes on in one process."""
  tool = tmp_path / 'scontrol'
  tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
  tool.chmod(0o755)
  workdir = tmp_path / 'run'
  processes = binaries.start_several(
    'train', *tiny.flags(workdir, num_steps=100_000, sample_every=0),
    SLURM_JOB_ID='4711', PATH=f'{tmp_path}:{os.environ["PATH"]}',
  )  # fmt: skip
  processes[0].wait_until(lambda: len(rows(workdir)) >= 3)
  processes[1].send(signal.Signals[name])
  results = [process.end() for process in processes]
  assert [r.code for r in results] == [0, 0], [r.err for r in results]
  step = max(rows(workdir))
  assert checkpoint.steps(workdir / 'checkpoints')[-1] == step
  assert f'stopped by {name} at step {step}, which is saved; ' in results[0].err
  assert 'stopped' not in results[1].err
  asked = tmp_path / 'asked'
  assert asked.exists() == (name == 'SIGUSR1')
  assert not asked.exists() or asked.read_text() == 'requeue 4711\n'
  tiny.train(workdir, num_steps=step + 3, sample_every=0)
  assert sorted(rows(workdir)) == list(range(1, step + 4))


@pytest.mark.slow
def test_one_that_dies_takes_the_other_with_it(tmp_path):
  """Killed in the middle: the other ends within the heartbeat, not never."""
  processes = binaries.start_several(
    'train', *tiny.flags(tmp_path, num_steps=100_000, sample_every=0),
    '--heartbeat_secs=10',
  )  # fmt: skip
  processes[0].wait_until(lambda: len(rows(tmp_path)) >= 3)
  processes[1].kill()
  assert processes[0].end(limit=90).code != 0


@pytest.mark.slow
def test_losses_of_two_processes_with_four_devices_each(tmp_path):
  """20 steps with dropout, equal to 3e-6; and bit by bit to 1 x 8.

  Where jax.distributed is initialised in both, both sum by the same
  collectives. On a CPU that is not enough: a convolution's sums are divided
  over the threads of a process, of which 1 x 8 has eight and each of 2 x 4 has
  four, so that losses differ in the last bit by the fourth step. XLA takes the
  number of threads from NPROC, as it stands when the process begins.
  """
  changes = {'num_steps': 20, 'sample_every': 0, 'eval_every': 0,
             'checkpoint_every': 0, **tiny.UNET,
             'model.channels': 16}  # fmt: skip
  tiny.train(tmp_path / 'one', **changes)
  for name, count in (('1x8', 1), ('2x4', 2)):
    address = f'localhost:{binaries.free_port()}'
    devices = f'--xla_force_host_platform_device_count={8 // count}'
    started = [
      subprocess.Popen(
        [
          *(sys.executable, '-m', 'diffusion_jax.train'),
          *tiny.flags(tmp_path / name, **changes),
          f'--coordinator={address}',
          f'--num_processes={count}',
          f'--process_id={i}',
        ],
        cwd=binaries.ROOT,
        env=os.environ | {'NPROC': '16', 'XLA_FLAGS': devices},
        stdout=subprocess.DEVNULL,
      )
      for i in range(count)
    ]
    assert [process.wait(900) for process in started] == [0] * count
  losses = {
    name: [row['loss'] for row in rows(tmp_path / name).values()]
    for name in ('one', '1x8', '2x4')
  }
  assert len(losses['one']) == 20
  np.testing.assert_allclose(losses['2x4'], losses['one'], rtol=3e-6)
  assert losses['1x8'] == losses['2x4']
