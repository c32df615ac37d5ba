"""Folders and pictures of Stable Diffusion's pipelines, with random weights.

Small networks of the structure of Stable Diffusion 1, of its inpainting and of
XL. `DRAWS` are pictures that diffusers' pipelines draw of PROMPTS. What
diffusers answers comes from itself (`*_live`) or from two files, which
tests/golden/make_text_pipelines.py writes: the settings that it saves, and the
pictures with the noise that they begin with. Weights follow from their names.
"""

import functools
import json
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from diffusion_jax import models
from diffusion_jax.conditioning import tokenizers
from diffusion_jax.models import autoencoder, text
from diffusion_jax.process import noise
from diffusion_jax.runs import draw
from diffusion_jax.weights import (
  coders,
  conditional,
  diffusers,
  stable_diffusion,
  text_encoders,
)
from parity import unet

SETTINGS = unet.GOLDEN / 'text_pipelines.json'
PICTURES = unet.GOLDEN / 'text_pipelines.npz'
TOLERANCE = 1e-3  # of the range of pictures in [0, 1]
STEPS, SEED, SIZE = 5, 3, 16
PROMPTS = ['a red apple on a blue tree!', 'the green sky']
NEGATIVE = 'blue! apples'

WORDS = ['a red apple', 'a green pear on a tree', 'the blue sky', 'red sky!']
LENGTH = 20
END, SIGN = tokenizers.EOS, '!'  # what pads in 1, and in 2 and XL's second


@functools.cache
def words() -> tokenizers.Tokenizer:
  return tokenizers.train(WORDS, 560, LENGTH)


def text_encoder(kind: str, activation: str, eos: int) -> dict:
  """A config.json; `eos` 2 stands for the highest id, as in older ones."""
  return {
    'architectures': [kind], 'model_type': 'clip_text_model',
    'vocab_size': words().size, 'hidden_size': 8, 'intermediate_size': 16,
    'num_hidden_layers': 3, 'num_attention_heads': 2,
    'max_position_embeddings': LENGTH, 'hidden_act': activation,
    'projection_dim': 6, 'bos_token_id': words().bos, 'eos_token_id': eos,
    'pad_token_id': 1,
  }  # fmt: skip


FIRST = text_encoder(text_encoders.PLAIN, 'quick_gelu', text_encoders.OLD_EOS)
SECOND = text_encoder(text_encoders.PROJECTING, 'gelu', words().eos)
VAE = {
  '_class_name': coders.KL,
  'sample_size': SIZE, 'block_out_channels': [4, 8], 'norm_num_groups': 2,
  'down_block_types': ['DownEncoderBlock2D'] * 2,
  'up_block_types': ['UpDecoderBlock2D'] * 2, 'latent_channels': 4,
}  # fmt: skip
UNET = {
  '_class_name': conditional.CLASS,
  'sample_size': SIZE // 2, 'in_channels': 4, 'out_channels': 4,
  'block_out_channels': [4, 8], 'layers_per_block': 1, 'norm_num_groups': 2,
  'down_block_types': ['CrossAttnDownBlock2D', 'DownBlock2D'],
  'up_block_types': ['UpBlock2D', 'CrossAttnUpBlock2D'],
  'attention_head_dim': 2, 'cross_attention_dim': 8,
}  # fmt: skip
OF_XL = {
  'down_block_types': ['DownBlock2D', 'CrossAttnDownBlock2D'],
  'up_block_types': ['CrossAttnUpBlock2D', 'UpBlock2D'],
  'attention_head_dim': [1, 2], 'transformer_layers_per_block': [1, 2],
  'cross_attention_dim': 16, 'use_linear_projection': True,
  'addition_embed_type': 'text_time', 'addition_time_embed_dim': 8,
  'projection_class_embeddings_input_dim': 6 + 6 * 8,
}  # fmt: skip


class Kind(NamedTuple):
  """A pipeline.

  Attributes:
    pipeline: its class.
    networks: the folder of each network -> its settings.
    padding: the folder of each tokenizer -> its padding.
  """

  pipeline: str
  networks: dict
  padding: dict


