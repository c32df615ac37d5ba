"""The judge of FID: Inception's features, by weights that users bring.

A distance by these features depends on the network's weights, on where in it
they are taken, and on how images are enlarged to what it takes. All three are
in the judge's protocol.
"""

import hashlib

import jax

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.features import Judge
from diffusion_jax.models import inception
from diffusion_jax.weights import inception as weights


def load(path, *, tap: str = '2048', convention: str = 'tf1') -> Judge:
  """A judge from a file of Inception weights.

  Args:
    path: of the .npz file, as `weights.inception.convert` writes it; for the
      taps up to '768' one that ends at mixed_7 will do.
    tap: what its features are, a key of `models.inception.TAPS`. With '2048',
      the usual one, come probabilities of the 1008 classes, those of the
      Inception Score (arXiv 1606.03498): of the logits without a bias.
    convention: how images are enlarged and scaled, see
      `models.inception.preprocess`.

  Returns:
    the judge; its features are [B, TAPS[tap]].

  Raises:
    UserError: there is no such file, it lacks what the tap needs, or the tap or
      the convention is not known.
  """
  if convention not in inception.CONVENTIONS:
    raise UserError(
      f'the input convention {convention!r} is not known: use one of '
      f'{", ".join(inception.CONVENTIONS)}'
    )
  taps = (tap, 'logits_unbiased') if tap == '2048' else (tap,)
  params = weights.read(path, taps)

  def apply(params, images):
    found = inception.apply(params, images, taps, convention)
    if tap != '2048':
      return found[tap], None
    return found[tap], jax.nn.softmax(found['logits_unbiased'])

  digest = hashlib.sha256()
  for layer in params.values():
    for part in 'wb':
      digest.update(layer[part].tobytes())
  protocol = {
    'features': 'inception',
    'features_sha256': digest.hexdigest(),
    'tap': tap,
    'resize': f'bilinear to {inception.SIZE}',
    'convention': convention,
  }
  return Judge(apply, params, protocol, {})
