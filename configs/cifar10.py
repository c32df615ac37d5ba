r"""DDPM on CIFAR-10, unconditional: the paper's main result.

Reproduces: arXiv 2006.11239, table 1, L_simple: FID 3.17 (against the training
            set, 50,000 samples, 1000 ancestral steps), IS 9.46, at most 3.75
            bits/dim. 35,746,307 parameters. Not yet run to the end.
Data:       TFDS, prepared once by
              bash launch/prepare_data.sh cifar10
            or any .npz: --config.data.name=arrays --config.data.path=FILE.
Hardware:   any number of devices that divides the batch; the paper used a TPU
            v3-8.
Time:       10.6 hours on the paper's TPU v3-8: 800,000 steps.
Command:    python -m diffusion_jax.train --config=configs/cifar10.py \
              --workdir=runs/cifar10
            python -m diffusion_jax.sample --workdir=runs/cifar10 \
              --num_samples=50000
"""

from diffusion_jax.configs import default


def get_config():
  config = default.get_config()
  config.num_steps = 800_000
  config.batch_size = 128
  config.eval_images = 1_280
  config.keep_every = 50_000

  config.data.name = 'tfds:cifar10'
  config.data.image_size = 32
  config.data.flip = True

  config.model.multipliers = (1, 2, 2, 2)
  config.model.dropout = 0.1

  config.optim.lr = 2e-4
  config.sample.variance = 'fixedlarge'
  return config
