r"""Likelihoods by the probability-flow ODE (arXiv 2011.13456, eq. 39).

For the process with log alpha_bar interpolated linearly between its steps, eq.
13 of the paper is

  dx/dt = (d log alpha_bar / dt) (x - eps(x, t) / sigma(t)) / 2.

This drift jumps at every whole t and is steep near t = 0. The ODE is therefore
solved in l = log(sigma / alpha), minus half the log-SNR, in which the flow is
the same: with alpha^2 = 1 / (1 + e^2l), d log alpha / dl = -sigma^2 and the
drift becomes

  dx/dl = sigma (eps(x, t(l)) - sigma x).

It is bounded, and sigma is smooth in l; t(l) is continuous, and its kinks only
affect the network. l grows from -4.6 to 5.1 for the linear schedule.

The solution starts at t = 0, the first noised step, and ends at T-1 (at T-2 if
T-1 is pure noise, where l is infinite), where p is N(0, I). At t = -1 sigma is
0 and l infinite, the network was not trained there, and 8-bit images have no
density. The result is thus the density of x at t = 0.
`dequantised` and `variational` convert it to a code length of 8-bit images in
two different ways. The change of variables (eq. 39),

  log p(x) = log N(x(T-1); 0, I) + integral of div(dx/dl) dl,

has div(dx/dl) = sigma (div eps - sigma D), and div eps = E[v' (d eps / dx) v]
for probes v of unit covariance (Hutchinson), with one probe per solution.
"""

import math
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.process import decoder, gaussian, noise, schedules
from diffusion_jax.system.errors import one_of

DIVERGENCES = ('rademacher', 'gaussian', 'exact')


class Flow(NamedTuple):
  """The result of the ODE for each example.

  Attributes:
    bits: [B], minus log2 of the likelihood, per dimension; NaN if the solver
      reached max_steps.
    evaluations: [B] int32, network evaluations.
  """

  bits: jax.Array
  evaluations: jax.Array


def _norm(error):
  """The larger of the scaled errors of x and of the log-density.

  In a root mean square over all elements, thousands of pixels would hide the
  error of the density.
  """
  x, log_density = error
  return jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(x))), jnp.abs(log_density))


def _draw(keys, label, like, sample=jax.random.normal):
  """Draws in float32, so that the noise is the same in float64."""
  drawn = noise.draw(keys, label, like.shape[1:], jnp.float32, sample)
  return drawn.astype(like.dtype)


def _signs(key, shape, dtype):
  # jax.random.rademacher gives other values if float64 is enabled.
  return jnp.sign(jax.random.uniform(key, shape, dtype, -1.0, 1.0) + 1e-9)


def _log_normal(x):
  """log N(x; 0, I) per dimension, [B]."""
  square = jnp.mean(jnp.square(x), axis=tuple(range(1, x.ndim)))
  return -0.5 * (square + math.log(2 * math.pi))


def _with_divergence(network, x, probe):
  """(network(x), its divergence per dimension); exact if probe is None."""
  if probe is None:
    jacobian = jax.jacfwd(network)(x).reshape(x.size, x.size)
    return network(x), jnp.trace(jacobian) / x.size
  eps, pushed = jax.jvp(network, (x,), (probe,))
  return eps, jnp.mean(probe * pushed)


