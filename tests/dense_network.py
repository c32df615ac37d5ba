"""`model.name=dense`: a hidden layer, for runs that need not be of a U-Net.

To import this module is to add the network. It is traced and compiled in a
fraction of the time, and has the keys of `model` that any network has.
"""

import math

import jax.numpy as jnp
from flax import nnx

from diffusion_jax import models
from diffusion_jax.models import doors as doors_of
from diffusion_jax.models import layers


class Dense(nnx.Module):
  """Its input, plus a layer of all values and the time, swish, and a layer.

  A label's embedding is added before the swish. Channels are more inputs.
  """

  DOORS = ('label', 'channels')

  def __init__(
    self, image_shape, *, doors, out_channels, channels=8, dropout=0.1,
    dtype='float32', rngs,
  ):  # fmt: skip
    self.shape, self.dropout = (*image_shape[:-1], out_channels), dropout
    self.dtype = jnp.dtype(dtype)
    common = {'dtype': self.dtype, 'rngs': rngs}
    more = math.prod(image_shape[:-1]) * doors.get('channels', 0)
    inputs = math.prod(image_shape) + more + 1
    outputs = math.prod(self.shape)
    self.hidden = layers.linear(inputs, channels, **common)
    self.out = layers.linear(channels, outputs, scale=0.1, **common)
    if 'label' in doors:
      self.label = nnx.Embed(doors['label'] + 1, channels, rngs=rngs)

  def __call__(self, xt, t, keys=None, cond=None):
    time = jnp.broadcast_to(t / 1000, len(xt)).astype(xt.dtype)
    given = doors_of.joined(xt, cond).reshape(len(xt), -1)
    hidden = self.hidden(jnp.concatenate([given, time[:, None]], axis=1))
    if cond and 'label' in cond:
      hidden += self.label(cond['label'])
    hidden = nnx.swish(hidden)
    hidden = layers.dropout(hidden, self.dropout, keys, 0)
    predicted = self.out(hidden).reshape(len(xt), *self.shape)
    return jnp.float32(xt + predicted)


models.MODELS['dense'] = Dense
