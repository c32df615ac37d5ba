"""The judge for FID: Inception's features, with weights that users provide.

A distance between these features depends on the weights, on the layer, and on
how images are resized to the network's input. All three are in the judge's
protocol.
"""

from collections.abc import Sequence

from diffusion_jax.evaluation import kept
from diffusion_jax.evaluation.features import Judge
from diffusion_jax.models import inception
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import inception as weights

# Tap -> the name of its Frechet distance; papers use '2048'.
DISTANCES = {
  '2048': 'fid',
  **{tap: f'fid_{tap}' for tap in ('64', '192', '768')},
  'spatial': 'sfid',
}
LOGITS = 'logits_unbiased'  # for the Inception Score: without softmax/b


def load(
  path,
  *,
  taps: Sequence[str] = ('2048',),
  logits: bool = False,
  convention: str = 'tf1',
) -> Judge:
  """Loads a judge from a file of Inception weights.

  Args:
    path: the .npz file, as `weights.inception.convert` writes it. For the taps
      up to '768' it may end at mixed_7.
    taps: the layers of its features, keys of DISTANCES. The features are
      [B, D], with D from `models.inception.TAPS`.
    logits: whether to also compute the logits of the 1008 classes, for the
      Inception Score (arXiv 1606.03498).
    convention: how images are resized and scaled, see
      `models.inception.preprocess`.

  Raises:
    UserError: there is no such file, it lacks weights that the taps need, or a
      tap is not known.
  """
  for tap in taps:
    if tap not in DISTANCES:
      raise UserError(
        f'Inception has no tap {tap!r}: use one of {", ".join(DISTANCES)}'
      )
  outputs = (*dict.fromkeys(taps), *[LOGITS] * logits)
  params = weights.read(path, outputs)

  def apply(params, images):
    return inception.apply(params, images, outputs, convention)

  return Judge(
    apply,
    params,
    taps={tap: DISTANCES[tap] for tap in taps},
    logits=LOGITS if logits else '',
    protocol={
      'features': 'inception',
      'features_sha256': _sha256(params, outputs),
      'taps': list(taps),
      'resize': f'bilinear to {inception.SIZE}',
      'convention': convention,
    },
    details={},
    keys={
      output: f'inception_{output}_{convention}_'
      f'{_sha256(params, (output,))[:16]}'
      for output in outputs
    },
  )


def _sha256(params, outputs) -> str:
  """The hash of the weights that these outputs need, wherever the file ends."""
  names = inception.shapes(outputs)
  return kept.sha256(params[name][part] for name in names for part in 'wb')
