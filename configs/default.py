"""Every key of a config, with its default: where other configs start from.

  from diffusion_jax.configs import default

  def get_config():
    config = default.get_config()
    config.optim.lr = 2e-5
    return config

That line works in a file of your own, too, wherever it lies; in place of
`default` it may name any other config. `train --config=FILE --print_config`
shows what comes of it. A config that lacks a key has the default of this file.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.seed = 0  # of the initial values, the batches' order and all noise
  config.num_steps = 500_000
  config.batch_size = 128  # over all devices
  # Pieces of a batch, one after the other: less memory, the same numbers.
  config.microbatches = 1

  # In steps; 0 = never.
  config.log_every = 100
  config.eval_every = 5_000  # held-out loss
  config.eval_images = 0  # held-out images that it is the mean of; 0 = all
  config.sample_every = 10_000  # a grid of samples
  config.checkpoint_every = 5_000
  config.keep_last = 2  # so many of the newest checkpoints
  config.keep_every = 100_000  # checkpoints at these steps are never deleted

  # Devices along each axis; -1 = all that are left. 'data' copies the
  # parameters, 'fsdp' splits them, 'tensor' splits the channels.
  config.mesh = ConfigDict()
  config.mesh.data = -1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1

  config.data = ConfigDict()
  config.data.name = 'folder'  # 'folder', 'arrays', 'digits' or 'tfds:NAME'
  config.data.path = ''  # its folder or file; '' = TFDS's own data_dir
  config.data.train_split = 'train'
  config.data.heldout_split = 'test'  # '' = none
  # Of sets without one: 10 holds out every tenth image, 0 none.
  config.data.heldout_every = 0
  config.data.image_size = 32  # images become squares of this many pixels
  config.data.channels = 3  # 1 = grey, 3 = RGB
  config.data.flip = True  # half of the training images are mirrored

  # What is diffused; 'pixels' = the images, from -1 to 1.
  config.codec = ConfigDict()
  config.codec.name = 'pixels'

  # What else the network is given; 'none' = noised data and time alone.
  config.conditioning = ConfigDict()
  config.conditioning.name = 'none'

  config.model = ConfigDict()
  config.model.name = 'unet'
  config.model.channels = 128  # at full resolution
  config.model.multipliers = (1, 2, 2, 2)  # of the channels, one a level
  config.model.num_blocks = 2  # residual blocks a level
  config.model.attention_resolutions = (16,)  # sizes of maps that attend
  config.model.num_heads = 1  # of attention
  config.model.num_groups = 32  # of group normalisation
  config.model.dropout = 0.0  # share of the values that are dropped
  config.model.dtype = 'float32'  # 'bfloat16' computes faster on TPUs and GPUs

  # The variances beta of the noise that each step adds (arXiv 2006.11239).
  config.process = ConfigDict()
  config.process.schedule = 'linear'
  config.process.num_timesteps = 1000
  config.process.beta_start = 1e-4
  config.process.beta_end = 0.02

  config.loss = ConfigDict()
  config.loss.name = 'denoising'  # the mean squared error of the prediction
  config.loss.prediction = (
    'eps'  # what the network predicts: 'eps', 'x0' or 'v'
  )

  config.optim = ConfigDict()
  config.optim.name = 'adam'  # 'adam' or 'adamw'
  config.optim.lr = 2e-4  # after warm-up
  config.optim.warmup_steps = 5_000  # of a linear rise from 0; 0 = none
  # Of the learning rate after warm-up: 'constant', 'cosine' or 'linear', down
  # to end_lr at step decay_steps. Not at num_steps: a run may be prolonged.
  config.optim.decay = 'constant'
  config.optim.decay_steps = 0
  config.optim.end_lr = 0.0
  config.optim.clip_norm = 1.0  # of the whole gradient; 0 = no clipping
  config.optim.b1 = 0.9
  config.optim.b2 = 0.999
  config.optim.eps = 1e-8
  # Of 'adamw', times the learning rate; not of biases and scales.
  config.optim.weight_decay = 0.0
  # Learning rates of parts of the network in place of lr: {'codec': 1e-5}.
  config.optim.part_lr = ConfigDict()

  # The moving average of the parameters, of which samples are drawn.
  config.ema = ConfigDict()
  config.ema.decay = 0.9999

  # Grids on the way, see docs/samplers.md.
  config.sample = ConfigDict()
  config.sample.sampler = 'ddim'
  config.sample.grid = 'uniform'
  config.sample.num_steps = 50
  config.sample.num_images = 64
  # Of ancestral sampling: 'fixedlarge' = beta, 'fixedsmall' = the posterior's.
  config.sample.variance = 'fixedlarge'
  config.sample.clip = True  # x0 to [-1, 1], in every step
  return config
