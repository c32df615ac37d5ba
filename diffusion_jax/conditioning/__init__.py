"""Conditioning: labels, text or images -> the network's conditioning input."""

from diffusion_jax.conditioning import augmented, frozen_text, labels, text
from diffusion_jax.conditioning.conditioner import Conditioner
from diffusion_jax.system.errors import one_of


def none(num_classes: int = 0, drop: float = 0.0) -> Conditioner:
  """No condition: the network's only inputs are xt and t.

  Args:
    num_classes: unused; configs have it whatever the condition.
    drop: unused.
  """
  del num_classes, drop
  return Conditioner(lambda params, rows, keys: {})


# name -> (**options) -> Conditioner
CONDITIONERS = {
  'none': none,
  'label': labels.create,
  'text': text.create,
  'frozen_text': frozen_text.create,
}
# Those that tell the network the size of images.
OF_SIZES = ('frozen_text',)


def create(
  name: str,
  augment: float = 0.0,
  image_shape: tuple[int, ...] | None = None,
  **options,
) -> Conditioner:
  """A conditioner by name.

  Args:
    name: a key of CONDITIONERS.
    augment: the probability of transforms of the training images; above 0, the
      network is told of them.
    image_shape: (H, W, C) of the data.
    **options: the conditioner's options.

  Raises:
    UserError: the name is not known.
  """
  one_of('conditioning.name', name, CONDITIONERS)
  if name in OF_SIZES:
    options['image_shape'] = image_shape
  made = CONDITIONERS[name](**options)
  return augmented.create(made) if augment else made
