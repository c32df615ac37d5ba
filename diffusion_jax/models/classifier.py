"""A small convolutional classifier, to evaluate samples of small images."""

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.models import layers


class Classifier(nnx.Module):
  """Levels of two convolutions down to a 4x4 map, a hidden layer, and logits.

  Args:
    image_shape: (H, W, C).
    num_classes: K.
    rngs: random keys of the initial values.
    width: channels of the first level; they double with each level.
    num_features: D, the size of the hidden layer.
    dropout: dropout rate of the hidden layer in training.
  """

  def __init__(
    self, image_shape, num_classes, *, rngs, width=32, num_features=64,
    dropout=0.3,
  ):  # fmt: skip
    height, wide, channels = image_shape
    self.rate = dropout
    self.levels = nnx.List()
    while True:
      convs = [layers.conv(c, width, rngs=rngs) for c in (channels, width)]
      self.levels.append(nnx.List(convs))
      channels, width = width, 2 * width
      if max(height, wide) <= 4:
        break
      height, wide = -(-height // 2), -(-wide // 2)
    self.hidden = layers.linear(
      height * wide * channels, num_features, rngs=rngs
    )
    self.out = layers.linear(num_features, num_classes, rngs=rngs)

  def __call__(self, x, keys=None) -> tuple[jax.Array, jax.Array]:
    """[B, H, W, C] in [-1, 1] -> (features [B, D], logits [B, K])."""
    for i, level in enumerate(self.levels):
      if i:
        x = nnx.max_pool(x, (2, 2), (2, 2), 'SAME')
      for conv in level:
        x = nnx.relu(conv(x))
    features = nnx.relu(self.hidden(x.reshape(len(x), -1)))
    dropped = layers.dropout(features, self.rate, keys, 0)
    return features, self.out(dropped).astype(jnp.float32)
