r"""DDPM on scikit-learn's handwritten digits, conditional on the digit.

Reproduces: nothing published; it shows labels and guidance on real data.
            Held-out loss 0.072 at the end. Of 2,000 samples with w = 2 and 50
            steps of DDIM, a classifier takes all for the digit that was asked
            for, and 98.9% of held-out images for theirs (docs/conditions.md).
Data:       as in digits.py. Each image drops its label with probability 0.1,
            so that the network can also sample without one and be guided.
Hardware:   2 CPU cores.
Time:       4 to 5 minutes.
Command:    python -m diffusion_jax.train \
              --config=configs/digits_conditional.py \
              --workdir=runs/digits_conditional
Samples:    python -m diffusion_jax.sample --workdir=runs/digits_conditional \
              --label=all --guidance=2 --sampler=ddim --num_steps=50
"""

from diffusion_jax.configs import digits


def get_config():
  config = digits.get_config()
  config.conditioning.name = 'label'
  config.conditioning.num_classes = 10
  config.sample.num_images = 80  # a row of 8 for each digit
  return config
