"""The training step of diffusers' UNet2DModel, written as its users would.

The same work as ours: uint8 images -> noise -> loss -> gradient, clipping, Adam
with warm-up, and the average of the parameters. Memory format channels_last;
with bfloat16 autocast; on a GPU the network is compiled, convolutions are
autotuned and float32 products may round to TF32, as ours may.
"""

import contextlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from diffusers import UNet2DModel

from diffusion_jax import runs
from diffusion_jax.process import schedules
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import diffusers as folders
from diffusion_jax.weights import unets

OPTIMIZERS = {'adam': torch.optim.Adam, 'adamw': torch.optim.AdamW}


class Theirs(NamedTuple):
  """A network of theirs and what its training needs.

  Attributes:
    network: the UNet2DModel.
    called: the network, compiled on a GPU.
    optimizer: of its parameters.
    rate: its schedule.
    averages: of the parameters.
    alpha: [T] signal level of each time.
    sigma: [T] noise level.
    autocast: () -> a context in which the network is called.
    config: the run's config, as plain values.
  """

  network: torch.nn.Module
  called: torch.nn.Module
  optimizer: torch.optim.Optimizer
  rate: torch.optim.lr_scheduler.LRScheduler
  averages: list
  alpha: torch.Tensor
  sigma: torch.Tensor
  autocast: object
  config: Mapping


def device() -> str:
  return 'cuda' if torch.cuda.is_available() else 'cpu'


def check(config) -> None:
  """Raises UserError for a config whose step theirs cannot do."""
  unets.unet_of(config)
  for key, plain in (('microbatches', 1), ('optim.decay', 'constant')):
    value = runs.flatten(config)[key]
    if value != plain:
      raise UserError(
        f'--vs=diffusers: {key}={value}, but their step here has {plain}: set '
        f'--config.{key}={plain}'
      )
  if config['optim']['part_lr']:
    raise UserError('--vs=diffusers: optim.part_lr: their step has one rate')


def create(config: Mapping, params) -> Theirs:
  """The network with our parameters, and its optimiser.

  Args:
    config: a run's config, as plain values.
    params: our parameters of the network, on the host.
  """
  torch.backends.cudnn.benchmark = True
  torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
  where = device()
  unet = unets.unet_of(config)
  network = UNet2DModel(**{k: v for k, v in unet.items() if k[0] != '_'})
  tensors = folders.to_tensors(params)
  network.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()})
  network.to(where, memory_format=torch.channels_last)
  optim = config['optim']
  decay = (
    {'weight_decay': optim['weight_decay']} if optim['weight_decay'] else {}
  )
  optimizer = OPTIMIZERS[optim['name']](
    network.parameters(), optim['lr'], (optim['b1'], optim['b2']),
    optim['eps'], fused=True, **decay,
  )  # fmt: skip
  warmup = optim['warmup_steps']
  rate = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda step: min(step / warmup, 1) if warmup else 1.0
  )
  schedule = schedules.create(**config['process'])
  times = np.arange(schedule.num_timesteps)
  alpha, sigma = (
    torch.tensor(np.asarray(level(times)), device=where)
    for level in (schedule.alpha, schedule.sigma)
  )
  half = config['model']['dtype'] == 'bfloat16'
  return Theirs(
    network,
    torch.compile(network) if where == 'cuda' else network,
    optimizer,
    rate,
    [p.detach().clone() for p in network.parameters()],
    alpha,
    sigma,
    (lambda: torch.autocast(where, torch.bfloat16))
    if half
    else contextlib.nullcontext,
    config,
  )


def on_device(array: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(array).to(device())


def predict(theirs: Theirs, xt, t):
  with theirs.autocast():
    return theirs.called(xt, t, return_dict=False)[0]


def loss(theirs: Theirs, batch, t, eps):
  """The mean squared error at given times and noise.

  Args:
    theirs: the network.
    batch: uint8 [B, H, W, C].
    t: [B] times.
    eps: [B, C, H, W] standard normal.
  """
  x0 = batch.permute(0, 3, 1, 2).float() / 127.5 - 1
  alpha, sigma = (
    a[t][:, None, None, None] for a in (theirs.alpha, theirs.sigma)
  )
  prediction = predict(theirs, alpha * x0 + sigma * eps, t).float()
  kind = theirs.config['loss']['prediction']
  target = {
    'eps': lambda: eps, 'x0': lambda: x0, 'v': lambda: alpha * eps - sigma * x0
  }[kind]()  # fmt: skip
  return torch.nn.functional.mse_loss(prediction, target)


def update(theirs: Theirs, value) -> None:
  """Steps down the gradient of a loss."""
  value.backward()
  params = list(theirs.network.parameters())
  if bound := theirs.config['optim']['clip_norm']:
    torch.nn.utils.clip_grad_norm_(params, bound)
  theirs.optimizer.step()
  theirs.rate.step()
  theirs.optimizer.zero_grad(set_to_none=True)
  with torch.no_grad():
    decay = theirs.config['ema']['decay']
    torch._foreach_lerp_(theirs.averages, params, 1 - decay)


def step(theirs: Theirs, batch) -> torch.Tensor:
  """One update with random times and noise; returns the loss.

  Args:
    theirs: the network.
    batch: uint8 [B, H, W, C].
  """
  size, height, width, channels = batch.shape
  t = torch.randint(len(theirs.alpha), (size,), device=batch.device)
  eps = torch.randn(
    (size, channels, height, width), device=batch.device
  ).contiguous(memory_format=torch.channels_last)
  theirs.network.train()
  value = loss(theirs, batch, t, eps)
  update(theirs, value)
  return value.detach()


def forward(theirs: Theirs, xt, t) -> torch.Tensor:
  """The network alone, without dropout.

  Args:
    theirs: the network.
    xt: [B, C, H, W].
    t: [B] times.
  """
  theirs.network.eval()
  with torch.inference_mode():
    return predict(theirs, xt, t)


def finish() -> None:
  """Waits until the device has done its work."""
  if device() == 'cuda':
    torch.cuda.synchronize()


def peak_bytes() -> int | None:
  """The most memory since the last call; None on a CPU."""
  if device() == 'cpu':
    return None
  peak = torch.cuda.max_memory_allocated()
  torch.cuda.reset_peak_memory_stats()
  return peak
