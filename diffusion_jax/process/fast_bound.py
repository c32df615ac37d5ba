"""Estimates the variational bound from a hundredth of the evaluations.

Prior and decoder are computed for every image, and the terms in between are
sampled: E over t ~ p of term(t) / p(t) is their sum for any p > 0. The variance
is lowest if p is proportional to the root mean square of the term, which a
pilot run estimates (arXiv 2102.09672, section 3.3, samples training times in
this way).

Numbers folded into an image's key: 0 .. K-1 are the steps of
`likelihood.terms`; from K on they alternate between `sampled` and `pilot`,
first for the offsets, then for the draws.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from diffusion_jax.process import gaussian, likelihood, noise, schedules
from diffusion_jax.system.errors import UserError


def _strata(keys, count, label):
  """[count, B]: for each key, one uniform number in each of `count` strata."""
  offsets = noise.draw(keys, label, sample=jax.random.uniform)
  return (jnp.arange(count)[:, None] + offsets[None]) / count


def pilot(
  denoiser: gaussian.Denoiser, steps: likelihood.Steps, x0, keys, count: int = 1
) -> tuple[jax.Array, jax.Array]:
  """Terms at steps spread evenly in the log of their distance from the end.

  Args:
    denoiser: (xt, t) -> (x0, eps).
    steps: the K steps of the grid, at least 2.
    x0: [B, ...] data.
    keys: [B] random keys, the same as for `sampled`; the noise differs.
    count: evaluations per image.

  Returns:
    (steps [count, B], bits [count, B]), for `proposal`.
  """
  num_steps = len(steps.t)
  place = jnp.floor(num_steps ** _strata(keys, count, num_steps + 1))
  place = jnp.clip(place.astype(jnp.int32), 1, num_steps - 1)
  which = num_steps - 1 - place
  labels = num_steps + 3 + 2 * jnp.arange(count)
  # None of them is the last step, so `discrete` has no effect.
  return which, likelihood.terms(
    denoiser, steps, x0, keys, which, False, labels
  ).bits


def proposal(
  which, bits, num_steps: int, uniform: float = 0.1, width: float = 0.25
) -> np.ndarray:
  """Sampling probabilities of the steps, from a pilot; on the host.

  Proportional to the root mean square of the terms, smoothed over the log of
  the steps' distance from the end by a Gaussian of standard deviation `width`.
  A uniform part is mixed in, so that no weight 1 / p exceeds
  (K - 1) / uniform.

  Args:
    which: any shape, the steps of the pilot, all below K - 1.
    bits: the same shape, their terms.
    num_steps: K.
    uniform: the share of the uniform part.
    width: width of the smoothing: 0.25 averages over a factor of about 1.3 in
      t.

  Returns:
    [K-1] float64, for every step but the last; they sum to 1.
  """
  which, bits = np.ravel(which), np.ravel(np.asarray(bits, np.float64))
  place = np.log(np.arange(num_steps - 1, 0, -1))
  kernel = np.exp(-0.5 * ((place[:, None] - place) / width) ** 2) + 1e-99
  count = np.bincount(which, minlength=num_steps - 1)
  square = np.bincount(which, bits**2, num_steps - 1)
  size = np.sqrt(kernel @ square / (kernel @ count))
  size += np.finfo(np.float64).tiny  # all terms 0: uniform
  return uniform / len(size) + (1 - uniform) * size / size.sum()


def sampled(
  denoiser: gaussian.Denoiser,
  schedule: schedules.Schedule,
  steps: likelihood.Steps,
  x0,
  keys,
  probabilities,
  draws: int = 8,
  discrete: bool = True,
) -> jax.Array:
  """An unbiased estimate of each image's bound, from draws + 1 evaluations.

  The estimate is prior + decoder + the mean over draws of term / probability.
  The draws of an image are stratified: one in each of `draws` strata of equal
  probability, at a shared random offset. The offset is uniform, so the mean
  over draws is an unbiased mean under p. It remains unbiased if p comes from a
  pilot on the same images, because the noise and steps of the pilot are
  independent: for every p the expectation is the image's bound. The decoder's
  noise is that of `likelihood.terms`.

  Args:
    denoiser: (xt, t) -> (x0, eps).
    schedule: the noise schedule.
    steps: the steps of the grid; concrete, not an argument of a jitted
      function.
    x0: [B, ...] data.
    keys: [B] random keys; an image's estimate depends only on its own key.
    probabilities: [K-1], see `proposal`.
    draws: number of steps to sample.
    discrete: see `likelihood.term`.

  Returns:
    [B] bits per dimension, independent of each other given the probabilities.
  """
  num_steps = len(steps.t)
  edges = jnp.cumsum(jnp.asarray(probabilities, x0.dtype))
  edges = edges / edges[-1]
  # Recomputed in this dtype, so that the weights match the draws exactly.
  drawn = jnp.diff(edges, prepend=0)
  place = _strata(keys, draws, num_steps).astype(x0.dtype)
  tried = jnp.searchsorted(edges, place, side='right')
  tried = jnp.minimum(tried, num_steps - 2)
  decoder = jnp.full((1, len(x0)), num_steps - 1)
  labels = num_steps + 2 + 2 * jnp.arange(draws)
  which = jnp.concatenate([decoder, tried])
  labels = jnp.append(num_steps - 1, labels)
  bits = likelihood.terms(
    denoiser, steps, x0, keys, which, discrete, labels
  ).bits
  between = jnp.mean(bits[1:] / drawn[tried], axis=0)
  prior = likelihood.prior(schedule, x0, steps.t[0])
  return prior + bits[0] + between


def interval(values) -> tuple[float, float, float]:
  """(mean, low, high): the 95% interval by Student's t; on the host.

  Images are the independent units. Their spread includes both the differences
  between images and the sampling of times and noise, so no second term is
  needed. The interval is for the mean over the distribution of the images, and
  therefore conservative for the mean over these images only.

  Args:
    values: [N], from `sampled`.

  Raises:
    UserError: there are fewer than 2 values.
  """
  values = np.asarray(values, np.float64)
  if len(values) < 2:
    raise UserError(
      f'{len(values)} images: an interval needs at least 2, score more'
    )
  mean, error = values.mean(), values.std(ddof=1) / np.sqrt(len(values))
  half = scipy.special.stdtrit(len(values) - 1, 0.975) * error
  return float(mean), float(mean - half), float(mean + half)
