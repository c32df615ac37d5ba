"""Autoencoders' runs: training, reconstructions, their numbers and cards."""

import json
import math

import binaries
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from diffusion_jax.configs import default
from diffusion_jax.evaluation import reconstructions
from diffusion_jax.evaluation.features import Images
from diffusion_jax.models import bottleneck
from diffusion_jax.runs import autoencoders


def pictures(count=10):
  images = np.random.default_rng(0).integers(30, 220, (count, 12, 12, 3))
  images = images.astype(np.uint8)
  blocks = [images[:7], images[7:]]
  return images, Images(count, lambda: iter(blocks), 'noise')


def test_numbers_of_reconstructions_are_means_over_images():
  """Of known errors; the noise of an image depends on its number."""
  images, given = pictures()

  def reconstruct(indices, batch):
    return batch + indices[:, None, None, None].astype(np.uint8)

  def counts(batch):
    return np.bincount(batch[:, 0, 0, 0] % 4, minlength=8).astype(float)

  done = []
  found = reconstructions.measure(
    given, reconstructions.Coding(reconstruct, counts), done.append
  )
  assert done == [7, 3]
  errors = np.arange(1, 10)
  psnr = np.mean([100, *(20 * np.log10(255 / errors))])
  assert found['psnr'] == pytest.approx(psnr)
  assert found['l1'] == pytest.approx(errors.sum() / 10 / 127.5)
  assert 0.9 < found['ssim'] < 1
  share = np.bincount(images[:, 0, 0, 0] % 4) / 10
  entropy = -sum(p * math.log(p) for p in share if p)
  assert found['perplexity'] == pytest.approx(math.exp(entropy), rel=1e-5)
  assert found['codes_used'] == np.count_nonzero(share) / 8
  plain = reconstructions.Coding(reconstruct, None)
  kept = reconstructions.measure(given, plain, done.append)
  assert kept.keys() == {'psnr', 'ssim', 'l1'}


@pytest.mark.parametrize(('kept', 'decoded'), [(2**20, 10), (7 * 432, 13)])
def test_what_is_kept_is_not_decoded_again(monkeypatch, kept, decoded):
  """Two readings of 10 images; room for all, or for the first block of 7."""
  monkeypatch.setattr(reconstructions, 'KEPT', kept)
  images, given = pictures()
  asked = []

  def reconstruct(indices, batch):
    asked.extend(indices)
    return batch + 1

  made = reconstructions.Coding(reconstruct, None)
  seen = reconstructions.reconstructed(given, made)
  for _ in range(2):
    np.testing.assert_array_equal(np.concatenate([*seen.stream()]), images + 1)
  assert len(asked) == decoded


@pytest.mark.parametrize('regulariser', ['vq', 'fsq', 'kl'])
def test_codes_are_counted_but_not_those_of_padding(regulariser):
  codec = {
    **default.autoencoder(), 'channels': 4, 'multipliers': (1,),
    'num_blocks': 1, 'attention': False, 'num_groups': 2, 'levels': (4, 3),
    'codes': 6, 'regulariser': regulariser, 'latent_channels': 2,
  }  # fmt: skip
  config = {'codec': codec, 'data': {'image_size': 4, 'channels': 1}}
  count = autoencoders.counter(config)
  if regulariser == 'kl':
    assert count is None
    return
  coder = autoencoders.coder_of(config)
  params = {'codec': coder.init(jax.random.key(0))}
  images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), np.uint8)
  found = count(params, images, jnp.array([True, True, False]))
  z = coder.encode(params['codec'], images[:2] / 127.5 - 1)
  if regulariser == 'vq':
    index = bottleneck.nearest(params['codec']['quantize']['codebook'], z)
  else:
    index = bottleneck.level_index(z, (4, 3))
  want = np.bincount(index.ravel(), minlength=6 if regulariser == 'vq' else 12)
  assert np.array_equal(found, want)
  assert found.sum() == 32


CONFIG = """
from diffusion_jax.configs import default, digits

def get_config(kind='vq'):
  config = digits.get_config()
  config.codec = default.autoencoder()
  config.codec.update(
    channels=8, multipliers=(1, 2), num_groups=4, num_blocks=1, codes=16,
    attention=False, regulariser=kind,
  )
  config.loss = default.autoencoding()
  config.loss.update(critic_channels=8, critic_strides=1)
  if kind == 'norm':
    config.codec.decoder = False
    config.loss = default.dito()
    config.loss.decode_steps = 3
    config.process.schedule = 'flow'
    config.model.update(channels=8, num_groups=4, attention_resolutions=())
  config.update(
    num_steps=6, batch_size=16, log_every=1, eval_every=3, sample_every=6,
    checkpoint_every=3,
  )
  config.sample.num_images = 6
  return config
"""


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['vq', 'norm'])
def test_an_autoencoder_is_trained_resumed_and_judged(tmp_path, kind):
  path = tmp_path / 'mine.py'
  path.write_text(CONFIG)
  flags = [f'--config={path}:{kind}']
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  for workdir, steps in ((whole, 6), (parts, 3), (parts, 6)):
    result = binaries.run(
      'train', *flags, f'--workdir={workdir}', f'--config.num_steps={steps}'
    )
    assert result.code == 0, result.err
  assert tiny.losses(parts) == tiny.losses(whole)
  with Image.open(whole / 'samples' / 'train_00000006.png') as grid:
    assert grid.size[0] > grid.size[1]  # six images, each beside another

  judge = ('evaluate', f'--workdir={whole}', '--features=pixels', '--json')
  result = binaries.run(*judge, '--num_samples=50')
  assert result.code == 0, result.err
  card = json.loads(result.out)
  assert card['protocol']['judged'] == 'reconstructions'
  assert {'frechet', 'psnr', 'ssim', 'l1'} <= card['results'].keys()
  assert ('codes_used' in card['results']) == (kind == 'vq')
  assert any('fewer than 2000' in x for x in card['details']['caveats'])
  cost = card['details']['cost']
  assert min(cost['flops_per_image'].values()) > 0
  assert cost['latents'] == [4, 4, 4]
  assert list((whole / 'evaluations').glob('*_images.png'))
  page = (whole / 'report.html').read_text()
  assert 'Images, each with its reconstruction to the right: step 6' in page

  for command in (
    ['sample', f'--workdir={whole}', '--num_samples=2'],
    ['evaluate', f'--workdir={whole}', '--metrics=bpd'],
    ['calibrate', f'--workdir={whole}'],
  ):
    result = binaries.run(*command)
    assert result.code == 2
    assert 'draws no samples' in result.err
    assert 'Traceback' not in result.err
  result = binaries.run(*judge, '--sampler=ddim')
  assert result.code == 2
  assert '--sampler does not apply to an autoencoder' in result.err
