r"""DDPM on CelebA-HQ at 256x256, unconditional.

Reproduces: arXiv 2006.11239, section 4 and appendix B: the recipe for
            CelebA-HQ. 113,673,219 parameters. Not yet run.
Data:       a folder of the 30,000 images, given by --config.data.path=DIR, such
            as CelebA-HQ-img of github.com/switchablenorms/CelebAMask-HQ. Images
            are resized each time they are read; for speed, resize them to
            256x256 beforehand. TFDS cannot download this set.
Hardware:   any number of devices that divides the batch; the paper used a TPU
            v3-8.
Time:       63 hours on the paper's TPU v3-8: 500,000 steps at 2.2 per second;
            128 samples in 300 s.
Command:    python -m diffusion_jax.train --config=configs/celebahq256.py \
              --workdir=runs/celebahq256 --config.data.path=CelebA-HQ-img
            python -m diffusion_jax.sample --workdir=runs/celebahq256 \
              --num_samples=64
"""

from diffusion_jax.configs import default


def get_config():
  config = default.get_config()
  config.num_steps = 500_000
  config.batch_size = 64

  config.data.name = 'folder'
  config.data.path = ''  # set by a flag
  config.data.image_size = 256
  config.data.flip = True

  config.model.multipliers = (1, 1, 2, 2, 4, 4)
  config.model.dropout = 0.0

  config.optim.lr = 2e-5
  config.sample.num_images = 16
  config.sample.variance = 'fixedsmall'
  return config
