"""Group norm, with swish or without, in two passes over the maps.

The derivative is written out, since what XLA derives takes about twice the
memory traffic: all sums over a map are per example and channel, and everything
else about groups is arithmetic on those [B, C] sums.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class How(NamedTuple):
  """How to normalise: `group_norm`'s arguments that are no arrays."""

  num_groups: int
  epsilon: float
  swish: bool


def group_norm(
  xs: tuple[jax.Array, ...],
  scale: jax.Array,
  bias: jax.Array,
  num_groups: int,
  shift: jax.Array | None = None,
  swish: bool = False,
  epsilon: float = 1e-6,
) -> jax.Array:
  """Group norm (arXiv 1803.08494) of several maps as if concatenated.

  The concatenation is never written, nor is the shifted map: only the result.
  Statistics are float32 for any dtype, and the variance is accurate also where
  the mean is much larger than the standard deviation.

  Args:
    xs: maps [B, H, W, C_i] of one dtype; C is the sum of all C_i.
    scale: [C], or [B, C] for a scale per example.
    bias: [C] or [B, C].
    num_groups: divides C.
    shift: [B, C], added to every pixel before the norm; None = nothing.
    swish: whether to apply swish to the result.
    epsilon: added to the variance.

  Returns:
    [B, H, W, C] in the dtype of the maps.
  """
  if shift is None:
    shift = jnp.zeros((len(xs[0]), scale.shape[-1]))
  how = How(num_groups, epsilon, swish)
  scale, bias = jnp.atleast_2d(scale), jnp.atleast_2d(bias)
  return _norm(how, tuple(xs), scale, bias, shift)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _norm(how, xs, scale, bias, shift):
  return _forward(how, xs, scale, bias, shift)[0]


def _forward(how, xs, scale, bias, shift):
  """The result, and the moments that the backward pass needs."""
  mean, var = _moments(xs)
  moments = mean, *_group_moments(how.num_groups, mean + shift, var)
  # Without the barrier XLA keeps a float32 copy of the maps between the passes.
  xs, moments = jax.lax.optimization_barrier((xs, moments))
  center, inverse = _statistics(*moments, shift, how.epsilon)
  y = _affine(_joined(xs), center, inverse * scale, bias)
  return _activation(how, y)[0].astype(xs[0].dtype), moments


@_norm.defjvp
def _norm_jvp(how, primals, tangents):
  y, moments = _forward(how, *primals)
  # Checkpointed, so that the backward pass keeps the maps and the moments
  # and nothing else.
  tangent = jax.checkpoint(functools.partial(_tangent, how), prevent_cse=False)
  return y, tangent(primals, moments, tangents)


def _tangent(how, primals, moments, tangents):
  """The tangent of the result; linear in the tangents.

  Its transpose is the usual backward pass of a norm: it reads the maps twice,
  for two sums over the pixels and for the gradient.
  """
  xs, scale, bias, shift = primals
  dxs, dscale, dbias, dshift = tangents
  mean, first, _ = moments
  center, inverse = _statistics(*moments, shift, how.epsilon)
  pixels = xs[0].shape[1] * xs[0].shape[2]
  size = pixels * mean.shape[1] // first.shape[1]  # of a group
  # The backward pass uses one for the sums and the other for the gradient, so
  # that XLA writes no float32 maps between the two.
  for_sums = jax.lax.optimization_barrier(xs)
  for_gradient, _ = jax.lax.optimization_barrier((xs, mean))

  def centered(x, center):
    return x.astype(jnp.float32) - _over(center)

  dxs = [dx.astype(jnp.float32) for dx in dxs]
  dsum = _joined([jnp.sum(dx, (1, 2)) for dx in dxs])
  dinner = _joined(
    [
      jnp.sum(centered(x, c) * dx, (1, 2))
      for x, c, dx in zip(for_gradient, _split(center, xs), dxs, strict=True)
    ]
  )
  offset = pixels * (mean - center)  # the sum of x - center over the pixels
  # How mean and scale of the groups change. As one array: one sum less.
  by_channel = jnp.stack([dsum + pixels * dshift, dinner + offset * dshift], 1)
  dmean, dinner = jnp.moveaxis(_over_groups(by_channel, first) / size, 1, 0)
  dfactor = inverse * (dscale - scale * inverse**2 * dinner)
  doffset = dbias + scale * inverse * (dshift - dmean)
  # Without the barrier XLA takes sums over the batch from the maps.
  dfactor, doffset = jax.lax.optimization_barrier((dfactor, doffset))

  def slope(xs):
    z = _affine(_joined(xs), center, inverse * scale, bias)
    return _activation(how, z)[1]

  indirect = centered(_joined(for_sums), center) * _over(dfactor)
  dy = slope(for_sums) * (indirect + _over(doffset))
  dy += slope(for_gradient) * _over(inverse * scale) * _joined(dxs)
  return dy.astype(xs[0].dtype)


