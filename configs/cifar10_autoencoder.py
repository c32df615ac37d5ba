r"""An autoencoder of CIFAR-10, for diffusion in 8x8x4 latents.

Reproduces: nothing published; the structure is that of latent diffusion's f4
            (arXiv 2112.10752), with L1 and SSIM in place of LPIPS.
Data:       as for cifar10.py: bash launch/prepare_data.sh cifar10
Hardware:   any number of devices that divides the batch.
Time:       not measured; preflight predicts that of a step.
Command:    python -m diffusion_jax.train --workdir=runs/cifar10_autoencoder \
              --config=configs/cifar10_autoencoder.py
"""

from diffusion_jax.configs import cifar10, default


def get_config():
  config = cifar10.get_config()
  config.num_steps = 100_000

  config.codec = default.autoencoder()
  config.loss = default.autoencoding()
  config.loss.critic_start = 20_000
  config.loss.critic_strides = 2

  config.optim.lr = 2e-4
  config.optim.b1 = 0.5
  config.optim.b2 = 0.9
  config.optim.clip_norm = 0.0  # a critic's gradients would scale the others
  config.optim.warmup_steps = 1000
  config.ema.decay = 0.999
  return config
