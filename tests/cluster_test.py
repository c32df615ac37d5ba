"""The launchers for clusters, of which there is none here.

What they would do is printed and compared; in place of the clouds stand
programs that start real processes on this machine.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import binaries
import cloud
import pytest
import tiny

from configs import cifar10
from diffusion_jax import runs
from diffusion_jax.system import distributed

ROOT = binaries.ROOT
POD = ['--name=pod', '--zone=us-x1-a']
TRAIN = ['--config=digits', '--workdir=gs://bucket/run']
TYPE = '--accelerator_type=v6e-16'


def bash(*arguments, limit=60, **environment):
  return subprocess.run(
    ['bash', *map(str, arguments)],
    cwd=ROOT,
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    timeout=limit,
    check=False,
  )


def dry(*arguments):
  """The commands of a dry run, each as its words."""
  result = bash('launch/tpu_pod.sh', *arguments, '--dry_run')
  assert result.returncode == 0, result.stderr
  return [shlex.split(line) for line in result.stdout.splitlines()]


def until(holds, limit=60):
  deadline = time.monotonic() + limit
  while not holds():
    assert time.monotonic() < deadline
    time.sleep(0.02)


# --- tpu_pod.sh: what it would do --------------------------------------------


def test_a_dry_run_prints_every_command():
  result = bash(
    'launch/tpu_pod.sh', 'run', *POD, TYPE, *TRAIN, '--data=gs://bucket/data',
    '--dry_run', TMPDIR='/var/tmp',
  )  # fmt: skip
  at = 'pod --zone=us-x1-a'
  tpu_vm = 'gcloud compute tpus tpu-vm'
  there = '.diffusion_jax/launch/worker.sh'

  def ssh(worker, command):
    return (
      f'{tpu_vm} ssh {at} --worker={worker} '
      f"--ssh-flag=-oServerAliveInterval=30 '--command={command}'"
    )

  look = f"{tpu_vm} describe {at} '--format=value(state)'"
  status = ssh('all', f'bash {there} status 2>/dev/null || echo none')
  assert result.stdout.splitlines() == [
    look,
    f'{tpu_vm} create {at} --accelerator-type=v6e-16 --version=v2-alpha-tpuv6e',
    look,
    status,
    f'git -C {ROOT} archive --format=tar.gz --output=/var/tmp/pod.tar.gz HEAD',
    f'{tpu_vm} scp /var/tmp/pod.tar.gz pod: --zone=us-x1-a --worker=all',
    ssh(
      'all',
      'cp .diffusion_jax/.worker/log .diffusion_jax.log 2>/dev/null; '
      'rm -rf .diffusion_jax && mkdir .diffusion_jax && '
      'tar -xzf pod.tar.gz -C .diffusion_jax && '
      f'bash {there} install gs://bucket/data',
    ),
    ssh(
      'all',
      f'bash {there} start train --config=digits --workdir=gs://bucket/run',
    ),
    ssh(0, f'bash {there} follow'),
    look,
    status,
  ]


def test_queued_and_spot_ask_for_a_queued_resource():
  commands = dry(
    'create', *POD, '--accelerator_type=v5litepod-16', '--queued', '--spot',
    '--project=mine',
  )  # fmt: skip
  assert ' '.join(commands[1]) == (
    'gcloud compute tpus queued-resources create pod --node-id=pod '
    '--zone=us-x1-a --project=mine --accelerator-type=v5litepod-16 '
    '--runtime-version=v2-alpha-tpuv5-lite --spot'
  )


def test_delete_asks_nothing_and_takes_the_slice_with_its_request():
  (command,) = dry('delete', *POD)
  assert ' '.join(command) == (
    'gcloud compute tpus tpu-vm delete pod --zone=us-x1-a --quiet'
  )
  (command,) = dry('delete', *POD, '--queued')
  assert ' '.join(command) == (
    'gcloud compute tpus queued-resources delete pod --zone=us-x1-a --force '
    '--quiet'
  )


def test_odd_arguments_come_through_both_shells():
  odd = ["--a=it's", '--b=$HOME `x`', '--c="\\', '--d=', '*', '--e=a  b;#']
  start = dry('start', *POD, *TRAIN)[-1]
  plain = shlex.split(start[-1].removeprefix('--command='))
  result = bash(
    'launch/tpu_pod.sh', 'start', *POD, *TRAIN, '--dry_run', '--', *odd
  )
  command = shlex.split(result.stdout.splitlines()[-1])[-1]
  assert shlex.split(command.removeprefix('--command=')) == [*plain, *odd]
  assert plain[-2:] == TRAIN


def test_other_binaries_have_no_config():
  start = dry('start', *POD, TRAIN[1], '--binary=evaluate')[-1]
  assert start[-1].endswith('start evaluate --workdir=gs://bucket/run')


@pytest.mark.parametrize(
  ('arguments', 'must'),
  [
    ([], 'is not a command'),
    (['fly', *POD], "'fly' is not a command"),
    (['run', *POD, TYPE, *TRAIN, '--colour=red'], '--colour=red'),
    (['delete', '--zone=z'], '--name= is missing'),
    (['delete', '--name=pod'], '--zone= is missing'),
    (['delete', '--name=a b', '--zone=z'], '--name=a b'),
    (['create', *POD], '--accelerator_type= is missing'),
    (['create', *POD, '--accelerator_type=h100'], '--version= is missing'),
    (['run', *POD, TYPE, TRAIN[0]], '--workdir= is missing'),
    (['run', *POD, TYPE, TRAIN[1]], '--config= is missing'),
    (['run', *POD, TYPE, TRAIN[0], '--workdir=runs/a'], 'gs://BUCKET/RUN'),
  ],
)
def test_a_mistake_is_one_line(arguments, must):
  result = bash('launch/tpu_pod.sh', *arguments, '--dry_run')
  (line,) = result.stderr.splitlines()
  assert result.returncode == 2
  assert not result.stdout
  assert line.startswith('error: ')
  assert must in line


def test_without_gcloud_there_is_one_line_and_the_dry_run(tmp_path):
  for tool in ('bash', 'dirname', 'sed', 'grep'):
    (tmp_path / tool).symlink_to(shutil.which(tool))
  arguments = ['launch/tpu_pod.sh', 'delete', *POD]
  result = bash(*arguments, PATH=str(tmp_path))
  (line,) = result.stderr.splitlines()
  assert result.returncode == 2
  assert line.startswith('error: gcloud was not found')
  result = bash(*arguments, '--dry_run', PATH=str(tmp_path))
  assert result.stdout.startswith('gcloud ')


# --- tpu_pod.sh: in a cloud of folders ---------------------------------------


def run_in(environment, command, *arguments, limit=60):
  return subprocess.run(
    ['bash', 'launch/tpu_pod.sh', command, '--poll_secs=0.05', *arguments],
    cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit,
    check=False,
  )  # fmt: skip


def verbs(folder):
  """What was done, of which what matters: 'create', 'start', ..."""
  done = []
  for _, verb, *rest in cloud.calls(folder):
    command = rest[-1]
    if verb == 'ssh':
      verb = re.search(r'worker.sh (\w+)', command)[1]
    if verb not in ('describe', 'status', 'scp'):
      done.append(verb)
  return done


@pytest.mark.parametrize(
  'queued',
  [pytest.param([], marks=pytest.mark.slow), ['--queued', '--spot']],
)
def test_a_preempted_slice_is_made_anew_and_goes_on(tmp_path, queued):
  """CREATING, READY, PREEMPTED, gone, CREATING, READY, done."""
  environment = cloud.create(
    tmp_path / 'cloud',
    preempt_when=str(tmp_path / 'trains1'),
    python=f'echo "$@" >>{tmp_path}/started$WORKER\n'
    f'[ ! -e {tmp_path}/trains$WORKER ] || exit 0\n'
    f'touch {tmp_path}/trains$WORKER\n'
    'exec sleep 60',
  )
  arguments = [*POD, TYPE, *TRAIN, *queued]
  result = run_in(environment, 'run', *arguments, '--', '--x=a b')
  assert result.returncode == 0, result.stderr
  assert verbs(tmp_path / 'cloud') == [
    'create', 'install', 'start', 'follow', 'delete',
    'create', 'install', 'start', 'follow',
  ]  # fmt: skip
  states = re.findall(r'pod: ([A-Z_]+)', result.stderr)
  making = 'WAITING_FOR_RESOURCES' if queued else 'CREATING'
  assert states == [
    'ABSENT', making, 'READY', 'PREEMPTED', 'ABSENT', making, 'READY',
  ]  # fmt: skip
  for worker in '01':
    # The same command, both times.
    first, second = (tmp_path / f'started{worker}').read_text().splitlines()
    assert (
      first == second == f'-m diffusion_jax.train {" ".join(TRAIN)} --x=a b'
    )


def test_what_cannot_go_on_ends_it_and_is_told(tmp_path):
  environment = cloud.create(
    tmp_path / 'cloud', 'never', "echo 'error: no such thing' >&2; exit 2"
  )
  (tmp_path / 'cloud' / 'preempted').touch()
  result = run_in(environment, 'run', *POD, TYPE, *TRAIN)
  assert result.returncode == 2
  assert 'error: no such thing' in result.stdout
  assert result.stderr.splitlines()[-1].startswith('error: pod: a user error')
  assert verbs(tmp_path / 'cloud') == ['create', 'install', 'start', 'follow']


@pytest.mark.slow
def test_a_crash_is_tried_again_but_not_for_ever(tmp_path):
  environment = cloud.create(tmp_path / 'cloud', 'never', 'exit 134')
  (tmp_path / 'cloud' / 'preempted').touch()
  result = run_in(environment, 'run', *POD, TYPE, *TRAIN)
  assert result.returncode == 2
  assert 'failed five times' in result.stderr.splitlines()[-1]
  assert verbs(tmp_path / 'cloud').count('start') == 5


@pytest.mark.slow
def test_a_slice_is_not_started_twice(tmp_path):
  environment = cloud.create(tmp_path / 'cloud', 'never', 'exec sleep 60')

  def call(*words):
    return run_in(environment, *words)

  try:
    assert call('status', *POD).stdout == 'ABSENT\n'
    assert call('start', *POD, *TRAIN).stderr == 'error: pod is ABSENT\n'
    assert call('create', *POD, TYPE).returncode == 0
    assert 'already' in call('create', *POD, TYPE).stderr
    assert call('status', *POD).stdout == 'none\n'
    assert call('install', *POD).returncode == 0
    assert call('start', *POD, *TRAIN).returncode == 0
    assert call('status', *POD).stdout == 'running\n'
    for command in (['start', *TRAIN], ['install']):
      result = call(*command, *POD)
      assert result.returncode == 2
      assert 'training is running there' in result.stderr
  finally:
    assert call('stop', *POD).returncode == 0
  assert call('status', *POD).stdout == 'stopped\n'
  assert call('delete', *POD).returncode == 0
  assert call('status', *POD).stdout == 'ABSENT\n'


@pytest.mark.slow
def test_two_workers_train_through_a_preemption(tmp_path):
  """Real training: from the newest checkpoint on, on the next slice."""
  workdir = tmp_path / 'run'
  environment = cloud.create(
    tmp_path / 'cloud',
    preempt_when=str(workdir / 'checkpoints' / '5'),
    python=f'exec {sys.executable} "$@" '
    f'--coordinator=localhost:{binaries.free_port()} '
    '--num_processes=2 --process_id=$WORKER',
  )
  environment |= {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  config, given, *flags = tiny.flags(
    workdir,
    num_steps=12,
    sample_every=0,
    eval_every=0,
    checkpoint_every=5,
    **tiny.UNET,
  )
  result = run_in(
    environment, 'run', *POD, TYPE, config, given, '--', *flags,
    limit=400,
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  assert verbs(tmp_path / 'cloud').count('start') == 2
  assert sorted(tiny.losses(workdir)) == list(range(1, 13))
  first, second = (workdir / 'starts.jsonl').read_text().splitlines()
  assert json.loads(first)['step'] == 0
  assert json.loads(second)['step'] >= 5
  assert 'trained to step 12' in result.stdout


# --- worker.sh ---------------------------------------------------------------


@pytest.fixture
def worker(tmp_path):
  """A worker, whose training is what a test writes into .venv/bin/python."""
  (tmp_path / 'launch').mkdir()
  shutil.copy(ROOT / 'launch' / 'worker.sh', tmp_path / 'launch')
  (tmp_path / '.venv' / 'bin').mkdir(parents=True)

  def call(*words):
    return bash(tmp_path / 'launch' / 'worker.sh', *words)

  def trains(script):
    cloud.write(tmp_path / '.venv' / 'bin' / 'python', script)

  yield call, trains, tmp_path
  call('stop')


@pytest.mark.parametrize(
  ('code', 'status'),
  [(0, 'done'), (2, 'refused'), (3, 'failed 3'), (137, 'failed 137')],
)
def test_status_says_how_it_ended(worker, code, status):
  call, trains, folder = worker
  trains(f'echo "$@"; exit {code}')
  assert call('status').stdout == 'none\n'
  assert call('start', 'train', '--a=b c').returncode == 0
  until(lambda: call('status').stdout == f'{status}\n')
  assert call('follow').stdout == '-m diffusion_jax.train --a=b c\n'
  assert (folder / '.worker' / 'log').exists()


def without_locks(folder, monkeypatch):
  """A flock that fails in this folder as on a file system without locks."""
  real = shutil.which('flock')
  for name in ('bin', 'tmp'):
    (folder / name).mkdir()
  cloud.write(
    folder / 'bin' / 'flock',
    f"""
