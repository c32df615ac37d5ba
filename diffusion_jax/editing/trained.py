"""Sampling by a network that was trained to be told what is known."""

from diffusion_jax.editing.editing import Editing, from_noise
from diffusion_jax.editing.measurements import Measurement
from diffusion_jax.process import gaussian
from diffusion_jax.samplers.ddim import ddim


def trained(
  denoiser: gaussian.Denoiser,
  schedule,
  measurement: Measurement,
  y,
  *,
  eta: float = 1.0,
) -> Editing:
  """Plain samples: the denoiser knows y as its condition (SR3, 2104.07636).

  Args:
    denoiser: the model, with y as its condition.
    schedule: not used.
    measurement: not used.
    y: not used.
    eta: of DDIM's steps, 1 for ancestral ones.
  """
  del schedule, measurement, y
  return Editing(ddim(eta), denoiser, from_noise)
