r"""Fine-tuning of Stable Diffusion 1.5 on a folder of captioned images.

Reproduces: nothing published; the network, the autoencoder and the text encoder
            are those of Stable Diffusion 1.5 (arXiv 2112.10752, appendix), and
            the rate is that of diffusers' train_text_to_image. 859,520,964
            trained parameters. Not yet run with the published weights.
Data:       a folder of images with NAME.txt beside NAME.png, see docs/data.md,
            and the folder of Stable Diffusion 1.5, which you download: unet/,
            vae/, text_encoder/, tokenizer/ and scheduler/.
Hardware:   one GPU or TPU, or several: 8.6 GB of state in each (3.4 of
            parameters, 5.2 of moments), 3.4 GB of gradients, 0.8 GB of the
            frozen parts, and the activations of four images at once;
            --config.microbatches=32 has one image at once.
            --config.mesh.fsdp=8 --config.microbatches=4 splits the state over
            eight devices: compiled for TPUs of 16 GB it fits, see
            docs/scaling.md.
Time:       not yet measured; `preflight --measure` times a step on your
            machine, and docs/scaling.md has lower bounds for TPUs.
Command:    python -m diffusion_jax.convert --from=stable-diffusion-v1-5 \
              --to=runs/sd15
            python -m diffusion_jax.train --config=configs/sd15_finetune.py \
              --workdir=runs/mine --init_from=runs/sd15 \
              --config.codec.path=runs/sd15 \
              --config.conditioning.path=runs/sd15 --config.data.path=DIR
            python -m diffusion_jax.sample --workdir=runs/mine \
              --prompt="a red apple" --sampler=ddim --num_steps=50 \
              --grid=stable_diffusion

Latents and captions can be encoded before: codec.cache and conditioning.cache,
see docs/latents.md and docs/text.md. An average of the weights takes 3.4 GB
more: --config.ema.decay=0.999.
"""

from diffusion_jax.configs import default


def get_config():
  config = default.get_config()
  config.num_steps = 10_000
  config.batch_size = 32
  config.microbatches = 8  # four images at once

  config.log_every = 50
  config.eval_every = 500
  config.sample_every = 500
  config.checkpoint_every = 500
  config.keep_every = 0

  config.data.name = 'folder'
  config.data.path = ''  # set by a flag
  config.data.heldout_every = 20
  config.data.image_size = 512
  config.data.flip = False  # captions may speak of left and right

  config.codec = default.latents()
  config.codec.path = ''  # set by a flag
  config.conditioning = default.frozen_text()
  config.conditioning.path = ''  # set by a flag

  config.model.style = 'diffusers'
  config.model.channels = 320
  config.model.multipliers = (1, 2, 4, 4)
  config.model.transformer_depths = (1, 1, 1, 0, 1)
  config.model.num_heads = 8
  config.model.dtype = 'bfloat16'

  config.process.schedule = 'scaled_linear'
  config.process.beta_start = 0.00085
  config.process.beta_end = 0.012

  config.optim.name = 'adamw'
  config.optim.weight_decay = 0.01
  config.optim.lr = 1e-5
  config.optim.warmup_steps = 500
  config.optim.moments_dtype = 'bfloat16'
  config.ema.decay = 0.0  # the network is good already, and an average large

  config.sample.clip = False
  config.sample.grid = 'stable_diffusion'
  config.sample.guidance = 7.5
  config.sample.num_images = 8
  return config
