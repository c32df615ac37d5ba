"""Our programs to be measured: the training step and the bare network."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import models, runs
from diffusion_jax.models import layers
from diffusion_jax.planning import flops
from diffusion_jax.runs import programs
from diffusion_jax.training import sharding


class Measured(NamedTuple):
  """A compiled program and a way to run it.

  Attributes:
    call: runs it that many times, one after the other, and waits for the end.
    program: the executable.
    compile_seconds: of tracing, lowering and compilation.
    bytes: that the program needs while it runs, by its own account.
  """

  call: Callable[[int], None]
  program: jax.stages.Compiled
  compile_seconds: float
  bytes: int


def mesh() -> jax.sharding.Mesh:
  """The mesh of one device."""
  return sharding.make_mesh(devices=jax.devices()[:1])


def on_one_device(config: ConfigDict) -> ConfigDict:
  """The config on a mesh of one device."""
  one = config.copy_and_resolve_references()
  one.mesh.update(data=-1, fsdp=1, tensor=1)
  return one


def images(config: ConfigDict) -> np.ndarray:
  """A batch of random images, uint8 [B, H, W, C]."""
  shape = (config.batch_size, *runs.image_shape(config.data))
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def state(config: ConfigDict, over: jax.sharding.Mesh):
  """A new training state."""
  return programs.create(config, over).create_state(over)


def abstract(config: ConfigDict, over: jax.sharding.Mesh):
  """Shapes, dtypes and shardings of a training state."""
  return programs.create(config, over).abstract


def step(config: ConfigDict, over: jax.sharding.Mesh, now: list) -> Measured:
  """The training step, from a batch of uint8 images on the device.

  Args:
    config: the run's config.
    over: the devices.
    now: [the state], which each call replaces.
  """
  program = programs.create(config, over)
  batch = sharding.put_batch({'image': images(config)}, over)
  compiled, seconds = _compiled(program.step_fn, now[0], program.frozen, batch)

  def call(count):
    for _ in range(count):
      now[0], values = compiled(now[0], program.frozen, batch)
      if jax.default_backend() == 'cpu':
        # Two runs at once on several devices of a CPU can block each other.
        jax.block_until_ready(values)
    jax.block_until_ready((now[0], values))

  return Measured(call, compiled, seconds, _bytes(compiled))


def forward(config: ConfigDict, over: jax.sharding.Mesh, now: list) -> Measured:
  """The network without dropout, from noise on the device.

  Args:
    config: the run's config.
    over: the devices.
    now: [the state], whose parameters are used.
  """
  size, shape = config.batch_size, runs.image_shape(config.data)
  model = models.create(image_shape=shape, **config.model)
  xt, t = sharding.put_batch(
    (noise((size, *shape)), np.arange(size, dtype=np.int32)), over
  )
  compiled, seconds = _compiled(
    jax.jit(model.apply), now[0].params[models.NET], xt, t
  )

  def call(count):
    for _ in range(count):
      out = compiled(now[0].params[models.NET], xt, t)
      if jax.default_backend() == 'cpu':
        jax.block_until_ready(out)
    jax.block_until_ready(out)

  return Measured(call, compiled, seconds, _bytes(compiled))


WHAT = {'step': step, 'forward': forward}


def noise(shape) -> np.ndarray:
  """Standard normal float32."""
  return np.random.default_rng(1).standard_normal(shape, np.float32)


def flops_per_image(config: ConfigDict, what: str) -> float:
  """FLOPs of the products of a step or of the network, without padding taps.

  Those of the plain network: measures that save products count as speed.

  Args:
    config: the run's config.
    what: a key of WHAT.
  """
  config = config.copy_and_resolve_references()
  config.update(batch_size=1, microbatches=1)
  config.model.update(plain=layers.MEASURES, remat='none')
  over, shape = mesh(), runs.image_shape(config.data)
  if what == 'step':
    program = programs.create(config, over)
    batch = {'image': jax.ShapeDtypeStruct((1, *shape), jnp.uint8)}
    traced = program.step_fn.trace(program.abstract, program.frozen, batch)
  else:
    model = models.create(image_shape=shape, **config.model)
    params = jax.eval_shape(model.init, jax.random.key(0))
    xt = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    traced = jax.jit(model.apply).trace(params, xt, t)
  return float(flops.products(traced.jaxpr).total())


def peak_bytes() -> int:
  """The most memory of the device in use so far; 0 if it does not say."""
  return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0)


def matrix_rate(dtype: str, size: int, rounds: int = 9) -> float:
  """FLOPs per second of a product of two square matrices, the best of rounds.

  Args:
    dtype: of the factors and the product.
    size: of the matrices.
    rounds: how often it is measured.
  """
  a = jax.random.normal(jax.random.key(0), (size, size), dtype)
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(a, a))
  seconds = []
  for _ in range(rounds):
    start = time.perf_counter()
    jax.block_until_ready(product(a, a))
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)


def _compiled(fn, *args) -> tuple[jax.stages.Compiled, float]:
  start = time.perf_counter()
  program = fn.lower(*args).compile()
  return program, time.perf_counter() - start


def _bytes(program: jax.stages.Compiled) -> int:
  memory = program.memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
