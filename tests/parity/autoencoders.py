"""Our autoencoders against diffusers', with random weights.

What diffusers answers comes from itself (`live`) or from a file (`golden`),
which tests/golden/make_autoencoders.py writes. Weights and images follow from
names, so that the file holds outputs only.
"""

import functools

import jax
import numpy as np

from diffusion_jax.models import autoencoder, bottleneck
from diffusion_jax.objectives import autoencoding
from diffusion_jax.weights import coders
from diffusion_jax.weights.diffusers import to_tensors
from parity import unet

GOLDEN = unet.GOLDEN / 'autoencoders.npz'
BETA = 0.25  # diffusers' weight of one of the two terms of VQ

# name -> (class, its settings)
CASES = {
  'kl': (
    coders.KL,
    {
      'sample_size': 16,
      'block_out_channels': [4, 8, 8],
      'down_block_types': [
        'DownEncoderBlock2D', 'AttnDownEncoderBlock2D', 'DownEncoderBlock2D',
      ],
      'up_block_types': [
        'UpDecoderBlock2D', 'AttnUpDecoderBlock2D', 'UpDecoderBlock2D',
      ],
      'norm_num_groups': 2,
    },
  ),
  'vq': (
    coders.VQ,
    {
      'sample_size': 8,
      'in_channels': 1,
      'out_channels': 1,
      'block_out_channels': [4, 8],
      'down_block_types': ['DownEncoderBlock2D', 'AttnDownEncoderBlock2D'],
      'up_block_types': ['AttnUpDecoderBlock2D', 'UpDecoderBlock2D'],
      'norm_num_groups': 2,
      'num_vq_embeddings': 12,
      'vq_embed_dim': 2,
    },
  ),
  # Stable Diffusion 3's, narrow.
  'plain': (
    coders.KL,
    {
      'sample_size': 8,
      'block_out_channels': [4, 8],
      'down_block_types': ['DownEncoderBlock2D'] * 2,
      'up_block_types': ['UpDecoderBlock2D'] * 2,
      'norm_num_groups': 2,
      'latent_channels': 6,
      'use_quant_conv': False,
      'use_post_quant_conv': False,
      'scaling_factor': 1.5305,
      'shift_factor': 0.0609,
    },
  ),
  # Of the tests of diffusers' pipelines.
  'pipelines': (
    coders.KL,
    {
      'sample_size': 32,
      'block_out_channels': [32, 64],
      'down_block_types': ['DownEncoderBlock2D'] * 2,
      'up_block_types': ['UpDecoderBlock2D'] * 2,
    },
  ),
}  # fmt: skip


def settings(name: str) -> dict:
  """The config.json of a case."""
  kind, given = CASES[name]
  return {'_class_name': kind, **given}


@functools.cache
def create(name: str) -> tuple[autoencoder.Coder, dict]:
  """Our autoencoder and its random weights."""
  parts = coders.network_of(settings(name), name)
  size, channels = parts['data']['image_size'], parts['data']['channels']
  options = {k: v for k, v in parts['codec'].items() if k != 'name'}
  coder = autoencoder.create((size, size, channels), **options)
  params = unet.random_params(coder)
  if 'quantize' in params:
    shape = params['quantize']['codebook'].shape
    # About as far apart as the latents.
    params['quantize']['codebook'] = unet.normal('codebook', shape) / 3
  return coder, params


def images(name: str) -> np.ndarray:
  """Two images [2, H, W, C] in [-1, 1]."""
  size, channels = (
    coders.network_of(settings(name), name)['data'][key]
    for key in ('image_size', 'channels')
  )
  noise = unet.normal(f'images of {name}', (2, size, size, channels))
  return np.tanh(noise)


def network_live(name: str):
  """diffusers' network with our weights."""
  import diffusers
  import torch

  kind, given = CASES[name]
  network = getattr(diffusers, kind)(**given).eval()
  tensors = to_tensors(create(name)[1])
  network.load_state_dict(
    {k: torch.from_numpy(v) for k, v in tensors.items()}, strict=True
  )
  return network


