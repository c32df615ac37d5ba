"""What a run does before it trains: its config, its parts and its rows.

Latents of images and tokens of captions are made here from what the config
names, and what later starts need is kept in the run.
"""

from jax.sharding import Mesh

from diffusion_jax import codecs, models
from diffusion_jax.data import resident
from diffusion_jax.runs import (
  encoded_texts,
  finetune,
  frozen,
  kept_parts,
  latents,
  licences,
  low_rank,
  perceptual,
  texts,
)
from diffusion_jax.runs.dataset import Splits
from diffusion_jax.system import distributed, files


def complete(config, workdir=None) -> None:
  """Adds to a config what its run has found out, or will be told, in place.

  Args:
    config: the config of a run.
    workdir: the run's folder, new or existing, or None.

  Raises:
    UserError: as for `frozen.complete`.
  """
  frozen.complete(config, workdir)
  texts.complete(config, workdir)


def keep(
  workdir,
  parts: kept_parts.Frozen,
  splits: Splits,
  origin: finetune.Origin | None = None,
) -> None:
  """Copies what a run needs into it: frozen parts, tokenizer and licences.

  Call it in all processes.

  Args:
    workdir: the run's folder.
    parts: the frozen parts, from `prepare`.
    splits: the images, from `prepare`.
    origin: the origin of the initial parameters.
  """
  places = {
    name: facts['from']
    for name, facts in parts.facts.items()
    if kept_parts.SHA256 not in facts
  }
  if origin:
    places[models.NET] = origin.workdir

  def copy():
    for part, place in places.items():
      target = files.at(workdir) / licences.FOLDER
      licences.write(target, licences.of(place), part)

  kept_parts.write(workdir, parts)
  texts.write(workdir, splits[0])
  distributed.on_first(copy)


def prepare(
  config,
  mesh: Mesh,
  workdir,
  splits: Splits,
  origin: finetune.Origin | None = None,
) -> tuple[Splits, kept_parts.Frozen]:
  """What a run trains on, and with which frozen parts.

  Call it in all processes.

  Args:
    config: the run's config, completed.
    mesh: the devices.
    workdir: the run's folder, new or existing.
    splits: the training images and the held-out ones.
    origin: the origin of the initial parameters, see `texts.prepare` and
      `low_rank.load`.

  Returns:
    The splits, with cached latents in place of images if there are any and
    with tokens of captions, and the frozen parts, with shift and scale.

  Raises:
    UserError: as for `frozen.load`, `low_rank.load`, `perceptual.load`,
      `texts.prepare` and `data.latents.opened`, or they do not fit on the
      devices.
  """
  base = low_rank.load(config, mesh, workdir, origin)
  splits = texts.prepare(config, workdir, splits, origin)
  parts = frozen.load(config, mesh, workdir)
  if perceptual.is_used(config):
    parts = perceptual.load(config, mesh)
  if config['codec'].get('cache'):
    splits = distributed.everywhere(
      lambda: latents.cached(config, splits, parts)
    )
  if config['conditioning'].get('cache'):
    splits = distributed.everywhere(
      lambda: encoded_texts.cached(config, splits, parts)
    )
  if config['data']['on_device']:
    distributed.everywhere(lambda: resident.check(splits[0]))
  if codecs.is_in_latents(config):
    parts = latents.scaled(config, splits[0], parts, mesh)
  return splits, frozen.joined([parts, base])
