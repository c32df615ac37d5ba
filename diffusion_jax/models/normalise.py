"""Group norm, with swish or without, in two passes over the maps.

The derivative is written out, since what XLA derives takes about twice the
memory traffic: all sums over a map are per example and channel, and everything
else about groups is arithmetic on those [B, C] sums.
"""

import functools

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
  """The result, and the moments of the channels, mean and variance [B, C]."""
  moments = _moments(xs)
  center, factor = _affine(num_groups, *moments, scale, shift)
  # Without the barrier XLA keeps a float32 copy of the maps between the passes.
  xs, center = jax.lax.optimization_barrier((xs, center))
  y = [
    (_activation(swish, z)[0]).astype(xs[0].dtype)
    for z in _standardised(xs, center, factor, bias)
  ]
  return jnp.concatenate(y, axis=-1) if y[1:] else y[0], moments


@_norm.defjvp
def _norm_jvp(num_groups, swish, primals, tangents):
  y, moments = _forward(num_groups, swish, *primals)
  # Checkpointed, so that the backward pass keeps the maps and the moments and
  # nothing else.
  tangent = jax.checkpoint(
    functools.partial(_tangent, num_groups, swish), prevent_cse=False
  )
  return y, tangent(primals, moments, tangents)


def _tangent(num_groups, swish, primals, moments, tangents):
  """The tangent of the result; linear in the tangents."""
  xs, scale, bias, shift = primals
  dxs, dscale, dbias, dshift = tangents
  dxs = [dx.astype(jnp.float32) for dx in dxs]
  pixels = xs[0].shape[1] * xs[0].shape[2]
  means = _split(moments[0], xs)
  dmean = [jnp.sum(dx, axis=(1, 2)) / pixels for dx in dxs]
  dvar = [
    2 * jnp.sum((x.astype(jnp.float32) - _over(mean)) * dx, (1, 2)) / pixels
    for x, dx, mean in zip(xs, dxs, means, strict=True)
  ]
  (center, factor), (dcenter, dfactor) = jax.jvp(
    functools.partial(_affine, num_groups),
    (*moments, scale, shift),
    (jnp.concatenate(dmean, -1), jnp.concatenate(dvar, -1), dscale, dshift),
  )
  # [B, C], so that one sum serves both. Without the barrier XLA takes the sum
  # over the batch from the maps.
  doffset = jax.lax.optimization_barrier(dbias - dcenter * factor)
  # The backward pass reads the maps twice, for the sums over the pixels and for
  # the gradient. Barriers keep XLA from writing float32 maps in between.
  by_sums = jax.lax.optimization_barrier(xs)
  by_maps, _ = jax.lax.optimization_barrier((xs, center))

  def slopes(xs):
    standardised = _standardised(xs, center, factor, bias)
    return (_activation(swish, z)[1] for z in standardised)

  dys = []
  for x, dx, c, f, df, do, direct, indirect in zip(
    by_sums, dxs,
    *(_split(s, xs) for s in (center, factor, dfactor, doffset)),
    slopes(by_maps), slopes(by_sums), strict=True,
  ):  # fmt: skip
    centered = x.astype(jnp.float32) - _over(c)
    dy = indirect * (centered * _over(df) + _over(do))
    dys.append((direct * _over(f) * dx + dy).astype(x.dtype))
  return jnp.concatenate(dys, axis=-1) if dys[1:] else dys[0]


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
  return jnp.concatenate(means, axis=-1), jnp.concatenate(variances, axis=-1)


def _affine(num_groups, mean, var, scale, shift):
  """(center, factor) [B, C] with norm(x + shift) = (x - center) factor."""
  mean, var, shift = (
    x.reshape(len(mean), num_groups, -1) for x in (mean, var, shift)
  )
  of_group = jnp.mean(mean + shift, axis=-1, keepdims=True)
  deviation = mean + shift - of_group
  variance = jnp.mean(var + jnp.square(deviation), axis=-1, keepdims=True)
  factor = jax.lax.rsqrt(variance + EPSILON) * scale.reshape(num_groups, -1)
  center = of_group - shift
  return center.reshape(len(mean), -1), factor.reshape(len(mean), -1)


def _standardised(xs, center, factor, bias):
  for x, c, f, b in zip(
    xs, *(_split(s, xs) for s in (center, factor, bias[None])), strict=True
  ):
    yield (x.astype(jnp.float32) - _over(c)) * _over(f) + _over(b)


def _activation(swish, z):
  """The activation of z and its derivative."""
  if not swish:
    return z, 1.0
  sigmoid = jax.nn.sigmoid(z)
  return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))


def _split(sums, xs):
  """[B, C] -> a [B, C_i] for each map."""
  ends, at = [], 0
  for x in xs:
    ends.append(slice(at, at + x.shape[-1]))
    at += x.shape[-1]
  return [sums[:, end] for end in ends]


def _over(sums):
  return sums[:, None, None, :]
