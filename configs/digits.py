r"""DDPM on scikit-learn's handwritten digits: a complete run on a laptop.

Reproduces: nothing published; it shows that everything works, on real data.
            701,345 parameters. Held-out loss 0.081 at the end.
Data:       1,797 grey 8x8 images included in scikit-learn, every fifth held
            out. No download.
Hardware:   2 CPU cores.
Time:       4 to 5 minutes.
Command:    python -m diffusion_jax.train --config=configs/digits.py \
              --workdir=runs/digits
"""

from diffusion_jax.configs import default


def get_config():
  config = default.get_config()
  config.num_steps = 3000
  config.batch_size = 64

  config.log_every = 50
  config.eval_every = 500
  config.sample_every = 500
  config.checkpoint_every = 500
  config.keep_every = 0

  config.data.name = 'digits'
  config.data.image_size = 8
  config.data.channels = 1
  config.data.flip = False  # a mirrored 2 is not a digit

  config.model.channels = 32
  config.model.multipliers = (1, 2)
  config.model.num_blocks = 1
  config.model.attention_resolutions = (4,)
  config.model.num_groups = 8

  config.optim.lr = 2e-3
  config.optim.warmup_steps = 100
  config.ema.decay = 0.995
  return config
