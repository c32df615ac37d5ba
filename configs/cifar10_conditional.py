r"""DDPM on CIFAR-10, conditional on the class (arXiv 2207.12598).

Reproduces: no published table: the recipe is that of cifar10.py, with labels
            that each image drops with probability 0.1, the paper's p_uncond.
            Expected, not measured: an FID at w = 1 below the unconditional
            model's 3.17, as class-conditional CIFAR-10 models reach.
            Not yet run.
Data:       as for cifar10.py: bash launch/prepare_data.sh cifar10
Hardware:   as for cifar10.py.
Time:       as for cifar10.py, to which labels add next to nothing.
Command:    python -m diffusion_jax.train \
              --config=configs/cifar10_conditional.py \
              --workdir=runs/cifar10_conditional \
              --config.model.dtype=bfloat16
Samples:    python -m diffusion_jax.sample --workdir=runs/cifar10_conditional \
              --label=all --guidance=2 --sampler=ddim --num_steps=50
"""

from diffusion_jax.configs import cifar10


def get_config():
  config = cifar10.get_config()
  config.conditioning.name = 'label'
  config.conditioning.num_classes = 10
  config.sample.num_images = 80  # a row of 8 for each class
  return config
