r"""An autoencoder of emoji at 64x64, for diffusion in 16x16x4 latents.

Reproduces: nothing published; it shows autoencoders on a laptop.
Data:       1,236 emoji drawn from the font Noto Color Emoji, 146 held out:
            apt-get install fonts-noto-color-emoji. No other download.
Hardware:   2 CPU cores.
Time:       7.5 minutes, 0.50 s a step; with :dito 13.3 minutes beside other
            work (docs/latents.md).
Command:    python -m diffusion_jax.train --workdir=runs/emoji_autoencoder \
              --config=configs/emoji_autoencoder.py
Others:     --config=configs/emoji_autoencoder.py:dito is trained by one
            denoising loss, without a critic; with :hybrid the encoder has a
            transformer, and with :plain about as many parameters without one
            (305,207 and 305,653). These two take 600 steps in place of 900:
            8.2 and 8.9 minutes (docs/latents.md).
"""

from diffusion_jax.configs import default
from diffusion_jax.system.errors import UserError

KINDS = ('kl', 'dito', 'hybrid', 'plain')


def get_config(kind='kl'):
  if kind not in KINDS:
    raise UserError(
      f'--config=emoji_autoencoder:{kind}: after the colon give one of '
      f'{", ".join(KINDS)}'
    )
  config = default.get_config()
  config.num_steps = 900
  config.batch_size = 16

  config.log_every = 25
  config.eval_every = 150
  config.sample_every = 150
  config.checkpoint_every = 150
  config.keep_every = 0

  config.data.name = 'emoji'
  config.data.image_size = 64
  config.data.flip = True

  config.codec = default.autoencoder()
  config.codec.channels = 16
  config.codec.multipliers = (1, 2, 2)
  config.codec.num_blocks = 1
  config.codec.num_groups = 8

  config.loss = default.autoencoding()
  config.loss.critic_weight = 0.1
  config.loss.critic_start = 450
  config.loss.critic_channels = 16
  config.loss.critic_strides = 2

  config.optim.lr = 1e-3
  config.optim.b1 = 0.5
  config.optim.b2 = 0.9
  config.optim.clip_norm = 0.0  # a critic's gradients would scale the others
  config.optim.warmup_steps = 50
  config.optim.part_lr.critic = 5e-4
  config.ema.decay = 0.99

  if kind == 'dito':
    _dito(config)
  if kind in ('hybrid', 'plain'):
    config.num_steps = 600
    config.loss.critic_start = 300
  if kind == 'hybrid':
    config.codec.hybrid = 5
  if kind == 'plain':
    config.codec.channels = 18
    config.codec.num_groups = 9
  return config


def _dito(config):
  config.codec.decoder = False
  config.codec.regulariser = 'norm'
  config.model.channels = 16
  config.model.multipliers = (1, 2, 2)
  config.model.num_blocks = 1
  config.model.num_groups = 8
  config.model.time_scale = 1000.0
  config.model.attention_resolutions = (16,)
  config.process.schedule = 'flow'
  config.loss = default.dito()
  config.optim.b1 = 0.9
  config.optim.b2 = 0.999
  del config.optim.part_lr.critic
