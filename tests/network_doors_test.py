"""The doors of networks: each condition reaches its own example only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.unet import random_params

from diffusion_jax import models
from diffusion_jax.models import doors, unet
from diffusion_jax.system.errors import UserError

ALL = {'label': 3, 'vector': 2, 'tokens': 5, 'channels': 1}
SHAPES = {
  'dit': {'channels': 8, 'num_blocks': 2, 'num_heads': 2},
  'unet': {
    'channels': 8,
    'multipliers': (1, 2),
    'num_blocks': 1,
    'attention_resolutions': (4,),
    'num_groups': 4,
    'dropout': 0.0,
  },
}
FEW = {'multipliers': (1,), 'attention_resolutions': (), 'num_blocks': 1}
NETWORKS = pytest.mark.parametrize('name', SHAPES)


def make(name, doors=ALL, **kwargs):
  return models.create(name, (8, 8, 3), doors, **SHAPES[name] | kwargs)


@functools.cache
def with_all(name):
  """A network with all doors, compiled, and inputs for three examples."""
  model = make(name, out_channels=6, remat='all')
  params = random_params(model)
  rng = np.random.default_rng(0)
  xt = rng.standard_normal((3, 8, 8, 3)).astype('f4')
  cond = {
    'label': np.array([0, 1, 3]),
    'vector': rng.standard_normal((3, 2)).astype('f4'),
    'tokens': rng.standard_normal((3, 4, 5)).astype('f4'),
    'mask': np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], bool),
    'channels': rng.standard_normal((3, 8, 8, 1)).astype('f4'),
  }
  apply = jax.jit(lambda xt, cond: model.apply(params, xt, T, None, cond))
  return apply, xt, cond


T = np.array([10, 500, 900])


def changed_rows(name, door, value) -> list[int]:
  """The examples whose prediction another condition changes."""
  apply, xt, cond = with_all(name)
  before, after = apply(xt, cond), apply(xt, {**cond, door: value})
  difference = np.abs(np.asarray(after - before)).reshape(len(xt), -1)
  found = np.flatnonzero(difference.max(-1))
  assert (difference[found].max(-1) > 1e-4).all()
  return found.tolist()


@NETWORKS
def test_a_condition_changes_its_own_row_only(name):
  _, _, cond = with_all(name)
  for row in range(2):
    for door in ALL:
      value = cond[door].copy()
      value[row] = 2 if door == 'label' else value[row] + 1
      assert changed_rows(name, door, value) == [row], door


@NETWORKS
def test_tokens_that_are_not_valid_change_nothing(name):
  _, _, cond = with_all(name)
  tokens = np.where(cond['mask'][..., None], cond['tokens'], 7).astype('f4')
  assert changed_rows(name, 'tokens', tokens) == []
  assert changed_rows(name, 'mask', np.zeros((3, 4), bool)) == [0, 1]


@NETWORKS
def test_one_condition_serves_all_rows(name):
  apply, xt, cond = with_all(name)
  one = {door: value[:1] for door, value in cond.items()}
  repeated = {door: value.repeat(3, axis=0) for door, value in one.items()}
  np.testing.assert_allclose(apply(xt, one), apply(xt, repeated), atol=1e-5)


@NETWORKS
def test_outputs_have_the_channels_that_are_asked_for(name):
  apply, xt, cond = with_all(name)
  assert apply(xt, cond).shape == (3, 8, 8, 6)


@NETWORKS
def test_label_and_vector_leave_other_initial_values_alone(name):
  key, doors = jax.random.key(0), {'label': 3, 'vector': 2}
  plain = models.named(make(name, {}, **FEW).init(key))
  told = models.named(make(name, doors, **FEW).init(key))
  assert told.keys() - plain.keys() == {'label/embedding', 'vector/kernel'}
  assert told['label/embedding'].shape[0] == 4  # three classes and 'none'
  for each, value in plain.items():
    np.testing.assert_array_equal(value, told[each])


def test_initial_values_of_a_unet_without_doors_stay():
  """Those of the runs so far: a name, its draw and its distribution."""
  key = jax.random.key(0)
  found = models.named(make('unet', {}, **FEW).init(key))
  drawn = iter(range(10**6))
  for name in ('time1', 'time2', 'conv_in', 'down/0/blocks/0/norm1'):
    for parameter in (
      ('scale', 'bias') if 'norm' in name else ('kernel', 'bias')
    ):
      draw = jax.random.fold_in(key, next(drawn))
      value = found[f'{name}/{parameter}']
      if parameter == 'kernel':
        fan = value.size * (1 / value.shape[-1] + 1 / value.shape[-2]) / 2
        bound = np.sqrt(3 / fan)
        wanted = jax.random.uniform(draw, value.shape, minval=-1) * bound
        np.testing.assert_allclose(value, wanted, atol=1e-6)


def test_cross_attention_begins_with_almost_nothing():
  params = models.named(make('unet').init(jax.random.key(0)))
  outs = [name for name in params if 'cross' in name and 'out/kernel' in name]
  assert len(outs) == 4  # one down, the middle, two up
  for name in outs:
    assert np.abs(params[name]).max() < 1e-4


def test_a_door_that_a_network_lacks_is_one_line(monkeypatch):
  monkeypatch.setattr(unet.UNet, 'DOORS', ('label', 'vector'))
  with pytest.raises(UserError) as error:
    make('unet')
  told = str(error.value)
  assert 'has tokens and channels, but model.name=unet' in told
  assert 'takes label and vector' in told
  assert '\n' not in told
  assert make('unet', {'label': 3}).doors == ('label',)


def test_attention_to_tokens():
  """In float64 NumPy, two heads."""
  rng = np.random.default_rng(0)
  query, key, value = (
    rng.standard_normal(shape).astype('f4')
    for shape in ((2, 2, 3, 8), (2, 5, 8), (2, 5, 8))
  )
  mask = np.array([[1, 0, 1, 1, 0], [0] * 5], bool)
  found = doors.attend(*map(jnp.asarray, (query, key, value, mask)), 2)
  q, k, v = (x.reshape(2, -1, 2, 4).astype('f8') for x in (query, key, value))
  weights = np.exp(np.einsum('bqhc,bkhc->bhqk', q, k) / 2) * mask[:, None, None]
  weights[0] /= weights[0].sum(-1, keepdims=True)
  wanted = np.einsum('bhqk,bkhc->bqhc', weights, v).reshape(2, 2, 3, 8)
  np.testing.assert_allclose(found, wanted, atol=1e-5)
