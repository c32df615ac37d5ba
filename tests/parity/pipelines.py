"""Folders and images of diffusers' own pipelines, with random weights.

`FOLDERS` are networks as diffusers saves them, `DRAWS` are images that its
DDPMPipeline and DDIMPipeline draw, from noise that both sides are given. What
diffusers answers comes from itself (`*_live`) or from golden files, which
tests/golden/make_pipelines.py writes.
"""

import contextlib
import json
import pathlib
from typing import NamedTuple
from unittest import mock

import numpy as np

from parity import unet

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
TOLERANCE = 1e-3  # of images in [0, 1]


class Draw(NamedTuple):
  """Images, as both sides are asked for them.

  Attributes:
    pipeline: 'DDPMPipeline' or 'DDIMPipeline'.
    scheduler: settings of the DDPMScheduler that is saved with the network.
    arguments: of the pipeline's call.
    sampler: ours.
    options: its options, with `clip`.
    steps: how many; the grid is diffusers' leading one.
  """

  pipeline: str
  scheduler: dict
  arguments: dict
  sampler: str
  options: dict
  steps: int


DRAWS = {
  'ddpm_large_1000': Draw(
    'DDPMPipeline', {'variance_type': 'fixed_large'}, {},
    'ancestral', {'variance': 'fixedlarge', 'clip': True}, 1000,
  ),
  'ddpm_small_50': Draw(
    'DDPMPipeline', {'variance_type': 'fixed_small'}, {},
    'ancestral', {'variance': 'fixedsmall', 'clip': True}, 50,
  ),
  # Without use_clipped_model_output theirs clips x0, and goes on with the eps
  # of the x0 before; ours keeps xt = alpha x0 + sigma eps.
  'ddim_50': Draw(
    'DDIMPipeline', {}, {'use_clipped_model_output': True},
    'ddim', {'eta': 0.0, 'clip': True}, 50,
  ),
  'ddim_eta1_20': Draw(
    'DDIMPipeline', {}, {'eta': 1.0, 'use_clipped_model_output': True},
    'ddim', {'eta': 1.0, 'clip': True}, 20,
  ),
  'ddim_v_noclip_20': Draw(
    'DDIMPipeline',
    {'prediction_type': 'v_prediction', 'clip_sample': False}, {},
    'ddim', {'eta': 0.0, 'clip': False}, 20,
  ),
}  # fmt: skip

# What is not DDPM's default, of a network whose tensors are random.
UNUSUAL = unet.Shape(
  name='unusual',
  image_shape=(24, 24, 3),
  ours={},
  theirs=unet.DDPM
  | {
    'sample_size': 24,
    'block_out_channels': (20, 40, 20),
    'layers_per_block': 3,
    'norm_num_groups': 4,
    'down_block_types': ('AttnDownBlock2D', 'DownBlock2D', 'AttnDownBlock2D'),
    'up_block_types': ('AttnUpBlock2D', 'UpBlock2D', 'AttnUpBlock2D'),
  },
  count=0,
  times=(),
  stride=1,
)
FOLDERS = {
  shape.name: shape
  for shape in (
    *(unet.TINY, unet.CIFAR10, unet.CELEBAHQ, unet.DEFAULTS, unet.ADM),
    UNUSUAL,
  )
}
BATCH = 2


def noise(name: str, steps: int) -> np.ndarray:
  """float32 [1 + steps, B, H, W, C]: the first image, then of each step."""
  shape = (1 + steps, BATCH, *unet.TINY.image_shape)
  return unet.normal(f'noise of {name}', shape)


def grid(steps: int) -> list[int]:
  """The leading one, with -1."""
  stride = 1000 // steps
  return [*range((steps - 1) * stride, -1, -stride), -1]


def save_live(shape: unet.Shape, scheduler: dict, path) -> None:
  """A folder of diffusers' own writing; of TINY, the weights are ours too."""
  import diffusers
  import torch

  from diffusion_jax.weights import diffusers as ours

  network = diffusers.UNet2DModel(**shape.theirs).eval()
  if shape.ours:
    tensors = ours.to_tensors(unet.weights_of(shape))
  else:
    tensors = random_tensors(
      {name: list(x.shape) for name, x in network.state_dict().items()}
    )
  network.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
  diffusers.DDPMPipeline(
    network, diffusers.DDPMScheduler(**scheduler)
  ).save_pretrained(path)


