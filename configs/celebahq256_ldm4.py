r"""Latent diffusion on CelebA-HQ at 256x256, in latents of 64x64x3.

Reproduces: LDM-4 of arXiv 2112.10752, table 12: the network and the recipe.
            FID 5.11 there, 500 steps of DDIM. 274,056,163 parameters. Not yet
            run.
Data:       as for celebahq256; the autoencoder is the paper's VQ-f4 (8,192
            codes) in the layout of diffusers, which convert imports, or one
            that is trained here.
Hardware:   any number of devices that divides the batch.
Time:       14.4 days of a V100 in the paper, table 18.
Command:    python -m diffusion_jax.convert --from=VQ_F4 \
              --to=runs/celebahq256_vq4
            python -m diffusion_jax.train --workdir=runs/celebahq256_ldm4 \
              --config=configs/celebahq256_ldm4.py \
              --config.data.path=CelebA-HQ-img
            python -m diffusion_jax.sample --workdir=runs/celebahq256_ldm4 \
              --num_samples=50000 --sampler=ddim --num_steps=500

The latents are those before the codebook, and the decoder takes the nearest
codes. As in the paper, they are not scaled. With --config.codec.scale=0.0 they
are scaled by the imported folder's scaling_factor or, for an autoencoder that
is trained here, by what is measured on the training images.
"""

from diffusion_jax.configs import default


def get_config():
  config = default.get_config()
  config.num_steps = 410_000
  config.batch_size = 48

  config.data.name = 'folder'
  config.data.path = ''  # set by a flag
  config.data.image_size = 256
  config.data.flip = True

  config.codec = default.latents()
  config.codec.path = 'runs/celebahq256_vq4'
  config.codec.scale = 1.0  # the paper does not scale them

  config.model.style = 'diffusers'
  config.model.channels = 224
  config.model.multipliers = (1, 2, 3, 4)
  config.model.num_blocks = 2
  config.model.attention_resolutions = (32, 16, 8)
  config.model.head_channels = 32

  config.process.schedule = 'scaled_linear'
  config.process.beta_start = 0.0015
  config.process.beta_end = 0.0195

  config.optim.name = 'adamw'
  config.optim.weight_decay = 0.01
  config.optim.lr = 9.6e-5
  config.optim.warmup_steps = 0
  config.optim.clip_norm = 0.0
  config.sample.clip = False
  config.sample.num_images = 16
  return config
