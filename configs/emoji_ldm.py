r"""DDPM in the latents of an autoencoder of emoji (latent diffusion).

Reproduces: nothing published; it shows latent diffusion (arXiv 2112.10752) on a
            laptop. 2,500,468 parameters, in latents of 16x16x4.
Data:       1,236 emoji drawn from the font Noto Color Emoji, 146 held out:
            apt-get install fonts-noto-color-emoji. No other download.
Hardware:   2 CPU cores.
Time:       16.5 minutes, 0.25 s a step, after the autoencoder's.
Command:    python -m diffusion_jax.train --workdir=runs/emoji_autoencoder \
              --config=configs/emoji_autoencoder.py
            python -m diffusion_jax.encode --workdir=runs/emoji_autoencoder \
              --config=configs/emoji_ldm.py --output=runs/emoji_latents
            python -m diffusion_jax.train --workdir=runs/emoji_ldm \
              --config=configs/emoji_ldm.py \
              --config.codec.cache=runs/emoji_latents
"""

from diffusion_jax.configs import default


def get_config():
  config = default.get_config()
  config.num_steps = 4000
  config.batch_size = 16

  config.log_every = 50
  config.eval_every = 1000
  config.sample_every = 1000
  config.checkpoint_every = 1000
  config.keep_every = 0

  config.data.name = 'emoji'
  config.data.image_size = 64
  config.data.flip = True

  config.codec = default.latents()
  config.codec.path = 'runs/emoji_autoencoder'

  config.model.channels = 48
  config.model.multipliers = (1, 2, 2)
  config.model.num_blocks = 1
  config.model.attention_resolutions = (8,)
  config.model.num_groups = 8

  config.process.schedule = 'scaled_linear'
  config.process.beta_start = 0.0015
  config.process.beta_end = 0.0195

  config.optim.lr = 1e-3
  config.optim.warmup_steps = 100
  config.ema.decay = 0.995
  config.sample.clip = False
  config.sample.num_images = 36
  return config