def _moments(xs):
  """Mean and variance over the pixels, [B, C] float32."""
  pivots, firsts, seconds = [], [], []
  for x in xs:
    # Any value near the mean keeps the digits of the variance. Maps of 16 bits
    # have no such digits: rounding them has changed the variance by more.
    wide = x.dtype == jnp.float32
    pivot = x[:, :1, :1, :] if wide else jnp.zeros((1, 1, 1, x.shape[-1]))
    x = x.astype(jnp.float32)
    # XLA would write x - pivot for a CPU, if both sums took the same array.
    again = jax.lax.optimization_barrier(pivot) if wide else pivot
    pivots.append(jnp.broadcast_to(pivot[:, 0, 0], (len(x), x.shape[-1])))
    firsts.append(jnp.mean(x - pivot, axis=(1, 2)))
    seconds.append(jnp.mean(jnp.square(x - again), axis=(1, 2)))
  pivot, first, second = map(_joined, (pivots, firsts, seconds))
  # Rounding could make it negative, where all pixels are nearly the same.
  return pivot + first, jnp.maximum(second - jnp.square(first), 0.0)


def _group_moments(num_groups, mean, var):
  """Sums over groups [B, groups], about the mean of their first channel."""
  mean, var = (x.reshape(len(x), num_groups, -1) for x in (mean, var))
  deviation = mean - mean[..., :1]
  return jnp.sum(deviation, -1), jnp.sum(var + jnp.square(deviation), -1)


def _statistics(mean, first, second, shift, epsilon):
  """What the norm subtracts and multiplies by, both [B, C]."""
  size = mean.shape[-1] // first.shape[-1]
  first, second = first / size, second / size
  of_group = (mean + shift)[:, ::size] + first
  variance = jnp.maximum(second - jnp.square(first), 0.0)
  inverse = jax.lax.rsqrt(variance + epsilon)
  return jnp.repeat(of_group, size, 1) - shift, jnp.repeat(inverse, size, 1)


def _affine(x, center, factor, bias):
  return (x.astype(jnp.float32) - _over(center)) * _over(factor) + _over(bias)


def _activation(how, z):
  """The activation of z and its derivative."""
  if not how.swish:
    return z, 1.0
  sigmoid = jax.nn.sigmoid(z)
  return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))


def _joined(xs):
  return jnp.concatenate(xs, axis=-1) if len(xs) > 1 else xs[0]


def _split(sums, xs):
  """[B, C] -> a [B, C_i] for each map."""
  ends = list(itertools.accumulate(x.shape[-1] for x in xs))[:-1]
  return jnp.split(sums, ends, axis=-1)


def _over_groups(by_channel, like):
  """[B, N, C] -> each channel's sum over its group, [B, N, C]."""
  shape = by_channel.shape
  grouped = by_channel.reshape(*shape[:2], like.shape[-1], -1)
  sums = jnp.sum(grouped, axis=-1, keepdims=True)
  return jnp.broadcast_to(sums, grouped.shape).reshape(shape)


def _over(sums):
  return sums[:, None, None, :]
