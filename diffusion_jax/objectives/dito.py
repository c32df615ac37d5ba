"""DiTo: an encoder trained through a diffusion decoder (arXiv 2501.18593).

A denoising network is told the latents of a picture, enlarged to its size, as
further channels of its input. One loss, the error of its prediction, trains
both: no critic and no other network is needed. The latents have zero mean and
unit variance over their channels, so nothing else bounds them.

Noise synchronisation, from the same paper, noises the latents of some pictures
at a random time, and trains the decoder on these at no earlier times.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.codecs import dito
from diffusion_jax.codecs.codec import Codec
from diffusion_jax.conditioning import Conditioner
from diffusion_jax.models.autoencoder import Coder
from diffusion_jax.objectives import denoising
from diffusion_jax.objectives.laws import LEAST
from diffusion_jax.objectives.objective import Objective, branch
from diffusion_jax.process import gaussian, noise

NOISED = 'noised'  # the time of an example's latents, among its rows


def create(
  network_fn: Callable, coder: Coder, codec: Codec, schedule,
  synchronise: float = 0.0, **options,
) -> Objective:  # fmt: skip
  """The denoising loss of pictures, given their latents.

  Args:
    network_fn: (params, input, label, cond, dropout keys or None) ->
      prediction.
    coder: the encoder, of the part 'codec'.
    codec: rows -> pictures in [-1, 1].
    schedule: the noise schedule.
    synchronise: the probability with which training noises the latents of a
      picture, see `noised`; above 0 the law of the time must be uniform.
    **options: of `denoising.create`.
  """

  def condition(params, rows, keys):
    x = codec.encode(params, rows, None)
    z = coder.encode(params['codec'], x)
    if NOISED in rows:
      eps = noise.draw(keys, 2, z.shape[1:], z.dtype)
      z = noised(schedule, z, rows[NOISED], eps)
    return {'channels': dito.enlarged(z, x.shape[1:3])}

  made = denoising.create(
    network_fn, codec, Conditioner(condition, {}), schedule, **options
  )
  if not synchronise:
    return made

  def loss(params, extras, rows, keys):
    drawn = branch(keys, 'condition')
    chosen = noise.draw(drawn, 0, sample=jax.random.uniform) < synchronise
    share = noise.draw(drawn, 1, sample=jax.random.uniform)
    t = (share * schedule.num_timesteps).astype(jnp.int32)
    t = jnp.minimum(t, schedule.num_timesteps - 1)  # the share may be 1
    rows = {
      **rows, NOISED: jnp.where(chosen, t, -1), LEAST: jnp.where(chosen, t, 0),
    }  # fmt: skip
    return made.loss(params, extras, rows, keys)

  return made._replace(loss=loss)


def noised(schedule, z, t, eps) -> jax.Array:
  """(alpha z + sigma eps) / (alpha + sigma): on the line that a flow follows.

  Args:
    schedule: the noise schedule.
    z: [B, ...] latents.
    t: [B] times; -1 leaves the latents as they are.
    eps: [B, ...] standard normal noise.
  """
  alpha, sigma = gaussian.alpha_sigma(schedule, t, z)
  return (alpha * z + sigma * eps) / (alpha + sigma)
