"""UniPC (arXiv 2302.04867): a predictor with a corrector at no extra cost."""

from typing import Literal

import numpy as np

from diffusion_jax.samplers import levels, linear
from diffusion_jax.samplers.solve import Sampler
from diffusion_jax.system.errors import one_of


def unipc(
  order: Literal[3, 2, 1] = 3, variant: Literal['bh2', 'bh1'] = 'bh2'
) -> Sampler:
  """UniPC-p in terms of x0: UniP-p, then UniC-p with the next evaluation.

  The order is p + 1. The evaluation at the predicted x is used twice: to
  correct that x, and to predict the next one. The last step goes to clean data
  by UniP-1, which gives x0.

  Args:
    order: p, 1 to 3.
    variant: the paper's B(h): 'bh1' is h, 'bh2' is e^h - 1. It only matters in
      UniP-2 and UniC-1, where a coefficient is set to 1/2; the others follow
      from order conditions that do not depend on B(h).

  Raises:
    UserError: another order or variant.
  """
  one_of('order', order, (3, 2, 1))
  one_of('variant', variant, ('bh2', 'bh1'))

  def init(schedule, grid, x):
    alpha, sigma, lam = levels.of(schedule, grid)
    num_rows = len(grid) - 1
    ratio = np.concatenate([[1.0], sigma[1:] / sigma[:-1]])
    # Row i corrects the prediction of row i - 1; row 0 corrects nothing.
    correct = np.zeros((num_rows + 1, order + 1))  # weights of x0, newest first
    predict = np.zeros((num_rows, order))
    for i, p in enumerate(levels.orders(grid, order)):
      h = lam[i + 1] - lam[i]
      before = [(lam[i - k] - lam[i]) / h for k in range(1, p)]
      predict[i, :p] = alpha[i + 1] * _weights(h, before, variant)
      if np.isfinite(h):
        here, to, *past = _weights(h, [1.0, *before], variant)
        correct[i + 1, : p + 1] = alpha[i + 1] * np.array([to, here, *past])
    return {
      't': grid[:-1],
      'kept': ratio[:-1],
      'corrected': correct[:-1],
      'cx': ratio[1:],
      'w': predict,
    }, linear.memory_of(x, order)

  def step(denoiser, row, x, memory, noise_fn):
    start, past = memory
    seen = denoiser(x, row['t']).x0
    # UniC: repeats the step, now that x0 at its end is known, too.
    x = row['kept'] * start
    for weight, m in zip(row['corrected'], (seen, *past), strict=True):
      x = x + weight * m
    return linear.advance(seen, row, x, memory)

  return Sampler(init, step)


def _weights(h, places, variant):
  """Weights of x0 at the step's start and at other points, without alpha'.

  With u from 0 to 1 over the step, the weights integrate h e^-(1-u)h times
  1, u, .. u^k exactly: the paper's R_k a = b_k.

  Args:
    h: length of the step in lambda, inf to clean data.
    places: [k] values of u, other than 0, at which x0 is known.
    variant: 'bh1' or 'bh2'.
  """
  k = len(places)
  moments = [-np.expm1(-h)]
  for i in range(1, k + 1):
    moments.append(1 - i / h * moments[-1])
  if k == 1:
    half = 0.5 * (h if variant == 'bh1' else moments[0])
    others = np.array([half / places[0]])
  else:
    powers = np.array([[u**i for u in places] for i in range(1, k + 1)])
    others = np.linalg.solve(powers.reshape(k, k), moments[1:])
  return np.array([moments[0] - others.sum(), *others])