for word; do
  case $word in
    [89]) path=$(readlink /proc/$$/fd/$word) ;;
    *) path=$(realpath -m -- "$word") ;;
  esac
  case $path in
    {folder}/.worker/*) echo 'flock: No locks available' >&2; exit 71 ;;
  esac
done
exec {real} "$@"
""",
  )
  monkeypatch.setenv('PATH', f'{folder}/bin:{os.environ["PATH"]}')
  monkeypatch.setenv('TMPDIR', str(folder / 'tmp'))


@pytest.mark.parametrize('has_locks', [True, False])
def test_never_two_trainers(worker, monkeypatch, has_locks):
  call, trains, folder = worker
  if not has_locks:
    without_locks(folder, monkeypatch)
  trains(f'echo $$ >>{folder}/pids; exec sleep 60')
  starts = [
    subprocess.Popen(
      ['bash', folder / 'launch' / 'worker.sh', 'start', 'train']
    )
    for _ in range(4)
  ]
  assert [start.wait(30) for start in starts] == [0] * 4
  until((folder / 'pids').exists)
  assert call('status').stdout == 'running\n'
  assert 'already' in call('start', 'train').stdout
  assert 'training is running here' in call('install').stderr
  # The lock is the trainer's: who held it may be killed.
  os.kill(int((folder / '.worker' / 'pid').read_text()), signal.SIGKILL)
  assert call('status').stdout == 'running\n'
  (pid,) = (folder / 'pids').read_text().split()
  os.kill(int(pid), signal.SIGKILL)
  until(lambda: call('status').stdout == 'none\n')


SAVES = """
trap 'echo saved; exit 0' TERM
echo trains
while :; do sleep 0.05; done
"""


def test_stop_lets_it_save_and_is_no_end(worker):
  call, trains, _ = worker
  trains(SAVES)
  call('start', 'train')
  until(lambda: log(worker) == 'trains\n')
  assert call('stop').returncode == 0
  assert call('status').stdout == 'stopped\n'
  assert log(worker) == 'trains\nsaved\n'


def log(worker):
  return (worker[2] / '.worker' / 'log').read_text()


def test_hold_fails_where_it_was_told_to_stop(worker):
  """As a container's command: an exit code of 0 would count as done."""
  call, _, folder = worker
  command = ['bash', folder / 'launch' / 'worker.sh', 'hold', 'bash', '-c']
  held = subprocess.Popen([*command, SAVES], stdout=subprocess.PIPE, text=True)
  assert held.stdout.readline() == 'trains\n'
  held.send_signal(signal.SIGTERM)
  assert held.communicate(timeout=30)[0] == 'saved\n'
  assert held.returncode == 75
  assert call('status').stdout == 'interrupted\n'
  for code in (0, 2):
    assert subprocess.call([*command, f'exit {code}']) == code


# --- slurm.sbatch ------------------------------------------------------------

SBATCH = ROOT / 'launch' / 'slurm.sbatch'


def test_slurm_signals_the_processes_ahead_of_the_end():
  options = dict(
    line.removeprefix('#SBATCH --').partition('=')[::2]
    for line in SBATCH.read_text().splitlines()
    if line.startswith('#SBATCH')
  )
  assert options['signal'] == 'USR1@180'  # B:USR1 would be for the shell only
  assert {'requeue', 'time', 'nodes'} < options.keys()
  assert options['open-mode'] == 'append'
  # JAX gives each process the GPU of its number on the node.
  assert options['ntasks-per-node'] == options['gpus-per-node']
  # sbatch reads no further than the first command.
  head, _, tail = SBATCH.read_text().partition('\nset -euo pipefail')
  assert '#SBATCH' not in tail
  assert all(line[:1] in ('#', '') for line in head.splitlines())


def test_slurm_dry_run():
  result = bash(
    SBATCH, "--config.data.name=it's", '*', DRY_RUN='1', PYTHON='py'
  )
  assert result.returncode == 0
  assert shlex.split(result.stdout) == [
    'srun', '--kill-on-bad-exit=1', '--label', 'py', '-m',
    'diffusion_jax.train', '--config=configs/cifar10.py',
    '--workdir=runs/cifar10', "--config.data.name=it's", '*',
  ]  # fmt: skip


@pytest.mark.slow
def test_slurm_stops_in_time_is_requeued_and_goes_on(tmp_path):
  """With two processes as srun's, which get the signal as Slurm sends it."""
  workdir = tmp_path / 'run'
  script = tmp_path / 'slurm.sbatch'
  filled = SBATCH.read_text().replace(
    '--config=configs/cifar10.py --workdir=runs/cifar10',
    shlex.join(tiny.flags(workdir, num_steps=100_000, sample_every=0)[:2]),
  )
  assert str(workdir) in filled
  script.write_text(filled)
  cloud.write(
    tmp_path / 'srun',
    'while [[ $1 == --* ]]; do shift; done\n'
    'export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2\n'
    'SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!\n'
    'SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!\n'
    f'echo $first $second >{tmp_path}/pids\n'
    'wait $first && wait $second',
  )
  cloud.write(tmp_path / 'scontrol', f'echo "$@" >>{tmp_path}/asked')
  environment = {
    **os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}',
    'PYTHON': sys.executable, 'SLURM_JOB_ID': str(binaries.free_port()),
    'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'PYTHONPATH': str(ROOT),
  }  # fmt: skip

  def submit(**changes):
    changes |= {'sample_every': 0, **tiny.UNET}
    flags = tiny.flags(workdir, **changes)[2:]
    return subprocess.Popen(
      ['bash', script, *flags], cwd=ROOT, env=environment, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip

  job = submit(num_steps=100_000)
  metrics = workdir / 'metrics.jsonl'
  until(lambda: metrics.exists() and len(tiny.losses(workdir)) >= 3, 200)
  for pid in (tmp_path / 'pids').read_text().split():
    os.kill(int(pid), signal.SIGUSR1)
  out = job.communicate(timeout=120)[0]
  assert job.returncode == 0, out
  assert 'stopped by SIGUSR1' in out
  number = environment['SLURM_JOB_ID']
  assert (tmp_path / 'asked').read_text() == f'requeue {number}\n'

  step = max(tiny.losses(workdir))
  job = submit(num_steps=step + 3)
  out = job.communicate(timeout=200)[0]
  assert job.returncode == 0, out
  assert f'trained to step {step + 3}' in out
  assert sorted(tiny.losses(workdir)) == list(range(1, step + 4))


# --- gke_jobset*.yaml --------------------------------------------------------

README = (ROOT / 'launch' / 'README.md').read_text()


@pytest.fixture(params=['gke_jobset', 'gke_jobset_gpu'])
def jobset(request):
  """(name, the JobSet as filled in by the README's own command)."""
  yaml = pytest.importorskip('yaml')
  sed = re.search(r"sed '[^']*'", README)[0]
  result = bash('-c', f'{sed} launch/{request.param}.yaml')
  assert result.returncode == 0, result.stderr
  return request.param, yaml.safe_load(result.stdout)


def test_jobsets_are_filled_in_wholly(jobset):
  left = re.findall(r'\b[A-Z]{3,}\b(?!_)', str(jobset[1]))
  assert set(left) <= {'JOB_COMPLETION_INDEX'}, left


def test_jobsets_restart_whole_and_in_time_to_save(jobset):
  name, document = jobset
  assert document['kind'] == 'JobSet'
  assert document['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  assert document['spec']['failurePolicy']['maxRestarts'] >= 10
  (group,) = document['spec']['replicatedJobs']
  job = group['template']['spec']
  pod = job['template']['spec']
  (container,) = pod['containers']
  assert job['backoffLimit'] == 0
  assert job['parallelism'] == job['completions'] == 4
  assert job['completionMode'] == 'Indexed'
  # A mistake, exit code 2, is not tried again.
  (rule,) = job['podFailurePolicy']['rules']
  assert rule['onExitCodes']['values'] == [2]
  assert rule['onExitCodes']['containerName'] == container['name']
  (rule,) = document['spec']['failurePolicy']['rules']
  assert rule['onJobFailureReasons'] == ['PodFailurePolicy']
  assert pod['restartPolicy'] == 'Never'
  assert pod['terminationGracePeriodSeconds'] >= 120
  assert container['command'] == ['bash', 'launch/worker.sh', 'hold']
  mounted = {mount['name'] for mount in container['volumeMounts']}
  assert mounted == {volume['name'] for volume in pod['volumes']}
  (chips,) = container['resources']['limits'].items()
  gpu = name.endswith('gpu')
  assert chips == ('nvidia.com/gpu' if gpu else 'google.com/tpu', 4)


def test_jobsets_give_flags_that_exist(jobset):
  """And the GPUs' pods who they are: the others find it by themselves."""
  name, document = jobset
  (group,) = document['spec']['replicatedJobs']
  pod = group['template']['spec']['template']['spec']
  python, m, module, *flags = pod['containers'][0]['args']
  assert [python, m, module] == ['python', '-m', 'diffusion_jax.train']
  given = dict(flag.removeprefix('--').split('=', 1) for flag in flags)
  several = {'coordinator', 'num_processes', 'process_id', 'join_secs'}
  assert (several & given.keys()) == (several if 'gpu' in name else set())
  keys = runs.flatten(cifar10.get_config().to_dict())
  for flag in given:
    if flag.startswith('config.'):
      assert flag.removeprefix('config.') in keys
    else:
      assert flag in {'config', 'workdir', *distributed.FLAGS}
  if 'gpu' in name:
    run = document['metadata']['name']
    subdomain = document['spec']['network']['subdomain']
    host = f'{run}-{group["name"]}-0-0.{subdomain}'
    assert given['coordinator'] == f'{host}:8476'
    assert given['num_processes'] == '4'
    assert given['process_id'] == '$(JOB_COMPLETION_INDEX)'
    assert document['spec']['network']['enableDNSHostnames'] is True


def test_the_dockerfile_installs_extras_that_exist():
  text = (ROOT / 'launch' / 'Dockerfile').read_text()
  setup = (ROOT / 'setup.py').read_text()
  assert '".[gcs,${EXTRA:?is tpu or cuda}]"' in text
  for extra in ('tpu', 'cuda', 'gcs'):
    assert f"'{extra}': [" in setup
  assert "'.[tpu,gcs]'" in (ROOT / 'launch' / 'worker.sh').read_text()
