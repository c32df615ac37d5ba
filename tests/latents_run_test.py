"""A run in latents through the binaries: encode, train, resume, sample."""

import json
import shutil

import binaries
import latents_test
import numpy as np
import pytest
import tiny
from PIL import Image

from diffusion_jax import load, runs
from diffusion_jax.cli import config_files
from diffusion_jax.system.errors import UserError

pytestmark = pytest.mark.slow


def ok(binary, *arguments) -> binaries.Result:
  result = binaries.run(binary, *map(str, arguments))
  assert result.code == 0, result.err
  return result


def _edits_look_through_the_decoder(trained, images):
  how = {'num_steps': 2, 'label': 1}
  near = trained.edit(images, None, strength=0.2, **how)
  again = trained.edit(images[::-1], None, strength=0.2, batch_size=3, **how)
  assert near.shape == (4, 1, 8, 8, 3)
  assert np.abs(near[::-1].astype(int) - again).max() <= 1
  mask = np.arange(64).reshape(8, 8) % 3 > 0
  mask = np.broadcast_to(mask, (4, 8, 8))
  filled = trained.edit(images, 'inpaint', mask=mask, method='dps', **how)[:, 0]
  np.testing.assert_array_equal(filled[mask], images[mask])
  assert (filled[~mask] != images[~mask]).any()
  with pytest.raises(UserError, match='cannot look through the decoder'):
    trained.edit(images, 'inpaint', mask=mask, method='ddrm', **how)
  with pytest.raises(UserError, match='does not keep to it'):
    trained.edit(images, 'denoise', method='sdedit', strength=0.5, **how)


def test_a_run_in_latents(tmp_path):
  folder, workdir = latents_test.autoencoder(tmp_path / 'ae'), tmp_path / 'run'
  labels = np.arange(latents_test.COUNT) % 2
  config = latents_test.config_of(
    tmp_path, folder, **{
      'num_steps': 6, 'log_every': 1, 'eval_every': 3, 'sample_every': 3,
      'checkpoint_every': 3, 'conditioning.name': 'label',
      'conditioning.num_classes': 2, 'model.name': 'unet',
      'model.channels': 4, 'model.multipliers': (1,), 'model.num_blocks': 1,
      'model.num_groups': 2, 'model.attention_resolutions': (),
    },
  )  # fmt: skip
  np.savez(tmp_path / 'images.npz', images=latents_test.images(), labels=labels)
  path = tmp_path / 'ldm.py'
  path.write_text(config_files.source(config))
  plain = f'--config={path}', f'--workdir={workdir}'

  # Before the run begins.
  told = ok('preflight', *plain, '--sample_batch_size=4', '--json').out
  assert json.loads(told)['checks']
  missing = binaries.run('train', *plain, f'--config.codec.path={tmp_path}/no')
  assert 'codec.path' in missing.message
  assert 'holds no run' in missing.message

  ok('train', *plain, '--config.num_steps=3')
  cache = tmp_path / 'cache'
  told = ok(
    'encode', f'--config={path}', f'--workdir={folder}', f'--output={cache}'
  ).out
  assert f'--config.codec.cache={cache}' in told
  shutil.move(folder, tmp_path / 'moved')
  cached = ok('train', *plain, f'--config.codec.cache={cache}')
  assert 'as latents of 4x4x4' in cached.err
  losses = tiny.losses(workdir)

  # The same run in one go, without the cache.
  other = tmp_path / 'other'
  ok(
    'train', f'--config={path}', f'--workdir={other}',
    f'--config.codec.path={tmp_path}/moved',
  )  # fmt: skip
  again = tiny.losses(other)
  assert losses.keys() == again.keys() == set(range(1, 7))
  for step in losses:
    np.testing.assert_allclose(losses[step], again[step], rtol=3e-6)

  grid = np.asarray(Image.open(workdir / 'samples' / 'train_00000006.png'))
  assert grid.shape[0] >= 8
  out = tmp_path / 'samples'
  ok(
    'sample', f'--workdir={workdir}', '--num_samples=4', '--sampler=ddim',
    '--num_steps=2', '--guidance=2', f'--output={out}',
  )  # fmt: skip
  (images,) = (np.load(x) for x in (out / 'parts').glob('*.npy'))
  assert images.shape == (4, 8, 8, 3)
  assert images.dtype == np.uint8
  trained = load(workdir)
  assert trained.params.keys() == {'codec', 'net'}
  drawn = trained.sample(4, sampler='ddim', num_steps=2, guidance=2.0)
  assert np.abs(drawn.astype(int) - images).max() <= 1

  _edits_look_through_the_decoder(trained, images)

  for binary, *flags in (
    ('sample', '--num_samples=4', '--clip'),
    ('evaluate', '--metrics=bpd'),
  ):
    told = binaries.run(binary, f'--workdir={workdir}', *flags).message
    assert 'latents' in told
  ok('report', f'--workdir={workdir}')
  judged = '--features=pixels', '--num_samples=4'
  swept = ok(
    'evaluate', f'--workdir={workdir}', *judged, '--sweep=ddim,heun',
    '--sweep_evaluations=2', '--json',
  )  # fmt: skip
  assert json.loads(swept.out)['best'].keys() == {'2'}
  # Nothing is trained again, although the autoencoder has moved.
  ok(
    'reproduce', *plain, *judged, '--sampler=ddim', '--num_steps=2', '--nobits',
    '--nomeasure', f'--cache={tmp_path}/judges',
  )  # fmt: skip
  record = (workdir / 'reproduction' / 'reproduction.json').read_text()
  assert json.loads(record)['done']
  assert tiny.losses(workdir) == losses
  there = json.loads(
    ok(
      'invert', f'--workdir={workdir}', '--num_images=2', '--num_steps=2',
      '--json',
    ).out
  )  # fmt: skip
  assert 0 <= there['error']['max_255'] <= 255
  assert runs.read_config(workdir)['codec']['coder']['channels'] == 4

  # Anomalies, whose errors are those of decoded pixels.
  pictures, out = tmp_path / 'images.npz', tmp_path / 'found'
  ok(
    'edit', 'anomaly', f'--workdir={workdir}', f'--input={pictures}',
    f'--reference={pictures}', '--num_steps=2', '--start_times=500',
    '--bound_times=500', '--false_alarms=0.2', f'--output={out}',
  )  # fmt: skip
  rows = (out / 'scores.csv').read_text().splitlines()
  assert len(rows) == 1 + latents_test.COUNT
  assert np.isfinite([float(row.split(',')[3]) for row in rows[1:]]).all()
  with Image.open(out / 'heat_maps' / '000000.png') as heat:
    assert heat.size == (8, 8)
