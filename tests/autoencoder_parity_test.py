"""Autoencoders equal diffusers' with the same random weights.

The golden file holds what diffusers answered; the tests under the marker
`parity` ask it now, and fail where it is not installed.
"""

import jax
import numpy as np
import pytest
from parity import autoencoders

from diffusion_jax import models
from diffusion_jax.models import autoencoder
from diffusion_jax.weights import coders
from diffusion_jax.weights import diffusers as weights

STABLE_DIFFUSION = {
  'block_out_channels': [128, 256, 512, 512],
  'down_block_types': ['DownEncoderBlock2D'] * 4,
  'up_block_types': ['UpDecoderBlock2D'] * 4,
  'layers_per_block': 2,
}
# name -> (class, its settings)
PUBLISHED = {
  'stable diffusion': (coders.KL, STABLE_DIFFUSION),
  'stable diffusion 3': (
    coders.KL,
    STABLE_DIFFUSION
    | {
      'latent_channels': 16,
      'use_quant_conv': False,
      'use_post_quant_conv': False,
    },
  ),
  'VQ-f4': (
    coders.VQ,
    {
      'block_out_channels': [128, 256, 512],
      'down_block_types': ['DownEncoderBlock2D'] * 3,
      'up_block_types': ['UpDecoderBlock2D'] * 3,
      'layers_per_block': 2,
      'num_vq_embeddings': 8192,
    },
  ),
}


@pytest.mark.parametrize(
  'name', ['vq', pytest.param('kl', marks=pytest.mark.slow)]
)
def test_equals_golden(name):
  autoencoders.compare(name, autoencoders.golden(name))


@pytest.mark.parity
@pytest.mark.parametrize('name', autoencoders.CASES)
def test_equals_diffusers(name):
  autoencoders.compare(name, autoencoders.live(name))


@pytest.mark.parity
@pytest.mark.parametrize('name', PUBLISHED)
def test_published_networks_have_the_tensors_of_diffusers(name):
  """Names and shapes of all tensors, without allocating any."""
  import diffusers
  import torch

  kind, settings = PUBLISHED[name]
  with torch.device('meta'):
    theirs = getattr(diffusers, kind)(**settings).state_dict()
  parts = coders.network_of({'_class_name': kind, **settings}, name)
  options = {k: v for k, v in parts['codec'].items() if k != 'name'}
  coder = autoencoder.create((32, 32, 3), **options)
  abstract = jax.eval_shape(coder.init, jax.random.key(0))
  # Zeros that are broadcast take no memory.
  params = jax.tree.map(lambda x: np.broadcast_to(0.0, x.shape), abstract)
  ours = {
    weights.name_of(key): weights.to_theirs(key, leaf).shape
    for key, leaf in models.named(params).items()
  }
  assert ours == {key: tuple(x.shape) for key, x in theirs.items()}
