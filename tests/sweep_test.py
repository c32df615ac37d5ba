"""Sweeps: samplers at equal numbers of evaluations, judged by command."""

import json
from pathlib import Path

import binaries
import pytest
import tiny

from diffusion_jax.evaluation import sweep
from diffusion_jax.process import schedules
from diffusion_jax.samplers import plan as plans
from diffusion_jax.system.errors import UserError

LINEAR = schedules.linear(1000)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return tiny.trained(tmp_path_factory.mktemp('runs') / 'digits')


def test_rows_have_options_of_their_own():
  assert sweep.parse('unipc:order=2:variant=bh1:grid=karras:clip=false') == {
    'sampler': 'unipc', 'grid': 'karras', 'clip': False, 'order': 2,
    'variant': 'bh1',
  }  # fmt: skip
  plain = {'sampler': 'ddim', 'grid': 'uniform'}
  guided = sweep.parse('ddim:guidance=2:guidance_interval=-1/3')
  assert guided == {**plain, 'guidance': 2.0, 'guidance_interval': '-1/3'}
  assert sweep.parse('ddim:eta=0.5') == {**plain, 'eta': 0.5}
  assert sweep.parse('ddim') == plain


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('rk45', "sampler='rk45': one of ancestral"),
    (
      'ddim:order=2',
      'order=2 is not KEY=VALUE with one of eta, grid, clip, guidance',
    ),
    ('ddim:eta', 'eta is not KEY=VALUE'),
    ('ddim:grid=999', 'grid must be one of uniform'),
    ('ddim:clip=maybe', 'clip must be true or false'),
    ('ddim:eta=abc', 'eta must be a number'),
    ('ddim:eta=true', 'eta must be a number'),
    ('unipc:order=2.5', 'order must be a whole number'),
    ('euler:churn_max=abc', 'churn_max must be a number'),
    ('analytic_ddpm:x0_variance=1', 'with one of pixel_noise, grid, clip'),
    ('adaptive:rtol=0.1', 'adaptive chooses its own number of evaluations'),
  ],
)
def test_bad_rows_are_one_line(text, said):
  with pytest.raises(UserError) as error:
    sweep.parse(text)
  assert said in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('texts', [[], ['0'], ['10', 'x'], ['-3'], ['1.5']])
def test_bad_budgets_are_one_line(texts):
  with pytest.raises(UserError, match='--sweep_evaluations='):
    sweep.budgets(texts)


def made(how):
  return plans.create(LINEAR, **how)


@pytest.mark.parametrize(
  ('name', 'budget', 'num_steps', 'evaluations'),
  [
    ('ddim', 10, 10, 10),
    ('heun', 10, 5, 9),  # 2 S - 1
    ('predictor_corrector', 20, 10, 19),
    ('plms', 20, 11, 20),  # S + 9
    ('heun', 1, 1, 1),
    ('heun', 1500, 750, 1499),
  ],
)
def test_as_many_steps_as_fit(name, budget, num_steps, evaluations):
  plan = sweep.longest(name, made, budget, 1000)
  assert (plan.num_steps, plan.evaluations) == (num_steps, evaluations)


def test_numbers_that_a_grid_has_not_are_passed_over():
  """Equal strides are of 1, 2, 4, 5, 8 or 10 steps; Heun's 5 are 9."""
  plan = sweep.longest('heun:grid=leading', made, 10, 1000)
  assert (plan.num_steps, plan.evaluations) == (5, 9)
  # Where there is none at all, the error is that of the longest.
  with pytest.raises(UserError, match='order=3: the grid has 2 steps'):
    sweep.longest('unipc:grid=leading:order=3', made, 2, 1000)


def test_the_table_marks_the_best_and_what_costs_less():
  cells = [
    {'sampler': 'ddim', 'budget': 10, 'evaluations': 10, 'value': 20.5},
    {'sampler': 'ddim', 'budget': 20, 'evaluations': 20, 'value': 9.0},
    {'sampler': 'heun', 'budget': 10, 'evaluations': 9, 'value': 30.25},
    {'sampler': 'heun', 'budget': 20, 'evaluations': 19, 'value': 8.0},
  ]
  best = sweep.best(cells)
  assert best == {'10': cells[0], '20': cells[3]}
  told = sweep.text({'result': 'fid', 'cells': cells, 'best': best})
  lines = told.splitlines()
  assert lines[3].split() == ['ddim', '20.50*', '9.000']
  assert lines[4].split() == ['heun', '(9)', '30.25', '(19)', '8.000*']
  assert lines[-2:] == [
    'best at 10: ddim, 20.50', 'best at 20: heun, 8.000'
  ]  # fmt: skip


