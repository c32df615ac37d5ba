"""Meshes: the rules, and that they change no number."""

import collections
import dataclasses
import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from diffusion_jax import models
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import optim, sharding, state

# It compares the numbers of different programs.
pytestmark = pytest.mark.optimized

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]
SOME_SLOW = pytest.mark.parametrize(
  'sizes',
  [*(pytest.param(m, marks=pytest.mark.slow) for m in MESHES[:2]), MESHES[2]],
)


wide = functools.cache(tiny.wide)


@pytest.mark.parametrize(
  ('sizes', 'devices', 'shape'),
  [
    ((-1, 1, 1), 8, (8, 1, 1)),
    ((-1, 2, 2), 8, (2, 2, 2)),
    ((1, -1, 1), 3, (1, 3, 1)),
    ((1, 1, 1), 1, (1, 1, 1)),
  ],
)
def test_minus_one_is_what_is_left(sizes, devices, shape):
  assert sharding.mesh_shape(devices, *sizes) == shape


@pytest.mark.parametrize(
  ('sizes', 'must'),
  [
    ((7, 1, 1), 'takes 7 devices, but there are 8'),
    ((-1, 3, 1), 'a multiple of 3 devices'),
    ((-1, -1, 1), 'at most one'),
    ((0, 1, 1), 'positive'),
    ((-2, 1, 1), 'positive'),
    ((16, 1, 1), 'takes 16 devices'),
  ],
)
def test_meshes_that_do_not_fit_are_explained(sizes, must):
  with pytest.raises(ValueError, match=must):
    sharding.mesh_shape(8, *sizes)


def test_rules():
  mesh = sharding.make_mesh(2, 2, 2)
  spec = sharding.spec_of
  kernel = 'down/0/blocks/0/conv1/kernel'
  assert spec(kernel, (3, 3, 128, 256), mesh) == P(None, None, 'fsdp', 'tensor')
  assert spec(f'opt_state/0/mu/{kernel}', (3, 3, 128, 256), mesh) == P(
    None, None, 'fsdp', 'tensor'
  )
  assert spec('time1/kernel', (128, 512), mesh) == P('fsdp', 'tensor')
  assert spec('conv_in/kernel', (3, 3, 3, 128), mesh) == P()  # small
  assert spec('conv1/bias', (256,), mesh) == P()
  assert spec('a/kernel', (3, 3, 129, 255), mesh) == P(None, None, None, None)
  only_fsdp = sharding.make_mesh(1, 8, 1)
  assert spec('a/kernel', (3, 3, 128, 129), only_fsdp)[2] == 'fsdp'


def test_moments_and_average_follow_the_parameters():
  mesh = sharding.make_mesh(1, 4, 2)
  abstract = state.abstract_state(wide().init, optim.create(1e-3, 5, 1.0), mesh)
  params = [leaf.sharding for leaf in jax.tree.leaves(abstract.params)]
  assert any('fsdp' in sharding.spec for sharding in params)
  adam = abstract.opt_state[1][0]
  for other in (abstract.ema_params, adam.mu, adam.nu):
    assert [leaf.sharding for leaf in jax.tree.leaves(other)] == params


def test_state_is_made_in_pieces():
  """1 x 8 x 1: a device holds an eighth, and the small tensors.

  And the values are those of one device.
  """

  def start(mesh):
    optimizer = optim.create(1e-3, 5, 1.0)
    return state.create(jax.random.key(0), wide().init, optimizer, mesh)

  spread = start(sharding.make_mesh(1, 8, 1))
  leaves = jax.tree.leaves(spread)
  small = sum(a.nbytes for a in leaves if a.size < sharding.SMALL)
  large = sum(a.nbytes for a in leaves) - small
  here = sum(a.addressable_shards[0].data.nbytes for a in leaves)
  np.testing.assert_allclose(here, large / 8 + small, rtol=0.01)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
    jax.device_get(spread),
    jax.device_get(start(tiny.one_device())),
  )


# --- the step, compiled once on each mesh -----------------------------------


class Ran(NamedTuple):
  """Twenty steps with dropout, on the host, and their program."""

  losses: list
  gradient: dict  # of the first, up to a factor
  text: str  # the compiled step, as each device runs it


