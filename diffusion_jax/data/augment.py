"""Augmentation that the network is told (arXiv 2206.00364, appendix F.2).

Training images are flipped, scaled, rotated, stretched and moved at random.
Each transform is described by numbers that the network gets as a condition, all
zero for an unchanged image, so that samples drawn with zeros look like the data
and not like the transformed images. The numbers are

  0     1 if mirrored left to right
  1     1 if mirrored top to bottom
  2     n: scaled by 2^(0.2 n), n standard normal
  3, 4  cos(a) - 1, sin(a): rotated by a, uniform in all angles
  5, 6  n cos(a), n sin(a): stretched by 2^(0.2 n) along the angle a and
        compressed as much across it, n the absolute value of a standard normal
  7, 8  moved right and down by that many eighths of the width and the height,
        standard normal

in the order in which the transforms are made. In the paper n in 5 and 6 may be
negative, which gives the same transforms, but two of them the same numbers.
The host draws the numbers of each image; the device makes the transform.
"""

import jax
import jax.numpy as jnp
import numpy as np

SIZE = 9  # numbers of an image
STREAMS = 14  # random numbers that they are drawn from
SCALE = 0.2 * np.log(2.0)
SHIFT = 1 / 8


def hashed(key: np.ndarray, positions: np.ndarray) -> np.ndarray:
  """A random uint64 for each position, of positions' shape.

  SplitMix64 (Steele, Lea and Flood 2014) hashes a counter. A random number
  generator would have to be constructed for each position.

  Args:
    key: uint64, which broadcasts with the positions.
    positions: integers from 0 on.
  """
  z = key + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
  z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return z ^ (z >> np.uint64(31))


def draw(
  keys: np.ndarray,
  positions: np.ndarray,
  probability: float,
  mirrored: np.ndarray | None = None,
) -> np.ndarray:
  """The numbers of the transforms of images, by their positions.

  Args:
    keys: uint64 [STREAMS].
    positions: [R], the positions of the images in the stream.
    probability: with which each of the six transforms is made. Flips are then
      made or not, with equal chances.
    mirrored: bool [R], whether images are mirrored left to right, in place of
      the first transform.

  Returns:
    float32 [R, SIZE]. A row depends on its position only.
  """
  bits = hashed(keys[:, None], positions[None]) >> np.uint64(11)
  uniform = bits * 2.0**-53
  made, (flip_x, flip_y, turn, along, *pairs) = uniform[:6], uniform[6:]
  made = made < probability
  scale, stretch = _normal(*pairs[:2])
  right, down = _normal(*pairs[2:])
  if mirrored is None:
    mirrored = made[0] & (flip_x < 0.5)
  angle, axis = 2 * np.pi * (turn - 0.5) * made[3], 2 * np.pi * along
  stretch = np.abs(stretch) * made[4]
  columns = [
    mirrored, made[1] & (flip_y < 0.5), scale * made[2],
    np.cos(angle) - 1, np.sin(angle), stretch * np.cos(axis),
    stretch * np.sin(axis), right * made[5], down * made[5],
  ]  # fmt: skip
  return np.stack(columns, axis=1).astype(np.float32)


def _normal(first, second) -> tuple[np.ndarray, np.ndarray]:
  """Two uniform numbers in [0, 1) -> two standard normal ones (Box-Muller)."""
  radius, angle = np.sqrt(-2 * np.log1p(-first)), 2 * np.pi * second
  return radius * np.cos(angle), radius * np.sin(angle)


def apply(images: jax.Array, numbers: jax.Array) -> jax.Array:
  """Transforms images, with cubic interpolation (Keys 1981, a = -1/2).

  Outside of an image is its mirror image. Flips, moves by whole pixels and
  right angles are exact; numbers of zero change nothing.

  Args:
    images: [B, H, W, C] in [-1, 1].
    numbers: float32 [B, SIZE], see `draw`.
  """
  size, height, width, channels = images.shape
  x, y = _origins(numbers, height, width)
  flat = images.reshape(size, -1, channels)
  total = 0.0
  for row, of_row in _taps(y, height):
    for column, of_column in _taps(x, width):
      index = (row * width + column).reshape(size, -1, 1)
      weight = (of_row * of_column).reshape(size, -1, 1)
      total += weight * jnp.take_along_axis(flat, index, axis=1)
  return jnp.clip(total, -1, 1).reshape(images.shape).astype(images.dtype)


def _origins(numbers, height, width) -> tuple[jax.Array, jax.Array]:
  """Where each pixel comes from: columns and rows, float32 [B, H, W]."""
  mirrored, inverted, scale, less, sin, along, across, right, down = (
    numbers[:, i, None, None] for i in range(SIZE)
  )
  y, x = jnp.meshgrid(
    jnp.arange(height) - (height - 1) / 2,
    jnp.arange(width) - (width - 1) / 2,
    indexing='ij',
  )
  x = x[None] - right * SHIFT * width
  y = y[None] - down * SHIFT * height
  # Back along the angle a: cosh(s) - sinh(s) (cos 2a, sin 2a; sin 2a, -cos 2a).
  square = along**2 + across**2
  log_stretch = SCALE * jnp.sqrt(square)
  by = jnp.sinh(log_stretch) / jnp.where(square > 0, square, 1)
  same = jnp.cosh(log_stretch)
  cos2, sin2 = by * (along**2 - across**2), by * 2 * along * across
  x, y = (same - cos2) * x - sin2 * y, (same + cos2) * y - sin2 * x
  cos, shrink = 1 + less, jnp.exp(-SCALE * scale)
  x, y = shrink * (cos * x + sin * y), shrink * (cos * y - sin * x)
  x, y = (1 - 2 * mirrored) * x, (1 - 2 * inverted) * y
  return x + (width - 1) / 2, y + (height - 1) / 2


def _taps(at, size: int):
  """The four nearest pixels along an axis: (index, weight) of each."""
  first = jnp.floor(at)
  part = at - first
  period = max(2 * (size - 1), 1)
  for tap in range(-1, 3):
    x = jnp.abs(part - tap)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weight = jnp.where(x < 1, near, jnp.where(x < 2, far, 0))
    index = jnp.mod(first.astype(jnp.int32) + tap + size - 1, period)
    yield jnp.abs(index - (size - 1)), weight
