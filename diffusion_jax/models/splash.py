"""Splash attention: JAX's kernel for TPUs, which does not write the logits.

XLA cannot split a kernel over devices, so `over` has to say how the inputs lie:
each device computes its own examples and heads.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)
from jax.sharding import Mesh, PartitionSpec

LANES = 128  # a block is a multiple of so many positions
BLOCK = 512  # positions of the largest block
SHORTEST = 1024  # shorter sequences have few logits
_MESH = contextvars.ContextVar('mesh', default=None)


@contextlib.contextmanager
def over(mesh: Mesh) -> Iterator[None]:
  """While a network is traced: its inputs lie on this mesh.

  Args:
    mesh: with the axes data and fsdp, of the examples, and tensor, of heads.
  """
  token = _MESH.set(mesh)
  try:
    yield
  finally:
    _MESH.reset(token)


def _spec(query) -> PartitionSpec | None:
  """How [B, T, heads, D] lies on the mesh; None if the kernel cannot follow."""
  mesh = _MESH.get()
  if mesh is None or len(query) % (mesh.shape['data'] * mesh.shape['fsdp']):
    return None
  heads = 'tensor' if query.shape[2] % mesh.shape['tensor'] == 0 else None
  return PartitionSpec(('data', 'fsdp'), None, heads)


def fits(query: jax.Array) -> bool:
  """Whether the kernel is for these queries, with as many keys.

  Args:
    query: [B, T, heads, D].
  """
  length = query.shape[1]
  return (
    query.dtype == jnp.bfloat16
    and length >= SHORTEST
    and length % LANES == 0
    and _spec(query) is not None
  )


def attend(query, key, value, interpret: bool = False) -> jax.Array:
  """Scaled dot-product attention, see `attention.attend`.

  Args:
    query: [B, T, heads, D]; see `fits`.
    key: like `query`.
    value: like `query`.
    interpret: compute it step by step, on any device, for tests.

  Returns:
    [B, T, heads, D].
  """
  spec = _spec(query)
  return jax.shard_map(
    functools.partial(_attend, interpret=interpret),
    mesh=_MESH.get(),
    in_specs=(spec,) * 3,
    out_specs=spec,
    check_vma=False,
  )(query, key, value)


def _attend(query, key, value, interpret) -> jax.Array:
  """`attend` on one device."""
  kernel = _kernel(query.shape[1], query.shape[2], interpret)
  scale = jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
  maps = (jnp.moveaxis(x, 2, 1) for x in (query * scale, key, value))
  return jnp.moveaxis(jax.vmap(kernel)(*maps), 1, 2)


def _kernel(length: int, heads: int, interpret: bool):
  size = next(s for s in range(BLOCK, 0, -LANES) if length % s == 0)
  sizes = splash_attention_kernel.BlockSizes(
    block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size,
    block_q_dq=size, block_kv_dq=size,
  )  # fmt: skip
  whole = splash_attention_mask.FullMask((length, length))
  return splash_attention_kernel.make_splash_mha_single_device(
    splash_attention_mask.MultiHeadMask([whole] * heads),
    block_sizes=sizes,
    interpret=interpret,
  )