@functools.cache
def ran(*sizes) -> Ran:
  mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
  abstract, step_fn = tiny.program(mesh, network=wide())
  batch = sharding.put_batch(tiny.images(16), mesh)
  compiled = step_fn.lower(abstract, batch).compile()
  now, losses, moments = tiny.random_state(abstract), [], []
  for _ in range(20):
    now, metrics = compiled(now, batch)
    losses.append(float(metrics['loss']))
    if not moments:
      moments.append(jax.tree.map(np.array, now.opt_state[1][0].mu))
  return Ran(losses, moments[0], compiled.as_text())


@SOME_SLOW
def test_losses_are_the_same_on_every_mesh(sizes):
  """20 steps with dropout, to 3e-6: rounding differs, nothing else does."""
  alone = ran(1, 1, 1).losses
  np.testing.assert_allclose(ran(*sizes).losses, alone, rtol=3e-6)
  assert alone[-1] < 0.7 * alone[0]


def errors(gradient) -> dict:
  """Name -> the leaf's error against one device's, over its size.

  Keys' biases are left out: attention does not depend on them, so that their
  gradient is rounding noise on any mesh.
  """
  alone = ran(1, 1, 1).gradient
  found = {
    name: np.linalg.norm(leaf - other) / np.linalg.norm(leaf)
    for name, leaf, other in zip(
      models.names(alone),
      jax.tree.leaves(alone),
      jax.tree.leaves(gradient),
      strict=True,
    )
    if not name.endswith('key/bias')
  }
  assert len(found) > 40
  return found


@SOME_SLOW
def test_every_gradient_is_the_same_on_every_mesh(sizes):
  """Each leaf to 1e-4 of its size; 2x2x2 is where XLA goes wrong by itself."""
  for name, error in errors(ran(*sizes).gradient).items():
    assert error < 1e-4, name


@pytest.mark.slow
def test_what_the_guard_guards_from(monkeypatch, capsys):
  """Without `gather_fsdp` the first loss is right whatever the gradients are.

  So that a test of losses alone would not do. How wrong they are is printed,
  and not asserted: a later XLA may well be right.
  """
  monkeypatch.setattr(sharding, 'gather_fsdp', lambda params, *_: params)
  unguarded = ran.__wrapped__(2, 2, 2)
  np.testing.assert_allclose(
    unguarded.losses[0], ran(1, 1, 1).losses[0], rtol=3e-6
  )
  found = errors(unguarded.gradient)
  wrong = {name: error for name, error in found.items() if error > 1e-4}
  with capsys.disabled():
    print(
      f'\nwithout the guard {len(wrong)} of {len(found)} gradients are wrong'
      + (f', by up to {max(wrong.values()):.0%}' if wrong else '')
      + f'; after 20 steps the loss is {unguarded.losses[-1]:.4f} in place of '
      f'{ran(1, 1, 1).losses[-1]:.4f}'
    )


def collectives(text) -> dict:
  """Kind -> bytes that come out of a program's collectives on one device."""
  kinds = 'all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute'
  total = collections.Counter()
  for shapes, kind in re.findall(rf'= (.*?) ({kinds})(?:-start)?\(', text):
    for bits, sizes in re.findall(r'[a-z]+(\d+)\[([\d,]*)\]', shapes):
      numbers = math.prod(map(int, filter(None, sizes.split(','))))
      total[kind] += numbers * int(bits) // 8
  return total


@pytest.mark.parametrize(
  ('sizes', 'gathers'),
  [
    pytest.param((1, 8, 1), 1, marks=pytest.mark.slow),
    pytest.param((8, 1, 1), 0, marks=pytest.mark.slow),
  ],
)
def test_devices_exchange_what_theory_says(sizes, gathers):
  """In a step, of P bytes of parameters, of which S are split over 'fsdp':

  - gathers: S, once. Every kernel is needed whole, forward and backward; on
    these few megabytes XLA keeps what the first gathered.
  - reductions: P. Each device has the gradient of its rows, for all parameters,
    and the mean over the rows is a sum over the devices. (A CPU then keeps its
    piece of the S. An accelerator fuses the two into a reduce-scatter.)
  - nothing else: activations stay where their rows are. Scalars, such as the
    loss and the gradient's norm, are less than a percent.
  """
  params = jax.tree.leaves(ran(1, 1, 1).gradient)
  everything = sum(leaf.nbytes for leaf in params)
  split = sum(leaf.nbytes for leaf in params if leaf.size >= sharding.SMALL)
  theory = {'all-gather': gathers * split, 'all-reduce': everything}
  found = collectives(ran(*sizes).text)
  assert found.keys() == {kind for kind, size in theory.items() if size}
  for kind, size in found.items():
    np.testing.assert_allclose(size, theory[kind], rtol=0.1)


