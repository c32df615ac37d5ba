"""How alike two pictures are: PSNR and SSIM, in JAX or NumPy."""

import jax.numpy as jnp
import numpy as np

WINDOW, DEVIATION = 11, 1.5  # of SSIM, in pixels
K1, K2 = 0.01, 0.03


def psnr(a, b, span: float, xp=jnp):
  """The peak signal-to-noise ratio of each picture, in dB.

  Args:
    a: [B, ...] pictures.
    b: [B, ...] others.
    span: the range of their values, such as 255.
    xp: jax.numpy, or NumPy for float64.

  Returns:
    [B]; equal pictures have 100 dB.
  """
  error = xp.mean(xp.square(a - b), axis=tuple(range(1, a.ndim)))
  return -10 * xp.log10(xp.maximum(error / span**2, 1e-10))


def ssim(a, b, span: float, xp=jnp):
  """The structural similarity of each picture (Wang et al. 2004, eq. 13).

  Local means, variances and covariances are those of a Gaussian window of
  11x11 pixels, with a deviation of 1.5, at every place where it fits in. The
  result is their mean over places and channels. Smaller pictures have the
  largest odd window that fits in.

  Args:
    a: [B, H, W, C] pictures, from 0 to span.
    b: [B, H, W, C] others.
    span: such as 255, or 2 for pictures in [-1, 1] after adding 1.
    xp: see `psnr`.

  Returns:
    [B], 1 for equal pictures.
  """
  rows, columns = (_windows(side) for side in a.shape[1:3])
  maps = xp.stack([a, b, a * a, b * b, a * b])
  means = xp.einsum(
    'ih,jw,kbhwc->kbijc', *(xp.asarray(x, a.dtype) for x in (rows, columns)),
    maps,
  )  # fmt: skip
  mean_a, mean_b, aa, bb, ab = means
  c1, c2 = (K1 * span) ** 2, (K2 * span) ** 2
  both = mean_a * mean_b
  squares = mean_a * mean_a + mean_b * mean_b
  likeness = (2 * both + c1) * (2 * (ab - both) + c2)
  likeness = likeness / ((squares + c1) * (aa + bb - squares + c2))
  return xp.mean(likeness, axis=(1, 2, 3))


def _windows(side: int) -> np.ndarray:
  """The weights of a Gaussian window at all places: [places, side]."""
  size = min(WINDOW, side - 1 + side % 2)
  offsets = np.arange(size) - size // 2
  weights = np.exp(-0.5 * np.square(offsets / DEVIATION))
  weights /= weights.sum()
  places = np.zeros((side - size + 1, side))
  for i, place in enumerate(places):
    place[i : i + size] = weights
  return places
