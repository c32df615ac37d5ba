r"""Emoji from their names: diffusion in latents, conditioned on captions.

Reproduces: nothing published; it shows text to image on a laptop. The noise is
            that of rectified flow (arXiv 2209.03003), with the times of arXiv
            2403.03206; captions are read by cross-attention.
Data:       1,236 emoji drawn from the font Noto Color Emoji, with their names
            in Unicode; held out are every tenth and twelve combinations of a
            colour and a thing: apt-get install fonts-noto-color-emoji.
Hardware:   2 CPU cores.
Time:       50 minutes, 0.30 s a step, after the autoencoder's 7.5 minutes.
Result:     the names of 38% of the samples of training names are found first
            among 1,382, and of 50% of the twelve combinations: docs/text.md.
Command:    python -m diffusion_jax.train --workdir=runs/emoji_autoencoder \
              --config=configs/emoji_autoencoder.py
            python -m diffusion_jax.encode --workdir=runs/emoji_autoencoder \
              --config=configs/emoji_text.py --output=runs/emoji_latents
            python -m diffusion_jax.train --workdir=runs/emoji_text \
              --config=configs/emoji_text.py \
              --config.codec.cache=runs/emoji_latents
            docs/text.md has the evaluation.

The network is told a name as one vector, too, which scales and shifts its
blocks.
"""

from diffusion_jax.configs import default


def get_config():
  config = default.get_config()
  config.num_steps = 10_000
  config.batch_size = 16

  config.log_every = 50
  config.eval_every = 1000
  config.sample_every = 1000
  config.checkpoint_every = 1000
  config.keep_every = 0

  config.data.name = 'emoji'
  config.data.image_size = 64
  config.data.flip = False  # names speak of left and right

  config.codec = default.latents()
  config.codec.path = 'runs/emoji_autoencoder'

  config.conditioning = default.text()
  config.conditioning.width = 128
  config.conditioning.num_layers = 2
  config.conditioning.pooled = True

  config.model.channels = 48
  config.model.multipliers = (1, 2, 2)
  config.model.num_blocks = 1
  config.model.attention_resolutions = (16, 8)
  config.model.num_groups = 8
  config.model.time_scale = 1000.0
  config.model.details.scale_shift = True

  config.process.schedule = 'flow'
  config.loss.prediction = 'flow'
  config.loss.law = 'logitnormal'
  config.loss.law_mean = 0.5  # more noise: there, names tell most
  config.loss.law_std = 1.0

  config.optim.lr = 1e-3
  config.optim.warmup_steps = 100
  config.optim.decay = 'linear'
  config.optim.decay_from = 7000
  config.optim.decay_steps = 10_000
  config.optim.end_lr = 1e-4
  config.ema.decay = 0.998
  config.sample.clip = False
  config.sample.num_images = 36
  config.sample.guidance = 3.0
  return config