# --- several slices, several hosts ------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
  """What a mesh asks of a device."""

  id: int
  process_index: int
  platform: str
  device_kind: str


@dataclasses.dataclass(frozen=True)
class SliceDevice(Device):
  slice_index: int
  coords: tuple = (0, 0, 0)
  core_on_chip: int = 0


def cpus(hosts, each):
  return [Device(i, i // each, 'cpu', 'cpu') for i in range(hosts * each)]


def gpus(hosts, each):
  """JAX calls hosts slices where no NVLink connects them."""
  return [
    SliceDevice(i, i // each, 'gpu', 'H100', slice_index=i // each)
    for i in range(hosts * each)
  ]


def tpus(slices):
  """Slices of 2 x 2 x 2 chips, on two hosts each."""
  return [
    SliceDevice(
      i, i // 4, 'tpu', 'TPU v4', i // 8, tuple(map(int, f'{i % 8:03b}'))
    )
    for i in range(8 * slices)
  ]


def met(mesh, axis, what) -> set:
  """How many slices (or hosts) there are on each of a mesh's lines."""
  lines = np.moveaxis(mesh.devices, sharding.AXES.index(axis), -1)
  return {
    len({getattr(device, what) for device in line})
    for line in lines.reshape(-1, mesh.shape[axis])
  }


def test_only_data_crosses_between_slices():
  devices = tpus(slices=2)
  for ordered in (devices, devices[::-1]):
    mesh = sharding.make_mesh(-1, 2, 2, devices=ordered)
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert tuple(mesh.shape.values()) == (4, 2, 2)
    assert set(mesh.devices.flat) == set(devices)
    assert met(mesh, 'data', 'slice_index') == {2}
    assert met(mesh, 'fsdp', 'slice_index') == {1}
    assert met(mesh, 'tensor', 'slice_index') == {1}


@pytest.mark.parametrize('sizes', [(1, 16, 1), (1, 2, 8), (1, 4, 4)])
def test_fsdp_and_tensor_may_not_span_slices(sizes):
  with pytest.raises(UserError, match='data must be a multiple of 2') as error:
    sharding.make_mesh(*sizes, devices=tpus(slices=2))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('devices', [cpus(2, 4), gpus(2, 4), gpus(8, 1)])
@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 4, 2)])
def test_the_last_axes_stay_on_a_host_where_they_fit(devices, sizes):
  """Where they do not, 'fsdp' spans hosts: whatever order JAX lists them in."""
  listed = devices[1::2] + devices[::2]
  mesh = sharding.make_mesh(*sizes, devices=listed)
  assert mesh.axis_types == (AxisType.Auto,) * 3
  assert set(mesh.devices.flat) == set(devices)
  each = sum(device.process_index == 0 for device in devices)
  lines = mesh.devices.reshape(-1, min(sizes[1] * sizes[2], each))
  assert {len({d.process_index for d in line}) for line in lines} == {1}
  if sizes[2] <= each:
    assert met(mesh, 'tensor', 'process_index') == {1}


def test_one_host_or_slice_is_as_jax_has_it():
  for devices in (jax.devices(), cpus(1, 8), tpus(slices=1)):
    mesh = sharding.make_mesh(2, 2, 2, devices=devices)
    plain = jax.make_mesh((2, 2, 2), sharding.AXES, devices=devices)
    assert mesh.devices.tolist() == plain.devices.tolist()
  listed = jax.devices()[::-1]
  mesh = sharding.make_mesh(devices=listed)
  assert mesh.devices.ravel().tolist() == listed


def test_padding_of_indices():
  mesh = sharding.make_mesh(4, 2, 1)
  padded = sharding.padded_indices(np.array([5, 9, 2]), mesh)
  assert padded.dtype == jnp.uint32
  assert padded.tolist() == [5, 9, 2, 5, 9, 2, 5, 9]
  assert sharding.padded_indices(8, mesh).tolist() == list(range(8))