def density(
  denoiser: gaussian.Denoiser,
  schedule: schedules.Schedule,
  x,
  keys,
  *,
  divergence: str = 'rademacher',
  rtol: float = 1e-5,
  atol: float = 1e-5,
  max_steps: int = 4096,
) -> Flow:
  """Minus log2 of the model's density at t = 0, per dimension.

  Solved by Tsit5 with step sizes adapted to each example, so that the result
  does not depend on the batch. A batch takes as long as its slowest example.

  Args:
    denoiser: (xt, t) -> (x0, eps); its eps is used and differentiated, so it
      must not be clipped. It is called on one example at a time under
      `jax.vmap`.
    schedule: the noise schedule.
    x: [B, ...] at t = 0, float32 or float64.
    keys: [B] random keys of the probes.
    divergence: 'rademacher' or 'gaussian' probes; 'exact' takes one derivative
      per dimension, and is for data of few dimensions.
    rtol: relative tolerance of x and of the log-density per dimension.
    atol: absolute tolerance of the same.
    max_steps: number of steps after which the solver gives up on an example.

  Raises:
    UserError: an unknown divergence.
  """
  one_of('divergence', divergence, DIVERGENCES)
  last = schedule.last
  log_alpha_bar, sigma2 = schedule.host(np.array([0, last]))
  start, end = jnp.asarray(0.5 * (np.log(sigma2) - log_alpha_bar), x.dtype)
  sample = {'rademacher': _signs}.get(divergence, jax.random.normal)
  probes = _draw(keys, 0, x, sample)

  def solve_one(x, probe):
    def drift(ratio, state, args):
      x = state[0]
      sigma = jnp.sqrt(jax.nn.sigmoid(2 * ratio))
      t = jnp.clip(schedule.t_of_logsnr(-2 * ratio, x.dtype), 0, last)

      def network(x):
        return denoiser(x[None], t[None]).eps[0]

      probed = None if divergence == 'exact' else probe
      eps, spread = _with_divergence(network, x, probed)
      return sigma * (eps - sigma * x), sigma * (spread - sigma)

    solution = diffrax.diffeqsolve(
      diffrax.ODETerm(drift),
      diffrax.Tsit5(),
      start,
      end,
      dt0=jnp.asarray(0.01, x.dtype),
      y0=(x, jnp.zeros((), x.dtype)),
      stepsize_controller=diffrax.PIDController(rtol, atol, norm=_norm),
      max_steps=max_steps,
      throw=False,
    )
    x, log_density = (y[0] for y in solution.ys)
    done = solution.result == diffrax.RESULTS.successful
    log_density = jnp.where(done, log_density, jnp.nan)
    # Tsit5 has 6 evaluations per step, accepted or not, and one at the start.
    return x, log_density, 6 * solution.stats['num_steps'] + 1

  x, log_density, evaluations = jax.vmap(solve_one)(x, probes)
  bits = -(_log_normal(x) + log_density) / math.log(2)
  return Flow(bits, evaluations.astype(jnp.int32))


def dequantised(
  denoiser: gaussian.Denoiser, schedule: schedules.Schedule, x0, keys, **options
) -> Flow:
  """Code length of 8-bit images by uniform dequantisation: an upper bound.

  Level k becomes y = k + u with u uniform in [0, 1), and by Jensen's inequality
  log P(k) = log of the mean of p_y(k + u) >= the mean of log p_y(k + u). The
  ODE is solved for x = y / 128 - 1; p_y(y) = p_x(x) / 128 in each dimension,
  which adds log2 128 = 7 bits.

  Args:
    denoiser: see `density`.
    schedule: the noise schedule.
    x0: [B, ...] images k / 127.5 - 1 with k = 0 .. 255.
    keys: [B] random keys of u and the probes.
    **options: see `density`.

  Raises:
    UserError: see `density`.
  """
  level = jnp.round((x0 + 1) * 127.5)
  x = (level + _draw(keys, 1, x0, jax.random.uniform)) / 128 - 1
  found = density(denoiser, schedule, x, keys, **options)
  return Flow(found.bits + 7, found.evaluations)


def variational(
  denoiser: gaussian.Denoiser,
  schedule: schedules.Schedule,
  x0,
  keys,
  *,
  decoder_variance: float | None = None,
  **options,
) -> Flow:
  """Code length of 8-bit images with DDPM's decoder: an upper bound.

  The first noised step is a latent, x' ~ q(x_{t=0} | x0) = N(alpha x0, sigma^2
  I), and the ODE is its prior (variational dequantisation with a fixed q):

    log p(x0) >= E[log p_ode(x') + log decoder(x0 | x') - log q(x' | x0)].

  Args:
    denoiser: see `density`; its estimate of x0 at t = 0 is the decoder's mean,
      see `decoder.discretised_log_likelihood`.
    schedule: the noise schedule.
    x0: [B, ...] images k / 127.5 - 1 with k = 0 .. 255.
    keys: [B] random keys of x' and the probes.
    decoder_variance: the decoder's variance; by default the posterior variance
      of t = 1, as in the paper's likelihoods.
    **options: see `density`.

  Returns:
    Flow, with the decoder's evaluation counted.

  Raises:
    UserError: see `density`.
  """
  if decoder_variance is None:
    decoder_variance = gaussian.step_variance(schedule, 1, 0, 'fixedsmall')
  eps = _draw(keys, 1, x0)
  time = jnp.zeros(len(x0), jnp.int32)
  x = gaussian.q_sample(schedule, x0, time, eps)
  found = density(denoiser, schedule, x, keys, **options)
  decoded = decoder.discretised_log_likelihood(
    x0, denoiser(x, time).x0, 0.5 * math.log(decoder_variance)
  )
  decoded = jnp.mean(decoded, axis=tuple(range(1, x0.ndim)))
  # log q in terms of its noise: N(eps; 0, I) / sigma^D.
  log_q = _log_normal(eps) - 0.5 * math.log(schedule.host(0)[1])
  bits = found.bits + (log_q - decoded) / math.log(2)
  return Flow(bits, found.evaluations + 1)
