"""Denoising: a network predicts x0, eps or a mixture of both from xt.

DDPM's L_simple (arXiv 2006.11239, eq. 14) is the default; the parametrisation,
the law of the time, the weight, the distance and a learned variance make the
other objectives. docs/objectives.md has them all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.codecs.codec import Codec
from diffusion_jax.conditioning import Conditioner
from diffusion_jax.objectives import laws, weights
from diffusion_jax.objectives.laws import uniform_times  # noqa: F401
from diffusion_jax.objectives.objective import Aux, Mean, Objective, branch
from diffusion_jax.process import gaussian, likelihood, noise, schedules


def create(
  network_fn: Callable,
  codec: Codec,
  conditioner: Conditioner,
  schedule: schedules.Schedule,
  prediction: gaussian.Parametrisation | str = 'eps',
  *,
  law: str = 'uniform', law_mean: float = 0.0, law_std: float = 0.0,
  weight: str = 'simple', gamma: float = 0.0, k: float = 1.0,
  bias: float = 2.0, sigma_data: float = 0.5, huber: float = 0.0,
  variance: str = 'fixed', variance_weight: float = 0.001,
  step_variance: str = 'fixedlarge',
) -> Objective:  # fmt: skip
  """The weighted error of a prediction at random times.

  Args:
    network_fn: (params, input, label, cond, dropout keys or None) ->
      prediction.
    codec: rows -> x0.
    conditioner: rows -> the network's conditioning input.
    schedule: the noise schedule.
    prediction: a parametrisation, or its name.
    law: one of `laws.LAWS`, the law of the time.
    law_mean: see `laws.create`.
    law_std: see `laws.create`.
    weight: one of `weights.WEIGHTS`; 'bound' is the term of the variational
      bound in bits per dimension, times the number of steps.
    gamma: see `weights.create`.
    k: see `weights.create`.
    bias: see `weights.create`.
    sigma_data: see `weights.create`.
    huber: the error above which the distance grows linearly, see `distance`; 0
      for the squared error.
    variance: 'fixed', or 'learned': the network's second half is a fraction,
      see `gaussian.split`, trained by the bound.
    variance_weight: of the bound, in which the mean is not trained, beside
      another weight (L_hybrid of arXiv 2102.09672, section 3.1).
    step_variance: the fixed variance of the bound.

  Raises:
    UserError: the prediction is not known.
  """
  how = gaussian.parametrisation(prediction, sigma_data)
  learned, bound = variance == gaussian.LEARNED, weight == weights.BOUND
  factor_fn = weights.create(weight, how, gamma, k, bias, sigma_data)
  times = laws.create(law, schedule, law_mean, law_std, learned or bound)
  scores = {'factor_fn': factor_fn, 'huber': huber, 'hybrid': not bound}
  if weight in weights.PER_LOGSNR and law not in laws.NORMALS:
    scores['rate_fn'] = schedule.logsnr_rate
  if learned or bound:
    fixed_or_not = variance if learned else step_variance
    scores['terms'] = _bound(schedule, fixed_or_not, codec)
    scores['variance_weight'] = 1.0 if bound else variance_weight
  values_at = _valued(network_fn, codec, conditioner, schedule, how, scores)

  def loss(params, extras, rows, keys):
    t, factor = times.draw(branch(keys, 't'), extras, rows)
    values = values_at(
      params, rows, keys, t, branch(keys, 'condition'), branch(keys, 'dropout')
    )
    sums = times.sums(t, jax.lax.stop_gradient(values))
    if factor is None:
      return values, Aux({'t': t}, sums)
    return factor * values, Aux({'t': t, 'factor': factor}, sums)

  def heldout(params, extras, rows, keys, index):
    return values_at(params, rows, keys, times.spread(index), None, None)

  def metrics(values, by_row, sums):
    factor = by_row.get('factor')
    return by_quarter(values, by_row['t'], schedule.num_timesteps, factor)

  def update(extras, aux):
    return times.update(extras, aux.sums)

  made = Objective(loss, heldout, metrics, times.extras, update)
  return made._replace(whole=times.whole)


def _valued(network_fn, codec, conditioner, schedule, how, scores) -> Callable:
  """(params, rows, keys, t, condition keys, dropout keys) -> values [B].

  Args:
    network_fn: see `create`, and so are codec, conditioner and schedule.
    codec: see there.
    conditioner: see there.
    schedule: see there.
    how: the parametrisation.
    scores: the options of `errors`.
  """

  def values_at(params, rows, keys, t, cond_keys, dropout):
    x0 = codec.encode(params, rows, branch(keys, 'codec'))
    eps = noise.normal(branch(keys, 'eps'), x0.shape[1:])
    cond = conditioner.condition(params, rows, cond_keys)

    def network(xt, label):
      return network_fn(params, xt, label, cond, dropout)

    return errors(network, schedule, how, x0, t, eps, **scores)

  return values_at


def errors(
  network_fn, schedule, kind, x0, t, eps, *, factor_fn=None, rate_fn=None,
  huber=0.0, terms=None, variance_weight=0.0, hybrid=True,
) -> jax.Array:  # fmt: skip
  """The error of a network's prediction at given times and noise.

  Args:
    network_fn: (input [B, ...], label [B]) -> prediction [B, ...].
    schedule: the noise schedule.
    kind: a parametrisation, or its name.
    x0: [B, ...] clean data, see `Codec`.
    t: [B] times.
    eps: [B, ...] standard normal noise.
    factor_fn: (alpha, sigma) -> the factor on the error, of sigma's shape; None
      for 1.
    rate_fn: t -> one more factor; None for 1.
    huber: see `distance`.
    terms: (denoised, t, x0, eps) -> [B], the variational bound; None for none.
    variance_weight: the factor on it.
    hybrid: whether the bound is added to the error, and trains the variance
      only; if not, it is the result.

  Returns:
    [B] float32, the mean over each example's dimensions.
  """
  how = gaussian.parametrisation(kind)
  xt = gaussian.q_sample(schedule, x0, t, eps)
  output = gaussian.predict(network_fn, schedule, xt, t, how)
  output = output.astype(jnp.float32)
  extra = 0.0
  if terms:
    seen = gaussian.from_prediction(schedule, output, xt, t, how)
    if hybrid:
      seen = seen._replace(x0=jax.lax.stop_gradient(seen.x0))
    extra = variance_weight * terms(seen, t, x0, eps)
    if not hybrid:
      return extra
  target = gaussian.to_target(schedule, x0, eps, t, how)
  error = gaussian.split(output, x0.shape[-1])[0] - target
  values = jnp.mean(distance(error, huber), axis=tuple(range(1, x0.ndim)))
  if factor_fn:
    levels = gaussian.alpha_sigma(schedule, t, values)
    values = factor_fn(*levels) * values
  if rate_fn:
    values = rate_fn(t, values.dtype) * values
  return values + extra if terms else values


def distance(error: jax.Array, huber: float = 0.0) -> jax.Array:
  """The square of an error; for large ones, 2 huber times its size.

  With c = huber above 0 it is the pseudo-Huber distance of arXiv 2403.16728,
  2 c (sqrt(error^2 + c^2) - c), without its cancellation.
  """
  square = jnp.square(error)
  if not huber:
    return square
  return 2 * huber * square / (jnp.sqrt(square + huber**2) + huber)


def _bound(schedule, variance, codec) -> Callable:
  """(denoised, t, x0, eps) -> T times the bound's terms at whole times."""
  count = schedule.num_timesteps
  steps = likelihood.prepare(schedule, [*range(count - 1, -2, -1)], variance)

  def terms(denoised, t, x0, eps):
    found = likelihood.term(
      lambda xt, t: denoised, steps, count - 1 - t, x0, eps,
      codec.levels == 256,
    )  # fmt: skip
    return count * found.bits

  return terms


def by_quarter(
  values: jax.Array, t: jax.Array, num_timesteps: int, factor=None
) -> dict[str, Mean]:
  """The mean over each quarter of the times, which may be empty.

  Args:
    values: [B].
    t: [B] times.
    num_timesteps: the number of times.
    factor: [B], which the values contain: the mean is weighted by it; None for
      equal weights.
  """
  quarter = 4 * jnp.maximum(t, 0) // num_timesteps

  def count(inside):
    if factor is None:
      return jnp.sum(inside, dtype=values.dtype)
    return jnp.sum(factor, where=inside)

  return {
    f'loss_q{q + 1}': Mean(
      jnp.sum(values, where=quarter == q), count(quarter == q)
    )
    for q in range(4)
  }