ONE = {'vae': VAE, 'text_encoder': FIRST}
KINDS = {
  'sd1': Kind(
    'StableDiffusionPipeline', {**ONE, 'unet': UNET}, {'tokenizer': END}
  ),
  'sd2': Kind(
    'StableDiffusionPipeline',
    {
      **ONE, 'unet': UNET | {'use_linear_projection': True},
      'text_encoder': FIRST | {'hidden_act': 'gelu'},
    },
    {'tokenizer': SIGN},
  ),
  'inpainting': Kind(
    'StableDiffusionInpaintPipeline',
    {**ONE, 'unet': UNET | {'in_channels': 9}}, {'tokenizer': END},
  ),
  'sdxl': Kind(
    'StableDiffusionXLPipeline',
    {
      **ONE, 'unet': UNET | OF_XL, 'vae': VAE | {'scaling_factor': 0.13025},
      'text_encoder_2': SECOND,
    },
    {'tokenizer': END, 'tokenizer_2': SIGN},
  ),
}  # fmt: skip

BETAS = {
  'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear',
  'steps_offset': 1,
}  # fmt: skip
PNDM = BETAS | {
  '_class_name': 'PNDMScheduler',
  'skip_prk_steps': True,
  'set_alpha_to_one': False,
}
DDIM = BETAS | {
  '_class_name': 'DDIMScheduler',
  'clip_sample': False,
  'set_alpha_to_one': False,
}
EULER = BETAS | {
  '_class_name': 'EulerDiscreteScheduler', 'timestep_spacing': 'leading'
}  # fmt: skip
# As arXiv 2305.08891 proposes.
ZERO_SNR = DDIM | {
  'set_alpha_to_one': True, 'prediction_type': 'v_prediction',
  'rescale_betas_zero_snr': True, 'timestep_spacing': 'trailing',
}  # fmt: skip


class Draw(NamedTuple):
  """Pictures of PROMPTS, with the pipeline's usual guidance.

  Attributes:
    kind: of the pipeline.
    scheduler: its settings.
    negative: whether there is a negative prompt.
  """

  kind: str
  scheduler: dict
  negative: bool = True


DRAWS = {
  'pndm': Draw('sd1', PNDM),
  'ddim': Draw('sd1', DDIM),
  'euler': Draw('sd1', EULER),
  'sd2': Draw('sd2', DDIM | {'prediction_type': 'v_prediction'}, False),
  'sd2_zero_snr': Draw('sd2', ZERO_SNR),
  'sdxl': Draw('sdxl', EULER, False),
  'sdxl_negative': Draw('sdxl', EULER),
  'inpainting': Draw('inpainting', PNDM),
}


# --- folders -----------------------------------------------------------------


@functools.cache
def tensors(kind: str, part: str) -> dict[str, np.ndarray]:
  """The random weights of a network, under diffusers' names."""
  given = KINDS[kind].networks[part]
  if part == 'unet':
    parts = conditional.network_of(given, part)
    shape = (SIZE // 2, SIZE // 2, parts['data']['channels'])
    model = models.create(
      image_shape=shape, doors=parts['doors'], **parts['model']
    )
    return stable_diffusion.to_tensors(unet.random_params(model), given)
  if part == 'vae':
    options = {**coders.network_of(given, part)['codec']}
    del options['name']
    params = unet.random_params(autoencoder.create((SIZE, SIZE, 3), **options))
    found = diffusers.to_tensors(params)
    found['decoder.conv_out.weight'] /= 3  # few colours are out of range
    # Without variance, for latents are drawn with other random numbers.
    found['quant_conv.weight'][4:] = 0
    found['quant_conv.bias'][4:] = -30
    return found
  options, _ = text_encoders.network_of(given, part)
  params = unet.random_params(text.create(**options))
  # So large that words tell pictures apart.
  params['token']['embedding'] *= 10
  return text_encoders.to_tensors(params)


def write_tokenizer(path, padding: str) -> None:
  """The folder of a tokenizer that pads so."""
  tokenizers.write_folder(path, words())
  for name in (tokenizers.SPECIAL, tokenizers.SETTINGS):
    told = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps({**told, 'pad_token': padding}))


def folder_of(kind: str, path, scheduler=PNDM):
  """A folder as diffusers writes it; returns its path, which is new.

  Args:
    kind: a key of KINDS.
    path: of the folder.
    scheduler: settings of the scheduler.
  """
  files = {**settings_golden()[kind]}
  files['scheduler/scheduler_config.json'] |= scheduler
  index = files['model_index.json']
  index['scheduler'] = ['diffusers', scheduler['_class_name']]
  for name, settings in files.items():
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(json.dumps(settings))
  for part in KINDS[kind].networks:
    stem = 'model' if part.startswith('text') else 'diffusion_pytorch_model'
    safetensors.numpy.save_file(
      tensors(kind, part), path / part / f'{stem}.safetensors', {'format': 'pt'}
    )
  for name, padding in KINDS[kind].padding.items():
    write_tokenizer(path / name, padding)
  (path / 'LICENSE.md').write_text('Be good.\n')
  return path


