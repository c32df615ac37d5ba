"""Our CLIP against transformers', with random weights, from a folder.

What transformers answers comes from itself (`live`) or from a file (`golden`),
which tests/golden/make_clip.py writes. Weights follow from their names.
"""

import json

import jax
import numpy as np
import safetensors.numpy

from diffusion_jax.conditioning import tokenizers
from diffusion_jax.models import text, vision
from diffusion_jax.weights import clip, text_encoders
from parity import unet

GOLDEN = unet.GOLDEN / 'clip.npz'
TEXTS = ['a red apple', 'an orange book', 'a green and blue square', '']
SIZES = ((20, 20), (40, 26), (9, 12))  # of pictures
SETTINGS = {
  'model_type': 'clip', 'architectures': ['CLIPModel'], 'projection_dim': 6,
  'logit_scale_init_value': 2.6592,
  'text_config': {
    'model_type': 'clip_text_model', 'hidden_size': 8, 'intermediate_size': 12,
    'num_hidden_layers': 2, 'num_attention_heads': 2,
    'max_position_embeddings': 14, 'hidden_act': 'quick_gelu',
  },
  'vision_config': {
    'model_type': 'clip_vision_model', 'hidden_size': 12, 'patch_size': 5,
    'intermediate_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 3,
    'image_size': 17, 'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-4,
  },
}  # fmt: skip
PICTURES = {
  'crop_size': {'height': 17, 'width': 17}, 'size': {'shortest_edge': 19},
  'do_center_crop': True, 'do_normalize': True, 'do_resize': True,
  'image_mean': [0.4, 0.5, 0.6], 'image_std': [0.2, 0.3, 0.25], 'resample': 3,
}  # fmt: skip


def pictures() -> list[np.ndarray]:
  """Smooth random pictures of several sizes, uint8 [H, W, 3]."""
  found = []
  for height, width in SIZES:
    waves = unet.normal(f'picture of {height}x{width}', (3, 3, 2))
    y, x = np.mgrid[:height, :width] / max(height, width) * 2 * np.pi
    phase = waves[0][:, None, None, 0] + waves[1][:, None, None, 0] * x
    image = np.sin(phase + waves[2][:, None, None, 1] * y)
    found.append(
      np.round(127 + 120 * image).astype(np.uint8).transpose(1, 2, 0)
    )
  return found


def write(folder) -> None:
  """Writes a folder of random weights, with a tokenizer of its own."""
  folder.mkdir(parents=True, exist_ok=True)
  made = tokenizers.train(TEXTS * 2, 560, 14)
  tokenizers.write_folder(folder, made)
  words = {
    **SETTINGS['text_config'], 'vocab_size': made.size,
    'eos_token_id': made.eos, 'bos_token_id': made.bos,
    'pad_token_id': made.pad,
  }  # fmt: skip
  settings = {**SETTINGS, 'text_config': words}
  (folder / 'config.json').write_text(json.dumps(settings))
  (folder / clip.PICTURES).write_text(json.dumps(PICTURES))
  read, see = clip.networks_of(settings, folder / 'config.json')
  tensors = text_encoders.to_tensors(unet.random_params(text.create(**read)))
  for name, leaf in _named(unet.random_params(vision.create(**see))).items():
    array = clip.to_theirs(name, leaf)
    tensors[clip.name_of(name)] = np.ascontiguousarray(array)
  tensors['logit_scale'] = np.array(3.0, np.float32)
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')


def _named(params) -> dict:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
    for path, leaf in leaves
  }


def live(folder) -> dict[str, np.ndarray]:
  """What transformers answers now, from the folder."""
  import torch
  import transformers

  network = transformers.CLIPModel.from_pretrained(folder).eval()
  made = transformers.CLIPTokenizer.from_pretrained(folder)
  processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
  tokens = made(TEXTS, padding='max_length', return_tensors='pt', max_length=14)
  pixels = [
    processor(image, return_tensors='pt')['pixel_values']
    for image in pictures()
  ]
  with torch.no_grad():
    found = network(
      input_ids=tokens['input_ids'], pixel_values=torch.cat(pixels),
    )  # fmt: skip
  return {
    'pixels': torch.cat(pixels).numpy().transpose(0, 2, 3, 1),
    'images': found.image_embeds.numpy(),
    'texts': found.text_embeds.numpy(),
  }


def golden() -> dict[str, np.ndarray]:
  """What transformers answered when the file was made."""
  with np.load(GOLDEN) as file:
    return dict(file)
