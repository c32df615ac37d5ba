"""train --profile: which steps, where they are written, and mistakes."""

import contextlib
import gzip
import json

import binaries
import jax
import jax.numpy as jnp
import pytest
import tiny

from diffusion_jax.system.errors import UserError
from diffusion_jax.training import profiling
from diffusion_jax.training.profiling import Steps


@pytest.mark.parametrize(
  ('given', 'told'),
  [
    ('200', 'two steps, the second after the first, as 200:210'),
    ('20:20', 'two steps'),
    ('30:20', 'two steps'),
    ('-1:5', 'two steps'),
    ('a:b', 'two steps'),
    ('90:101', 'training ends at step 100'),
    ('10:20', 'training starts from step 10, and the step after it compiles: '
     'begin at step 11 or later'),
  ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path, given, told):
  folder = tmp_path / 'checkpoints' / '10'
  folder.mkdir(parents=True)
  (folder / '_CHECKPOINT_METADATA').touch()
  with pytest.raises(UserError) as e:
    profiling.check(given, tmp_path, 100)
  assert str(e.value).startswith(f'--profile={given}: ')
  assert told in str(e.value)


def test_a_good_range(tmp_path):
  profiling.check('1:100', tmp_path, 100)
  profiling.check(None, tmp_path, 100)
  assert profiling.parse('200:210') == Steps(200, 210)


def run(workdir, steps, end=12, per_call=1, fail_at=None):
  """Steps that multiply matrices, each in a program named after its step."""

  def step_fn(state, batch):
    if batch == fail_at:
      raise ValueError('failed')
    program = jax.jit(jnp.matmul)
    return program(state, state), {}

  state = jnp.eye(8)
  with profiling.profiled(steps, 0, workdir, per_call) as profiled:
    step = profiled(step_fn)
    for at in range(0, end, per_call):
      with jax.profiler.TraceAnnotation(f'from step {at}'):
        state, _ = step(state, at)
  return step is step_fn


def traced(workdir) -> tuple[str, list[int]]:
  """The name of the only profile, and the calls in it."""
  (folder,) = (workdir / 'profile' / 'plugins' / 'profile').iterdir()
  assert sorted(path.name for path in folder.iterdir()) == [
    'process_0.trace.json.gz', 'process_0.xplane.pb',
  ]  # fmt: skip
  with gzip.open(folder / 'process_0.trace.json.gz') as file:
    names = {event.get('name', '') for event in json.load(file)['traceEvents']}
  mark = 'from step '
  calls = [int(x.removeprefix(mark)) for x in names if x.startswith(mark)]
  return folder.name, sorted(calls)


# A call that is running when the profile begins or ends is not seen as a whole.
def test_the_chosen_steps_are_profiled(tmp_path, capsys):
  run(tmp_path, Steps(3, 6))
  assert traced(tmp_path) == ('steps_4_to_6', [4])
  told = capsys.readouterr().err
  assert 'profile of steps 4 to 6: open ' in told
  assert f'{tmp_path / "profile"} in TensorBoard' in told


def test_whole_calls_are_profiled(tmp_path):
  run(tmp_path, Steps(3, 6), per_call=2)
  assert traced(tmp_path)[0] == 'steps_5_to_6'


def test_a_run_that_stops_keeps_what_it_has(tmp_path):
  run(tmp_path, Steps(3, 9), end=6)
  assert traced(tmp_path) == ('steps_4_to_6', [4, 5])


def test_a_run_that_fails_keeps_no_profile_and_its_error(tmp_path):
  with pytest.raises(ValueError, match='failed'):
    run(tmp_path, Steps(3, 9), fail_at=5)
  assert not (tmp_path / 'profile').exists()
  run(tmp_path, Steps(3, 6))  # the profiler is free again
  assert traced(tmp_path)[0] == 'steps_4_to_6'


def test_what_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
  (tmp_path / 'profile').touch()
  run(tmp_path, Steps(3, 6))
  assert 'the profile cannot be written (' in capsys.readouterr().err


def test_without_steps_the_step_function_is_as_it_was(tmp_path):
  assert run(tmp_path, None)
  with contextlib.suppress(FileNotFoundError):
    assert not list((tmp_path / 'profile').iterdir())


def test_only_process_0_profiles(tmp_path, monkeypatch):
  monkeypatch.setattr(profiling.distributed, 'is_first', lambda: False)
  assert run(tmp_path, Steps(3, 6))


@pytest.mark.slow
def test_train_profiles_chosen_steps(tmp_path):
  workdir = tmp_path / 'run'
  result = binaries.run('train', *tiny.flags(workdir), '--profile=31:32')
  assert 'training ends at step 30' in result.message
  assert not workdir.exists()
  result = binaries.run('train', *tiny.flags(workdir), '--profile=3:5')
  assert result.code == 0, result.err
  assert 'profile of steps 4 to 5: open ' in result.err
  (folder,) = (workdir / 'profile' / 'plugins' / 'profile').iterdir()
  with gzip.open(folder / 'process_0.trace.json.gz') as file:
    assert 'train_step' in file.read().decode()
  result = binaries.run('train', *tiny.flags(workdir), '--profile=3:5')
  assert 'training starts from step 30' in result.message
