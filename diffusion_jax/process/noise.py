"""Random numbers from a key per example and a label, independent of batches."""

import jax


def normal(keys: jax.Array, shape, dtype=float) -> jax.Array:
  """[B] keys -> standard normal [B, *shape], with the keys as given."""
  return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


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
