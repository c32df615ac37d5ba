r"""DDPM on LSUN at 256x256, unconditional: church, bedroom or cat.

Reproduces: arXiv 2006.11239, section 4 and appendix B: their network and
            recipe at 256x256. 113,673,219 parameters. Not yet run.
Data:       TFDS, prepared once by one of
              bash launch/prepare_data.sh lsun/church_outdoor
              bash launch/prepare_data.sh lsun/bedroom
              bash launch/prepare_data.sh lsun/cat
            Downloads of 2.4, 46 and 45 GB. The cats have no held-out images.
Hardware:   any number of devices that divides the batch; the paper used a TPU
            v3-8.
Time:       6.3 days for church, 12.6 for bedroom and 9.5 for cat on the paper's
            TPU v3-8, at 2.2 steps per second; 128 samples in 300 s.
Command:    python -m diffusion_jax.train --config=configs/lsun.py:church \
              --workdir=runs/church
            python -m diffusion_jax.sample --workdir=runs/church \
              --num_samples=50000
"""

from diffusion_jax.configs import celebahq256
from diffusion_jax.system.errors import UserError

# Category -> (TFDS's name, held-out split ('' = none), steps, flip).
CATEGORIES = {
  'church': ('church_outdoor', 'validation', 1_200_000, True),
  'bedroom': ('bedroom', 'validation', 2_400_000, False),
  'cat': ('cat', '', 1_800_000, True),
}


def get_config(category='church'):
  if category not in CATEGORIES:
    raise UserError(
      f'--config=lsun:{category}: after the colon give one of '
      f'{", ".join(CATEGORIES)}'
    )
  name, heldout_split, num_steps, flip = CATEGORIES[category]

  config = celebahq256.get_config()  # the paper's network at 256x256
  config.num_steps = num_steps
  config.data.name = f'tfds:lsun/{name}'
  config.data.heldout_split = heldout_split
  config.data.flip = flip
  return config
