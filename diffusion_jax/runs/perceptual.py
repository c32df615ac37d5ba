"""LPIPS as a part of a run: a judge that is not trained, and is not copied.

The run reads it from loss.lpips_path at each start. Its checksum is in every
checkpoint, and the hash of its file in config.json.
"""

from collections.abc import Mapping

from jax.sharding import Mesh

from diffusion_jax.models import lpips
from diffusion_jax.objectives.autoencoding import LPIPS
from diffusion_jax.runs import kept_parts
from diffusion_jax.system import distributed
from diffusion_jax.training import sharding
from diffusion_jax.weights import lpips as weights


def is_used(config: Mapping) -> bool:
  """Whether a run is trained with LPIPS."""
  return config['loss'].get('lpips', 0) > 0


def abstract(config: Mapping) -> dict:
  """The shapes of the part: {'lpips': a tree}; {} for a run without."""
  return {LPIPS: lpips.abstract()} if is_used(config) else {}


def load(config: Mapping, mesh: Mesh) -> kept_parts.Frozen:
  """Loads the part for a start of a run; NONE for a run without.

  Call it in all processes.

  Args:
    config: the run's config.
    mesh: the devices to load it to.

  Raises:
    UserError: as for `weights.lpips.read`.
  """
  if not is_used(config):
    return kept_parts.NONE
  path = config['loss']['lpips_path']
  params, digest = distributed.everywhere(lambda: weights.read(path))
  facts = {'from': str(path), kept_parts.SHA256: digest}
  return kept_parts.Frozen(
    {LPIPS: sharding.placed(params, mesh)}, {LPIPS: facts}
  )
