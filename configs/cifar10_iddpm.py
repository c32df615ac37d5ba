r"""Improved DDPM on CIFAR-10, unconditional, with the hybrid loss.

Reproduces: arXiv 2102.09672, L_hybrid with the cosine schedule: FID 3.19 and
            at most 3.17 bits/dim after 500,000 steps, with 4,000 ancestral
            steps. 52,546,438 parameters. Not yet run; the two scores are
            still to be checked against the paper.
Data:       as for cifar10.py: bash launch/prepare_data.sh cifar10
Hardware:   any number of devices that divides the batch.
Time:       not measured; preflight predicts that of a step.
Command:    python -m diffusion_jax.train --config=configs/cifar10_iddpm.py \
              --workdir=runs/cifar10_iddpm --config.model.dtype=bfloat16
Samples:    python -m diffusion_jax.sample --workdir=runs/cifar10_iddpm \
              --num_samples=50000

Learning rate, dropout and steps are those of the authors' code
(openai/improved-diffusion), which does not mirror images and gives the network
times scaled to 0 .. 1000.
"""

from diffusion_jax.configs import cifar10


def get_config():
  config = cifar10.get_config()
  config.num_steps = 500_000
  config.data.flip = False

  config.model.style = 'iddpm'
  config.model.num_blocks = 3
  config.model.attention_resolutions = (16, 8)
  config.model.num_heads = 4
  config.model.dropout = 0.3
  config.model.time_scale = 0.25

  config.process.schedule = 'cosine'
  config.process.num_timesteps = 4000
  config.loss.variance = 'learned'

  config.optim.lr = 1e-4
  config.optim.warmup_steps = 0
  config.optim.clip_norm = 0.0
  config.sample.variance = 'learned'
  return config
