"""Data whose best denoiser is known: a mixture of Gaussians, by the number."""

import numpy as np

WEIGHTS = np.array([0.3, 0.5, 0.2])
MEANS = np.array([-1.0, 0.2, 0.9])
VARIANCES = np.array([0.5, 0.4, 0.6]) ** 2


def x0(x, alpha, sigma, lib=np):
  """E[x0 | x] where x = alpha x0 + sigma eps, each number of x by itself.

  A component k is alpha x0 ~ N(alpha m_k, alpha^2 v_k) in x, which has the
  posterior mean of a Gaussian; the components' posterior weights mix them.

  Args:
    x: any shape.
    alpha: scalar.
    sigma: scalar.
    lib: numpy, or jax.numpy.
  """
  variance = alpha**2 * VARIANCES + sigma**2
  off = x[..., None] - (alpha * MEANS).reshape((1,) * x.ndim + (-1,))
  shape = (1,) * x.ndim + (-1,)
  log_weight = (np.log(WEIGHTS) - 0.5 * lib.log(variance)).reshape(shape)
  log_weight = log_weight - off**2 / (2 * variance).reshape(shape)
  weight = lib.exp(log_weight - log_weight.max(-1, keepdims=True))
  mean = (
    MEANS.reshape(shape) + (alpha * VARIANCES / variance).reshape(shape) * off
  )
  return (weight * mean).sum(-1) / weight.sum(-1)
