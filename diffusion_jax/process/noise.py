"""Random numbers from a key per example and a label, independent of batches."""

import jax
import jax.numpy as jnp


def normal(keys: jax.Array, shape) -> jax.Array:
  """[B] keys -> standard normal float32 [B, *shape], with the keys as given."""
  return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def draw(keys, label, shape=(), dtype=float, sample=jax.random.normal):
  """Calls `sample` with each key, after folding the label into it.

  Args:
    keys: [B] random keys.
    label: an integer, which may be traced.
    shape: the shape of one example.
    dtype: the dtype of the numbers.
    sample: (key, shape, dtype) -> array.

  Returns:
    [B, *shape]; row b depends only on keys[b] and the label.
  """

  def one(key):
    return sample(jax.random.fold_in(key, label), shape, dtype)

  return jax.vmap(one)(keys)
