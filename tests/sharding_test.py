"""Meshes: the rules, and that they change no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from diffusion_jax.process import losses, schedules
from diffusion_jax.training import optim, sharding, state, step

MESHES = {'8x1x1': (8, 1, 1), '1x8x1': (1, 8, 1), '2x2x2': (2, 2, 2)}


def wide():
  """64 channels on 8x8 maps: where XLA's gradients go wrong if left alone."""
  return tiny.model(
    channels=64, multipliers=(1,), attention_resolutions=(8,), num_groups=8
  )


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
  abstract = state.abstract_state(wide(), optim.create(1e-3, 5, 1.0), mesh)
  params = [leaf.sharding for leaf in jax.tree.leaves(abstract.params)]
  assert any('fsdp' in sharding.spec for sharding in params)
  adam = abstract.opt_state[1][0]
  for other in (abstract.ema_params, adam.mu, adam.nu):
    assert [leaf.sharding for leaf in jax.tree.leaves(other)] == params


def test_state_is_made_in_pieces():
  """1 x 8 x 1: a device holds an eighth, and the small tensors."""
  mesh = sharding.make_mesh(1, 8, 1)
  start = state.create(
    jax.random.key(0), wide(), optim.create(1e-3, 5, 1.0), mesh
  )
  leaves = jax.tree.leaves(start)
  small = sum(a.nbytes for a in leaves if a.size < sharding.SMALL)
  large = sum(a.nbytes for a in leaves) - small
  here = sum(a.addressable_shards[0].data.nbytes for a in leaves)
  np.testing.assert_allclose(here, large / 8 + small, rtol=0.01)


@pytest.fixture(scope='module')
def alone():
  return run_losses(tiny.one_device())


def run_losses(mesh):
  start, step_fn, batch = tiny.run(mesh, network=wide(), batch=16)
  values = []
  for _ in range(20):
    start, metrics = step_fn(start, batch)
    values.append(float(metrics['loss']))
  return values


@pytest.mark.parametrize('name', MESHES)
def test_losses_are_the_same_on_every_mesh(alone, name):
  """20 steps with dropout, to 3e-6: rounding differs, nothing else does."""
  values = run_losses(sharding.make_mesh(*MESHES[name]))
  np.testing.assert_allclose(values, alone, rtol=3e-6)


def test_every_gradient_on_three_axes():
  """Each leaf to 1e-4 of its size, on 2x2x2, 8x8 maps, 64 channels.

  Keys' biases are left out: attention does not depend on them, so that their
  gradient is rounding noise on any mesh.
  """
  network = wide()
  # Random everywhere: zero-initialised layers would hide what is upstream.
  params = jax.tree.map(
    lambda a: a + 0.05 * jax.random.normal(jax.random.key(a.size), a.shape),
    network.init(jax.random.key(0)),
  )
  x0 = step.to_float(tiny.images(16)['image'])
  t = np.arange(16) * 60
  eps = jax.random.normal(jax.random.key(1), x0.shape)

  def gradients(mesh):
    where = sharding.shardings(params, mesh)

    def loss_fn(params, x0, t, eps):
      params = sharding.gather_fsdp(params, mesh)

      def predict(xt, t):
        return network.apply(params, xt, t)

      return losses.squared_error(
        predict, schedules.linear(1000), 'eps', x0, t, eps
      ).mean()

    batch = sharding.put_batch(tuple(map(np.asarray, (x0, t, eps))), mesh)
    grads = jax.jit(jax.grad(loss_fn), out_shardings=where)(
      jax.device_put(params, where), *batch
    )
    return jax.device_get(grads)

  alone = gradients(tiny.one_device())
  spread = gradients(sharding.make_mesh(2, 2, 2))
  compared = 0
  for path, leaf in jax.tree_util.tree_flatten_with_path(alone)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if name.endswith('key/bias'):
      continue
    other = spread
    for key in path:
      other = other[key.key]
    error = np.linalg.norm(other - leaf) / np.linalg.norm(leaf)
    assert error < 1e-4, (name, error)
    compared += 1
  assert compared > 40


def test_padding_of_indices():
  mesh = sharding.make_mesh(4, 2, 1)
  padded = sharding.padded_indices(np.array([5, 9, 2]), mesh)
  assert padded.dtype == jnp.uint32
  assert padded.tolist() == [5, 9, 2, 5, 9, 2, 5, 9]
  assert sharding.padded_indices(8, mesh).tolist() == list(range(8))
