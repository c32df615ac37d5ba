"""What lies between an encoder and a decoder, as pure functions.

Four regularisers of the latents z [..., C], channels last:

  kl    a Gaussian posterior per number, whose mean and log variance the encoder
        gives, close to the standard normal (arXiv 1312.6114)
  vq    the nearest vector of a learned codebook (arXiv 1711.00937)
  fsq   every number rounded to one of a few levels (arXiv 2309.15505)
  norm  zero mean and unit variance over the channels (arXiv 2501.18593)
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.models import pointwise
from diffusion_jax.process import noise

REGULARISERS = ('kl', 'vq', 'fsq', 'norm')
LOG_VARIANCES = (-30.0, 20.0)


class Posterior(NamedTuple):
  """A Gaussian with a diagonal covariance for each example.

  Attributes:
    mean: [..., C].
    log_variance: [..., C].
  """

  mean: jax.Array
  log_variance: jax.Array


def posterior(moments: jax.Array) -> Posterior:
  """The posterior of an encoder's output.

  Args:
    moments: [..., 2 C], means, then log variances, which are clipped to
      LOG_VARIANCES.
  """
  mean, log_variance = jnp.split(moments, 2, axis=-1)
  return Posterior(mean, jnp.clip(log_variance, *LOG_VARIANCES))


def sample(given: Posterior, keys: jax.Array) -> jax.Array:
  """A sample of the posterior of each example.

  Args:
    given: the posteriors, [B, ..., C].
    keys: [B] random keys.
  """
  eps = noise.normal(keys, given.mean.shape[1:], given.mean.dtype)
  return given.mean + jnp.exp(0.5 * given.log_variance) * eps


def kl(given: Posterior) -> jax.Array:
  """KL(posterior || N(0, 1)), in nats, summed over each example: [B]."""
  mean, log_variance = given
  # expm1: variance - 1 keeps its digits near the prior.
  terms = jnp.square(mean) + jnp.expm1(log_variance) - log_variance
  return 0.5 * jnp.sum(terms, axis=tuple(range(1, mean.ndim)))


def straight_through(z: jax.Array, quantised: jax.Array) -> jax.Array:
  """The quantised values, with the gradient of z."""
  return z + jax.lax.stop_gradient(quantised - z)


# --- a codebook --------------------------------------------------------------


def nearest(codebook: jax.Array, z: jax.Array) -> jax.Array:
  """The index of the nearest code, the first of equal ones.

  Args:
    codebook: [n, e].
    z: [..., e].

  Returns:
    int32 [...].
  """
  # |z|^2 is the same for all codes.
  products = jnp.einsum(
    '...e,ne->...n', z, codebook, precision=jax.lax.Precision.HIGHEST
  )
  half = 0.5 * jnp.sum(jnp.square(codebook), axis=-1)
  half = pointwise.broadcast(half, products)
  return jnp.argmin(half - products, axis=-1).astype(jnp.int32)


def counted(index: jax.Array, z: jax.Array, codes: int) -> tuple:
  """How often each code is the nearest, and the sum of what it is nearest to.

  Both add up over rows, so that they do not depend on how a batch is split.

  Args:
    index: int [...], of codes.
    z: [..., e].
    codes: n, the size of the codebook.

  Returns:
    ([n], [n, e]) float32.
  """
  # As products, whose order of additions is fixed on every device.
  hot = jax.nn.one_hot(index.reshape(-1), codes)
  z = jax.lax.stop_gradient(z).reshape(-1, z.shape[-1]).astype(jnp.float32)
  sums = jnp.matmul(hot.T, z, precision=jax.lax.Precision.HIGHEST)
  return jnp.sum(hot, axis=0), sums


def averaged(average: tuple, batch: tuple, decay: float) -> tuple:
  """Moving averages of the counts and sums of `counted`.

  Args:
    average: counts [n] and sums [n, e] before.
    batch: those of a batch.
    decay: in [0, 1); with 0, `codebook_of` is a step of k-means.
  """
  return tuple(
    decay * old + (1 - decay) * new
    for old, new in zip(average, batch, strict=True)
  )


def codebook_of(
  average: tuple, codebook: jax.Array, least: float = 1e-5
) -> jax.Array:
  """The codebook of averaged counts and sums (arXiv 1711.00937, eq. 8).

  Args:
    average: counts [n] and sums [n, e].
    codebook: [n, e], whose codes stay where the count is too small to divide
      by.
    least: the share of the mean count up to which it is.
  """
  counts, sums = average
  # A share, because counts are proportional to the number of latents in a
  # batch, and codes may not depend on it.
  used = counts > least * jnp.mean(counts)
  means = sums / jnp.where(used, counts, 1)[:, None]
  return jnp.where(used[:, None], means, codebook)


def revived(average: tuple, least: float, candidates: jax.Array) -> tuple:
  """Counts and sums in which dead codes have been replaced by candidates.

  Args:
    average: counts [n] and sums [n, e].
    least: codes whose count is below it are dead; a new one has this count.
    candidates: [k, e], latents to use, in this order; if there are more dead
      codes than candidates, the others stay dead.
  """
  counts, sums = average
  dead = counts < least
  rank = jnp.cumsum(dead) - 1
  replaced = dead & (rank < len(candidates))
  new = least * candidates[jnp.clip(rank, 0, len(candidates) - 1)]
  return (
    jnp.where(replaced, least, counts),
    jnp.where(replaced[:, None], new, sums),
  )


def histogram(
  index: jax.Array, codes: int, weights: jax.Array | float = 1.0
) -> jax.Array:
  """How often each code occurs: [codes] float32.

  Of whole weights the sums are exact in any order.

  Args:
    index: int [...], of codes.
    codes: n, the number of codes.
    weights: how much each index counts, an array that broadcasts with them.
  """
  weights = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), index.shape)
  return jnp.zeros(codes).at[index].add(weights)


def use_of(counts: jax.Array) -> dict[str, jax.Array]:
  """How codes are used.

  Args:
    counts: [n], how often each code occurs, of any total above 0.

  Returns:
    'perplexity': exp of the entropy of their use, from 1 to n, and
    'codes_used': the share of codes that occur.
  """
  p = counts / jnp.sum(counts)
  return {
    'perplexity': jnp.exp(-jnp.sum(jax.scipy.special.xlogy(p, p))),
    'codes_used': (counts > 0).mean(),
  }


# --- levels (finite scalar quantisation) -------------------------------------


def bounded(z: jax.Array, levels: Sequence[int]) -> jax.Array:
  """Squashes each number to the range of its levels, before rounding.

  Args:
    z: [..., C].
    levels: the number of levels of each channel, C numbers of at least 2.

  Returns:
    [..., C] in about [-1, 1]: `rounded` of it gives whole multiples of
    1 / (levels // 2).
  """
  half, offset, width = _of_levels(levels, z)
  shift = jnp.arctanh(offset / half)
  return (jnp.tanh(z + shift) * half - offset) / width


def rounded(bound: jax.Array, levels: Sequence[int]) -> jax.Array:
  """The nearest level of each number.

  Args:
    bound: [..., C], see `bounded`; numbers out of range get the last level.
    levels: see `bounded`.
  """
  return _values(_digits(bound, levels), levels)


def level_index(bound: jax.Array, levels: Sequence[int]) -> jax.Array:
  """The number of the code, int32 [...] below the product of the levels."""
  digits = _digits(bound, levels).astype(jnp.int32)
  return jnp.sum(digits * _bases(levels, digits), axis=-1)


def _digits(bound, levels):
  """Which level of each channel, from 0, as floats."""
  _, _, width = _of_levels(levels, bound)
  last = pointwise.broadcast(jnp.asarray(levels) - 1, bound)
  return jnp.clip(jnp.round(bound * width) + width, 0, last)


def _values(digits, levels):
  _, _, width = _of_levels(levels, digits)
  return (digits - width) / width


def _bases(levels, like):
  bases = [math.prod(levels[:i]) for i in range(len(levels))]
  return pointwise.broadcast(jnp.asarray(bases), like)


def _of_levels(levels, like):
  """The half range before rounding, the offset of even counts, the width."""
  count = jnp.asarray(levels, jnp.float32)
  # A little more than the last levels, so that tanh reaches them.
  half = (count - 1) * (1 + 1e-3) / 2
  offset = jnp.where(count % 2 == 0, 0.5, 0.0)
  return tuple(
    x.reshape((1,) * (like.ndim - 1) + (-1,))
    for x in (half, offset, count // 2)
  )


# --- unit variance -----------------------------------------------------------


def normed(z: jax.Array, epsilon: float = 1e-6) -> jax.Array:
  """Zero mean and unit variance over the channels, without parameters."""
  z = z - jnp.mean(z, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(z), axis=-1, keepdims=True)
  return z * jax.lax.rsqrt(variance + epsilon)
