"""Self-attention over all positions, with the memory traffic that it needs.

The logits and the softmax are float32 for any dtype. Where cuDNN or JAX (on
TPUs) has a kernel, they are not written at all; of long sequences, elsewhere,
only those of some queries exist at once.
"""

import contextlib
import contextvars
import functools
import math
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from diffusion_jax.models import splash

# Logits of a head that exist at once: 8 MB in float32.
LARGEST = 2**21
_PLAIN = contextvars.ContextVar('plain', default=False)


@contextlib.contextmanager
def plain() -> Iterator[None]:
  """While a network is traced: no kernels, which are each for one device."""
  token = _PLAIN.set(True)
  try:
    yield
  finally:
    _PLAIN.reset(token)


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  training: bool = False,
) -> jax.Array:
  """Scaled dot-product attention (arXiv 1706.03762, eq. 1).

  Args:
    query: [B, T, heads, D].
    key: like `query`.
    value: like `query`.
    training: whether only gradients are taken, if any. Then a kernel, which has
      no forward derivative, is also used backwards. There is one in bfloat16 on
      a GPU, unless XLA_FLAGS asks for deterministic operations, and on a TPU
      for long sequences, see `splash`.

  Returns:
    [B, T, heads, D].
  """
  if not _kernels(query):
    return _in_pieces(query, key, value)
  return (_kernel if training else _forward)(query, key, value)


def _kernel(query, key, value) -> jax.Array:
  """The kernel of the device that the program is compiled for."""
  # Which may be another than this machine's.
  return jax.lax.platform_dependent(
    query, key, value, **_kernels(query), default=_in_pieces
  )


@jax.custom_jvp
def _forward(query, key, value) -> jax.Array:
  """`_kernel`, with derivatives of the plain form."""
  return _kernel(query, key, value)


@_forward.defjvp
def _forward_jvp(primals, tangents):
  return jax.jvp(_in_pieces, primals, tangents)


def _kernels(query) -> dict:
  """Platform -> the kernel for these queries, of those that have one."""
  if _PLAIN.get():
    return {}
  found = {'tpu': splash.attend} if splash.fits(query) else {}
  if _has_cudnn(query):
    found['cuda'] = functools.partial(
      jax.nn.dot_product_attention, implementation='cudnn'
    )
  return found


def _has_cudnn(query) -> bool:
  """Whether cuDNN has a kernel for these heads on this machine's GPUs."""
  if query.dtype != jnp.bfloat16 or jax.default_backend() != 'gpu':
    return False
  if 'deterministic' in os.environ.get('XLA_FLAGS', ''):
    return False
  major = int(float(jax.local_devices()[0].compute_capability))
  most = 256 if major >= 9 else 128
  return major >= 8 and query.shape[-1] % 8 == 0 and query.shape[-1] <= most


def _in_pieces(query, key, value) -> jax.Array:
  """`attend` in plain JAX, for as many queries at once as LARGEST allows.

  As in arXiv 2112.05682, but only the queries are split: a softmax over all
  keys needs no correction.
  """
  b, length, *heads = query.shape
  least = math.ceil(length * key.shape[1] / LARGEST)
  if least <= 1:
    return _by_heads(query, key, value)
  count = next(n for n in range(least, length + 1) if length % n == 0)
  pieces = query.reshape(b, count, length // count, *heads)
  # Backwards, the logits of a piece are computed again.
  some = jax.checkpoint(lambda piece: _by_heads(piece, key, value))
  mixed = jax.lax.map(some, jnp.moveaxis(pieces, 1, 0))
  return jnp.moveaxis(mixed, 0, 1).reshape(query.shape)


def _by_heads(query, key, value) -> jax.Array:
  """`attend` with all logits at once."""
  _, _, *heads = query.shape
  maps = (
    jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], heads[1])
    for x in (query, key, value)
  )
  mixed = _attend(*maps).reshape(-1, heads[0], query.shape[1], heads[1])
  return jnp.moveaxis(mixed, 1, 2)


@jax.custom_jvp
def _attend(query, key, value):
  """[B heads, T, D] each -> [B heads, T, D]."""
  return _mix(_probabilities(query, key), value)


@_attend.defjvp
def _attend_jvp(primals, tangents):
  query, key, value = primals
  # The barrier: XLA would keep the float32 logits in place of the weights.
  weights = jax.lax.optimization_barrier(_probabilities(query, key))
  mixed = _mix(weights, value)
  # Checkpointed, so that the backward pass keeps only what is given here.
  tangent = jax.checkpoint(_tangent, prevent_cse=False)
  return mixed, tangent(primals, weights, mixed, tangents)


def _tangent(primals, weights, mixed, tangents):
  """The tangent of the result.

  The transpose subtracts sum(mixed * cotangent) from each row, a sum over D,
  so that no row of T float32 numbers has to be written and read for it.
  """
  query, key, value = primals
  dquery, dkey, dvalue = tangents
  # Not float32: cotangents are rounded before the products.
  dlogits = _logits(dquery, key, query.dtype) + _logits(query, dkey, key.dtype)
  dweights = weights.astype(jnp.float32) * dlogits.astype(jnp.float32)
  of_row = jnp.sum(dweights, axis=-1, keepdims=True)
  mean = of_row * mixed.astype(jnp.float32)
  moved = _mix(dweights.astype(value.dtype), value) + _mix(weights, dvalue)
  return moved - mean.astype(moved.dtype)


def _logits(query, key, dtype) -> jax.Array:
  """[B heads, T, T]."""
  logits = jnp.einsum('bqd,bkd->bqk', query, key, preferred_element_type=dtype)
  return logits * jnp.asarray(query.shape[-1] ** -0.5, dtype)


def _probabilities(query, key) -> jax.Array:
  logits = _logits(query, key, jnp.float32)
  return jax.nn.softmax(logits, axis=-1).astype(query.dtype)


def _mix(weights, value) -> jax.Array:
  return jnp.einsum('bqk,bkd->bqd', weights, value)
