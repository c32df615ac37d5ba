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

A schedule may end in pure noise: log alpha_bar is -inf at T-1. In its last step
alpha, not its logarithm, is interpolated linearly.

Tables are float64 NumPy arrays, computed once on the host and cast to the dtype
in use: sigma(0) from a float32 alpha_bar would be off by 8e-5; from a float32
*log* alpha_bar it is exact to rounding.
"""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.process import tables
from diffusion_jax.system.errors import UserError, one_of


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """A discrete-time schedule, as tables over t = 0 .. T-1.

  Attributes:
    betas: [T] float64, the variance that step t adds, 1 - ab_t / ab_{t-1}.
    log_alpha_bar: [T] float64, strictly decreasing, below 0; the last may be
      -inf.
  """

  betas: np.ndarray
  log_alpha_bar: np.ndarray

  @property
  def num_timesteps(self) -> int:
    return len(self.betas)

  @property
  def ends_in_noise(self) -> bool:
    """Whether the log SNR at T-1 is -inf."""
    return bool(np.isneginf(self.log_alpha_bar[-1]))

  @property
  def last(self) -> int:
    """The last time with a finite log SNR: T-1, or T-2."""
    return self.num_timesteps - 1 - self.ends_in_noise

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
    if not self.ends_in_noise:
      return table[low] + fraction * (table[low + 1] - table[low])
    is_last = low == self.last + 1
    above = jnp.where(is_last, table[low], table[low + 1])
    fallen = 2 * jnp.log1p(jnp.where(is_last, -fraction, 0))
    return table[low] + fraction * (above - table[low]) + fallen

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

  def logsnr_rate(self, t, dtype=jnp.float32) -> jax.Array:
    """-d logsnr / du at t in [0, T-1], with u = t / T; 0 in pure noise.

    At a whole time it is T times the interval of log SNRs between the middles
    of the steps before and after it. The mean over whole times is therefore the
    range of the log SNR, also where a schedule jumps, as the cosine at its end.
    Between whole times it is interpolated linearly.
    """
    finite = self.log_alpha_bar[: self.last + 1]
    halves = -np.diff(finite - np.log(-np.expm1(finite))) / 2
    rate = np.zeros(self.num_timesteps)
    rate[: self.last] += halves
    rate[1 : self.last + 1] += halves
    t = jnp.asarray(t, dtype)
    times = jnp.arange(self.num_timesteps, dtype=dtype)
    return jnp.interp(t, times, jnp.asarray(self.num_timesteps * rate, dtype))

  def t_of_logsnr(self, logsnr, dtype=jnp.float32) -> jax.Array:
    """The exact inverse of `logsnr`: fractional times in [-1, T-1]."""
    # alpha_bar = sigmoid(logsnr); then invert the piecewise linear table.
    falling = -jax.nn.log_sigmoid(jnp.asarray(logsnr, dtype))
    whole = np.concatenate([[0.0], -self.log_alpha_bar])
    table = jnp.asarray(whole[: self.last + 2], dtype)
    times = jnp.arange(-1, self.last + 1, dtype=dtype)
    found = jnp.interp(falling, table, times)
    if not self.ends_in_noise:
      return found
    return found - jnp.expm1(-0.5 * jnp.maximum(falling - table[-1], 0))

  def host(self, t) -> tuple[np.ndarray, np.ndarray]:
    """(log alpha_bar, sigma^2) at t in float64, for a grid's coefficients."""
    t = np.asarray(t, np.float64)
    table = np.concatenate([[0.0], self.log_alpha_bar])[: self.last + 2]
    log_alpha_bar = np.interp(t, np.arange(-1, self.last + 1), table)
    if self.ends_in_noise:
      with np.errstate(divide='ignore'):
        log_alpha_bar += 2 * np.log1p(-np.clip(t - self.last, 0, 1))
    return log_alpha_bar, -np.expm1(log_alpha_bar)

  def host_t_of_logsnr(self, logsnr) -> np.ndarray:
    """`t_of_logsnr` in float64, for the times of a grid; at most T-1."""
    falling = np.logaddexp(0.0, -np.asarray(logsnr, np.float64))
    table = np.concatenate([[0.0], -self.log_alpha_bar])[: self.last + 2]
    found = np.interp(falling, table, np.arange(-1.0, self.last + 1))
    if not self.ends_in_noise:
      return found
    return found - np.expm1(-0.5 * np.maximum(falling - table[-1], 0))


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


