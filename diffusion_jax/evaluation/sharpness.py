"""Measures samples that sharpen pictures: how near they are to the truth."""

import numpy as np

from diffusion_jax.conditioning import low_resolution
from diffusion_jax.evaluation.features import Images
from diffusion_jax.objectives import similarity


def measure(
  samples: Images,
  pictures: np.ndarray,
  originals: np.ndarray | None,
  factor: int,
  by: str,
) -> dict[str, float]:
  """PSNR and SSIM of samples, and of the pictures enlarged, to the originals.

  Sample i is of picture i % P. A sample that is right in all but chance is up
  to 3 dB further from its original than the mean of all such samples is, so
  that interpolation, which blurs, may have a higher PSNR.

  Args:
    samples: the samples.
    pictures: uint8 [P, h, w, C], the pictures that they sharpen.
    originals: uint8 [P, H, W, C], the images that the pictures were made of;
      None if they are not known.
    factor: how many times smaller the pictures are.
    by: how they were made, see `low_resolution.reduced`.

  Returns:
    name -> mean over the samples: 'psnr' and 'ssim', 'psnr_bicubic' and
    'ssim_bicubic', without originals not; 'rms_low', the root mean square of
    the difference between the picture and the sample, made small, in 8-bit
    levels.
  """
  found, first = [], 0
  for batch in samples.stream():
    which = np.arange(first, first + len(batch)) % len(pictures)
    first += len(batch)
    low = pictures[which].astype(np.float64)
    small = np.asarray(low_resolution.reduced(batch, factor, by), np.float64)
    values = {}
    if originals is not None:
      truth = originals[which].astype(np.float64)
      plain = low_resolution.enlarged(low, truth.shape[1:3])
      plain = np.clip(np.round(np.asarray(plain, np.float64)), 0, 255)
      for name, fn in (('psnr', similarity.psnr), ('ssim', similarity.ssim)):
        values[name] = fn(truth, batch.astype(np.float64), 255.0, np)
        values[f'{name}_bicubic'] = fn(truth, plain, 255.0, np)
    values['rms_low'] = np.mean((small - low) ** 2, axis=(1, 2, 3))
    found.append(values)
  means = {
    name: float(np.concatenate([one[name] for one in found]).mean())
    for name in found[0]
  }
  return {**means, 'rms_low': means['rms_low'] ** 0.5}
