"""A picture with a mask as a condition, beside another one: inpainting.

As in Stable Diffusion's inpainting network: the mask, 1 where the picture is to
be painted, and the latents of the picture with grey there.
"""

import jax
import jax.numpy as jnp

from diffusion_jax.conditioning.conditioner import Conditioner

MASK, PICTURE = 'mask', 'masked'  # rows: [B, h, w, 1] and 8-bit [B, H, W, C]
GREY = 127.5


def create(
  conditioner: Conditioner, codec, image_shape: tuple[int, ...]
) -> Conditioner:
  """Adds the door 'channels': the mask and the latents of the masked picture.

  Without rows of these names, all of the picture is to be painted.

  Args:
    conditioner: the other condition, which has no channels.
    codec: the `codecs.Codec` in whose latents the network works.
    image_shape: (H, W, C) of pictures.
  """
  height, width, channels = codec.shape

  def condition(params, rows, keys):
    cond = conditioner.condition(params, rows, keys)
    count = max([1, *(len(x) for x in cond.values())])
    mask = rows.get(MASK, jnp.ones((1, height, width, 1)))
    picture = rows.get(PICTURE, jnp.full((1, *image_shape), GREY))
    # The posterior is narrow, so any sample of it does.
    same = jnp.broadcast_to(jax.random.key(0), len(picture))
    latents = codec.encode(params, {'image': picture}, same)
    both = [
      jnp.broadcast_to(x, (count, *x.shape[1:])).astype(jnp.float32)
      for x in (mask, latents)
    ]
    return {**cond, 'channels': jnp.concatenate(both, axis=-1)}

  doors = {**conditioner.doors, 'channels': 1 + channels}
  return conditioner._replace(condition=condition, doors=doors)
