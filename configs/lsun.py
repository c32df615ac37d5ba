r"""DDPM on LSUN at 256x256, unconditional: church, bedroom or cat.

Reproduces: arXiv 2006.11239, section 4 and appendix B: their network and
            recipe at 256x256. 113,673,219 parameters. Not yet run.
Data:       TFDS, prepared once by one of
              bash launch/prepare_data.sh lsun/church_outdoor
              bash launch/prepare_data.sh lsun/bedroom
              bash launch/prepare_data.sh lsun/cat
            Downloads of 2.4, 46 and 45 GB. The cats have no held-out images.
Hardware:   the paper used a TPU v3-8; any number of devices that divides the
            batch.
Time:       2.2 steps a second on the paper's TPU v3-8, so 6.3 days for
            church, 12.6 for bedroom and 9.5 for cat; 128 samples in 300 s.
Command:    python -m diffusion_jax.train --config=configs/lsun.py:church \
              --workdir=runs/church
            python -m diffusion_jax.sample --workdir=runs/church \
              --num_samples=50000
"""

from ml_collections import ConfigDict

from diffusion_jax.system.errors import UserError

# TFDS's name, held-out split ('' = none), steps, flips.
CATEGORIES = {
  'church': ('church_outdoor', 'validation', 1_200_000, True),
  'bedroom': ('bedroom', 'validation', 2_400_000, False),
  'cat': ('cat', '', 1_800_000, True),
}


def get_config(category='church'):
  if category not in CATEGORIES:
    raise UserError(
      f'--config=lsun:{category}: what follows the colon is one of '
      f'{", ".join(CATEGORIES)}'
    )
  name, heldout_split, num_steps, flip = CATEGORIES[category]

  config = ConfigDict()
  config.seed = 0
  config.num_steps = num_steps
  config.batch_size = 64  # over all devices
  # Pieces of a batch, one after the other: less memory, the same numbers.
  config.microbatches = 1

  # In steps; 0 = never.
  config.log_every = 100
  config.eval_every = 5_000  # held-out loss
  config.eval_images = 0  # how many of them; 0 = all
  config.sample_every = 10_000  # grid of samples
  config.checkpoint_every = 5_000
  config.keep_last = 2
  config.keep_every = 100_000  # checkpoints at these steps are kept for ever

  # Devices; -1 = what is left. 'data' copies the parameters, 'fsdp' splits
  # them, 'tensor' splits the channels.
  config.mesh = ConfigDict({'data': -1, 'fsdp': 1, 'tensor': 1})

  config.data = ConfigDict()
  config.data.name = f'tfds:lsun/{name}'
  config.data.path = ''  # TFDS's data_dir; '' is TFDS's own default
  config.data.train_split = 'train'
  config.data.heldout_split = heldout_split
  config.data.heldout_every = 0  # TFDS holds images out by its splits
  config.data.image_size = 256
  config.data.channels = 3
  config.data.flip = flip

  config.model = ConfigDict()
  config.model.name = 'unet'
  config.model.channels = 128
  config.model.multipliers = (1, 1, 2, 2, 4, 4)
  config.model.num_blocks = 2
  config.model.attention_resolutions = (16,)
  config.model.num_heads = 1
  config.model.num_groups = 32
  config.model.dropout = 0.0
  config.model.dtype = 'float32'  # 'bfloat16' computes faster on TPUs and GPUs

  config.process = ConfigDict()
  config.process.schedule = 'linear'
  config.process.num_timesteps = 1000
  config.process.beta_start = 1e-4
  config.process.beta_end = 0.02

  config.loss = ConfigDict({'prediction': 'eps'})

  config.optim = ConfigDict()
  config.optim.name = 'adam'
  config.optim.lr = 2e-5
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
  config.sample.num_images = 16
  # Of ancestral sampling; the paper's choice at 256x256.
  config.sample.variance = 'fixedsmall'
  config.sample.clip = True  # x0 to [-1, 1], in every step
  return config
