"""Our U-Nets with transformers against diffusers', with random weights.

As in `parity.unet`: what diffusers answers comes from itself (`live`) or from a
file (`golden`), which tests/golden/make_conditional.py writes. Networks are
described by their config.json alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import models
from diffusion_jax.models import doors as doors_of
from diffusion_jax.weights import conditional, stable_diffusion
from parity import unet

GOLDEN = unet.GOLDEN / 'conditional.npz'
TIMES = (1, 981)
TOKENS = 5
TWO = {
  'block_out_channels': [4, 8],
  'down_block_types': ['CrossAttnDownBlock2D', 'DownBlock2D'],
  'up_block_types': ['UpBlock2D', 'CrossAttnUpBlock2D'],
  'layers_per_block': 1,
  'norm_num_groups': 2,
  'attention_head_dim': 2,
  'cross_attention_dim': 6,
}
# name -> settings, (height, width)
CASES = {
  'sd1': (TWO | {'sample_size': 8}, (8, 8)),
  # Sizes that are halved to 3 x 5, and to 2 x 3.
  'sd2': (
    TWO | {
      'sample_size': 8,
      'block_out_channels': [4, 8, 8],
      'down_block_types': ['CrossAttnDownBlock2D'] * 2 + ['DownBlock2D'],
      'up_block_types': ['UpBlock2D'] + ['CrossAttnUpBlock2D'] * 2,
      'attention_head_dim': [2, 4, 4],
      'use_linear_projection': True,
      'upcast_attention': True,
    },
    (6, 9),
  ),
  'sdxl': (
    TWO | {
      'sample_size': 8,
      'down_block_types': ['DownBlock2D', 'CrossAttnDownBlock2D'],
      'up_block_types': ['CrossAttnUpBlock2D', 'UpBlock2D'],
      'attention_head_dim': [1, 2],
      'transformer_layers_per_block': [1, 3],
      'use_linear_projection': True,
      'addition_embed_type': 'text_time',
      'addition_time_embed_dim': 8,
      'projection_class_embeddings_input_dim': 52,
    },
    (8, 8),
  ),
  'inpainting': (
    TWO | {'sample_size': 8, 'in_channels': 9, 'layers_per_block': 2}, (8, 4)
  ),
}  # fmt: skip
IDS = [[1024.0, 768, 0, 32, 1024, 1024], [512, 512, 64, 0, 512, 640]]


def settings(name: str) -> dict:
  """The config.json of a case."""
  return {'_class_name': conditional.CLASS, **CASES[name][0]}


@functools.cache
def create(name: str) -> tuple[models.Model, dict, dict]:
  """Our network, its random weights, and parts of a config."""
  parts = conditional.network_of(settings(name), name)
  options = {k: v for k, v in parts['model'].items() if k != 'name'}
  size, channels = parts['data']['image_size'], parts['data']['channels']
  model = models.create(
    'unet', (size, size, channels), parts['doors'], **options
  )
  params = unet.random_params(model)
  # So small a map that the norm of the first transformer feels its epsilon.
  first = params['down']['0']['blocks']['0']['conv2']
  params['down']['0']['blocks']['0']['conv2'] = {
    name: value / 50 for name, value in first.items()
  }
  return model, params, parts


def inputs(name: str) -> dict[str, np.ndarray]:
  """Noised data 'xt' and conditions, of two examples."""
  given, (height, width) = CASES[name]
  found = {
    'xt': unet.normal(f'xt of {name}', (2, height, width, 4)),
    'tokens': unet.normal(f'tokens of {name}', (2, TOKENS, 6)),
  }
  if given.get('in_channels', 4) > 4:
    found['channels'] = unet.normal(
      f'channels of {name}', (2, height, width, 5)
    )
  if 'addition_embed_type' in given:
    found['pooled'] = unet.normal(f'pooled of {name}', (2, 4))
    found['ids'] = np.array(IDS, 'f4')
  return found


def ours(name: str, params=None, **changes) -> np.ndarray:
  """What our network answers, [2, H, W, 4]; perhaps with other parameters."""
  model, own, _ = create(name)
  params = params or own
  xt, cond = split({**inputs(name), **changes})
  with jax.default_matmul_precision('highest'):
    apply = jax.jit(lambda p, x, c: model.apply(p, x, np.array(TIMES), None, c))
    return np.asarray(apply(params, xt, cond))


def split(given: dict) -> tuple[jax.Array, dict]:
  """The noised data, and the doors."""
  given = jax.tree.map(jnp.asarray, given)
  if 'ids' in given:
    given['vector'] = doors_of.of_sizes(
      given.pop('pooled'), given.pop('ids'), 8
    )
  return given.pop('xt'), given


def network_live(name: str):
  """diffusers' network with our weights."""
  import diffusers
  import torch

  network = diffusers.UNet2DConditionModel(**CASES[name][0]).eval()
  tensors = stable_diffusion.to_tensors(create(name)[1], settings(name))
  network.load_state_dict(
    {k: torch.from_numpy(v) for k, v in tensors.items()}, strict=True
  )
  return network


def live(name: str, network=None) -> np.ndarray:
  """What diffusers answers now, channels last; perhaps of a changed network."""
  import torch

  network, given = network or network_live(name), inputs(name)
  x = np.concatenate(
    [given['xt'], given.get('channels', given['xt'][..., :0])], -1
  )
  given = {key: torch.from_numpy(array) for key, array in given.items()}
  added = (
    {'text_embeds': given['pooled'], 'time_ids': given['ids']}
    if ('ids' in given)
    else None
  )
  with torch.no_grad():
    found = network(
      torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
      torch.tensor(TIMES),
      given['tokens'],
      added_cond_kwargs=added,
    ).sample
  return found.numpy().transpose(0, 2, 3, 1)


def golden(name: str) -> np.ndarray:
  """What diffusers answered when the file was made."""
  with np.load(GOLDEN) as file:
    return file[name]


def error(found: np.ndarray, wanted: np.ndarray) -> float:
  """The largest difference, relative to the largest number."""
  assert found.shape == wanted.shape
  assert np.abs(wanted).max() > 0.1
  return np.abs(found - wanted).max() / np.abs(wanted).max()
