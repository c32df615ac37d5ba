"""Group norm, with swish or without, in two passes over the maps.

The derivative is written out, since what XLA derives takes about twice the
memory traffic: all sums over a map are per example and channel, and everything
else about groups is arithmetic on those [B, C] sums.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

EPSILON = 1e-6


def group_norm(
  xs: tuple[jax.Array, ...],
  scale: jax.Array,
  bias: jax.Array,
  num_groups: int,
  shift: jax.Array | None = None,
  swish: bool = False,
) -> jax.Array:
  """Group norm (arXiv 1803.08494) of several maps as if concatenated.

  The concatenation is never written, nor is the shifted map: only the result.
  Statistics are float32 for any dtype, and the variance is accurate also where
  the mean is much larger than the standard deviation.

  Args:
    xs: maps [B, H, W, C_i] of one dtype; C is the sum of all C_i.
    scale: [C].
    bias: [C].
    num_groups: divides C.
    shift: [B, C], added to every pixel before the norm; None = nothing.
    swish: whether to apply swish to the result.

  Returns:
    [B, H, W, C] in the dtype of the maps.
  """
  if shift is None:
    shift = jnp.zeros((len(xs[0]), len(scale)))
  return _norm(num_groups, swish, tuple(xs), scale, bias, shift)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _norm(num_groups, swish, xs, scale, bias, shift):
  return _forward(num_groups, swish, xs, scale, bias, shift)[0]


def _forward(num_groups, swish, xs, scale, bias, shift):
  """The result, and the statistics of channels and groups."""
  mean, var = _moments(xs)
  of_group, inverse = _group_moments(num_groups, mean + shift, var)
  # Without the barrier XLA keeps a float32 copy of the maps between the passes.
  xs, of_group, inverse = jax.lax.optimization_barrier((xs, of_group, inverse))
  center = _to_channels(of_group, mean) - shift
  factor = _to_channels(inverse, mean) * scale
  y = _activation(swish, _affine(_joined(xs), center, factor, bias))[0]
  return y.astype(xs[0].dtype), (mean, of_group, inverse)


@_norm.defjvp
def _norm_jvp(num_groups, swish, primals, tangents):
  y, statistics = _forward(num_groups, swish, *primals)
  # Checkpointed, so that the backward pass keeps the maps and the statistics
  # and nothing else.
  tangent = jax.checkpoint(
    functools.partial(_tangent, swish), prevent_cse=False
  )
  return y, tangent(primals, statistics, tangents)


def _tangent(swish, primals, statistics, tangents):
  """The tangent of the result; linear in the tangents.

  Its transpose is the usual backward pass of a norm: it reads the maps twice,
  for two sums over the pixels and for the gradient.
  """
  xs, scale, bias, shift = primals
  dxs, dscale, dbias, dshift = tangents
  mean, of_group, inverse = statistics
  pixels = xs[0].shape[1] * xs[0].shape[2]
  size = pixels * scale.size // inverse.shape[1]  # of a group
  center = _to_channels(of_group, mean) - shift
  wide = _to_channels(inverse, mean)
  # Barriers, so that XLA writes no float32 maps between the two passes.
  for_sums = jax.lax.optimization_barrier(xs)
  for_maps, _ = jax.lax.optimization_barrier((xs, inverse))

  dxs = [dx.astype(jnp.float32) for dx in dxs]
  plain_sums = jnp.concatenate([jnp.sum(dx, (1, 2)) for dx in dxs], -1)
  sums = jnp.concatenate(
    [
      jnp.sum((x.astype(jnp.float32) - _over(c)) * dx, (1, 2))
      for x, c, dx in zip(for_sums, _split(center, xs), dxs, strict=True)
    ],
    axis=-1,
  )
  # How the mean and the scale of the groups change.
  dmean = _to_groups(plain_sums + pixels * dshift, inverse) / size
  offset = pixels * (mean - center)  # the sum of x - center over the pixels
  dinner = _to_groups(sums + offset * dshift, inverse) * inverse**2 / size
  dfactor = wide * (dscale - scale * _to_channels(dinner, mean))
  doffset = dbias + scale * wide * (dshift - _to_channels(dmean, mean))
  # Without the barrier XLA takes sums over the batch from the maps.
  dfactor, doffset = jax.lax.optimization_barrier((dfactor, doffset))

  def slope(xs):
    x = _affine(_joined(xs), center, wide * scale, bias)
    return _activation(swish, x)[1]

  centered = _joined(for_sums).astype(jnp.float32) - _over(center)
  by_statistics = slope(for_sums) * (
    centered * _over(dfactor) + _over(doffset)
  )
  directly = slope(for_maps) * _over(wide * scale) * _joined(dxs)
  return (directly + by_statistics).astype(xs[0].dtype)


def _moments(xs):
  """Mean and variance over the pixels, [B, C] float32."""
  means, variances = [], []
  for x in xs:
    # Any value near the mean would do: it keeps the digits of the variance.
    pivot = x[:, :1, :1, :].astype(jnp.float32)
    deviation = x.astype(jnp.float32) - pivot
    first = jnp.mean(deviation, axis=(1, 2))
    second = jnp.mean(jnp.square(deviation), axis=(1, 2))
    means.append(pivot[:, 0, 0] + first)
    variances.append(second - jnp.square(first))
  return _joined(means), _joined(variances)


def _group_moments(num_groups, mean, var):
  """Mean and inverse standard deviation [B, groups] from those of channels."""
  mean, var = (x.reshape(len(x), num_groups, -1) for x in (mean, var))
  pivot = mean[..., :1]  # as above
  first = jnp.mean(mean - pivot, axis=-1)
  second = jnp.mean(var + jnp.square(mean - pivot), axis=-1)
  inverse = jax.lax.rsqrt(second - jnp.square(first) + EPSILON)
  return pivot[..., 0] + first, inverse


def _affine(x, center, factor, bias):
  return (x.astype(jnp.float32) - _over(center)) * _over(factor) + bias


def _activation(swish, z):
  """The activation of z and its derivative."""
  if not swish:
    return z, 1.0
  sigmoid = jax.nn.sigmoid(z)
  return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))


def _joined(xs):
  return jnp.concatenate(xs, axis=-1) if len(xs) > 1 else xs[0]


def _split(sums, xs):
  """[B, C] -> a [B, C_i] for each map."""
  ends = list(itertools.accumulate(x.shape[-1] for x in xs))[:-1]
  return jnp.split(sums, ends, axis=-1)


def _to_groups(sums, like):
  """[B, C] -> sums over the channels of each group, [B, groups]."""
  return jnp.sum(sums.reshape(*like.shape, -1), axis=-1)


def _to_channels(of_group, like):
  """[B, groups] -> [B, C]."""
  return jnp.repeat(of_group, like.shape[-1] // of_group.shape[-1], axis=-1)


def _over(sums):
  return sums[:, None, None, :]