def from_log_alpha_bar(log_alpha_bar) -> Schedule:
  """The schedule with a table of log alpha_bar.

  Args:
    log_alpha_bar: [T], below 0 and strictly decreasing; the last may be -inf.

  Raises:
    UserError: the numbers do not decrease.
  """
  table = np.asarray(log_alpha_bar, np.float64)
  steps = np.diff(np.concatenate([[0.0], table]))
  if table.ndim != 1 or not np.all(steps < 0):
    raise UserError('alpha_bar must be a list of decreasing numbers below 1')
  return Schedule(-np.expm1(steps), table)


def from_logsnr(logsnr) -> Schedule:
  """The schedule with a table of log SNRs [T], strictly decreasing."""
  return from_log_alpha_bar(-np.logaddexp(0.0, -np.asarray(logsnr, np.float64)))


def linear(num_timesteps: int, beta_start=1e-4, beta_end=0.02) -> Schedule:
  """DDPM's schedule (arXiv 2006.11239, section 4): betas rise linearly.

  Args:
    num_timesteps: T.
    beta_start: the variance that t = 0 adds.
    beta_end: the variance that t = T-1 adds.
  """
  return from_betas(np.linspace(beta_start, beta_end, num_timesteps))


def scaled_linear(num_timesteps: int, beta_start=1e-4, beta_end=0.02):
  """The roots of the betas rise linearly, as for Stable Diffusion.

  Latent diffusion (arXiv 2112.10752) calls it linear, DDPM's code quad. The
  arguments are those of `linear`.
  """
  roots = np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps)
  return from_betas(roots**2)


def sigmoid(num_timesteps: int, beta_start=1e-4, beta_end=0.02) -> Schedule:
  """The betas rise as a sigmoid from -6 to 6, as in DDIM's code.

  The arguments are those of `linear`.
  """
  rise = 1 / (1 + np.exp(-np.linspace(-6, 6, num_timesteps)))
  return from_betas(rise * (beta_end - beta_start) + beta_start)


def cosine(num_timesteps: int) -> Schedule:
  """alpha is a cosine of t, with betas of at most 0.999 (arXiv 2102.09672).

  Equation 17 with s = 0.008.
  """
  angle = (np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008
  alpha_bar = np.cos(angle * np.pi / 2) ** 2
  return from_betas(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999))


def edm(num_timesteps: int, sigma_min=0.002, sigma_max=80.0) -> Schedule:
  """Levels sigma / alpha evenly spaced in their 7th root (arXiv 2206.00364).

  Equation 5 with rho = 7; sigma_min is the level of t = 0, sigma_max that of
  t = T-1.
  """
  roots = np.linspace(sigma_min ** (1 / 7), sigma_max ** (1 / 7), num_timesteps)
  return from_logsnr(-14 * np.log(roots))


def flow(num_timesteps: int) -> Schedule:
  """Rectified flow (arXiv 2209.03003): x = (1 - u) x0 + u eps.

  Divided by sqrt((1 - u)^2 + u^2) it is variance-preserving, with
  sigma / alpha = u / (1 - u). Step t has u = (t + 1) / T: T-1 is pure noise.
  """
  u = np.arange(1, num_timesteps + 1) / num_timesteps
  with np.errstate(divide='ignore'):
    return from_logsnr(2 * (np.log1p(-u) - np.log(u)))


