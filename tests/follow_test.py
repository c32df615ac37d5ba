"""A run is judged while it trains: real trainers, real kills."""

import json
import shutil
import time

import binaries
import pytest
import tiny

from diffusion_jax import runs
from diffusion_jax.evaluation import cards, follow
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, held

JUDGE = (
  '--sampler=ddim', '--num_steps=2', '--num_samples=20', '--features=pixels',
  '--metrics=fid', '--neighbours=0', '--follow', '--poll_secs=0.1', '--json',
)  # fmt: skip


def curve_file(workdir):
  (path,) = (workdir / 'evaluations' / 'curves').glob('*.json')
  return json.loads(path.read_text())


@pytest.mark.slow
def test_it_follows_a_run_through_restarts_of_both(tmp_path):
  """It begins before the run does; each is killed once.

  The trainer keeps two checkpoints, and those that are held: at the end the
  best one is still there, whatever came after it.
  """
  workdir = tmp_path / 'run'
  follower = binaries.start('evaluate', f'--workdir={workdir}', *JUDGE)
  few = {'keep_last': 2, 'keep_every': 0, 'checkpoint_every': 4,
         'sample_every': 0, 'eval_every': 0}  # fmt: skip
  trainer = binaries.start('train', *tiny.flags(workdir, num_steps=24, **few))
  trainer.wait_until(lambda: checkpoint.steps(workdir / 'checkpoints'))
  trainer.kill()
  evaluations = workdir / 'evaluations'
  follower.wait_until(lambda: list(evaluations.glob('*.json')))
  follower.kill()
  before = {
    path: path.stat().st_mtime_ns for path in evaluations.glob('*.json')
  }
  follower = binaries.start('evaluate', f'--workdir={workdir}', *JUDGE)
  tiny.train(workdir, num_steps=24, **few)
  result = follower.end()
  assert result.code == 0, result.err

  curve = json.loads(result.out)
  assert curve == curve_file(workdir)
  steps = [point['step'] for point in curve['points']]
  assert steps == sorted(set(steps))
  assert steps[-1] == 24
  assert len(steps) >= 3
  for point in curve['points']:
    card = cards.read(evaluations / point['card'])
    assert card['subject']['step'] == point['step']
    assert card['results']['frechet'] == point['value']
  assert {path: path.stat().st_mtime_ns for path in before} == before
  least = min(curve['points'], key=lambda point: point['value'])
  assert curve['best'] == least
  assert least['step'] in checkpoint.steps(workdir / 'checkpoints')
  assert 'Fréchet by step' in (workdir / 'report.html').read_text()
  assert not list((workdir / 'samples').glob('followed*'))

  # Nothing is left to do: the same command ends at once, and changes nothing.
  cards_before = sorted(evaluations.iterdir())
  again = binaries.run('evaluate', f'--workdir={workdir}', *JUDGE)
  assert again.code == 0, again.err
  assert json.loads(again.out) == curve
  assert sorted(evaluations.iterdir()) == cards_before


def made_run(monkeypatch, tmp_path, values, then={}):  # noqa: B006
  """A workdir of made-up checkpoints; its judge, and where cards lie."""
  workdir = tmp_path / 'made'
  for step in values:
    (workdir / 'checkpoints' / str(step)).mkdir(parents=True)
  judged = []

  def path_of(step):
    return workdir / 'evaluations' / f'step{step}_x.json'

  def read(step):
    if step not in checkpoint.steps(workdir / 'checkpoints'):
      raise UserError('it is gone')
    return step

  def judge(step):
    judged.append((step, held.steps(workdir / 'checkpoints')))
    if step in then:
      then[step](workdir / 'checkpoints')
    card = cards.create({'step': step}, {}, {'fid': values[step]}, {})
    files.write_json(path_of(step), card)
    return card

  def go():
    return follow.follow(
      workdir, read, judge, path_of, result='fid', poll_secs=0.01
    )

  monkeypatch.setattr(runs, 'read_config', lambda _: {'num_steps': 30})
  return workdir, judged, go


def test_what_is_judged_and_the_best_so_far_are_held(tmp_path, monkeypatch):
  monkeypatch.setattr(
    'diffusion_jax.runs.read_config', lambda _: {'num_steps': 30}
  )
  workdir, judged, go = made_run(
    monkeypatch, tmp_path, {0: 9.0, 10: 5.0, 20: 3.0, 30: 4.0}
  )
  curve = go()
  assert judged == [(10, {10, 20, 30}), (20, {10, 20, 30}), (30, {20, 30})]
  assert held.steps(workdir / 'checkpoints') == {20}
  assert [point['value'] for point in curve['points']] == [5.0, 3.0, 4.0]
  assert curve['best']['step'] == 20
  lines = follow.text(curve).splitlines()
  assert [line.endswith('*') for line in lines] == [
    False, False, True, False, False, False
  ]  # fmt: skip


def test_a_checkpoint_that_vanishes_is_passed_over(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(
    'diffusion_jax.runs.read_config', lambda _: {'num_steps': 30}
  )
  workdir, _, go = made_run(monkeypatch, tmp_path, {10: 5.0, 20: 3.0, 30: 4.0})
  hold = held.hold

  def too_late(directory, steps, by):
    hold(directory, steps, by)
    if (workdir / 'evaluations' / 'step10_x.json').exists():
      shutil.rmtree(workdir / 'checkpoints' / '20', ignore_errors=True)

  monkeypatch.setattr(held, 'hold', too_late)
  curve = go()
  assert [point['step'] for point in curve['points']] == [10, 30]
  assert 'checkpoint 20 was deleted before' in capsys.readouterr().err


def test_what_comes_while_one_is_judged_is_held(tmp_path, monkeypatch):
  """A trainer that keeps one checkpoint, and those that are held.

  It writes three while the first is judged. All are judged.
  """
  steps = (10, 20, 30, 40)

  def train(folder):
    for step in steps[1:]:
      (folder / str(step)).mkdir()
      deadline = time.monotonic() + 30
      while step not in held.steps(folder):
        assert time.monotonic() < deadline
        time.sleep(0.01)
      for old in checkpoint.steps(folder)[:-1]:
        if old not in held.steps(folder):
          (folder / str(old)).rmdir()

  values = dict.fromkeys(steps, 1.0)
  monkeypatch.setattr(runs, 'read_config', lambda _: {'num_steps': 40})
  workdir, judged, go = made_run(monkeypatch, tmp_path, values, {10: train})
  for step in steps[1:]:
    (workdir / 'checkpoints' / str(step)).rmdir()
  monkeypatch.setattr(runs, 'read_config', lambda _: {'num_steps': 40})
  curve = go()
  assert [point['step'] for point in curve['points']] == [*steps]
  assert [step for step, _ in judged] == [*steps]
  assert curve['best']['step'] == 10  # the first of equals
  assert held.steps(workdir / 'checkpoints') == {10}


@pytest.mark.parametrize(
  ('arguments', 'must'),
  [
    (['--step=10'], 'leave --step out'),
    (['--output=x'], 'leave --output out'),
    (['--poll_secs=0'], '--poll_secs=0'),
    (['--metrics=kid'], '--follow needs fid too'),
    (['--metrics=fidd'], '--metrics=fidd is not known'),
    (['--features=nope'], '--features=nope: there is no such file'),
    (['--sampler=magic'], 'magic'),
  ],
)
def test_flags_that_do_not_go_with_following(tmp_path, arguments, must):
  result = binaries.run(
    'evaluate', f'--workdir={tmp_path}', '--follow', *arguments
  )
  assert must in result.message
  assert not list(tmp_path.iterdir())
