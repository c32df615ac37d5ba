"""DiTo: an encoder trained through a diffusion decoder (arXiv 2501.18593).

A denoising network is told the latents of a picture, enlarged to its size, as
further channels of its input. One loss, the error of its prediction, trains
both: no critic and no other network is needed. The latents have zero mean and
unit variance over their channels, so nothing else bounds them.
"""

from collections.abc import Callable

from diffusion_jax.codecs import dito
from diffusion_jax.codecs.codec import Codec
from diffusion_jax.conditioning import Conditioner
from diffusion_jax.models.autoencoder import Coder
from diffusion_jax.objectives import denoising
from diffusion_jax.objectives.objective import Objective


def create(
  network_fn: Callable, coder: Coder, codec: Codec, schedule, **options
) -> Objective:
  """The denoising loss of pictures, given their latents.

  Args:
    network_fn: (params, input, label, cond, dropout keys or None) ->
      prediction.
    coder: the encoder, of the part 'codec'.
    codec: rows -> pictures in [-1, 1].
    schedule: the noise schedule.
    **options: of `denoising.create`.
  """

  def condition(params, rows, keys):
    del keys
    x = codec.encode(params, rows, None)
    z = coder.encode(params['codec'], x)
    return {'channels': dito.enlarged(z, x.shape[1:3])}

  return denoising.create(
    network_fn, codec, Conditioner(condition, {}), schedule, **options
  )