def betas(num_timesteps: int, path='', sha256='') -> Schedule:
  """Betas from a file, see `tables.read`.

  Args:
    num_timesteps: T, the number of betas.
    path: the file.
    sha256: the hash that the file must have, '' for any.

  Raises:
    UserError: the file is not a list of T numbers between 0 and 1.
  """
  values = tables.read(path, num_timesteps, sha256)
  if not np.all((values > 0) & (values < 1)):
    raise UserError(
      f'process.path={path}: betas must be between 0 and 1; for a table of '
      'alpha_bar use process.schedule=alpha_bar'
    )
  return from_betas(values)


def alpha_bar(num_timesteps: int, path='', sha256='') -> Schedule:
  """alpha_bar from a file; the last number may be 0, pure noise.

  Args:
    num_timesteps: T, the number of values.
    path: see `betas`.
    sha256: see `betas`.

  Raises:
    UserError: the file is not a list of T decreasing numbers below 1.
  """
  values = tables.read(path, num_timesteps, sha256)
  rises = np.flatnonzero(np.diff(np.concatenate([[1.0], values])) >= 0)
  if len(rises) or values[-1] < 0:
    at = rises[0] if len(rises) else num_timesteps - 1
    raise UserError(
      f'process.path={path}: alpha_bar must decrease from below 1 to 0 or '
      f'more, but number {at + 1} is {values[at]:g}'
      + f' after {values[at - 1]:g}'
      * bool(at)
    )
  with np.errstate(divide='ignore'):
    return from_log_alpha_bar(np.log(values))


def with_zero_snr(schedule: Schedule) -> Schedule:
  """Ends in pure noise (arXiv 2305.08891, algorithm 1).

  alpha is shifted so that the last is 0, and scaled so that the first remains.
  """
  alpha = np.exp(0.5 * schedule.log_alpha_bar)
  first, last = alpha[0], alpha[-1]
  with np.errstate(divide='ignore'):
    return from_log_alpha_bar(
      2 * np.log((alpha - last) * first / (first - last))
    )


def shifted(schedule: Schedule, shift: float) -> Schedule:
  """Multiplies every level sigma / alpha: the log SNR falls by 2 ln(shift).

  For images of d pixels a side, simple diffusion (arXiv 2301.11093, section
  3.1) multiplies the levels of a schedule for 64 pixels by d / 64. The shift
  u' = s u / (1 + (s - 1) u) of flows (arXiv 2403.03206, eq. 23) is the same,
  with s the root of the ratio of the numbers of pixels.

  Args:
    schedule: the schedule.
    shift: above 0; 1 changes nothing.
  """
  log_alpha_bar = schedule.log_alpha_bar
  with np.errstate(divide='ignore'):
    logsnr = log_alpha_bar - np.log(-np.expm1(log_alpha_bar))
  return from_logsnr(logsnr - 2 * np.log(shift))


SCHEDULES = {
  'linear': linear,
  'scaled_linear': scaled_linear,
  'quadratic': scaled_linear,  # its name in DDPM's code
  'cosine': cosine,
  'sigmoid': sigmoid,
  'edm': edm,
  'flow': flow,
  'betas': betas,
  'alpha_bar': alpha_bar,
}

FROM_FILES = ('betas', 'alpha_bar')


def create(
  schedule: str = 'linear',
  *,
  zero_snr: bool = False,
  shift: float = 1.0,
  **options,
) -> Schedule:
  """A schedule by name.

  Args:
    schedule: a key of SCHEDULES.
    zero_snr: whether to rescale it to end in pure noise, see `with_zero_snr`.
    shift: see `shifted`.
    **options: num_timesteps, and options of any schedule; each takes its own.

  Raises:
    UserError: the name is not known, or see the schedule.
  """
  how = SCHEDULES[one_of('process.schedule', schedule, SCHEDULES)]
  taken = inspect.signature(how).parameters
  made = how(**{name: x for name, x in options.items() if name in taken})
  if zero_snr and not made.ends_in_noise:
    made = with_zero_snr(made)
  return made if shift == 1 else shifted(made, shift)
