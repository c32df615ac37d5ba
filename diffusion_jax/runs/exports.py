"""Runs as folders and files that diffusers loads."""

import jax

from diffusion_jax import codecs, models, runs
from diffusion_jax.models import NET
from diffusion_jax.runs import (
  licences,
  low_rank,
  pairs,
  text_pipelines,
  texts,
  upscaled,
)
from diffusion_jax.runs.frozen_codec import CODEC
from diffusion_jax.runs.trained import load
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding
from diffusion_jax.weights import autoencoders, coders, diffusers, pipelines
from diffusion_jax.weights import lora as weights


def write(
  source,
  target,
  step: int | None = None,
  ema: bool = True,
  ema_profile: str | float | None = None,
  merged: bool = False,
) -> tuple[dict, str]:
  """Writes the weights of a run as a folder.

  Args:
    source: the run's folder.
    target: the folder to write.
    step: the step of the checkpoint; by default the newest that is not damaged.
    ema: whether to write the averaged or the raw weights.
    ema_profile: another average, see `trained.load`.
    merged: whether to write all of a run with LoRA, and not its changes alone.

  Returns:
    (facts about what was written, what it is in words).

  Raises:
    UserError: as for `trained.load`, or diffusers does not support the network.
  """
  asked = step, ema, ema_profile
  config = runs.read_config(source, '--from')
  pairs.check_export(config, source)
  upscaled.check_plain(config, 'a pipeline of diffusers')
  if low_rank.is_used(config) and not merged:
    return _write_changes(source, target, asked)
  if merged and not low_rank.is_used(config):
    raise UserError(
      f'--merged is for runs with LoRA, and --from={source} is none: leave it '
      'out'
    )
  trained = load(source, step, ema, sharding.make_mesh(), ema_profile)
  params = jax.tree.map(sharding.to_host, trained.params)
  kept = (runs.conversion(source) or {}).get('settings')
  if text_pipelines.is_one(trained.config):
    encoder = texts.kept(source, trained.config)
    kind = text_pipelines.write(target, trained.config, params, encoder, kept)
    form = f'a {kind}'
  elif codecs.is_in_latents(trained.config):
    form = 'an LDMPipeline'
    pipelines.write(target, trained.config, params, kept)
  elif codecs.reconstructs(trained.config):
    params = {CODEC: params[CODEC]}
    autoencoders.write(target, trained.config, params[CODEC], kept)
    kind = coders.class_of(trained.config['codec'])
    form = f'{"an" if kind == coders.KL else "a"} {kind}'
  else:
    form = 'a DDPMPipeline'
    diffusers.write(target, trained.config, params[NET])
  licences.write(target, licences.of(source))
  result = {
    'path': str(target),
    'step': trained.step,
    'ema': trained.ema,
    **trained.average,
    'parameters': models.count(params),
    'weights_sha256': trained.weights_sha256,
  }
  kind = 'averaged' if trained.ema else 'raw'
  if trained.average:
    kind += f' ({trained.average["ema_profile"]})'
  return result, (
    f'{kind} weights of step {trained.step}, {result["parameters"]:,} '
    f'parameters, as {form}'
  )


def _write_changes(source, target, asked) -> tuple[dict, str]:
  """Writes the low-rank changes that a run has trained as a file."""
  found, step, average = low_rank.read(source, *asked)
  path = files.make(target) / weights.FILE
  weights.write(path, found, low_rank.names_of(source))
  licences.write(target, licences.of(source))
  count = models.count(found.pairs)
  facts = {
    'path': str(path),
    'step': step,
    'ema': asked[1],
    **average,
    'parameters': count,
    'sha256': weights.sha256(found),
  }
  return facts, (
    f'low-rank changes of {len(found.pairs)} layers at step {step}, {count:,} '
    f'parameters, as {path.name}'
  )
