"""A picture of low resolution as a condition, beside another one.

Super-resolution by training (SR3, arXiv 2104.07636, section 2.4): the picture,
enlarged by bicubic interpolation, is concatenated to the noised images. Without
a given picture, as in training, it is made of the image itself.

With `noise`, it gets noise of a random deviation in training, which the network
is told (conditioning augmentation, arXiv 2106.15282, section 4.2), so that it
also sharpens pictures that are not perfect, such as samples of another run.
"""

import jax
import jax.numpy as jnp

from diffusion_jax.conditioning.conditioner import Conditioner
from diffusion_jax.process import noise as noises
from diffusion_jax.system.errors import UserError, one_of

# Rows: pictures [B, h, w, C], 8-bit; the deviation of the noise on each, [B],
# in units of [-1, 1]; and the random keys of that noise, [B].
ROW = 'low_resolution'
NOISE, KEYS = f'{ROW}_noise', f'{ROW}_keys'
ROWS = (ROW, NOISE, KEYS)
BY = ('mean', 'bicubic')
GREY = 127.5


def sides_of(sides: tuple[int, int], factor: int) -> tuple[int, int]:
  """The (height, width) of the small pictures of large ones.

  Args:
    sides: (H, W) of the large ones.
    factor: how many times smaller.

  Raises:
    UserError: the factor does not divide them.
  """
  if any(side % factor for side in sides):
    raise UserError(
      f'super_resolution.factor={factor} does not divide images of '
      f'{sides[0]}x{sides[1]}: use a divisor of both sides'
    )
  return sides[0] // factor, sides[1] // factor


def reduced(images: jax.Array, factor: int, by: str) -> jax.Array:
  """Small pictures of large ones, rounded to 8 bits, as files hold them.

  Args:
    images: [B, H, W, C] in [0, 255].
    factor: how many times smaller, a divisor of H and W.
    by: 'mean' of blocks, or 'bicubic' (Keys 1981, a = -1/2), antialiased.

  Returns:
    float32 [B, H / factor, W / factor, C], whole numbers.

  Raises:
    UserError: the factor does not divide the sides, or `by` is not known.
  """
  count, *sides, channels = images.shape
  height, width = sides_of(tuple(sides), factor)
  images = images.astype(jnp.float32)
  if one_of('super_resolution.by', by, BY) == 'mean':
    blocks = images.reshape(count, height, factor, width, factor, channels)
    small = blocks.mean((2, 4))
  else:
    shape = (count, height, width, channels)
    small = jax.image.resize(images, shape, 'cubic', antialias=True)
  return jnp.round(jnp.clip(small, 0, 255))


def enlarged(pictures: jax.Array, sides: tuple[int, int]) -> jax.Array:
  """Pictures enlarged by bicubic interpolation (Keys 1981, a = -1/2).

  Args:
    pictures: [B, h, w, C].
    sides: (H, W).

  Returns:
    float32 [B, H, W, C], which may leave the pictures' range.
  """
  shape = (len(pictures), *sides, pictures.shape[-1])
  return jax.image.resize(pictures.astype(jnp.float32), shape, 'cubic')


def create(
  conditioner: Conditioner,
  codec,
  factor: int,
  by: str = 'mean',
  noise: float = 0.0,
) -> Conditioner:
  """Adds the door 'channels': the enlarged picture, and the level of its noise.

  The picture, in [-1, 1], is ROW of the rows, or made of their image; with
  neither it is grey. Its noise is drawn with the examples' keys, as in
  training, or is that of NOISE and KEYS. It is never dropped.

  Args:
    conditioner: the other condition, which has no channels.
    codec: `codecs.pixels`, of the images to draw.
    factor: how many times larger these are than the pictures.
    by: see `reduced`.
    noise: the largest deviation of the noise in training; 0 for none, and then
      there is no channel that tells it.

  Raises:
    UserError: the factor does not divide the sides of the images.
  """
  *sides, channels = codec.shape
  small = sides_of(tuple(sides), factor)

  def picture_of(params, rows):
    if ROW in rows:
      return rows[ROW].astype(jnp.float32)
    if 'augment' in rows:  # of the image that is trained on
      x0 = codec.encode(params, rows, None)
      return reduced(codec.decode(params, x0, None), factor, by)
    if 'image' in rows:
      return reduced(rows['image'], factor, by)
    return jnp.full((1, *small, channels), GREY)

  def condition(params, rows, keys):
    x = picture_of(params, rows) / 127.5 - 1
    told = []
    if noise:
      x, level = _noised(x, rows, keys, noise)
      share = (level / noise)[:, None, None, None]
      told = [jnp.broadcast_to(share, (len(x), *sides, 1))]
    found = jnp.concatenate([enlarged(x, sides), *told], axis=-1)
    return {**conditioner.condition(params, rows, keys), 'channels': found}

  size = channels + bool(noise)
  doors = {**conditioner.doors, 'channels': size}
  return conditioner._replace(condition=condition, doors=doors)


def _noised(x, rows, keys, most) -> tuple[jax.Array, jax.Array]:
  """Pictures with noise, and its deviation [B]."""
  if keys is not None:
    first, own = jax.vmap(jax.random.split, out_axes=1)(keys)
    level = most * jax.vmap(jax.random.uniform)(first)
  elif NOISE in rows:
    level, own = rows[NOISE].astype(x.dtype), rows[KEYS]
  else:
    return x, jnp.zeros(len(x), x.dtype)
  eps = noises.normal(own, x.shape[1:], x.dtype)
  return x + level[:, None, None, None] * eps, level