def settings_golden() -> dict:
  """kind -> name of a file -> settings that diffusers has written."""
  return json.loads(SETTINGS.read_text())


def folder_live(kind: str, path, scheduler=PNDM):
  """The same folder, by diffusers and transformers."""
  import diffusers as theirs
  import torch
  import transformers

  made = KINDS[kind]
  parts = {}
  for part, given in made.networks.items():
    if part.startswith('text'):
      (name,) = given['architectures']
      config = transformers.CLIPTextConfig(**given)
      network = getattr(transformers, name)(config)
    else:
      options = {k: v for k, v in given.items() if k != '_class_name'}
      network = getattr(theirs, given['_class_name'])(**options)
    state = {k: torch.from_numpy(v) for k, v in tensors(kind, part).items()}
    if part == 'text_encoder':  # in memory, its names have no prefix
      state = {k.removeprefix('text_model.'): v for k, v in state.items()}
    network.load_state_dict(state, strict=True)
    parts[part] = network.eval()
  for name, padding in made.padding.items():
    write_tokenizer(path.with_name(f'{path.name}_{name}'), padding)
    parts[name] = transformers.CLIPTokenizer.from_pretrained(
      path.with_name(f'{path.name}_{name}')
    )
  options = {k: v for k, v in scheduler.items() if k != '_class_name'}
  parts['scheduler'] = getattr(theirs, scheduler['_class_name'])(**options)
  if kind != 'sdxl':
    parts |= {'safety_checker': None, 'feature_extractor': None}
    parts['requires_safety_checker'] = False
  getattr(theirs, made.pipeline)(**parts).save_pretrained(path)
  return path


def settings_of(path) -> dict:
  """The settings in a folder, but for those of tokenizers."""
  return {
    str(file.relative_to(path)): json.loads(file.read_text())
    for file in sorted(path.rglob('*.json'))
    if not file.parent.name.startswith('tokenizer')
  }


# --- pictures ----------------------------------------------------------------


def first_noise() -> np.ndarray:
  """What our samples 0 and 1 begin with: [2, h, w, 4]."""
  keys, _ = draw.sample_keys(SEED, jnp.arange(2, dtype=jnp.uint32))
  side = SIZE // 2
  return np.asarray(noise.normal(keys, (side, side, 4), jnp.float32))


def drawn_live(name: str, path) -> np.ndarray:
  """[2, H, W, 3] in [0, 1], by the pipeline in a folder."""
  import diffusers as theirs
  import torch

  pipeline = theirs.DiffusionPipeline.from_pretrained(path)
  pipeline.set_progress_bar_config(disable=True)
  given = {'guidance_scale': 5.0 if DRAWS[name].kind == 'sdxl' else 7.5}
  if DRAWS[name].negative:
    given['negative_prompt'] = [NEGATIVE] * len(PROMPTS)
  if DRAWS[name].kind == 'inpainting':  # all of the picture
    given['image'] = torch.zeros(2, 3, SIZE, SIZE)
    given |= {'mask_image': torch.ones(2, 1, SIZE, SIZE), 'strength': 1.0}
  return pipeline(
    PROMPTS, num_inference_steps=STEPS, height=SIZE, width=SIZE,
    latents=torch.from_numpy(first_noise().transpose(0, 3, 1, 2).copy()),
    output_type='np', **given,
  ).images  # fmt: skip


def drawn_golden(name: str) -> np.ndarray:
  """What the pipeline has drawn when the file was made."""
  with np.load(PICTURES) as file:
    np.testing.assert_allclose(file['noise'], first_noise(), atol=1e-5)
    return file[name]


def drawn_ours(name: str, trained, **options) -> np.ndarray:
  """The same of a run, which samples as its pipeline does.

  Args:
    name: a key of DRAWS.
    trained: `diffusion_jax.load` of the run.
    **options: of its sampler, in place of its pipeline's.
  """
  given = {'negative_prompt': NEGATIVE} if DRAWS[name].negative else {}
  given |= options
  images = trained.sample(
    2, seed=SEED, num_steps=STEPS, prompts=PROMPTS, dtype='float32', **given
  )
  return images / 255


def error(found: np.ndarray, wanted: np.ndarray) -> float:
  """The largest difference, relative to the range."""
  assert found.shape == wanted.shape
  # Pictures that are different, and mostly in range.
  assert np.abs(wanted[0] - wanted[1]).max() > 0.05
  assert ((wanted > 0) & (wanted < 1)).mean() > 0.5
  return np.abs(found - wanted).max() / np.ptp(wanted)
