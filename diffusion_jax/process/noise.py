"""Random numbers by a key and a label for each example, whatever its batch."""

import jax


def draw(keys, label, shape=(), dtype=float, sample=jax.random.normal):
  """What `sample` gives for each key, of which the label makes another.

  Args:
    keys: [B] random keys.
    label: a whole number, which may be traced.
    shape: of one example.
    dtype: of the numbers.
    sample: (key, shape, dtype) -> array.

  Returns:
    [B, *shape]; row b depends on keys[b] and the label alone.
  """

  def one(key):
    return sample(jax.random.fold_in(key, label), shape, dtype)

  return jax.vmap(one)(keys)
