"""Optimisers of a config's `optim`: Adam and others, with a schedule.

Everything is a function of the step, so a run resumed from a checkpoint makes
the same updates as an uninterrupted one.
"""

import collections
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffusion_jax import models
from diffusion_jax.system.errors import UserError

OPTIMIZERS = ('adam', 'adamw', 'adafactor')
DECAYS = ('constant', 'cosine', 'linear')
# The keys of a config that the form of the optimiser's state depends on.
FORM = (
  *('optim.name', 'optim.clip_norm', 'optim.part_lr', 'optim.moments_dtype'),
)
MOMENTS = ('float32', 'bfloat16')


def learning_rate(
  lr: float,
  warmup_steps: int = 0,
  decay: str = 'constant',
  decay_steps: int = 0,
  end_lr: float = 0.0,
  decay_from: int = 0,
  **others: Any,
) -> optax.Schedule:
  """The learning rate schedule: warm-up, then constant or a decay.

  The rate rises linearly from exactly 0 at step 0 to lr at step warmup_steps.
  From step decay_from on it decays to end_lr at step decay_steps, and stays
  there. A constant rate with a short linear decay at the end needs no number of
  steps in advance (arXiv 2405.18392).

  Args:
    lr: the learning rate after warm-up.
    warmup_steps: steps of the linear rise; 0 = none.
    decay: one of DECAYS. 'cosine' is half a period (arXiv 1608.03983, eq. 5,
      without restarts).
    decay_steps: the step at which the decay ends, counted from the start of
      training, above warmup_steps; unused with 'constant'.
    end_lr: the learning rate from then on.
    decay_from: the step at which the decay begins; by default, and at least,
      warmup_steps.
    **others: the other options of `create`, unused here.
  """
  del others
  start = max(warmup_steps, decay_from)
  length = decay_steps - start
  if decay == 'constant':
    after = optax.constant_schedule(lr)
  elif decay == 'cosine':
    after = optax.cosine_decay_schedule(lr, length, alpha=end_lr / lr)
  else:
    after = optax.linear_schedule(lr, end_lr, length)
  # It stays at lr after the rise.
  rise = optax.linear_schedule(0.0 if warmup_steps else lr, lr, warmup_steps)
  if decay == 'constant':
    return rise if warmup_steps else after
  return optax.join_schedules([rise, after], [start]) if start else after


def create(
  lr: float,
  warmup_steps: int = 0,
  clip_norm: float = 0.0,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  name: str = 'adam',
  weight_decay: float = 0.0,
  part_lr: Mapping[str, float] | None = None,
  decay: str = 'constant',
  decay_steps: int = 0,
  end_lr: float = 0.0,
  decay_from: int = 0,
  moments_dtype: str = 'float32',
) -> optax.GradientTransformation:
  """Adam as DDPM trains (arXiv 2006.11239, appendix B), AdamW or Adafactor.

  TensorFlow 1 adds epsilon outside the bias correction, optax inside: the two
  differ by a factor of up to sqrt(1 - b2) in epsilon during the first steps.

  Args:
    lr: the learning rate after warm-up.
    warmup_steps: steps of the linear rise; 0 = none.
    clip_norm: bound on the gradient's global norm; 0 = no clipping.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    name: one of OPTIMIZERS. 'adafactor' (arXiv 1804.04235) keeps the second
      moment of a matrix as its row and column means; no b2, eps, or scaling
      with the parameters.
    weight_decay: for 'adamw' (arXiv 1711.05101): each update also subtracts
      learning rate x weight_decay x parameter, for the parameters that
      `decayed` selects.
    part_lr: maps a part of the parameters (a key of their outermost dict) to
      its learning rate, in place of lr. Warm-up and decay scale with it: the
      part's rate is learning_rate(step) * part_lr[part] / lr.
    decay: the decay of the learning rate, see `learning_rate`.
    decay_steps: the step at which it ends.
    end_lr: the learning rate from then on.
    decay_from: the step at which it begins, if that is after warm-up.
    moments_dtype: one of MOMENTS, of the first moment. The second is float32: a
      step changes it by 1 - b2, which is less than bfloat16 resolves.
  """
  rate = learning_rate(lr, warmup_steps, decay, decay_steps, end_lr, decay_from)
  dtype = None if moments_dtype == 'float32' else moments_dtype
  if name == 'adamw':
    adam = optax.adamw(
      rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed,
      mu_dtype=dtype,
    )  # fmt: skip
  elif name == 'adafactor':
    adam = optax.adafactor(
      rate, multiply_by_parameter_scale=False, momentum=b1,
      dtype_momentum=moments_dtype,
    )  # fmt: skip
  else:
    adam = optax.adam(rate, b1=b1, b2=b2, eps=eps, mu_dtype=dtype)
  steps = [_clip(clip_norm)] if clip_norm else []
  steps += [adam]
  if part_lr:
    steps += [_by_part({part: own / lr for part, own in part_lr.items()})]
  # A single step is not chained: older checkpoints have no tuple in that case.
  return optax.chain(*steps) if steps[1:] else adam


