r"""A pair of encoders of emoji and their names, which judges emoji from text.

Reproduces: nothing published; it shows evaluation of text to image (the loss is
            CLIP's, arXiv 2103.00020) on a laptop.
Data:       all 1,382 emoji drawn from the font Noto Color Emoji, with their
            names in Unicode: apt-get install fonts-noto-color-emoji.
Hardware:   2 CPU cores.
Time:       12 minutes, 0.46 s a step.
Command:    python -m diffusion_jax.train --workdir=runs/emoji_judge \
              --config=configs/emoji_judge.py
            python -m diffusion_jax.evaluate --workdir=runs/emoji_judge
"""

from diffusion_jax.configs import default


def get_config():
  config = default.get_config()
  config.num_steps = 1500
  config.batch_size = 128

  config.log_every = 20
  config.eval_every = 0
  config.sample_every = 0
  config.checkpoint_every = 250
  config.keep_every = 0

  config.data.name = 'emoji'
  config.data.image_size = 64
  config.data.train_split = 'all'
  config.data.heldout_split = ''
  config.data.flip = False  # names speak of left and right

  config.conditioning = default.text()
  config.conditioning.width = 128
  config.conditioning.num_layers = 2
  config.conditioning.num_heads = 4
  config.conditioning.drop = 0.0

  config.model.name = 'encoder'
  config.model.channels = 16
  config.model.multipliers = (1, 2, 4, 4)
  config.model.num_blocks = 1
  config.model.num_groups = 8
  config.model.attention_resolutions = ()

  config.loss = default.contrastive()
  config.loss.pool = 2  # a quarter of the time
  config.loss.shift = 4.0
  config.loss.scale = 0.12
  config.loss.noise = 12.0

  config.optim.name = 'adamw'
  config.optim.lr = 1e-3
  config.optim.weight_decay = 0.01
  config.optim.warmup_steps = 100
  config.optim.decay = 'cosine'
  config.optim.decay_steps = 1500
  config.ema.decay = 0.98
  return config
