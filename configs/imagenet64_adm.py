r"""ADM (guided diffusion) on ImageNet, 64x64, conditional on the class.

Reproduces: arXiv 2105.05233, ADM at 64x64 without guidance: FID 2.07,
            precision 0.74, recall 0.63, with 250 ancestral steps. 295,905,222
            parameters. Not yet run.
Data:       TFDS, prepared once by
              bash launch/prepare_data.sh imagenet_resized/64x64
            or any .npz with labels: --config.data.name=arrays
            --config.data.path=FILE.
Hardware:   many accelerators; preflight tells whether a batch fits.
Time:       540,000 steps of 2,048 images (still to be checked against the
            paper); not measured.
Command:    python -m diffusion_jax.train --config=configs/imagenet64_adm.py \
              --workdir=runs/imagenet64_adm
Samples:    python -m diffusion_jax.sample --workdir=runs/imagenet64_adm \
              --num_samples=50000 --num_steps=250

As in the paper no label is dropped, so that the network has no unconditional
mode: --config.conditioning.drop=0.1 trains one for classifier-free guidance.
"""

from diffusion_jax.configs import default


def get_config():
  config = default.get_config()
  config.num_steps = 540_000
  config.batch_size = 2048
  config.eval_images = 2_048
  config.keep_every = 50_000

  config.data.name = 'tfds:imagenet_resized/64x64'
  config.data.heldout_split = 'validation'
  config.data.image_size = 64
  config.conditioning.name = 'label'
  config.conditioning.num_classes = 1000
  config.conditioning.drop = 0.0

  config.model.style = 'adm'
  config.model.channels = 192
  config.model.multipliers = (1, 2, 3, 4)
  config.model.num_blocks = 3
  config.model.attention_resolutions = (32, 16, 8)
  config.model.head_channels = 64
  config.model.dropout = 0.1
  config.model.dtype = 'bfloat16'

  config.process.schedule = 'cosine'
  config.loss.variance = 'learned'

  config.optim.lr = 3e-4
  config.optim.warmup_steps = 0
  config.optim.clip_norm = 0.0
  config.sample.variance = 'learned'
  return config
