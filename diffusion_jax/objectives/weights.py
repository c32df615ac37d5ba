"""Weights of the squared error at each noise level.

Each is a factor on the squared error of x0, as a function of S = alpha^2 /
sigma^2. The error of a prediction F is that of x0 divided by the
parametrisation's `gain`, so the factor on the error of F is weight times gain
squared: an objective is the same one for every prediction.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.process.gaussian import Parametrisation

# name -> (S, gamma, k, bias, sigma_data) -> the factor on the error of x0.
OF_X0 = {
  # arXiv 2303.09556: min(S, gamma)
  'min_snr': lambda S, gamma, k, bias, s: jnp.minimum(S, gamma),
  # arXiv 2204.00227: 1 / (k + S)^gamma on the error of eps
  'p2': lambda S, gamma, k, bias, s: S / (k + S) ** gamma,
  # arXiv 2303.00848: sigmoid(bias - log S) on the error of eps, see PER_LOGSNR
  'sigmoid': lambda S, gamma, k, bias, s: S / (1 + S * jnp.exp(-bias)),
  # arXiv 2202.00512, section 4: max(S, 1)
  'truncated_snr': lambda S, gamma, k, bias, s: jnp.maximum(S, 1),
  # arXiv 2206.00364, table 1: (level^2 + s^2) / (level s)^2
  'edm': lambda S, gamma, k, bias, s: S + 1 / s**2,
}
BOUND = 'bound'  # the term of the variational bound, see `denoising`
WEIGHTS = ('simple', BOUND, *OF_X0)
# Weights per unit of log S. Where times are drawn uniformly, such a weight is
# multiplied by -d log S / du, u = t / T (arXiv 2303.00848, eq. 1).
PER_LOGSNR = ('sigmoid',)
GAMMAS = {'min_snr': 5.0, 'p2': 1.0}  # as published


def create(
  weight: str,
  how: Parametrisation,
  gamma: float = 0.0,
  k: float = 1.0,
  bias: float = 0.0,
  sigma_data: float = 0.5,
) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
  """(alpha, sigma) -> the factor on the squared error of F.

  Args:
    weight: one of WEIGHTS.
    how: the parametrisation of F.
    gamma: of 'min_snr' and 'p2'; 0 for GAMMAS.
    k: of 'p2'.
    bias: of 'sigmoid'.
    sigma_data: of 'edm', the data's standard deviation.

  Returns:
    the function; None if the factor is 1.
  """
  if weight not in OF_X0:
    return None
  gamma = gamma or GAMMAS.get(weight, 0.0)

  def factor(alpha, sigma):
    S = jnp.square(alpha / sigma)
    of_x0 = OF_X0[weight](S, gamma, k, bias, sigma_data)
    return of_x0 * jnp.square(how.gain(alpha, sigma))

  return factor
