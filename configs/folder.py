r"""DDPM on a folder of your own images: 300, 3,000 or 30,000 of them.

Reproduces: nothing published; a starting point, see docs/your_images.md. The
            sizes, rates and steps are rules of thumb, not measured.
Data:       a folder of image files of any size, given by
            --config.data.path=DIR; every tenth image is held out.
Hardware:   one GPU or TPU; 300 images also on a CPU, at a small
            --config.data.image_size.
Time:       unknown; `preflight --measure` times a step on your machine.
Command:    python -m diffusion_jax.train --config=configs/folder.py:300 \
              --workdir=runs/mine --config.data.path=DIR
            python -m diffusion_jax.sample --workdir=runs/mine \
              --sampler=ddim --num_steps=50
"""

from diffusion_jax.configs import default
from diffusion_jax.system.errors import UserError

# Number of images -> what depends on it. Fewer images need a smaller network
# and more dropout, or it learns them by heart; shorter runs need a shorter
# average.
SIZES = {
  '300': {
    'num_steps': 20_000, 'batch_size': 32, 'model.channels': 64,
    'model.dropout': 0.2, 'optim.lr': 1e-4, 'optim.warmup_steps': 500,
    'ema.decay': 0.999,
  },
  '3000': {
    'num_steps': 60_000, 'batch_size': 64, 'model.channels': 96,
    'model.dropout': 0.1, 'optim.lr': 2e-4, 'optim.warmup_steps': 1_000,
    'ema.decay': 0.9995,
  },
  '30000': {
    'num_steps': 200_000, 'batch_size': 64, 'model.channels': 128,
    'model.dropout': 0.1, 'optim.lr': 2e-4, 'optim.warmup_steps': 5_000,
    'ema.decay': 0.9999,
  },
}  # fmt: skip


def get_config(images='3000'):
  if images not in SIZES:
    raise UserError(
      f'--config=folder:{images}: after the colon give the nearest number of '
      f'images, one of {", ".join(SIZES)}'
    )
  config = default.get_config()
  config.update_from_flattened_dict(SIZES[images])

  config.data.name = 'folder'
  config.data.path = ''  # set by a flag
  config.data.heldout_every = 10  # without test images of its own
  config.data.image_size = 64  # cropped to squares, and resized
  config.data.flip = True  # not for text, digits or anything with a side

  config.log_every = 50
  config.eval_every = 1_000
  config.sample_every = 1_000
  config.checkpoint_every = 1_000
  return config
