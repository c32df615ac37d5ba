"""What the config of an autoencoder must hold, a line each."""

import math
from collections.abc import Iterator

from ml_collections import config_dict

from diffusion_jax import codecs, objectives, runs
from diffusion_jax.models import autoencoder, lpips
from diffusion_jax.models.bottleneck import REGULARISERS

# Keys of config.loss: (the allowed values in words, whether a value is one).
OF_LOSS = {
  **dict.fromkeys(
    ('l1', 'l2', 'ssim', 'lpips', 'kl', 'commitment', 'critic_weight'),
    ('0 or more, finite', lambda x: 0 <= x < math.inf),
  ),
  **dict.fromkeys(('decay', 'revive'), ('in [0, 1)', lambda x: 0 <= x < 1)),
  'synchronise': ('in [0, 1]', lambda x: 0 <= x <= 1),
  **dict.fromkeys(
    ('critic_start', 'critic_strides'), ('0 or more', lambda x: x >= 0)
  ),
  **dict.fromkeys(
    ('critic_channels', 'decode_steps'), ('at least 1', lambda x: x >= 1)
  ),
}
OF_CODEC = {
  **dict.fromkeys(
    ('channels', 'num_blocks', 'latent_channels', 'num_groups'),
    ('at least 1', lambda x: x >= 1),
  ),
  'multipliers': (
    'one or more whole numbers of at least 1',
    lambda x: len(x) > 0 and min(x) >= 1,
  ),
  **dict.fromkeys(('hybrid', 'code_channels'), ('0 or more', lambda x: x >= 0)),
  'codes': ('at least 2', lambda x: x >= 2),
  'levels': (
    'whole numbers of at least 2',
    lambda x: len(x) > 0 and min(x) >= 2,
  ),
  'regulariser': (
    f'one of {", ".join(REGULARISERS)}',
    lambda x: x in REGULARISERS,
  ),
  'dtype': ('float32 or bfloat16', lambda x: x in ('float32', 'bfloat16')),
}


def of_autoencoder(config: config_dict.ConfigDict) -> Iterator[tuple]:
  """Yields (holds, message) pairs; those of other runs are few."""
  codec, loss = config.codec, config.loss
  trains = loss.name in objectives.AUTOENCODERS
  yield (
    codecs.reconstructs(config) == trains,
    f'loss.name={loss.name!r} with codec.name={codec.name!r}: '
    "codec.name='autoencoder' goes together with loss.name='autoencoding' or "
    "'dito'",
  )
  if not (trains and codecs.reconstructs(config)):
    return
  for name, group, limits in (
    ('codec', codec, OF_CODEC), ('loss', loss, OF_LOSS)
  ):  # fmt: skip
    for key, (allowed, fits) in limits.items():
      if key in group:
        yield fits(group[key]), f'{name}.{key}={group[key]}: {allowed}'
  if codec.multipliers:
    yield from _sizes(config)
  yield (
    config.conditioning.name == 'none',
    f'conditioning.name={config.conditioning.name!r}: an autoencoder has no '
    "condition, so it must be 'none'",
  )
  yield (
    config.data.augment == 0,
    f'data.augment={config.data.augment}: an autoencoder is not told of '
    'transforms, so it must be 0',
  )
  yield from (_dito if loss.name == objectives.DITO else _plain)(config)


def _sizes(config):
  codec, sides = config.codec, runs.image_shape(config.data)[:2]
  halvings = len(codec.multipliers) - 1
  yield (
    all(side % 2**halvings == 0 for side in sides),
    f'data.image_size={config.data.image_size}: codec.multipliers='
    f'{tuple(codec.multipliers)} halves images {halvings} times, so it must be '
    f'a multiple of {2**halvings}',
  )
  for multiplier in codec.multipliers:
    width = codec.channels * multiplier
    yield (
      width % max(codec.num_groups, 1) == 0,
      f'codec.num_groups={codec.num_groups} does not divide {width} channels '
      f'(codec.channels={codec.channels} x {multiplier})',
    )
  maps = [min(sides) // 2**level for level in range(halvings + 1)]
  for resolution in codec.attention_resolutions:
    yield (
      resolution in maps,
      f'codec.attention_resolutions has {resolution}, but the maps are of size '
      f'{", ".join(map(str, maps))}: give some of these, or () for none',
    )
  width = codec.channels * codec.multipliers[-1]
  yield (
    not codec.hybrid or width % 4 == 0,
    f'codec.hybrid={codec.hybrid} needs a multiple of 4 channels at the last '
    f'level, which has {width} (codec.channels={codec.channels} x '
    f'{codec.multipliers[-1]})',
  )
  outputs = autoencoder.channels_of(**codec)
  yield (
    codec.quant_conv or outputs == codec.latent_channels,
    f'codec.latent_channels={codec.latent_channels} with '
    f'codec.quant_conv=False: the latents have {outputs} channels, so it must '
    f'be {outputs}, or set codec.quant_conv=True',
  )


def _dito(config):
  yield (
    not config.codec.decoder and config.codec.regulariser == 'norm',
    "loss.name='dito' has a denoising network as its decoder: set "
    "codec.decoder=False and codec.regulariser='norm'",
  )
  yield (
    config.loss.variance == 'fixed',
    f"loss.variance={config.loss.variance!r}: with loss.name='dito' it must be "
    "'fixed'",
  )
  yield (
    not config.loss.synchronise or config.loss.law == 'uniform',
    f'loss.synchronise={config.loss.synchronise} with loss.law='
    f'{config.loss.law!r}: noise synchronisation draws uniform times, so set '
    "loss.law='uniform', or loss.synchronise=0",
  )


def _plain(config):
  loss = config.loss
  yield (
    config.codec.decoder,
    "codec.decoder=False: loss.name='autoencoding' needs a decoder",
  )
  yield (
    loss.l1 + loss.l2 + loss.ssim + loss.lpips > 0,
    'loss.l1, loss.l2, loss.ssim and loss.lpips are 0: one of them must be '
    'above 0',
  )
  if not loss.lpips:
    return
  yield (
    loss.lpips_path,
    f"loss.lpips={loss.lpips} with loss.lpips_path='': give the file of its "
    'weights, see docs/latents.md, or set loss.lpips=0',
  )
  sides = runs.image_shape(config.data)[:2]
  yield (
    min(sides) >= lpips.SMALLEST,
    f'data.image_size={config.data.image_size} with loss.lpips={loss.lpips}: '
    f'LPIPS needs at least {lpips.SMALLEST} pixels a side: set loss.lpips=0, '
    'or use larger images',
  )
