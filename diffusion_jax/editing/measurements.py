"""Measurements: what is known of a picture, y = A x + noise n.

A is linear: it leaves out pixels, averages them, blurs them or mixes their
channels. `kind` is JSON, so a plan of an edit can hold it; the noise and the
mask are data, one per example:

  inpaint                          the pixels of a mask
  upscale, factor, by              a picture made smaller: 'mean' of each block
                                   (the default), or 'bicubic'
  colourise, weights               a weighted sum of the channels: Pillow's grey
  deblur, kernel                   a convolution, with mirrored borders
  denoise                          every pixel
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.editing import kernels
from diffusion_jax.process import gaussian
from diffusion_jax.system.errors import UserError, one_of

CUT = 0.03  # singular values below this share of the largest, see `estimates`
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow converts to 'L'


class Spectrum(NamedTuple):
  """The singular values of A = U S V', and the way to their coordinates.

  Attributes:
    coordinates: x -> V' x, [B, H, W, C].
    picture: its inverse.
    observed: y -> U' y, [B, H, W, C], at the coordinates of the singular
      values; 0 where A sees nothing.
    values: S, which broadcasts to [B, H, W, C]; 0 where A sees nothing.
  """

  coordinates: Callable
  picture: Callable
  observed: Callable
  values: jax.Array


class Measurement(NamedTuple):
  """What is known of a picture.

  Attributes:
    apply: x [B, H, W, C] -> A x.
    adjoint: y -> A' y, the exact transpose.
    noise: standard deviation of the noise of y, [B] or a scalar, in units of x.
    spectrum: None if it is not known.
  """

  apply: Callable
  adjoint: Callable
  noise: jax.Array
  spectrum: Spectrum | None = None


Make = Callable[[Mapping], Measurement]  # rows -> Measurement


def _noise(rows) -> jax.Array:
  noise = jnp.asarray(rows['noise'])
  return noise if jnp.issubdtype(noise.dtype, jnp.floating) else noise + 0.0


def diagonal(rows: Mapping) -> Measurement:
  """Every pixel, or those of a mask.

  Args:
    rows: 'noise' [B], and optionally 'mask' [B, H, W, 1], 1 where known.
  """
  mask = rows.get('mask')

  def seen(x):
    return x if mask is None else jnp.where(mask > 0, x, 0)

  values = jnp.ones((1, 1, 1, 1)) if mask is None else mask > 0
  noise = _noise(rows)
  values = values.astype(noise.dtype)
  spectrum = Spectrum(lambda x: x, lambda x: x, seen, values)
  return Measurement(seen, seen, noise, spectrum)


def separable(matrices) -> Make:
  """A matrix along each of the rows, the columns and the channels.

  The singular vectors are those of the three matrices, computed on the host in
  float64.

  Args:
    matrices: (along H, along W, along C), each [output, input].
  """
  parts = [np.linalg.svd(matrix) for matrix in matrices]
  sides = [matrix.shape[1] for matrix in matrices]
  lines = [
    np.pad(np.where(s > 1e-12 * s[0], s, 0), (0, side - len(s)))
    for (_, s, _), side in zip(parts, sides, strict=True)
  ]
  values = np.einsum('h,w,c->hwc', *lines)[None]
  observing = [
    np.pad(u.T[:side], ((0, max(side - len(u), 0)), (0, 0)))
    for (u, _, _), side in zip(parts, sides, strict=True)
  ]
  forward = [vt for _, _, vt in parts]

  def make(rows):
    noise = _noise(rows)
    spectrum = Spectrum(
      _along(forward),
      _along([vt.T for vt in forward]),
      _along(observing),
      jnp.asarray(values, noise.dtype),
    )
    back = _along([matrix.T for matrix in matrices])
    return Measurement(_along(matrices), back, noise, spectrum)

  return make


def _along(matrices) -> Callable:
  """x -> the matrices applied to H, W and C; identities are left out."""

  def is_identity(matrix):
    return matrix.shape[0] == matrix.shape[1] and np.all(
      matrix == np.eye(len(matrix))
    )

  def apply(x):
    for axis, matrix in enumerate(matrices, 1):
      if not is_identity(matrix):
        x = jnp.moveaxis(x, axis, -1)
        x = jnp.matmul(x, jnp.asarray(matrix.T, x.dtype), precision='highest')
        x = jnp.moveaxis(x, -1, axis)
    return x

  return apply


def convolution(kernel: np.ndarray, shape) -> Make:
  """A convolution of each channel, with borders mirrored (edges repeated).

  A point becomes the kernel, with its middle, K // 2, at the point.

  Args:
    kernel: [K, L], at most as large as the picture.
    shape: (H, W, C).
  """
  pads = [(0, 0), *((k - 1 - k // 2, k // 2) for k in kernel.shape), (0, 0)]

  def apply(x):
    padded = jnp.pad(x, pads, mode='symmetric')
    weights = jnp.asarray(kernel[::-1, ::-1, None, None], x.dtype)
    return jax.lax.conv_general_dilated(
      padded, jnp.tile(weights, (1, 1, 1, x.shape[-1])), (1, 1), 'VALID',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=x.shape[-1], precision='highest',
    )  # fmt: skip

  def adjoint(y):
    like = jax.ShapeDtypeStruct((len(y), *shape), y.dtype)
    return jax.linear_transpose(apply, like)(y)[0]

  return lambda rows: Measurement(apply, adjoint, _noise(rows))


def blur_matrix(line: np.ndarray, side: int) -> np.ndarray:
  """[side, side], the convolution with a line, with mirrored borders.

  Args:
    line: [K], K at most `side`.
    side: the number of pixels.
  """
  k = len(line)
  padded = np.pad(np.eye(side), ((k - 1 - k // 2, k // 2), (0, 0)), 'symmetric')
  return sum(w * padded[i : i + side] for i, w in enumerate(line[::-1]))


def mean_matrix(side: int, factor: int) -> np.ndarray:
  """[side / factor, side], the mean of each block.

  Args:
    side: the number of pixels.
    factor: pixels per block.
  """
  return np.kron(np.eye(side // factor), np.full((1, factor), 1 / factor))


def bicubic_matrix(side: int, factor: int) -> np.ndarray:
  """[side / factor, side], Pillow's bicubic reduction.

  Keys' cubic with a = -1/2, stretched by the factor; at the borders what lies
  outside is left out.

  Args:
    side: the number of pixels.
    factor: by how much it becomes smaller.
  """
  middles = (np.arange(side // factor) + 0.5) * factor - 0.5
  d = np.abs(np.arange(side) - middles[:, None]) / factor
  near = 1.5 * d**3 - 2.5 * d**2 + 1
  far = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
  weights = np.where(d < 1, near, np.where(d < 2, far, 0))
  return weights / weights.sum(axis=1, keepdims=True)


REDUCTIONS = {'mean': mean_matrix, 'bicubic': bicubic_matrix}


def plain(kind: Mapping | None) -> dict | None:
  """A kind as JSON has it: lists and numbers in place of arrays.

  Args:
    kind: see the module; None if nothing is known.
  """

  def of(x):
    if isinstance(x, list | tuple):
      return [of(each) for each in x]
    return x.tolist() if hasattr(x, 'tolist') else x

  return kind and {key: of(value) for key, value in kind.items()}


def factor_of(kind: Mapping | None) -> int:
  """How many times smaller than the picture y is: 1 but for 'upscale'.

  Args:
    kind: see the module; None if nothing is known.

  Raises:
    UserError: the factor is no whole number from 2.
  """
  if kind is None or kind.get('name') != 'upscale':
    return 1
  factor = kind.get('factor')
  if type(factor) is not int or factor < 2:
    raise UserError(f'factor={factor!r}: a whole number from 2')
  return factor


def _upscale(shape, factor=None, by='mean'):
  height, width, channels = shape
  one_of('by', by, REDUCTIONS)
  factor_of({'name': 'upscale', 'factor': factor})
  if height % factor or width % factor:
    raise UserError(
      f'factor={factor}: it must divide the picture, {height}x{width}'
    )
  matrix = REDUCTIONS[by]
  return separable(
    (matrix(height, factor), matrix(width, factor), np.eye(channels))
  )


def _colourise(shape, weights=GREY):
  height, width, channels = shape
  row = np.asarray(weights, np.float64)
  if channels == 1:
    raise UserError('colourise: these pictures are grey, with one channel')
  if row.shape != (channels,) or not np.isfinite(row).all() or not row.any():
    raise UserError(
      f'weights={list(weights)}: one number for each of {channels} channels, '
      'not all 0'
    )
  return separable((np.eye(height), np.eye(width), row[None]))


def _deblur(shape, kernel=()):
  kernel = kernels.given(kernel, shape)
  lines = kernels.factors(kernel)
  if lines is None:
    return convolution(kernel, shape)
  blurs = (blur_matrix(*of) for of in zip(lines, shape[:2], strict=True))
  return separable((*blurs, np.eye(shape[2])))


def _mask_of(rows):
  if 'mask' not in rows:
    raise UserError('inpaint needs a mask: 1 where the picture is known')
  return diagonal(rows)


KINDS = {
  'inpaint': lambda shape: _mask_of,
  'upscale': _upscale,
  'colourise': _colourise,
  'deblur': _deblur,
  'denoise': lambda shape: lambda rows: diagonal({'noise': rows['noise']}),
}

# The keys of a kind beside its name, and those that it cannot do without.
KEYS = {
  'upscale': ('factor', 'by'),
  'colourise': ('weights',),
  'deblur': ('kernel',),
}
REQUIRED = {'upscale': 'factor', 'deblur': 'kernel'}


def create(kind: Mapping, shape) -> Make:
  """A measurement's operator, for pictures of one shape.

  Args:
    kind: see the module.
    shape: (H, W, C).

  Returns:
    make(rows) -> Measurement, to be called inside or outside jit. rows holds
    'noise' [B], and for inpaint 'mask' [B, H, W, 1], 1 where known.

  Raises:
    UserError: the kind is not known, or does not fit the pictures.
  """
  options = dict(kind)
  name = one_of('measurement', options.pop('name', None), KINDS)
  for option in options:
    one_of(f"{name}'s option", option, KEYS.get(name, ()))
  if name in REQUIRED and REQUIRED[name] not in options:
    raise UserError(f'{name} needs {REQUIRED[name]}, which is not given')
  return KINDS[name](tuple(shape), **options)


def shape_of(kind: Mapping, shape) -> tuple[int, int, int]:
  """The shape of y without the batch.

  Args:
    kind: see the module.
    shape: (H, W, C) of x.

  Raises:
    UserError: see `create`.
  """
  make = create(kind, shape)
  rows = {'noise': np.zeros(1), 'mask': np.ones((1, *shape[:2], 1))}
  x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  return jax.eval_shape(lambda x: make(rows).apply(x), x).shape[1:]


def has_spectrum(kind: Mapping, shape) -> bool:
  """Whether the singular values are known: of all but some blurs.

  Args:
    kind: see the module.
    shape: (H, W, C).

  Raises:
    UserError: see `create`.
  """
  create(kind, shape)
  if kind['name'] != 'deblur':
    return True
  return kernels.factors(kernels.given(kind['kernel'], shape)) is not None


def observe(kind: Mapping, measurement: Measurement, x, standard) -> jax.Array:
  """y = A x + noise n, for experiments with a known picture.

  Args:
    kind: see the module.
    measurement: the measurement.
    x: [B, H, W, C].
    standard: standard normal noise of y's shape.

  Returns:
    y; 0 at the pixels that a mask hides.
  """
  if kind['name'] == 'inpaint':
    standard = measurement.apply(standard)
  y = measurement.apply(x)
  return y + gaussian.per_example(measurement.noise, y) * standard


def estimates(measurement: Measurement, y, cut: float = CUT) -> tuple:
  """What y says of each coordinate V' x: U' y / S, and its noise's level.

  Args:
    measurement: one with a spectrum.
    y: what was measured.
    cut: singular values up to this share of the largest count as 0, because
      the rounding of y, divided by them, would be large. As in the code of
      DDRM (arXiv 2201.11793) for blurs.

  Returns:
    (U' y / S [B, H, W, C], noise / S, which broadcasts to it): 0 and inf where
    nothing is known.
  """
  spectrum = measurement.spectrum
  values = spectrum.values
  most = values.max(axis=(1, 2, 3), keepdims=True)
  is_seen = values > cut * most
  values = jnp.where(is_seen, values, 1)
  level = gaussian.per_example(measurement.noise, values) / values
  found = jnp.where(is_seen, spectrum.observed(y) / values, 0)
  return found, jnp.where(is_seen, level, jnp.inf)
