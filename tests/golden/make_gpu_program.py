"""Writes gpu_program.txt: a tiny program, as XLA compiles it for eight H100s.

  pip install '.[cuda]'
  python tests/golden/make_gpu_program.py

Metadata and most of backend_config are left out.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax.planning import slices

AXIS = 'd'


def program(x, y):
  """A collective of each kind, a scan, a loop and a condition.

  Args:
    x: [1024], the same everywhere.
    y: [8, 16], other numbers everywhere.
  """
  scattered = jax.lax.psum_scatter(x, AXIS, tiled=True)
  turned = jax.lax.all_to_all(y, AXIS, 1, 1, tiled=True)
  ring = [(i, (i + 1) % 8) for i in range(8)]
  moved = jax.lax.ppermute(y, AXIS, ring)
  gathered = jax.lax.all_gather(scattered * 2, AXIS)
  summed = jax.lax.psum(jnp.sin(y), AXIS)

  def body(carry, i):
    carry = carry * 2 + jax.lax.psum(carry, AXIS)
    return carry, carry.sum() + y[i, 0]

  last, sums = jax.lax.scan(body, y, jnp.arange(4))
  either = jax.lax.cond(
    sums[0] > 0, lambda v: v @ v.T, lambda v: jnp.sin(v) @ v.T, last
  )
  endless = jax.lax.while_loop(lambda v: v.sum() < 7, lambda v: v * 3, last)
  return (
    *(scattered, turned, moved, gathered, summed),
    *(last, sums, either, endless),
  )


def stripped(text: str) -> str:
  """The text without what no test reads."""
  text = re.sub(
    r'\n(FileNames|FunctionNames|FileLocations|StackFrames)\n(.*\n)*?(?=\n)',
    '\n', text,
  )  # fmt: skip
  text = re.sub(r', metadata=\{[^}]*\}|, use_global_device_ids=true', '', text)
  text = re.sub(r', allow_spmd.*', '', text)

  def config(match):
    kept = re.search(r'"known_trip_count":\{"n":"\d+"\}', match[0])
    return f', backend_config={{{kept[0]}}}' if kept else ''

  text = re.sub(r', backend_config=\{.*\}$', config, text, flags=re.M)
  return re.sub(r'\n\n+', '\n\n', text).strip() + '\n'


def main():
  devices = np.array(slices.devices(slices.parse('h100:8')))
  mesh = jax.sharding.Mesh(devices, (AXIS,))
  split = P(AXIS)
  fn = jax.jit(jax.shard_map(
    program, mesh=mesh, in_specs=(P(), split),
    out_specs=(*[split] * 4, P(), *[split] * 4), check_vma=False,
  ))  # fmt: skip
  x = jax.ShapeDtypeStruct(
    (1024,), jnp.float32, sharding=NamedSharding(mesh, P())
  )
  y = jax.ShapeDtypeStruct(
    (64, 16), jnp.float32, sharding=NamedSharding(mesh, split)
  )
  text = stripped(fn.lower(x, y).compile().as_text())
  (Path(__file__).parent / 'gpu_program.txt').write_text(text)


if __name__ == '__main__':
  main()