def random_tensors(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
  generator = np.random.Generator(np.random.PCG64(0))
  return {
    name: generator.standard_normal(shape, np.float32)
    for name, shape in shapes.items()
  }


def described_live(shape: unet.Shape, path) -> dict:
  """What is in a folder of diffusers': the settings, and the tensors' shapes.

  Args:
    shape: of the network.
    path: of a new folder.
  """
  import safetensors.numpy

  save_live(shape, {'variance_type': 'fixed_large'}, path)
  tensors = safetensors.numpy.load_file(
    path / 'unet' / 'diffusion_pytorch_model.safetensors'
  )
  return {
    'index': json.loads((path / 'model_index.json').read_text()),
    'unet': json.loads((path / 'unet/config.json').read_text()),
    'scheduler': json.loads(
      (path / 'scheduler/scheduler_config.json').read_text()
    ),
    'tensors': {name: list(x.shape) for name, x in tensors.items()},
  }


def described_golden() -> dict:
  return json.loads((GOLDEN / 'diffusers.json').read_text())


def drawn_live(name: str, path) -> np.ndarray:
  """float32 [B, H, W, C] in [0, 1], by the pipeline; `path` is a new folder."""
  draw = DRAWS[name]
  save_live(unet.TINY, draw.scheduler, path)
  return run_live(name, path)


def run_live(name: str, path) -> np.ndarray:
  """As `drawn_live`, of a folder that is there."""
  import diffusers
  import torch

  draw = DRAWS[name]
  given = iter(noise(name, draw.steps))

  def randn_tensor(shape, **_):
    x = torch.from_numpy(next(given).transpose(0, 3, 1, 2).copy())
    assert tuple(x.shape) == tuple(shape)
    return x

  with contextlib.ExitStack() as stack:
    for module in (
      'pipelines.ddpm.pipeline_ddpm', 'pipelines.ddim.pipeline_ddim',
      'schedulers.scheduling_ddpm', 'schedulers.scheduling_ddim',
    ):  # fmt: skip
      stack.enter_context(
        mock.patch(f'diffusers.{module}.randn_tensor', randn_tensor)
      )
    pipeline = getattr(diffusers, draw.pipeline).from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
      batch_size=BATCH, num_inference_steps=draw.steps, output_type='np',
      **draw.arguments,
    ).images  # fmt: skip


def drawn_golden(name: str) -> np.ndarray:
  with np.load(GOLDEN / 'pipelines.npz') as file:
    return file[name]


def drawn_ours(name: str, trained) -> np.ndarray:
  """float32 [B, H, W, C] in [0, 1], of a run's network.

  Args:
    name: of the draw.
    trained: `diffusion_jax.load` of the workdir.
  """
  import jax
  import jax.numpy as jnp

  from diffusion_jax import samplers
  from diffusion_jax.guidance import clipping

  draw = DRAWS[name]
  options = dict(draw.options)
  denoiser = trained.denoise
  if options.pop('clip'):
    denoiser = clipping.clip_x0(denoiser, trained.schedule)
  first, *later = noise(name, draw.steps)
  later = jnp.asarray(later)
  sampler = samplers.create(draw.sampler, **options)

  # The sampler itself, with noise that is given in place of drawn.
  def init(schedule, grid, x):
    rows, memory = sampler.init(schedule, grid, x)
    return {**rows, 'number': np.arange(draw.steps)}, memory

  def step(denoiser, row, x, memory, _):
    number = row['number'].astype(int)
    return sampler.step(denoiser, row, x, memory, lambda: later[number])

  keys = jax.random.split(jax.random.key(0), BATCH)  # of no use
  x = samplers.solve(
    samplers.Sampler(init, step), denoiser, trained.schedule,
    grid(draw.steps), jnp.asarray(first), keys,
  )  # fmt: skip
  return np.clip(np.asarray(x) / 2 + 0.5, 0, 1)