@pytest.mark.slow
def test_a_sweep_of_a_run_goes_on_where_it_was_cut(run):
  """What has its card is not drawn again; a card of other weights is."""
  flags = (
    f'--workdir={run}', '--features=pixels', '--num_samples=4',
    '--sweep_evaluations=2,3', '--sweep=ddim,heun:grid=karras', '--json',
  )  # fmt: skip
  first = binaries.run('evaluate', *flags)
  assert first.code == 0, first.err
  told = json.loads(first.out)
  cells = told['cells']
  assert [c['sampler'] for c in cells] == ['ddim'] * 2 + [
    'heun:grid=karras'
  ] * 2
  assert told['subject']['seed'] == 0
  assert told['protocol']['num_samples'] == 4
  assert [c['evaluations'] for c in cells] == [2, 3, 1, 3]
  assert [c['num_steps'] for c in cells] == [2, 3, 1, 2]
  for cell in cells:
    card = json.loads((run / 'evaluations' / cell['card']).read_text())
    assert card['results']['frechet'] == cell['value']
    assert card['subject']['evaluations'] == cell['evaluations']
  least = min(cells[1], cells[3], key=lambda cell: cell['value'])
  assert told['best']['3'] == least
  assert not list(run.glob('samples/swept_*'))
  assert Path(told['plot']).read_bytes()[:4] == b'\x89PNG'
  assert json.loads(Path(told['path']).read_text())['cells'] == cells
  assert 'Samplers by network evaluations' in (run / 'report.html').read_text()
  changed = run / 'evaluations' / cells[0]['card']
  card = json.loads(changed.read_text())
  card['subject']['weights_sha256'] = 'others'
  changed.write_text(json.dumps(card))
  again = binaries.run('evaluate', *flags)
  assert again.code == 0, again.err
  assert again.err.count('drawing 4 images') == 1
  assert json.loads(again.out)['cells'] == cells
  # A damaged card is judged anew; what a kill left goes; a moved run is known;
  # and a sweep of other budgets does not take its place.
  changed.write_text(changed.read_text()[:-40])
  left = run / 'samples' / 'swept_step3_ddim3_seed0_float'
  left = left.with_name(
    left.name.replace('step3', f'step{card["subject"]["step"]}')
  )
  left.mkdir(parents=True)
  moved = run.with_name('moved')
  run.rename(moved)
  more = [
    flag for flag in flags if 'workdir' not in flag and '=2,3' not in flag
  ]
  third = binaries.run(
    'evaluate', f'--workdir={moved}', '--sweep_evaluations=2,3,4', *more
  )
  moved.rename(run)
  assert third.code == 0, third.err
  assert third.err.count('drawing 4 images') == 2  # of ddim at 2 and at 4
  assert len(list(run.glob('evaluations/sweeps/*.json'))) == 2
  assert not left.exists()


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (['--sweep=ddim,rk45'], 'rk45'),
    (['--sweep=ddim', '--num_steps=5'], '--num_steps does not apply'),
    (['--sweep=ddim', '--eta=1'], '--eta does not apply'),
    (['--sweep=ddim', '--metrics=kid'], '--sweep needs fid too'),
    (['--sweep=analytic_ddpm'], 'not yet computed'),
    (['--sweep=unipc:order=3', '--sweep_evaluations=2'], 'order=3'),
    (['--sweep=ddim:eta=2'], '--sweep=ddim:eta=2 at 10 evaluations: eta=2'),
    (['--sweep=ddim', '--follow'], '--follow does not apply'),
    (['--sweep=ddim', '--metrics=bpd_fast'], '--sweep needs fid too'),
    (['--sweep='], '--sweep is empty'),
    (['--sweep_evaluations=5'], '--sweep is empty'),
  ],
)
def test_bad_sweeps_are_one_line_before_anything_is_drawn(run, flags, said):
  before = sorted(run.rglob('*'))
  ended = binaries.run('evaluate', f'--workdir={run}', *flags)
  assert said in ended.message
  assert sorted(run.rglob('*')) == before
