r"""DDPM on emoji at 64x64, in pixels, to be compared with emoji_ldm.

Reproduces: nothing published. 2,499,603 parameters (wide) or 2,534,083 (deep),
            as many as emoji_ldm within 2%, in as many levels.
Data:       1,236 emoji drawn from the font Noto Color Emoji, 146 held out:
            apt-get install fonts-noto-color-emoji. No other download.
Hardware:   2 CPU cores.
Time:       26 minutes, 3.2 s a step; with :deep 3.5 s. benchmarks/latent.py
            makes it as long as the autoencoder and emoji_ldm together: 455
            steps.
Command:    python -m diffusion_jax.train --workdir=runs/emoji_pixels \
              --config=configs/emoji_pixels.py
Others:     --config=configs/emoji_pixels.py:deep is narrower with more blocks.
"""

from diffusion_jax.configs import default, emoji_ldm
from diffusion_jax.system.errors import UserError

# Shape -> (channels, residual blocks per level).
SHAPES = {'wide': (48, 1), 'deep': (40, 2)}


def get_config(shape='wide'):
  if shape not in SHAPES:
    raise UserError(
      f'--config=emoji_pixels:{shape}: after the colon give one of '
      f'{", ".join(SHAPES)}'
    )
  config = emoji_ldm.get_config()
  config.codec = default.get_config().codec
  config.num_steps = 500
  config.eval_every = 100
  config.sample_every = 250
  config.checkpoint_every = 50
  config.log_every = 10

  config.model.channels, config.model.num_blocks = SHAPES[shape]
  config.model.attention_resolutions = (16,)

  config.process.schedule = 'linear'
  config.process.beta_start = 1e-4
  config.process.beta_end = 0.02

  config.optim.warmup_steps = 50
  config.ema.decay = 0.98
  config.sample.clip = True
  return config