def live(name: str) -> dict[str, np.ndarray]:
  """What diffusers answers now, channels last."""
  import torch

  network = network_live(name)
  x = torch.from_numpy(images(name).transpose(0, 3, 1, 2).copy())

  def last(array):
    return array.detach().numpy().transpose(0, 2, 3, 1)

  if CASES[name][0] == coders.KL:
    posterior = network.encode(x).latent_dist
    return {
      'moments': last(posterior.parameters),
      'kl': posterior.kl().detach().numpy(),
      'decoded': last(network.decode(posterior.mode()).sample),
    }
  z = network.encode(x).latents.detach().requires_grad_()
  codebook = network.quantize.embedding.weight
  found = {'moments': last(z)}
  for legacy in (True, False):
    network.quantize.legacy = legacy
    snapped, loss, (_, _, index) = network.quantize(z)
    of_z, of_codes = torch.autograd.grad(loss, (z, codebook))
    found |= {
      f'loss_{legacy}': loss.detach().numpy(),
      f'of_latents_{legacy}': last(of_z),
      f'of_codes_{legacy}': of_codes.numpy(),
    }
  return found | {
    'index': index.numpy().reshape(2, *z.shape[2:]),
    'snapped': last(snapped),
    'decoded': last(network.decode(z).sample),
  }


def golden(name: str) -> dict[str, np.ndarray]:
  """What diffusers answered when the file was made."""
  with np.load(GOLDEN) as file:
    return {
      key.removeprefix(f'{name}/'): file[key]
      for key in file.files
      if key.startswith(f'{name}/')
    }


def ours(name: str) -> dict[str, np.ndarray]:
  """What our functions answer."""
  coder, params = create(name)

  def answer(params, x):
    moments = coder.encode(params, x)
    if coder.regulariser == 'kl':
      posterior = bottleneck.posterior(moments)
      return {
        'moments': moments,
        'kl': bottleneck.kl(posterior),
        'decoded': coder.decode(params, posterior.mean),
      }
    codebook = params['quantize']['codebook']
    index = bottleneck.nearest(codebook, moments)
    found = {
      'moments': moments,
      'index': index,
      'snapped': coder.snap(params, moments),
      'decoded': coder.decode(params, coder.snap(params, moments)),
    }
    # diffusers has a gradient of the codes where we have sums.
    counts, sums = bottleneck.counted(index, moments, len(codebook))
    to_codes = 2 * (counts[:, None] * codebook - sums) / moments.size
    given = coder._replace(encode=lambda params, z: z)

    def error(z, commitment):
      keys = jax.random.split(jax.random.key(0), len(z))
      between = autoencoding.between(
        given, params, z, keys, commitment=commitment
      )
      return between.penalty.mean()

    for legacy, weights in ((True, (1.0, BETA)), (False, (BETA, 1.0))):
      found |= {
        f'loss_{legacy}': sum(error(moments, weight) for weight in weights),
        f'of_latents_{legacy}': jax.grad(error)(moments, weights[0]),
        f'of_codes_{legacy}': weights[1] * to_codes,
      }
    return found

  with jax.default_matmul_precision('highest'):
    return jax.device_get(jax.jit(answer)(params, images(name)))


def compare(name: str, wanted: dict[str, np.ndarray]) -> dict[str, float]:
  """The relative errors of our answers.

  Raises:
    AssertionError: one of them is not below 1e-4, or indices differ.
  """
  found = ours(name)
  assert found.keys() == wanted.keys()
  if 'index' in wanted:
    _compare_index(name, found, wanted)
  errors = {
    key: np.abs(found[key] - want).max() / np.abs(want).max()
    for key, want in wanted.items()
    if key != 'index'
  }
  if not all(error < unet.TOLERANCE for error in errors.values()):
    raise AssertionError(f'{name}: relative errors {errors}')
  return errors


def _compare_index(name, found, wanted):
  """Indices are equal, but for ties of distances to 1e-5."""
  codebook = create(name)[1]['quantize']['codebook'].astype('f8')
  assert len(np.unique(wanted['index'])) > len(codebook) / 2
  z = wanted['moments'][..., None, :].astype('f8')
  distances = np.linalg.norm(z - codebook, axis=-1)
  theirs, mine = (
    np.take_along_axis(distances, one['index'][..., None], -1)
    for one in (wanted, found)
  )
  np.testing.assert_allclose(mine, theirs, atol=1e-5)