def global_norm(tree: Any) -> jax.Array:
  """The root of the sum of all squares of a tree, as `optax.global_norm`.

  For a GPU, XLA makes two kernels of the sum over an array, of which a network
  has hundreds, and no more of the sum over a stack of arrays, which it does not
  write. On other devices a stack would be a copy.
  """
  return jax.lax.platform_dependent(
    tree, cuda=_norm_of_stacks, default=optax.global_norm
  )


def _norm_of_stacks(tree) -> jax.Array:
  """`global_norm`, of stacks of arrays that are split over a mesh alike.

  Vectors, which are small, are one stack.
  """
  stacks = collections.defaultdict(list)
  for name, leaf in models.named(tree).items():
    key = (leaf.shape, name.rpartition('/')[2]) if leaf.ndim > 1 else None
    stacks[key].append(leaf[None] if leaf.ndim > 1 else leaf.reshape(-1))
  return jnp.sqrt(
    sum(jnp.sum(jnp.square(jnp.concatenate(one))) for one in stacks.values())
  )


def _clip(bound: float) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm`, by `global_norm`."""

  def update(updates, state, params=None):
    del params
    norm = global_norm(updates)
    return jax.tree.map(
      lambda u: jnp.where(norm < bound, u, u / norm * bound), updates
    ), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def same_form(one: Mapping, other: Mapping) -> bool:
  """Whether two configs' optimisers have states of the same form."""
  forms = (
    (
      *(config['name'], config['moments_dtype']),
      *(config['clip_norm'] > 0, bool(config['part_lr'])),
    )
    for config in (one, other)
  )
  return len(set(forms)) == 1


def decayed(params: Any) -> Any:
  """The mask of parameters with weight decay: a tree of bools.

  As usual (GPT, MAE, timm), matrices, kernels and embedding tables decay;
  biases, normalisation scales and other vectors do not.
  """
  structure = jax.tree.structure(params)
  return structure.unflatten(
    leaf.ndim > 1 and name.rpartition('/')[2] not in ('bias', 'scale')
    for name, leaf in models.named(params).items()
  )


def _by_part(factors: Mapping[str, float]) -> optax.GradientTransformation:
  """Multiplies the updates of named parts by a factor; stateless."""

  def init(params):
    unknown = factors.keys() - params.keys()
    if unknown:
      raise UserError(
        f'optim.part_lr.{min(unknown)}: the parameters have no such part, only '
        f'{", ".join(sorted(params))}'
      )
    return optax.EmptyState()

  def update(updates, state, params=None):
    del params
    scaled = {
      part: jax.tree.map(lambda u, by=by: u * by, updates[part])
      for part, by in factors.items()
    }
    return {**updates, **scaled}, state

  return optax.GradientTransformation(init, update)
