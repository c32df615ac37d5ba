"""benchmarks/: what they answer, and that both sides do the same work.

No test asserts a time.
"""

import json
import os
import subprocess
import sys

import binaries
import pytest

FOLDER = binaries.ROOT / 'benchmarks'
SAMPLING = FOLDER / 'sampling.py'
NARROW = (
  '--config=digits', '--config.model.channels=8', '--config.model.num_groups=4',
  '--num_steps=2', '--rounds=1', '--batch_sizes=1',
)  # fmt: skip


def run(*arguments, before='') -> subprocess.CompletedProcess:
  """Runs it as a script; `before` is Python that comes first."""
  program = (
    f'{before}\nimport runpy, sys\nsys.argv = sys.argv[1:]\n'
    f"runpy.run_path(sys.argv[0], run_name='__main__')"
  )
  paths = [binaries.ROOT, FOLDER, os.environ.get('PYTHONPATH', '')]
  return subprocess.run(
    [sys.executable, '-c', program, SAMPLING, *arguments],
    capture_output=True, text=True, timeout=300,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, paths))},
  )  # fmt: skip


def test_help():
  result = run('--help')
  assert result.returncode == 0, result.stderr
  for flag in ('config', 'batch_sizes', 'num_steps', 'rounds', 'output'):
    assert f'\n  --{flag} ' in result.stdout


def test_without_torch_it_is_one_line():
  result = run(before="import sys; sys.modules['torch'] = None")
  assert result.returncode == 2
  assert not result.stdout
  assert result.stderr == (
    "error: torch is not installed: pip install '.[parity]'\n"
  )


@pytest.mark.parity
@pytest.mark.parametrize(
  ('mistake', 'said'),
  [
    ('--batch_sizes=1,x', '--batch_sizes=1,x: whole numbers from 1 on'),
    ('--num_steps=3', 'needs a number of steps that divides 1000'),
    ('--rounds=0', '--rounds=0: at least 1'),
    ('--config.model.dtype=bfloat16', 'dtype=bfloat16: float32'),
    ('--config.model.num_groups=3', 'num_groups'),
    (f'--output={SAMPLING.parent}', 'is a folder'),
  ],
)
def test_mistakes_are_one_line(mistake, said):
  result = run(mistake)
  assert result.returncode == 2
  assert len(result.stderr.splitlines()) == 1
  assert said in result.stderr


@pytest.mark.parity
def test_a_narrow_network(tmp_path):
  output = tmp_path / 'new' / 'speed.json'
  result = run(*NARROW, f'--output={output}')
  assert result.returncode == 0, result.stderr
  found = json.loads(output.read_text())
  assert found['difference'] < 1e-3
  assert found['versions']['torch'] in result.stdout
  (batch,) = found['batches']
  # With one round a ratio is that of the two medians.
  rates = {name: row['median'] for name, row in batch['images_per_sec'].items()}
  seconds = {name: row['median'] for name, row in batch['seconds'].items()}
  assert {k: row['median'] for k, row in batch['ratios'].items()} == {
    'ours / diffusers': pytest.approx(rates['ours'] / rates['diffusers']),
    'draw / one by one': pytest.approx(seconds['draw'] / seconds['one by one']),
    'draw / one scan': pytest.approx(seconds['draw'] / seconds['one scan']),
  }


@pytest.mark.parity
def test_another_network_is_not_timed(tmp_path):
  """One tensor of theirs is 2% off."""
  before = """
import diffusers
right = diffusers.DDIMPipeline.from_pretrained
def wrong(*args):
  pipeline = right(*args)
  pipeline.unet.conv_in.weight.data *= 1.02
  return pipeline
diffusers.DDIMPipeline.from_pretrained = wrong
"""
  output = tmp_path / 'speed.json'
  result = run(*NARROW, f'--output={output}', before=before)
  assert result.returncode == 1
  assert 'from the same noise' in result.stderr.splitlines()[-1]
  assert not output.exists()
