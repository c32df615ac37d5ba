r"""EDM on CIFAR-10, unconditional (arXiv 2206.00364).

Reproduces: table 2, training configuration F with the DDPM++ network: FID 1.97
            with 35 evaluations (18 steps of Heun). 55,733,891 parameters.
            Not yet run.
Data:       as for cifar10.py: bash launch/prepare_data.sh cifar10
Hardware:   any number of devices that divides the batch.
Time:       not measured; preflight predicts that of a step.
Command:    python -m diffusion_jax.train --config=configs/cifar10_edm.py \
              --workdir=runs/cifar10_edm --config.model.dtype=bfloat16
Samples:    python -m diffusion_jax.sample --workdir=runs/cifar10_edm \
              --num_samples=50000 --sampler=heun --grid=karras --num_steps=18

The paper trains on 200 million images in batches of 512. Its average has a
half-life of 500,000 images, which is a decay of 0.99929 per step; ours has no
ramp at the start. With the prediction `edm`, the paper's weight is 1 in the
space of the network's output. Learning rate, dropout and probability of
augmentation are those of table 7 for CIFAR-10.
"""

from diffusion_jax.configs import cifar10


def get_config():
  config = cifar10.get_config()
  config.num_steps = 390_625
  config.batch_size = 512
  config.data.augment = 0.12

  config.model.style = 'ddpmpp'
  config.model.multipliers = (2, 2, 2)
  config.model.num_blocks = 4
  config.model.dropout = 0.13

  config.process.schedule = 'edm'
  config.loss.prediction = 'edm'
  config.loss.law = 'lognormal'

  config.optim.lr = 1e-3
  config.optim.warmup_steps = 19_531  # 10 million images
  config.optim.clip_norm = 0.0
  config.ema.decay = 0.99929

  config.sample.sampler = 'heun'
  config.sample.grid = 'karras'
  config.sample.num_steps = 18
  config.sample.clip = False
  return config
