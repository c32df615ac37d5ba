r"""Latent diffusion on LSUN churches at 256x256, in latents of 32x32x4.

Reproduces: LDM-8 of arXiv 2112.10752, table 12: the network and the recipe, but
            for the squared error in place of the absolute one. FID 4.02 there,
            200 steps of DDIM. 294,966,916 parameters. Not yet run.
Data:       TFDS, prepared once by bash launch/prepare_data.sh
            lsun/church_outdoor (2.4 GB); an autoencoder of 8-fold reduction
            with KL, such as that of Stable Diffusion, which convert imports.
Hardware:   any number of devices that divides the batch.
Time:       18 days of a V100 in the paper, table 18.
Command:    python -m diffusion_jax.convert --from=KL_F8 \
              --to=runs/church_kl8
            python -m diffusion_jax.train --workdir=runs/church_ldm8 \
              --config=configs/church_ldm8.py
            python -m diffusion_jax.sample --workdir=runs/church_ldm8 \
              --num_samples=50000 --sampler=ddim --num_steps=200
"""

from diffusion_jax.configs import celebahq256_ldm4


def get_config():
  config = celebahq256_ldm4.get_config()
  config.num_steps = 500_000
  config.batch_size = 96

  config.data.name = 'tfds:lsun/church_outdoor'
  config.data.heldout_split = 'validation'
  config.codec.path = 'runs/church_kl8'
  config.codec.scale = 0.0  # that of the imported weights

  config.model.style = 'adm'
  config.model.channels = 192
  config.model.multipliers = (1, 2, 2, 4, 4)
  config.model.attention_resolutions = (32, 16, 8, 4)
  config.model.num_heads = 8
  config.model.head_channels = 0

  config.process.beta_end = 0.0155

  config.optim.lr = 5e-5
  config.optim.warmup_steps = 10_000
  return config
