"""What the benchmark of edits compares with: simple answers without a model."""

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage import restoration


def _each(known, answer) -> np.ndarray:
  """Answers each picture; uint8 [N, H, W, C]."""
  found = np.stack([answer(one, i) for i, one in enumerate(known)])
  return np.clip(np.round(found), 0, 255).astype(np.uint8)


def nearest_fill(known, mask) -> np.ndarray:
  """The nearest known pixel."""

  def answer(one, i):
    _, places = ndimage.distance_transform_edt(~mask[i], return_indices=True)
    return one[tuple(places)]

  return _each(known, answer)


def biharmonic(known, mask) -> np.ndarray:
  """scikit-image's biharmonic inpainting."""

  def answer(one, i):
    scaled = np.clip(one, 0, 255) / 255
    return 255 * restoration.inpaint_biharmonic(
      scaled, ~mask[i], channel_axis=-1
    )

  return _each(known, answer)


def resized(method) -> callable:
  """Pillow's interpolation.

  Args:
    method: such as BICUBIC.
  """

  def answers(known, shape):
    def answer(one, i):
      bands = [
        Image.fromarray(np.float32(one[..., c])).resize(shape[1::-1], method)
        for c in range(one.shape[-1])
      ]
      return np.stack([np.asarray(band) for band in bands], -1)

    return _each(known, answer)

  return answers


def as_it_is(known) -> np.ndarray:
  """What is known, in as many channels as needed."""
  return _each(known, lambda one, i: one)


def coloured(known) -> np.ndarray:
  """Grey in three channels."""
  return _each(known, lambda one, i: np.repeat(one, 3, -1))


def median(known) -> np.ndarray:
  """A median over 3x3 pixels."""
  return _each(
    known, lambda one, i: ndimage.median_filter(one, (3, 3, 1), mode='mirror')
  )


def non_local_means(noise):
  """scikit-image's non-local means, told the level of noise.

  Args:
    noise: its standard deviation, in levels of 255.
  """

  def answer(one, i):
    found = restoration.denoise_nl_means(
      one, patch_size=3, patch_distance=5, h=0.8 * noise, sigma=noise,
      fast_mode=False, channel_axis=-1, preserve_range=True,
    )  # fmt: skip
    return found.reshape(one.shape)

  return lambda known: _each(known, answer)


def wiener(noise, apply):
  """scikit-image's Wiener deconvolution with a weight of the noise's variance.

  Args:
    noise: the standard deviation of the noise, in levels of 255.
    apply: the kernel, [K, L].
  """

  weight = 20 * (noise / 127.5) ** 2

  def answer(one, i):
    bands = [
      restoration.wiener(one[..., c] / 255, apply, weight)
      for c in range(one.shape[-1])
    ]
    return 255 * np.stack(bands, -1)

  return lambda known: _each(known, answer)


def of(task, kind, noise, mask, shape) -> dict:
  """Name -> function from what is known to answers, for a task.

  Args:
    task: its name in the benchmark.
    kind: what is known, see `editing.measurements`.
    noise: the level of its noise, in levels of 255.
    mask: bool [N, H, W], true where known; None without a mask.
    shape: (H, W, C) of the answers.
  """
  del task
  return {
    'inpaint': lambda: {
      'nearest pixel': lambda known: nearest_fill(known, mask),
      'biharmonic': lambda known: biharmonic(known, mask),
    },
    'upscale': lambda: {
      'nearest': lambda known: resized(Image.Resampling.NEAREST)(known, shape),
      'bicubic': lambda known: resized(Image.Resampling.BICUBIC)(known, shape),
    },
    'colourise': lambda: {'grey': coloured},
    'deblur': lambda: {
      'as it is': as_it_is,
      'Wiener': wiener(noise, np.asarray(kind['kernel'])),
    },
    'denoise': lambda: {
      'as it is': as_it_is,
      'median 3x3': median,
      'non-local means': non_local_means(noise),
    },
  }[kind['name']]()
