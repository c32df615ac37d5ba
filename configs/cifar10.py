r"""DDPM on CIFAR-10, unconditional: the paper's main result.

Reproduces: arXiv 2006.11239, table 1, L_simple: FID 3.17 (against the training
            set, 50,000 samples, 1000 ancestral steps), IS 9.46, at most 3.75
            bits/dim. 35,746,307 parameters. Not yet run to the end.
Data:       TFDS, prepared once by
              bash launch/prepare_data.sh cifar10
            or any .npz: --config.data.name=arrays --config.data.path=FILE.
Hardware:   the paper used a TPU v3-8; any number of devices that divides the
            batch.
Time:       800,000 steps, 10.6 hours on the paper's TPU v3-8.
Command:    python -m diffusion_jax.train --config=configs/cifar10.py \
              --workdir=runs/cifar10
            python -m diffusion_jax.sample --workdir=runs/cifar10 \
              --num_samples=50000
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.seed = 0
  config.num_steps = 800_000
  config.batch_size = 128  # over all devices
  # Pieces of a batch, one after the other: less memory, the same numbers.
  config.microbatches = 1

  # In steps; 0 = never.
  config.log_every = 100
  config.eval_every = 5_000  # held-out loss
  config.eval_images = 1_280  # how many of them; 0 = all
  config.sample_every = 10_000  # grid of samples
  config.checkpoint_every = 5_000
  config.keep_last = 2
  config.keep_every = 50_000  # checkpoints at these steps are kept for ever

  # Devices; -1 = what is left. 'data' copies the parameters, 'fsdp' splits
  # them, 'tensor' splits the channels.
  config.mesh = ConfigDict({'data': -1, 'fsdp': 1, 'tensor': 1})

  config.data = ConfigDict()
  config.data.name = 'tfds:cifar10'
  config.data.path = ''  # TFDS's data_dir; '' is TFDS's own default
  config.data.train_split = 'train'
  config.data.heldout_split = 'test'
  config.data.heldout_every = 0  # CIFAR-10 has a test set of its own
  config.data.image_size = 32
  config.data.channels = 3
  config.data.flip = True

  config.model = ConfigDict()
  config.model.name = 'unet'
  config.model.channels = 128
  config.model.multipliers = (1, 2, 2, 2)
  config.model.num_blocks = 2
  config.model.attention_resolutions = (16,)
  config.model.num_heads = 1
  config.model.num_groups = 32
  config.model.dropout = 0.1
  config.model.dtype = 'float32'  # 'bfloat16' computes faster on TPUs and GPUs

  config.process = ConfigDict()
  config.process.schedule = 'linear'
  config.process.num_timesteps = 1000
  config.process.beta_start = 1e-4
  config.process.beta_end = 0.02

  config.loss = ConfigDict({'prediction': 'eps'})

  config.optim = ConfigDict()
  config.optim.name = 'adam'
  config.optim.lr = 2e-4
  config.optim.warmup_steps = 5_000
  config.optim.decay = 'constant'
  config.optim.decay_steps = 0
  config.optim.end_lr = 0.0
  config.optim.clip_norm = 1.0
  config.optim.b1 = 0.9
  config.optim.b2 = 0.999
  config.optim.eps = 1e-8
  config.optim.weight_decay = 0.0
  config.optim.part_lr = ConfigDict()

  config.ema = ConfigDict({'decay': 0.9999})

  # Grids on the way.
  config.sample = ConfigDict()
  config.sample.sampler = 'ddim'
  config.sample.grid = 'uniform'
  config.sample.num_steps = 50
  config.sample.num_images = 64
  # Of ancestral sampling; the paper's choice for CIFAR-10.
  config.sample.variance = 'fixedlarge'
  config.sample.clip = True  # x0 to [-1, 1], in every step
  return config
