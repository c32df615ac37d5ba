"""Commands from end to end in this process, with networks as small as can be.

The tests of each command look closer; theirs start processes and are slow.
"""

import json
import math
from pathlib import Path

import binaries
import dense_network  # noqa: F401, which adds it
import latents_test
import numpy as np
import pytest
import tiny
from imagesets import png

from diffusion_jax import runs
from diffusion_jax.configs import default, digits
from diffusion_jax.planning import timing
from diffusion_jax.runs import programs
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

CONFIG = [
  f'--config.{key}={value}'
  for key, value in {**tiny.CONFIG, 'batch_size': 8}.items()
]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return tiny.trained(tmp_path_factory.mktemp('runs') / 'digits')


def report(capsys, binary, *arguments) -> dict:
  capsys.readouterr()
  binaries.here(binary, *arguments, '--json')
  return json.loads(capsys.readouterr().out)


def test_preflight_counts_times_and_says_what_would_fit(capsys, monkeypatch):
  monkeypatch.setattr(timing, 'SECS', 0.01)
  given = ['preflight', '--config=configs/digits.py', *CONFIG]
  binaries.here(*given, '--sample_batch_size=6', '--measure')
  out = capsys.readouterr().out
  # Of the dense network: two products, once forward, twice backward.
  hidden, size = 8, 64
  products = 2 * (size + 1) * hidden + 2 * hidden * size
  assert 'it fits' in out.splitlines()[-1]
  assert sum(line.startswith('measured: ') for line in out.splitlines()) == 2
  binaries.here(*given, '--nosampling', '--json')
  found = json.loads(capsys.readouterr().out)['train']
  assert 2 * products <= found['product_flops_per_image'] <= 3 * products
  assert 'sample' not in found
  with pytest.raises(UserError, match=r'batch_size=\d+ does not fit.*bfloat16'):
    binaries.here(*given, '--nosampling', '--config.batch_size=80000000')


def test_encode_and_evaluate_of_an_autoencoder(tmp_path, capsys):
  folder = latents_test.autoencoder(tmp_path / 'ae', regulariser='vq', codes=16)
  config = latents_test.config_of(tmp_path, folder)
  whole = runs.read_config(folder)
  whole['data'] = config.data.to_dict()
  whole['loss'] = {**default.autoencoding(), 'critic_weight': 0.0}
  (folder / 'config.json').write_text(json.dumps(whole))
  (tmp_path / 'mine.json').write_text(config.to_json())
  how = [
    f'--workdir={folder}', f'--config={tmp_path}/mine.json',
    f'--output={tmp_path}/latents',
  ]  # fmt: skip
  first = report(capsys, 'encode', *how)
  assert first['images'] == latents_test.COUNT
  assert first['files_written'] > 0
  assert not report(capsys, 'encode', *how)['files_written']
  # A stand-in would get the caption of the broken image.
  (tmp_path / 'images').mkdir()
  for i, content in enumerate([png(latents_test.images()[0]), b'broken']):
    (tmp_path / 'images' / f'{i}.png').write_bytes(content)
  data = {
    **config.data, 'name': 'folder', 'path': f'{tmp_path}/images',
    'skip_broken': True, 'heldout_every': 0,
  }  # fmt: skip
  config.data.update(data)
  (tmp_path / 'mine.json').write_text(config.to_json())
  how[2] = f'--output={tmp_path}/other'
  with pytest.raises(UserError, match=r"'1\.png'.*only a run without codec"):
    report(capsys, 'encode', *how)

  card = report(capsys, 'evaluate', f'--workdir={folder}', '--features=pixels')
  assert card['protocol']['num_images'] == latents_test.COUNT // 5  # held out
  told = '; '.join(card['details']['caveats'])
  assert 'the distance is that of training images' in told
  assert card['details']['cost']['latent_numbers'] == 4 * 4 * 2
  results = card['results']
  assert 1 <= results['perplexity'] <= 16 * results['codes_used']
  assert -1 <= results['ssim'] <= 1
  # PSNR is at most that of the mean error, by Jensen's inequality twice.
  assert 10 ** (-results['psnr'] / 10) * 4 >= results['l1'] ** 2 * 0.999
  assert list((folder / 'evaluations').glob('*_images.png'))


