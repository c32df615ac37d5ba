r"""DDPM on scikit-learn's handwritten digits: the whole road, on a laptop.

Reproduces: nothing published; it shows that everything works, on real data.
            701,345 parameters. Held-out loss 0.081 at the end.
Data:       1,797 grey 8x8 images that scikit-learn carries, every fifth held
            out. No download.
Hardware:   2 CPU cores.
Time:       4 to 5 minutes.
Command:    python -m diffusion_jax.train --config=configs/digits.py \
              --workdir=runs/digits
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.seed = 0
  config.num_steps = 3000
  config.batch_size = 64  # over all devices
  # Pieces of a batch, one after the other: less memory, the same numbers.
  config.microbatches = 1

  # In steps; 0 = never.
  config.log_every = 50
  config.eval_every = 500  # held-out loss
  config.eval_images = 0  # how many of them; 0 = all
  config.sample_every = 500  # grid of samples
  config.checkpoint_every = 500
  config.keep_last = 2
  config.keep_every = 0  # checkpoints at these steps are kept for ever

  # Devices; -1 = what is left. 'data' copies the parameters, 'fsdp' splits
  # them, 'tensor' splits the channels.
  config.mesh = ConfigDict({'data': -1, 'fsdp': 1, 'tensor': 1})

  config.data = ConfigDict()
  config.data.name = 'digits'
  config.data.path = ''
  config.data.train_split = 'train'
  config.data.heldout_split = 'test'
  config.data.heldout_every = 0  # the digits have a split of their own
  config.data.image_size = 8
  config.data.channels = 1
  config.data.flip = False  # a mirrored 2 is no digit

  config.model = ConfigDict()
  config.model.name = 'unet'
  config.model.channels = 32
  config.model.multipliers = (1, 2)
  config.model.num_blocks = 1
  config.model.attention_resolutions = (4,)
  config.model.num_heads = 1
  config.model.num_groups = 8
  config.model.dropout = 0.0
  config.model.dtype = 'float32'

  config.process = ConfigDict()
  config.process.schedule = 'linear'
  config.process.num_timesteps = 1000
  config.process.beta_start = 1e-4
  config.process.beta_end = 0.02

  config.loss = ConfigDict({'prediction': 'eps'})

  config.optim = ConfigDict()
  config.optim.name = 'adam'
  config.optim.lr = 2e-3
  config.optim.warmup_steps = 100
  config.optim.decay = 'constant'
  config.optim.decay_steps = 0
  config.optim.end_lr = 0.0
  config.optim.clip_norm = 1.0
  config.optim.b1 = 0.9
  config.optim.b2 = 0.999
  config.optim.eps = 1e-8
  config.optim.weight_decay = 0.0
  config.optim.part_lr = ConfigDict()

  config.ema = ConfigDict({'decay': 0.995})

  # Grids on the way.
  config.sample = ConfigDict()
  config.sample.sampler = 'ddim'
  config.sample.grid = 'uniform'
  config.sample.num_steps = 50
  config.sample.num_images = 64
  # Of ancestral sampling; the paper's choice for CIFAR-10, here too.
  config.sample.variance = 'fixedlarge'
  config.sample.clip = True  # x0 to [-1, 1], in every step
  return config
