"""Guided sampling by class, step by step, against diffusers.

The U-Net is compared with a loop around `UNet2DModel` and DDIMScheduler, the
transformer with DiTPipeline, whose scheduler is observed.
"""

import dataclasses
import itertools
from unittest import mock

import jax
import numpy as np

from diffusion_jax.guidance import guided
from diffusion_jax.process import gaussian, schedules
from parity import pipelines, unet

LABELS = (2, 0)
WEIGHT = 3.0
STEPS = 5
# DiTPipeline's label of no class is 1000.
DIT = dataclasses.replace(
  unet.DIT, name='dit_1000', doors={'label': 1000},
  theirs=unet.DIT.theirs | {'num_embeds_ada_norm': 1000}, count=31_456,
)  # fmt: skip
CASES = {'unet': unet.DEFAULTS, 'dit': DIT}
GOLDEN = unet.GOLDEN / 'guided.npz'


def noise(shape: unet.Shape) -> np.ndarray:
  return unet.normal(
    f'noise of {shape.name}', (len(LABELS), *shape.image_shape)
  )


def scheduler():
  import diffusers

  return diffusers.DDIMScheduler(clip_sample=False)


def live(name: str) -> np.ndarray:
  """[STEPS, B, H, W, C], what diffusers has after each step."""
  import torch

  shape = CASES[name]
  x = torch.from_numpy(noise(shape).transpose(0, 3, 1, 2).copy())
  with torch.no_grad():
    found = (_pipeline if name == 'dit' else _loop)(shape, x)
  return np.stack([each.numpy().transpose(0, 2, 3, 1) for each in found])


def _loop(shape, x):
  import torch

  network, steps, found = unet.network_live(shape), scheduler(), []
  steps.set_timesteps(STEPS)
  null = shape.doors['label']
  label = torch.tensor([*LABELS, *[null] * len(LABELS)])
  for t in steps.timesteps:
    eps = network(torch.cat([x, x]), t, class_labels=label).sample
    given, none = eps.chunk(2)
    x = steps.step(none + WEIGHT * (given - none), t, x).prev_sample
    found.append(x)
  return found


def _pipeline(shape, x):
  import diffusers
  from diffusers.pipelines.dit import pipeline_dit

  vae = diffusers.AutoencoderKL(
    block_out_channels=(4,), norm_num_groups=2, latent_channels=4
  )
  pipeline = diffusers.DiTPipeline(unet.network_live(shape), vae, scheduler())
  pipeline.set_progress_bar_config(disable=True)
  found, step = [], pipeline.scheduler.step

  def spied(*args, **kwargs):
    result = step(*args, **kwargs)
    found.append(result.prev_sample[: len(LABELS)])
    return result

  with (
    mock.patch.object(pipeline.scheduler, 'step', spied),
    mock.patch.object(pipeline_dit, 'randn_tensor', return_value=x),
  ):
    pipeline(
      list(LABELS), guidance_scale=WEIGHT, num_inference_steps=STEPS,
      output_type='np',
    )  # fmt: skip
  return found


def golden(name: str) -> np.ndarray:
  with np.load(GOLDEN) as file:
    return file[name]


def ours(name: str) -> np.ndarray:
  """[STEPS, B, H, W, C], what we have after each step of DDIM."""
  shape = CASES[name]
  model, params = unet.create(shape), unet.weights_of(shape)
  schedule = schedules.linear(1000, 1e-4, 0.02)
  label = guided.alternate(
    np.array(LABELS), np.full(len(LABELS), shape.doors['label'])
  )

  def network(xt, t):
    prediction = model.apply(params, xt, t, None, {'label': label})
    return prediction[..., : xt.shape[-1]]  # without the learned variance

  both = gaussian.denoiser(network, schedule, 'eps')
  denoise = jax.jit(
    guided.always(guided.classifier_free(both), guided.towards(WEIGHT))
  )
  x, found = noise(shape), []
  grid = pipelines.grid(STEPS)
  for t, s in itertools.pairwise(grid):
    x0, eps, *_ = denoise(x, t)
    alpha = np.sqrt(np.exp(schedule.log_alpha_bar[s])) if s >= 0 else 1.0
    x = np.asarray(alpha * x0 + np.sqrt(1 - alpha**2) * eps, np.float32)
    found.append(x)
  return np.stack(found)
