r"""Noise schedules: the scales of signal and noise at time t.

The forward process is Gaussian (DDPM, arXiv 2006.11239, eq. 4),

  q(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I),   alpha(t)^2 + sigma(t)^2 = 1,

and a schedule is a table of log alpha_bar = log alpha(t)^2, from which all
other quantities follow. Note that `alpha(t)` is sqrt(alpha_bar_t), as in later
papers, not DDPM's alpha_t = 1 - beta_t.

Convention for time: t = 0 is the first noised step and T - 1 the last, as in
the networks' input (the papers count from 1). Integer t is looked up;
fractional t interpolates log alpha_bar linearly, so that solvers with
continuous steps use the same model. t = -1 is clean data, log alpha_bar = 0,
and is part of the interpolation.

Tables are float64 NumPy arrays, computed once on the host and cast to the dtype
in use: sigma(0) from a float32 alpha_bar would be off by 8e-5; from a float32
*log* alpha_bar it is exact to rounding.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.system.errors import UserError, one_of


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """A discrete-time schedule, as tables over t = 0 .. T-1.

  Attributes:
    betas: [T] float64, the variance that step t adds, 1 - ab_t / ab_{t-1}.
    log_alpha_bar: [T] float64, strictly decreasing, below 0.
  """

  betas: np.ndarray
  log_alpha_bar: np.ndarray

  @property
  def num_timesteps(self) -> int:
    return len(self.betas)

  def log_alpha_bar_at(self, t, dtype=jnp.float32) -> jax.Array:
    """log alpha_bar at any time in [-1, T-1].

    Args:
      t: integer or floating array of times; integers are looked up.
      dtype: dtype of the result and of the interpolation.

    Returns:
      An array of t's shape; 0 at t = -1.
    """
    table = jnp.asarray(np.concatenate([[0.0], self.log_alpha_bar]), dtype)
    t = jnp.asarray(t)
    if jnp.issubdtype(t.dtype, jnp.integer):
      return table[t + 1]
    t = t.astype(dtype) + 1
    low = jnp.clip(jnp.floor(t).astype(jnp.int32), 0, self.num_timesteps - 1)
    fraction = t - low.astype(dtype)
    return table[low] + fraction * (table[low + 1] - table[low])

  def alpha(self, t, dtype=jnp.float32) -> jax.Array:
    """sqrt(alpha_bar): the scale of the signal at t (shape of t)."""
    return jnp.exp(0.5 * self.log_alpha_bar_at(t, dtype))

  def sigma(self, t, dtype=jnp.float32, clean=0.0) -> jax.Array:
    """sqrt(1 - alpha_bar): the standard deviation of the noise at t.

    Args:
      t: integer or floating array of times.
      dtype: dtype of the result.
      clean: the result at t = -1; inf for a divisor.
    """
    variance = -jnp.expm1(self.log_alpha_bar_at(t, dtype))
    # Chosen before the root: XLA rounds x / sqrt(y) in its own way.
    return jnp.sqrt(
      jnp.where(variance > 0, variance, clean) if clean else variance
    )

  def logsnr(self, t, dtype=jnp.float32) -> jax.Array:
    """2 log(alpha / sigma), strictly decreasing; inf at t = -1.

    DPM-Solver's lambda (arXiv 2206.00927) is half of it.
    """
    log_alpha_bar = self.log_alpha_bar_at(t, dtype)
    return log_alpha_bar - jnp.log(-jnp.expm1(log_alpha_bar))

  def t_of_logsnr(self, logsnr, dtype=jnp.float32) -> jax.Array:
    """The exact inverse of `logsnr`: fractional times in [-1, T-1]."""
    # alpha_bar = sigmoid(logsnr); then invert the piecewise linear table.
    falling = -jax.nn.log_sigmoid(jnp.asarray(logsnr, dtype))
    table = jnp.asarray(np.concatenate([[0.0], -self.log_alpha_bar]), dtype)
    times = jnp.arange(-1, self.num_timesteps, dtype=dtype)
    return jnp.interp(falling, table, times)

  def host(self, t) -> tuple[np.ndarray, np.ndarray]:
    """(log alpha_bar, sigma^2) at t in float64, for a grid's coefficients."""
    times = np.arange(-1, self.num_timesteps)
    table = np.concatenate([[0.0], self.log_alpha_bar])
    log_alpha_bar = np.interp(np.asarray(t, np.float64), times, table)
    return log_alpha_bar, -np.expm1(log_alpha_bar)

  def host_t_of_logsnr(self, logsnr) -> np.ndarray:
    """`t_of_logsnr` in float64, for the times of a grid; at most T-1."""
    falling = np.logaddexp(0.0, -np.asarray(logsnr, np.float64))
    table = np.concatenate([[0.0], -self.log_alpha_bar])
    return np.interp(falling, table, np.arange(-1.0, self.num_timesteps))


def from_betas(betas) -> Schedule:
  """The schedule whose step t adds variance betas[t].

  Args:
    betas: [T], each between 0 and 1.

  Raises:
    UserError: the betas are not numbers between 0 and 1.
  """
  betas = np.asarray(betas, np.float64)
  if betas.ndim != 1 or not np.all((betas > 0) & (betas < 1)):
    raise UserError('betas must be a list of numbers between 0 and 1')
  return Schedule(betas, np.cumsum(np.log1p(-betas)))


def linear(num_timesteps: int, beta_start=1e-4, beta_end=0.02) -> Schedule:
  """DDPM's schedule (arXiv 2006.11239, section 4): betas rise linearly.

  Args:
    num_timesteps: T.
    beta_start: the variance that t = 0 adds.
    beta_end: the variance that t = T-1 adds.
  """
  return from_betas(np.linspace(beta_start, beta_end, num_timesteps))


SCHEDULES = {'linear': linear}


def create(schedule: str = 'linear', **kwargs) -> Schedule:
  """A schedule by name.

  Args:
    schedule: a key of SCHEDULES.
    **kwargs: the schedule's own arguments, see `linear`.

  Raises:
    UserError: the name is not known.
  """
  return SCHEDULES[one_of('process.schedule', schedule, SCHEDULES)](**kwargs)
