"""The decoder of a diffusion autoencoder (DiTo, arXiv 2501.18593)."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import models
from diffusion_jax.process import gaussian, noise, schedules


class DiTo(NamedTuple):
  """A denoising network that is a decoder.

  Attributes:
    network: the network, of the part `models.NET`.
    network_fn: see `models.network_fn`.
    schedule: the noise schedule.
    prediction: what the network predicts.
    decode: (params of all parts, z, keys) -> pictures, see `decoder`.
  """

  network: models.Model
  network_fn: Callable
  schedule: schedules.Schedule
  prediction: gaussian.Parametrisation
  decode: Callable


def create(shape: tuple[int, int, int], channels: int, config: Mapping) -> DiTo:
  """The decoder of a config.

  Args:
    shape: (H, W, C) of the pictures.
    channels: channels of the latents.
    config: the config of the run that trains it, or its groups model, process
      and loss.
  """
  loss, schedule = config['loss'], schedules.create(**config['process'])
  network = models.create(
    image_shape=shape, doors={'channels': channels}, **config['model']
  )
  network_fn = models.network_fn(network)
  how = gaussian.parametrisation(
    loss['prediction'], loss['sigma_data'], loss.get('level', 'auto')
  )
  decode = decoder(network_fn, schedule, how, shape, loss['decode_steps'])
  return DiTo(network, network_fn, schedule, how, decode)


def enlarged(z: jax.Array, sides: tuple[int, int]) -> jax.Array:
  """Latents repeated to the size of the pictures, [B, h, w, C] -> [B, H, W, C].

  Args:
    z: the latents.
    sides: (H, W), multiples of (h, w).
  """
  for axis, side in enumerate(sides, start=1):
    z = jnp.repeat(z, side // z.shape[axis], axis=axis)
  return z


def decoder(
  network_fn: Callable,
  schedule: schedules.Schedule,
  prediction: gaussian.Parametrisation | str,
  shape: tuple[int, int, int],
  steps: int = 50,
) -> Callable:
  """A decoder that solves the flow from noise to a picture.

  Its steps are those of DDIM, which for the flow schedule are Euler's.

  Args:
    network_fn: (params, input, label, cond, None) -> prediction.
    schedule: the noise schedule.
    prediction: what the network predicts.
    shape: (H, W, C) of the pictures.
    steps: the number of steps, and of evaluations of the network.

  Returns:
    (params, z [B, h, w, z], keys [B]) -> pictures [B, H, W, C].
  """
  times = np.linspace(schedule.num_timesteps - 1, -1, steps + 1)
  pairs = np.stack([times[:-1], times[1:]], axis=1).astype(np.float32)

  def decode(params, z, keys):
    cond = {'channels': enlarged(z, shape[:2])}
    denoise = gaussian.denoiser(
      lambda x, label: network_fn(params, x, label, cond, None),
      schedule, prediction,
    )  # fmt: skip

    def step(x, pair):
      seen = denoise(x, pair[0])
      alpha, sigma = gaussian.alpha_sigma(schedule, pair[1], x)
      return alpha * seen.x0 + sigma * seen.eps, None

    x = noise.normal(keys, shape, jnp.float32)
    return jax.lax.scan(step, x, pairs)[0]

  return decode
