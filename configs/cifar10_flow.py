r"""Rectified flow on CIFAR-10, unconditional (arXiv 2209.03003).

Reproduces: table 1, 1-rectified flow: FID 2.58 with an adaptive solver of 127
            evaluations. Not yet run; the score is still to be checked
            against the paper.
Data:       as for cifar10.py: bash launch/prepare_data.sh cifar10
Hardware:   any number of devices that divides the batch.
Time:       not measured; preflight predicts that of a step.
Command:    python -m diffusion_jax.train --config=configs/cifar10_flow.py \
              --workdir=runs/cifar10_flow --config.model.dtype=bfloat16
Samples:    python -m diffusion_jax.sample --workdir=runs/cifar10_flow \
              --num_samples=50000 --sampler=heun --num_steps=64

Network (DDPM++), dropout and steps are those of the authors' code
(gnobitab/RectifiedFlow). The times are uniform, as in the paper. Their average
has the decay 0.999999 after a ramp; without a ramp it would still be a quarter
random initial weights at the end, so the decay here is 0.9999.
"""

from diffusion_jax.configs import cifar10


def get_config():
  config = cifar10.get_config()
  config.num_steps = 1_300_000

  config.model.style = 'ddpmpp'
  config.model.num_blocks = 4
  config.model.dropout = 0.15
  config.model.time_scale = 1000.0

  config.process.schedule = 'flow'
  config.loss.prediction = 'flow'

  config.sample.sampler = 'heun'
  config.sample.clip = False
  return config
