"""The device mesh, and sharding rules as data.

The mesh has three axes. 'data' replicates the parameters and splits the batch,
'fsdp' splits both, and 'tensor' splits the channels. `jax.jit` with shardings
is the former pjit.
"""

import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax import models
from diffusion_jax.data import pipeline
from diffusion_jax.system.errors import UserError

AXES = ('data', 'fsdp', 'tensor')
BATCH = P(('data', 'fsdp'))

# Parameters smaller than this many numbers are not worth splitting.
SMALL = 2**14

# (regex of parameter names, spec of the last axes): the first match applies,
# then the largest remaining divisible axis is split over 'fsdp'. A kernel's
# last axis is the output channels, for dense layers and convolutions.
RULES = ((r'.*/kernel', P('tensor')),)


def mesh_shape(num_devices: int, data=-1, fsdp=1, tensor=1) -> tuple:
  """(data, fsdp, tensor), with a -1 replaced by the remaining devices.

  Args:
    num_devices: the number of devices of the mesh.
    data: size of the axis that replicates the parameters.
    fsdp: size of the axis that splits them.
    tensor: size of the axis that splits their channels.

  Raises:
    ValueError: the sizes do not use the devices exactly; one line.
  """
  sizes = (data, fsdp, tensor)
  free = sizes.count(-1)
  if free > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(
      f'mesh {_sizes(sizes)}: sizes must be positive, and at most one -1 (the '
      'rest)'
    )
  known = math.prod(size for size in sizes if size != -1)
  if num_devices % known or (known != num_devices and not free):
    raise ValueError(
      f'mesh {_sizes(sizes)} takes {"a multiple of " * free}{known} devices, '
      f'but there are {num_devices}'
    )
  return tuple(num_devices // known if n == -1 else n for n in sizes)


def _sizes(shape) -> str:
  return ' x '.join(f'{k}={v}' for k, v in zip(AXES, shape, strict=True))


def make_mesh(data=-1, fsdp=1, tensor=1, devices=None) -> Mesh:
  """The mesh of all devices.

  Devices along 'fsdp' and 'tensor' communicate in every layer, along 'data'
  once per step. So only 'data' crosses the slow network between TPU slices, and
  between hosts of other devices if fsdp x tensor divides the devices of a host.

  Args:
    data: size of the axis that replicates parameters and splits the batch.
    fsdp: size of the axis that splits both.
    tensor: size of the axis that splits channels. One of the three may be -1,
      the remaining devices.
    devices: the devices to use; by default all.

  Raises:
    ValueError: the sizes do not use the devices exactly; one line.
    UserError: fsdp x tensor does not fit into a TPU slice.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = mesh_shape(len(devices), data, fsdp, tensor)
  # Explicit axes, the default, do not trace convolutions split over 'fsdp'.
  types = (AxisType.Auto,) * 3
  islands = {_island(device) for device in devices}
  if len(islands) == 1:
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
  if devices[0].platform != 'tpu':
    devices.sort(key=_island)  # the last axes then stay within a host
    placed = np.array(devices).reshape(shape)
  elif shape[0] % len(islands):
    raise UserError(
      f'mesh {_sizes(shape)} on {len(islands)} TPU slices: fsdp x tensor may '
      f'not span slices, so data must be a multiple of {len(islands)}'
    )
  else:
    placed = mesh_utils.create_hybrid_device_mesh(
      (shape[0] // len(islands), *shape[1:]),
      (len(islands), 1, 1),
      devices,
      allow_split_physical_axes=True,
    )
  return Mesh(placed, AXES, axis_types=types)


def _island(device):
  """The fast-network group of a device: its TPU slice, or its host."""
  island = getattr(device, 'slice_index', 0)
  return island if device.platform == 'tpu' else (island, device.process_index)


def spec_of(name: str, shape: tuple, mesh: Mesh) -> P:
  """The PartitionSpec of a parameter (or of its moments).

  Args:
    name: the parameter's name, with slashes.
    shape: the parameter's shape.
    mesh: the devices.
  """
  axes = [None] * len(shape)
  if math.prod(shape) < SMALL:
    return P()
  for pattern, spec in RULES:
    if re.fullmatch(pattern, name):
      for i, axis in enumerate(spec, start=len(shape) - len(spec)):
        if axis and shape[i] % mesh.shape[axis] == 0:
          axes[i] = axis
      break
  free = [i for i, axis in enumerate(axes) if axis is None]
  divisible = [i for i in free if shape[i] % mesh.shape['fsdp'] == 0]
  if divisible:
    # The last of equal sizes: kernels then split over inputs or outputs.
    axes[max(divisible, key=lambda i: (shape[i], i))] = 'fsdp'
  return P(*axes)


def shardings(tree, mesh: Mesh):
  """A NamedSharding for each leaf of a state (arrays or their shapes).

  Optimiser moments and the EMA are split like the parameters, because the rules
  only use the end of the name and the shape.
  """
  return jax.tree.structure(tree).unflatten(
    NamedSharding(mesh, spec_of(name, leaf.shape, mesh))
    for name, leaf in models.named(tree).items()
  )


def abstract(tree, mesh: Mesh):
  """Adds shardings to the shapes of a tree.

  Args:
    tree: arrays or their shapes: parameters or a whole state.
    mesh: the devices.
  """
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    tree,
    shardings(tree, mesh),
  )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, BATCH)


def gather_fsdp(params, mesh: Mesh):
  """Inside a jitted function: gathers the parameters over 'fsdp'.

  FSDP does this anyway; the constraint makes it explicit. Without it, XLA
  silently computes wrong gradients for convolutions with kernels split over
  both 'fsdp' and 'tensor' on a mesh with all three axes above 1.

  Args:
    params: the parameters, traced.
    mesh: the devices.
  """

  def gathered(leaf, sharding):
    axes = [None if axis == 'fsdp' else axis for axis in sharding.spec]
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, P(*axes)))

  return jax.tree.map(gathered, params, shardings(params, mesh))


def to_host(array) -> np.ndarray:
  """Copies a global array to NumPy, in every process."""
  if array.is_fully_addressable:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def local_rows(array) -> tuple[np.ndarray, np.ndarray]:
  """The rows of a global array [B, ...] that this process's devices hold.

  Args:
    array: an array split over its first axis only.

  Returns:
    (rows [R] ascending, values [R, ...]), each row once.
  """
  shards = {
    shard.index[0].indices(len(array))[:2]: shard.data
    for shard in array.addressable_shards
  }
  rows = [np.arange(*bounds) for bounds in sorted(shards)]
  values = [np.asarray(shards[bounds]) for bounds in sorted(shards)]
  return np.concatenate(rows), np.concatenate(values)


def put_batch(tree, mesh: Mesh):
  """NumPy arrays [B, ...], the same in every process -> global arrays."""
  size = len(jax.tree.leaves(tree)[0])
  return pipeline.put_rows(tree, batch_sharding(mesh), size)


def split_batch(tree, pieces: int, mesh: Mesh):
  """Inside a jitted step: [B, ...] -> [pieces, B / pieces, ...].

  Each device contributes some of its own rows to every piece, so no data moves
  between devices; the rows of a piece are not contiguous in the batch.

  Args:
    tree: traced arrays, split over the mesh.
    pieces: how many; pieces x data x fsdp divides B.
    mesh: the devices.
  """
  parts = mesh.shape['data'] * mesh.shape['fsdp']

  def lie(array, *spec):
    return jax.lax.with_sharding_constraint(
      array, NamedSharding(mesh, P(*spec))
    )

  def split(array):
    here = array.reshape(parts, pieces, -1, *array.shape[1:])
    there = lie(lie(here, *BATCH).swapaxes(0, 1), None, *BATCH)
    return lie(there.reshape(pieces, -1, *array.shape[1:]), None, *BATCH)

  return jax.tree.map(split, tree)


def join_batch(tree, mesh: Mesh):
  """Inside a jitted step: the inverse of `split_batch`.

  Args:
    tree: traced arrays [pieces, B / pieces, ...].
    mesh: the devices.
  """
  parts = mesh.shape['data'] * mesh.shape['fsdp']

  def lie(array, *spec):
    return jax.lax.with_sharding_constraint(
      array, NamedSharding(mesh, P(*spec))
    )

  def join(array):
    pieces, rows, *shape = array.shape
    there = array.reshape(pieces, parts, rows // parts, *shape)
    here = lie(lie(there, None, *BATCH).swapaxes(0, 1), *BATCH)
    return lie(here.reshape(pieces * rows, *shape), *BATCH)

  return jax.tree.map(join, tree)


def placed(params, mesh: Mesh):
  """NumPy's parameters on the devices of a mesh, see `shardings`.

  Args:
    params: a tree of arrays, the same in every process.
    mesh: the devices.
  """
  return jax.tree.map(
    lambda x, where: jax.make_array_from_callback(
      x.shape, where, x.__getitem__
    ),
    params,
    shardings(params, mesh),
  )


def padded_indices(indices, mesh: Mesh) -> jax.Array:
  """uint32 indices, repeated until their number is divisible by the mesh.

  Args:
    indices: [N], or N for 0 .. N-1.
    mesh: the devices.
  """
  if np.ndim(indices) == 0:
    indices = np.arange(indices)
  size = rounded(len(indices), mesh)
  return put_padded(np.asarray(indices, np.uint32), size, mesh)


def rounded(count: int, mesh: Mesh) -> int:
  """The least number of rows, from `count` on, that is divisible by the mesh.

  Args:
    count: the number of rows, at least 1.
    mesh: the devices.
  """
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  return -(-count // parts) * parts


def put_padded(tree, size: int, mesh: Mesh):
  """Like `put_batch`, of arrays [n, ...] padded with repeats to [size, ...]."""
  return put_batch(
    jax.tree.map(lambda x: np.resize(x, (size, *x.shape[1:])), tree), mesh
  )


def in_batches(fn, rows, size: int, mesh: Mesh):
  """Calls a compiled function on any number of rows, with one shape.

  Args:
    fn: global arrays [size, ...] -> a tree of arrays [size, ...].
    rows: an array [N, ...] or a tree of them, the same in every process.
    size: rows per call, see `rounded`; the last call's are padded.
    mesh: the devices.

  Returns:
    the tree of NumPy arrays [N, ...], in every process.
  """
  count, found = len(jax.tree.leaves(rows)[0]), []
  for first in range(0, count, size):
    part = jax.tree.map(lambda x, at=first: x[at : at + size], rows)
    found.append(jax.tree.map(to_host, fn(put_padded(part, size, mesh))))
  return jax.tree.map(lambda *x: np.concatenate(x)[:count], *found)
