"""Guidance: D = u + w (c - u), for a conditional model c and another one, u.

w = 1 is c alone and w = 0 is u alone. Papers that write (1 + w) c - w u, such
as arXiv 2207.12598, count from 0: w here is their w plus 1.

A pair is a function (xt, t) -> (c, u) of two `Denoised`. As x0 and eps are
linear in each other at a given xt, both are combined with the same weight. A
learned variance is that of c.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.process import gaussian
from diffusion_jax.process.gaussian import Denoised, Denoiser
from diffusion_jax.process.schedules import Schedule

Pair = Callable[[jax.Array, jax.Array], tuple[Denoised, Denoised]]


def twice(x: jax.Array) -> jax.Array:
  """[B, ...] -> [2 B, ...], each row twice, next to each other.

  So on a mesh, both copies are on the device of the row.
  """
  return jnp.repeat(x, 2, axis=0)


def alternate(first: jax.Array, second: jax.Array) -> jax.Array:
  """Two arrays [B, ...] -> [2 B, ...], their rows in turn."""
  pairs = jnp.stack([first, second], axis=1)
  return pairs.reshape(-1, *first.shape[1:])


def classifier_free(both: Denoiser) -> Pair:
  """c and u of one network, in one call (arXiv 2207.12598).

  Args:
    both: a denoiser of 2 B rows: rows 0, 2, ... have the condition, rows
      1, 3, ... do not, see `alternate`.
  """

  def pair(xt, t):
    found = both(twice(xt), twice(t) if jnp.ndim(t) else t)

    def half(k):
      return jax.tree.map(
        lambda x: x.reshape(len(xt), 2, *x.shape[1:])[:, k], found
      )

    return half(0), half(1)

  return pair


def by_guide(denoiser: Denoiser, guide: Denoiser) -> Pair:
  """c of one network and u of another, such as a weaker one (2406.02507)."""
  return lambda xt, t: (denoiser(xt, t), guide(xt, t))


def same_level(own: Schedule, schedule: Schedule) -> Callable:
  """(t, dtype) -> the time of a schedule at the log-SNR of t in another.

  Args:
    own: the schedule of the result.
    schedule: the schedule of t.
  """
  if np.array_equal(own.log_alpha_bar, schedule.log_alpha_bar):
    return lambda t, dtype: t
  return lambda t, dtype: own.t_of_logsnr(schedule.logsnr(t, dtype), dtype)


def at_level(guide: Denoiser, own: Schedule, schedule: Schedule) -> Denoiser:
  """A denoiser in the times of another schedule, at equal log-SNR.

  Args:
    guide: the denoiser.
    own: its schedule.
    schedule: the schedule of the times that it is to take.
  """
  level = same_level(own, schedule)
  return lambda xt, t: guide(xt, level(t, xt.dtype))


def towards(weight: float, rescale: Callable | None = None) -> Callable:
  """(c, u, xt, t) -> u + w (c - u).

  Args:
    weight: w.
    rescale: (guided, c, xt, t) -> guided, see `rescaling`; None for none.
  """

  def combine(c, u, xt, t):
    guided = c._replace(
      x0=u.x0 + weight * (c.x0 - u.x0), eps=u.eps + weight * (c.eps - u.eps)
    )
    return rescale(guided, c, xt, t) if rescale else guided

  return combine


def always(pair: Pair, combine: Callable) -> Denoiser:
  """Guidance at all times.

  Args:
    pair: (xt, t) -> (c, u).
    combine: (c, u, xt, t) -> Denoised.
  """
  return lambda xt, t: combine(*pair(xt, t), xt, t)


def rescaling(schedule: Schedule, prediction: str, share: float) -> Callable:
  """Gives the guided prediction the standard deviation of c's, in part.

  Section 3.4 of arXiv 2305.08891. The prediction is what the network gives
  (eps, v, ...), and its deviation is over all dimensions of an example.

  Args:
    schedule: the noise schedule.
    prediction: a key of `gaussian.PARAMETRISATIONS`.
    share: the paper's phi, 0 for none, 1 for all.

  Returns:
    (guided, c, xt, t) -> guided.
  """

  def rescale(guided, c, xt, t):
    t = jnp.broadcast_to(t, xt.shape[:1])
    F, of_c = (
      gaussian.to_target(schedule, x.x0, x.eps, t, prediction)
      for x in (guided, c)
    )
    axes = tuple(range(1, xt.ndim))
    ratio = of_c.std(axes, keepdims=True) / F.std(axes, keepdims=True)
    F = F * (share * ratio + (1 - share))
    found = gaussian.from_prediction(schedule, F, xt, t, prediction)
    return guided._replace(x0=found.x0, eps=found.eps)

  return rescale


def within(
  pair: Pair, combine: Callable, alone: Denoiser, above: float, to: float
) -> Denoiser:
  """Guidance in an interval of times only (arXiv 2404.07724); elsewhere, c.

  Args:
    pair: (xt, t) -> (c, u).
    combine: (c, u, xt, t) -> Denoised.
    alone: (xt, t) -> c, which is all that is evaluated if no time of a call is
      in the interval.
    above: times t with above < t <= to are in the interval.
    to: see above.
  """

  def denoise(xt, t):
    inside = (t > above) & (t <= to)

    def some():
      c, u = pair(xt, t)
      found = combine(c, u, xt, t)
      if not jnp.ndim(t):
        return found
      return jax.tree.map(
        lambda a, b: jnp.where(gaussian.per_example(inside, a), a, b), found, c
      )

    return jax.lax.cond(jnp.any(inside), some, lambda: alone(xt, t))

  return denoise
