"""Class labels as the condition."""

import jax
import jax.numpy as jnp

from diffusion_jax.conditioning.conditioner import Conditioner


def create(num_classes: int, drop: float = 0.1) -> Conditioner:
  """The label of each example, replaced by the null label at random.

  With drop > 0, one network learns the conditional and the unconditional law,
  as classifier-free guidance needs (arXiv 2207.12598, algorithm 1).

  Args:
    num_classes: labels are 0 .. num_classes - 1; num_classes is the null label.
    drop: the probability with which training drops an example's label.
  """

  def condition(params, rows, keys):
    del params
    if 'label' not in rows:
      return {'label': jnp.array([num_classes], jnp.int32)}
    label = rows['label'].astype(jnp.int32)
    if keys is None or not drop:
      return {'label': label}
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, drop))(keys)
    return {'label': jnp.where(dropped, num_classes, label)}

  return Conditioner(condition, {'label': num_classes}, drop)
