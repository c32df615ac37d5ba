r"""DDPM on CelebA-HQ at 256x256, unconditional.

Reproduces: arXiv 2006.11239, section 4 and appendix B: the recipe for
            CelebA-HQ. 113,673,219 parameters. Not yet run.
Data:       a folder of the 30,000 images, named by --config.data.path=DIR, such
            as CelebA-HQ-img of github.com/switchablenorms/CelebAMask-HQ. They
            are resized each time they are read: quickest at 256x256 already.
            TFDS has no download for it.
Hardware:   the paper used a TPU v3-8; any number of devices that divides the
            batch.
Time:       500,000 steps, 2.2 a second on the paper's TPU v3-8, so 63 hours;
            128 samples in 300 s.
Command:    python -m diffusion_jax.train --config=configs/celebahq256.py \
              --workdir=runs/celebahq256 --config.data.path=CelebA-HQ-img
            python -m diffusion_jax.sample --workdir=runs/celebahq256 \
              --num_samples=64
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.seed = 0
  config.num_steps = 500_000
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
  config.data.name = 'folder'
  config.data.path = ''  # give yours
  config.data.train_split = 'train'
  config.data.heldout_split = 'test'
  config.data.heldout_every = 0  # 100 would hold out every hundredth
  config.data.image_size = 256
  config.data.channels = 3
  config.data.flip = True

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
