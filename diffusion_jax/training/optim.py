"""The optimiser of the paper: Adam, linear warm-up, global-norm clipping."""

import optax


def learning_rate(lr: float, warmup_steps: int) -> optax.Schedule:
  """Rises linearly from exactly 0 at step 0 to lr, then stays."""
  if not warmup_steps:
    return optax.constant_schedule(lr)
  return optax.linear_schedule(0.0, lr, warmup_steps)


def create(
  lr: float,
  warmup_steps: int = 0,
  clip_norm: float = 0.0,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  """Adam as DDPM trains (arXiv 2006.11239, appendix B).

  TensorFlow 1 adds epsilon outside the bias correction, optax inside: the two
  differ by a factor of up to sqrt(1 - b2) in epsilon during the first steps.

  Args:
    lr: the learning rate after warm-up.
    warmup_steps: steps of the linear rise; 0 = none.
    clip_norm: bound on the gradient's global norm; 0 = no clipping.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
  """
  adam = optax.adam(learning_rate(lr, warmup_steps), b1=b1, b2=b2, eps=eps)
  if not clip_norm:
    return adam
  return optax.chain(optax.clip_by_global_norm(clip_norm), adam)