def test_calibrate_measures_the_errors_of_the_network(run, capsys):
  how = [f'--workdir={run}', '--num_images=3']
  binaries.here('calibrate', *how)
  first = capsys.readouterr().out
  told = report(capsys, 'calibrate', *how)
  assert told['path'] in first
  found = json.loads(Path(told['path']).read_text())
  assert len(found['mse']) == 1000
  # At time 0 almost nothing is hidden; at the end everything is.
  assert found['mse'][0] < 1e-3 < found['clipped_mse'][-1]


def test_sweep_follow_and_comparison_of_cards(run, capsys):
  how = [
    f'--workdir={run}', '--num_samples=8', '--features=pixels',
    '--batch_size=8', '--neighbours=0',
  ]  # fmt: skip
  binaries.here('evaluate', *how, '--sweep=ddim', '--sweep_evaluations=2,3')
  table = capsys.readouterr().out
  (path,) = (run / 'evaluations' / 'sweeps').glob('*.json')
  cells = json.loads(path.read_text())['cells']
  assert [cell['evaluations'] for cell in cells] == [2, 3]
  assert all(f'{cell["value"]:.4g}' in table for cell in cells)
  # Steps and samples are those of the sweep's first cell.
  curve = report(
    capsys, 'evaluate', *how, '--follow', '--poll_secs=0.1', '--num_steps=2',
    '--sampler=ddim',
  )  # fmt: skip
  assert [point['step'] for point in curve['points']] == [10, 20, 25, 30]
  assert curve['points'][-1]['value'] == pytest.approx(cells[0]['value'])
  paths = [str(run / 'evaluations' / cell['card']) for cell in cells]
  binaries.here('evaluate', f'--compare={",".join(paths)}')
  compared = capsys.readouterr().out
  assert all(f'{cell["value"]:.4g}' in compared for cell in cells)


def test_a_classifier_learns_labels_of_noised_images():
  config = digits.get_config()
  config.loss.name, config.model.name = 'classification', 'encoder'
  config.conditioning.name, config.conditioning.num_classes = 'label', 3
  config.update_from_flattened_dict({
    'model.channels': 4, 'model.num_groups': 2, 'model.num_blocks': 1,
    'model.multipliers': (1,), 'model.attention_resolutions': (8,),
    'model.dropout': 0.1, 'batch_size': 12, 'optim.warmup_steps': 0,
    'optim.lr': 3e-3,
  })  # fmt: skip
  mesh = tiny.one_device()
  program = programs.create(config, mesh)
  labels = np.arange(12) % 3
  rows = {
    'image': np.full((12, 8, 8, 1), 1, np.uint8)
    * (labels * 120).astype(np.uint8)[:, None, None, None],
    'label': labels.astype(np.int32),
  }
  batch, state = sharding.put_batch(rows, mesh), program.create_state(mesh)
  for step in range(30):
    state, found = program.step_fn(state, program.frozen, batch)
    if not step:
      # Nothing is known at the start: the last layer is small.
      assert float(found['loss']) == pytest.approx(math.log(3), rel=0.5)
  assert float(found['loss']) < math.log(3)
  right = found['accuracy_q1']
  assert 0 < right.count == right.total


def test_a_run_without_lora_has_nothing_to_merge(run, tmp_path):
  with pytest.raises(UserError, match='--merged is for runs with LoRA'):
    binaries.here(
      'convert', f'--from={run}', f'--to={tmp_path}/out', '--merged'
    )
  assert not (tmp_path / 'out').exists()
