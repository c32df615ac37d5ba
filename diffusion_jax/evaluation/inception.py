"""The judge of FID: Inception's features, by weights that users bring.

A distance by these features depends on the network's weights, on where in it
they are taken, and on how images are enlarged to what it takes. All three are
in the judge's protocol.
"""

import hashlib
from collections.abc import Sequence

from diffusion_jax.evaluation.features import Judge
from diffusion_jax.models import inception
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import inception as weights

# What a Frechet distance at a tap is called; '2048' is where papers take it.
DISTANCES = {
  '2048': 'fid',
  **{tap: f'fid_{tap}' for tap in ('64', '192', '768')},
  'spatial': 'sfid',
}
LOGITS = 'logits_unbiased'  # the Inception Score's: without softmax/b


def load(
  path,
  *,
  taps: Sequence[str] = ('2048',),
  logits: bool = False,
  convention: str = 'tf1',
) -> Judge:
  """A judge from a file of Inception weights.

  Args:
    path: of the .npz file, as `weights.inception.convert` writes it; for the
      taps up to '768' one that ends at mixed_7 will do.
    taps: what its features are, keys of DISTANCES. They are [B, D], D being
      that of `models.inception.TAPS`.
    logits: of the 1008 classes too, those of the Inception Score (arXiv
      1606.03498).
    convention: how images are enlarged and scaled, see
      `models.inception.preprocess`.

  Raises:
    UserError: there is no such file, it lacks what the taps need, or a tap or
      the convention is not known.
  """
  if convention not in inception.CONVENTIONS:
    raise UserError(
      f'the input convention {convention!r} is not known: use one of '
      f'{", ".join(inception.CONVENTIONS)}'
    )
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
  """Of what these outputs need of the network, wherever the file ends."""
  digest = hashlib.sha256()
  for name in inception.shapes(outputs):
    for part in 'wb':
      digest.update(params[name][part].tobytes())
  return digest.hexdigest()
