"""Styles of U-Nets: how the papers' networks differ beyond their sizes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion_jax.system.errors import UserError, one_of


class Style(NamedTuple):
  """Details of a U-Net; the defaults are DDPM's (arXiv 2006.11239).

  Attributes:
    epsilon: added to the variance in group norms.
    scale_shift: the time embedding scales and shifts the second norm of a
      block (improved DDPM, arXiv 2102.09672), instead of being added before it.
    resampling: 'conv' (a convolution at the end of a level) or 'block' (a
      residual block that resamples, as in BigGAN, arXiv 1809.11096).
    resampled_shortcut: such a block has a 1x1 convolution on its shortcut.
    padding: of the halving convolutions: 'end' (as TensorFlow) or 'both' sides.
    middle_attention: the middle has self-attention.
    up_attention: on the way up, attention follows 'all' blocks of a level or
      only the 'last'.
    skip_scale: factor on the sums of residual blocks and of attention.
    sinusoid: 'sin_cos', 'cos_sin' (the order of the time's features) or
      'fourier' (EDM's, arXiv 2206.00364), see `layers.time_features`.
    freq_shift: the frequencies are 10000 ** (-i / (half - freq_shift)).
    doors_at: where label and vector are added: 'time' (the time embedding) or
      'sinusoid' (before its two layers).
    vector: the layers of the vector: 'linear' (one, without bias) or 'mlp'
      (two, like those of the time).
    init: initial values: 'ddpm' (variance scaling, biases 0) or 'torch'
      (uniform, by the number of inputs, biases too). Last layers are zero.
    attention_init: scale of the initial variance of query, key and value.
  """

  epsilon: float = 1e-6
  scale_shift: bool = False
  resampling: str = 'conv'
  resampled_shortcut: bool = False
  padding: str = 'end'
  middle_attention: bool = True
  up_attention: str = 'all'
  skip_scale: float = 1.0
  sinusoid: str = 'sin_cos'
  freq_shift: int = 1
  doors_at: str = 'time'
  vector: str = 'linear'
  init: str = 'ddpm'
  attention_init: float = 1.0


DDPM = Style()
IDDPM = Style(
  epsilon=1e-5, scale_shift=True, padding='both', sinusoid='cos_sin',
  freq_shift=0, init='torch',
)  # fmt: skip
STYLES = {
  'ddpm': DDPM,
  # Improved DDPM (arXiv 2102.09672).
  'iddpm': IDDPM,
  # Guided diffusion (arXiv 2105.05233).
  'adm': IDDPM._replace(resampling='block'),
  # DDPM++ (arXiv 2011.13456) as in EDM (arXiv 2206.00364). EDM draws query, key
  # and value as one kernel, which halves the variance of its 0.2.
  'ddpmpp': Style(
    resampling='block', resampled_shortcut=True, up_attention='last',
    skip_scale=0.5**0.5, doors_at='sinusoid', attention_init=0.1,
  ),
  # The defaults of diffusers' UNet2DModel.
  'diffusers': Style(
    epsilon=1e-5, padding='both', sinusoid='cos_sin', freq_shift=0,
    init='torch',
  ),
}  # fmt: skip
CHOICES = {
  'resampling': ('conv', 'block'),
  'padding': ('end', 'both'),
  'up_attention': ('all', 'last'),
  'sinusoid': ('sin_cos', 'cos_sin', 'fourier'),
  'freq_shift': (0, 1),
  'doors_at': ('time', 'sinusoid'),
  'vector': ('linear', 'mlp'),
  'init': ('ddpm', 'torch'),
}


def create(name: str, details: Mapping[str, Any] | None = None) -> Style:
  """A style by name, with single details changed.

  Args:
    name: a key of STYLES.
    details: field of `Style` -> value.

  Raises:
    UserError: a name or a value is not known.
  """
  return changed(STYLES[one_of('model.style', name, STYLES)], details or {})


def described(style: Style) -> tuple[str, dict[str, Any]]:
  """The name of the most similar style, and the details that differ from it.

  Args:
    style: the details; how values begin is taken from the named style.
  """

  def different(name):
    return {
      field: value
      for field, value in style._asdict().items()
      if value != getattr(STYLES[name], field) and 'init' not in field
    }

  name = min(STYLES, key=lambda name: len(different(name)))
  return name, different(name)


def changed(style: NamedTuple, details: Mapping[str, Any]) -> NamedTuple:
  """A named tuple of details with some of its fields changed.

  Args:
    style: the details, such as a `Style`.
    details: field -> value.

  Raises:
    UserError: there is no such field, or it cannot have this value.
  """
  for key, value in details.items():
    one_of('model.details', key, style._fields)
    if key in CHOICES:
      one_of(f'model.details.{key}', value, CHOICES[key])
    usual = getattr(style, key)
    kinds = (int, float) if isinstance(usual, float) else type(usual)
    if not isinstance(value, kinds) or (
      isinstance(value, bool) != isinstance(usual, bool)
    ):
      raise UserError(
        f'model.details.{key}={value!r:.50}: must be a {type(usual).__name__}, '
        f'such as {usual!r}'
      )
  return style._replace(**details)
