"""Our text encoders against transformers', with random weights.

What transformers answers comes from itself (`live`) or from a file (`golden`),
which tests/golden/make_text.py writes. Weights follow from their names.
"""

import functools

import jax
import numpy as np

from diffusion_jax.models import text
from diffusion_jax.weights import text_encoders
from parity import unet

GOLDEN = unet.GOLDEN / 'text.npz'

SMALL = {
  'model_type': 'clip_text_model', 'vocab_size': 30, 'hidden_size': 8,
  'intermediate_size': 12, 'num_hidden_layers': 2, 'num_attention_heads': 2,
  'max_position_embeddings': 7,
}  # fmt: skip
# name -> config.json
CASES = {
  # Of Stable Diffusion 1: the end is at the highest id.
  'old': SMALL
  | {'architectures': ['CLIPTextModel'], 'eos_token_id': 2, 'bos_token_id': 0},
  # Of XL's second: OpenCLIP's activation, and a projection.
  'open': SMALL
  | {
    'architectures': ['CLIPTextModelWithProjection'], 'eos_token_id': 20,
    'hidden_act': 'gelu', 'projection_dim': 6, 'layer_norm_eps': 1e-4,
  },
}  # fmt: skip
# The end is at the third, the last, and the sixth place.
IDS = {
  'old': [
    [28, 4, 29, 29, 29, 29, 29],
    [28, 1, 0, 2, 5, 9, 29],
    [28, 2, 27, 2, 1, 29, 29],
  ],
  'open': [
    [19, 4, 20, 0, 0, 0, 0],
    [19, 29, 0, 21, 5, 9, 20],
    [19, 2, 27, 2, 1, 20, 20],
  ],
}


def ids(name: str) -> np.ndarray:
  """Token ids [3, 7]."""
  return np.array(IDS[name], np.int32)


def options(name: str) -> dict:
  """The options of our network."""
  return text_encoders.network_of(CASES[name], name)[0]


@functools.cache
def weights(name: str) -> dict:
  """Our random weights."""
  return unet.random_params(text.create(**options(name)))


def live(name: str) -> dict[str, np.ndarray]:
  """What transformers answers now."""
  import torch

  network = network_live(name)
  inner = network if name == 'old' else network.text_model
  with torch.no_grad():
    found = network(torch.from_numpy(ids(name)), output_hidden_states=True)
    before = found.hidden_states[-2]
    answers = {
      'last': found.last_hidden_state,
      'before': before,
      'before_normed': inner.final_layer_norm(before),
      'pooled': found.pooler_output if name == 'old' else found.text_embeds,
    }
  return {key: x.numpy() for key, x in answers.items()}


def network_live(name: str):
  """transformers' network with our weights."""
  import torch
  import transformers

  (kind,) = CASES[name]['architectures']
  config = transformers.CLIPTextConfig(**CASES[name])
  network = getattr(transformers, kind)(config).eval()
  tensors = text_encoders.to_tensors(weights(name))
  if name == 'old':  # in memory, its names have no prefix
    tensors = {k.removeprefix('text_model.'): v for k, v in tensors.items()}
  network.load_state_dict(
    {k: torch.from_numpy(v) for k, v in tensors.items()}, strict=True
  )
  return network


def golden(name: str) -> dict[str, np.ndarray]:
  """What transformers answered when the file was made."""
  with np.load(GOLDEN) as file:
    return {
      key.removeprefix(f'{name}/'): file[key]
      for key in file.files
      if key.startswith(f'{name}/')
    }


def ours(name: str) -> dict[str, np.ndarray]:
  """What our network answers."""

  def answer(params, ids):
    encoded = {
      key: text.create(**options(name), **how).apply(params, ids)
      for key, how in {
        'last': {},
        'before': {'skip': 1, 'final_norm': False},
        'before_normed': {'skip': 1},
      }.items()
    }
    tokens = {key: x.tokens for key, x in encoded.items()}
    return {**tokens, 'pooled': encoded['before'].pooled}

  with jax.default_matmul_precision('highest'):
    return jax.device_get(jax.jit(answer)(weights(name), ids(name)))


def compare(name: str, wanted: dict[str, np.ndarray]) -> dict[str, float]:
  """The relative errors of our answers.

  Raises:
    AssertionError: one of them is not below 1e-4.
  """
  found = ours(name)
  assert found.keys() == wanted.keys()
  errors = {
    key: np.abs(found[key] - want).max() / np.abs(want).max()
    for key, want in wanted.items()
  }
  if not all(error < unet.TOLERANCE for error in errors.values()):
    raise AssertionError(f'{name}: relative errors {errors}')
  return errors
