"""Frozen parts of a run: networks that it uses and does not train.

A run in latents uses an autoencoder, see `frozen_codec`, and one with
conditioning.name='frozen_text' text encoders, see `frozen_text`. It copies them
when it begins, see `kept_parts`, and needs the places that they come from no
longer once it has a checkpoint.
"""

from collections.abc import Mapping

from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion_jax.runs import frozen_codec, frozen_text, kept_parts
from diffusion_jax.runs.kept_parts import Frozen

KINDS = (frozen_codec, frozen_text)


def complete(config: ConfigDict, workdir=None) -> None:
  """Adds the structures of the frozen parts to a config, in place.

  Args:
    config: the config of a run.
    workdir: the run's folder, new or existing, or None.

  Raises:
    UserError: the config names no such part, or one that does not fit.
  """
  for kind in KINDS:
    kind.complete(config, workdir)


def abstract(config: Mapping) -> dict:
  """The shapes of the frozen parts: name -> a tree; {} if there are none.

  Args:
    config: a run's config, completed.
  """
  return {
    name: tree for kind in KINDS for name, tree in kind.abstract(config).items()
  }


def load(config: Mapping, mesh: Mesh, workdir=None) -> Frozen:
  """Loads the frozen parts for a start of a run; NONE if it has none.

  Call it in all processes. A run that has saved a checkpoint keeps its copy.

  Args:
    config: the run's config, completed.
    mesh: the devices to load them to.
    workdir: the run's folder, new or existing, or None.

  Raises:
    UserError: they are missing, damaged, of another structure, or not those
      that the run in the workdir was trained with.
  """
  return joined(kind.load(config, mesh, workdir) for kind in KINDS)


def joined(parts) -> Frozen:
  """Several groups of parts as one."""
  params, facts = {}, {}
  for one in parts:
    params |= one.params
    facts |= one.facts
  return Frozen(params, facts)


def copied(config: Mapping, mesh: Mesh, workdir) -> Frozen:
  """Loads the frozen parts that a run has copied; NONE if it has none.

  Args:
    config: the run's config.
    mesh: the devices to load them to.
    workdir: the run's folder.

  Raises:
    UserError: they are missing, damaged or of another structure.
  """
  return kept_parts.read(workdir, abstract(config), mesh)
