"""Networks with LoRA: in the library, and from --lora of the binaries."""

import json

import binaries
import jax
import lora_test
import numpy as np
import pytest
import tiny

from diffusion_jax import load
from diffusion_jax.models import lora
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import lora as files_of

HOW = {'sampler': 'ddim', 'num_steps': 3}
LAYERS = ('hidden', 'out')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return tiny.trained(tmp_path_factory.mktemp('run') / 'run')


@pytest.fixture(scope='module')
def trained(run):
  return load(run)


def written(trained, path, seed=0, factor=1.0):
  made = lora_test.random_lora(
    trained.params['net'], LAYERS, factor=factor, seed=seed
  )
  files_of.write(path, made, files_of.names_of('dense'))
  return made


@pytest.fixture
def file(trained, tmp_path):
  path = tmp_path / files_of.FILE
  written(trained, path)
  return path


def weights(trained) -> dict:
  kernels = lora.kernels(jax.device_get(trained.params['net']))
  return {layer: np.float64(kernels[layer]) for layer in LAYERS}


def test_a_network_gets_the_sum(trained, tmp_path):
  one, other = tmp_path / 'one.safetensors', tmp_path / 'other.safetensors'
  made = written(trained, one), written(trained, other, seed=1, factor=0.25)
  both = trained.with_lora(one, 0.5).with_lora(other, -2.0)
  for layer, found in weights(both).items():
    (a, b), (c, d) = (x.pairs[layer] for x in made)
    wanted = weights(trained)[layer] + 0.5 * a @ b - 2.0 * 0.25 * c @ d
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
  # Another checkpoint gets it too, and has other weights.
  before = both.at(20)
  for layer, found in weights(before).items():
    change = weights(both)[layer] - weights(trained)[layer]
    wanted = weights(trained.at(20))[layer] + change
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert not np.allclose(found, weights(both)[layer])
  assert [change.scale for change in before.changes] == [0.5, -2.0]
  # A folder with the file of diffusers' name, and the network as it was.
  written(trained, tmp_path / files_of.FILE)
  again = trained.with_lora(tmp_path, 0.5)
  assert again.weights_sha256 == trained.with_lora(one, 0.5).weights_sha256
  assert again.weights_sha256 != trained.weights_sha256
  assert trained.changes == ()


def test_a_scale_of_zero_is_the_network(trained, file):
  none = trained.with_lora(file, 0)
  assert none.weights_sha256 == trained.weights_sha256
  images = trained.with_lora(file).sample(4, **HOW)
  assert (images != trained.sample(4, **HOW)).any()
  np.testing.assert_array_equal(none.sample(4, **HOW), trained.sample(4, **HOW))


@pytest.mark.parametrize('scale', [float('nan'), float('inf')])
def test_a_scale_is_finite(trained, file, scale):
  with pytest.raises(UserError, match='scale'):
    trained.with_lora(file, scale)


def test_a_calibration_is_not_that_of_the_changed_network(trained, file):
  changed = trained.with_lora(file)
  with pytest.raises(UserError, match='without --lora'):
    changed.plan(sampler='analytic_ddim', num_steps=3)


def sampled(run, *flags):
  return binaries.run(
    'sample', f'--workdir={run}', '--sampler=ddim', '--num_steps=3',
    '--num_samples=4', *map(str, flags),
  )  # fmt: skip


def test_samples_know_their_lora(run, trained, file, tmp_path):
  output = tmp_path / 'samples'
  for _ in range(2):  # the second draws nothing
    result = sampled(run, f'--lora={file}:0.5', f'--output={output}')
    assert result.code == 0, result.err
  (part,) = (output / 'parts').glob('*.npy')
  drawn = trained.with_lora(file, 0.5).sample(4, **HOW)
  assert np.abs(np.load(part).astype(int) - drawn).max() <= 1
  told = json.loads((output / 'store.json').read_text())
  made = files_of.sha256(written(trained, file))
  assert told['lora'] == [{'sha256': made, 'scale': 0.5}]
  again = sampled(run, f'--lora={file}:0.25', f'--output={output}').message
  assert 'lora' in again or 'weights_sha256' in again
  assert 'choose another --output' in again
  # A picture is drawn again with the same file only.
  result = sampled(run, f'--lora={file}:0.5', f'--output={output}', '--png')
  assert result.code == 0, result.err
  like = f'--like={output}/png/000003.png', f'--output={tmp_path}/again'
  assert 'give it, as --lora=' in binaries.run('sample', *like).message
  other = binaries.run('sample', *like, f'--lora={file}:0.25').message
  assert 'was drawn with lora=' in other
  same = binaries.run('sample', *like, f'--lora={file}:0.5', '--json')
  assert json.loads(same.out)['largest_difference'] <= 1
  # Names of folders say so, too.
  two = f'--lora={file}', f'--lora={file}:-0.5'
  result = sampled(run, *two, '--json')
  name = json.loads(result.out)['output']
  assert f'_lora{made[:8]}x1_lora{made[:8]}x-0.5_seed0' in name


def test_mistakes_are_one_line(run, trained, file, tmp_path):
  for flag, *told in (
    (f'{file}:much', 'number', 'FILE:0.8'),
    (f'{tmp_path}/no.safetensors:0.5', 'no.safetensors', 'No such file'),
    (f'{tmp_path}/pickled.bin', '.safetensors'),
    (f'{tmp_path}:1e999', 'finite'),
  ):
    message = sampled(run, f'--lora={flag}').message
    for part in told:
      assert part in message
  made = lora_test.written(tmp_path / 'other.safetensors')
  assert made
  message = sampled(run, f'--lora={tmp_path}/other.safetensors:0.5').message
  assert 'no low-rank parts of layers of this network' in message


def test_a_controlnet_has_a_picture_and_a_unet(run):
  message = sampled(run, '--control=net').message
  assert '--control_image 0 times: give one for each' in message
  message = sampled(run, '--control=net', '--control_image=edges.png').message
  assert 'is for a U-Net that denoises' in message
