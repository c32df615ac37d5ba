"""The U-Net and the transformer equal diffusers' with the same random weights.

The golden files hold what diffusers answered; the tests under the marker
`parity` ask it now, and fail where it is not installed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import guided, unet

from diffusion_jax.models import layers

SHAPES = pytest.mark.parametrize('shape', unet.SHAPES.values(), ids=unet.SHAPES)


@pytest.mark.parametrize(
  'shape',
  [
    pytest.param(
      shape,
      marks=[pytest.mark.slow] * (name in ('cifar10', 'celebahq')),
      id=name,
    )
    for name, shape in unet.SHAPES.items()
  ],
)
def test_equals_golden(shape):
  unet.compare(shape, unet.reference_golden(shape))


@pytest.mark.parity
@SHAPES
def test_equals_diffusers(shape):
  unet.compare(shape, unet.reference_live(shape))


@pytest.mark.parity
def test_another_network_of_theirs_is_seen():
  theirs = unet.TINY.theirs | {'downsample_padding': 1}
  symmetric = dataclasses.replace(unet.TINY, theirs=theirs)
  with pytest.raises(AssertionError, match='relative errors'):
    unet.compare(unet.TINY, unet.reference_live(symmetric))


@pytest.mark.parametrize('name', guided.CASES)
def test_guided_samples_equal_diffusers_step_by_step(name):
  wanted = guided.golden(name)
  found = guided.ours(name)
  np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parity
@pytest.mark.parametrize('name', guided.CASES)
def test_guided_golden_samples_are_diffusers(name):
  wanted = guided.live(name)
  atol = 1e-5 * np.abs(wanted).max()  # samples reach 90
  np.testing.assert_allclose(guided.golden(name), wanted, rtol=0, atol=atol)


@SHAPES
def test_golden_files_are_small_and_say_something(shape):
  golden = unet.reference_golden(shape)
  assert (unet.GOLDEN / f'unet_{shape.name}.npz').stat().st_size < 100_000
  assert golden.outputs.dtype == np.float32
  assert np.isfinite(golden.outputs).all()
  assert (golden.outputs.std(axis=(1, 2)) > 0.1).all()


# Each takes one detail back to what re-implementations often have.


def _symmetric_padding(monkeypatch):
  def wrong(self, x):
    self.conv.padding = ((1, 1), (1, 1))
    return self.conv(x)

  monkeypatch.setattr(layers.Downsample, '__call__', wrong)


def _bilinear_upsampling(monkeypatch):
  def wrong(self, x, size):
    shape = (x.shape[0], *size, x.shape[-1])
    return self.conv(jax.image.resize(x, shape, 'bilinear'))

  monkeypatch.setattr(layers.Upsample, '__call__', wrong)


def _cos_before_sin(monkeypatch):
  right = layers.sinusoid
  monkeypatch.setattr(
    layers, 'sinusoid',
    lambda t, dim, *args: jnp.roll(right(t, dim, *args), dim // 2, -1),
  )  # fmt: skip


def _frequencies_over_half(monkeypatch):
  def wrong(t, dim, *_):
    frequencies = 10_000 ** (-jnp.arange(dim // 2) / (dim // 2))
    angles = jnp.outer(t, frequencies)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

  monkeypatch.setattr(layers, 'sinusoid', wrong)


def _another_time(monkeypatch):
  right = layers.sinusoid
  monkeypatch.setattr(layers, 'sinusoid', lambda t, *args: right(t + 1, *args))


def _change_norms(monkeypatch, **changes):
  right = layers.norm

  def wrong(*args, **kwargs):
    norm = right(*args, **kwargs)
    for name, value in changes.items():
      setattr(norm, name, value)
    return norm

  monkeypatch.setattr(layers, 'norm', wrong)


def _large_epsilon(monkeypatch):
  _change_norms(monkeypatch, epsilon=1e-5)


def _one_head(monkeypatch):
  right = layers.Attention.__init__

  def wrong(self, *args, **kwargs):
    right(self, *args, **{**kwargs, 'num_heads': 1})

  monkeypatch.setattr(layers.Attention, '__init__', wrong)


def _attention_without_residual(monkeypatch):
  right = layers.Attention.__call__
  monkeypatch.setattr(
    layers.Attention, '__call__', lambda self, x, *args: right(self, x) - x
  )


@pytest.mark.parametrize(
  'change',
  [
    _symmetric_padding,
    _attention_without_residual,
    *(
      pytest.param(change, marks=pytest.mark.slow)
      for change in (
        _bilinear_upsampling,
        _cos_before_sin,
        _frequencies_over_half,
        _another_time,
        _large_epsilon,
        _one_head,
      )
    ),
  ],
)
def test_a_wrong_detail_is_seen(change, monkeypatch):
  golden = unet.reference_golden(unet.TINY)
  change(monkeypatch)
  with pytest.raises(AssertionError, match='relative errors'):
    unet.compare(unet.TINY, golden)
