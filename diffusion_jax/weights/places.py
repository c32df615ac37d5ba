"""Finds the parts of a diffusers model in what a user gives.

That is the model's folder, or one around it (a download's cache, the output of
a training script), or one inside it, or a single file of weights.
"""

import re
from typing import NamedTuple

from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import states

PIPELINE = 'model_index.json'
SETTINGS = 'config.json'
SCHEDULER = 'scheduler_config.json'
UNET = 'unet'
CODECS = ('vqvae', 'vae')  # next to UNET, of pipelines in latents
AVERAGES = ('unet_ema', 'ema_unet')  # of training scripts, next to UNET
CHECKPOINT = re.compile(r'checkpoint-(\d+)')  # as training scripts name them
DEEPEST = 3  # folders that hold only one folder


class Place(NamedTuple):
  """The parts of a model.

  Attributes:
    network: the folder of the network's settings.
    weights: the weights: that folder, or a file in it.
    raw: the folder of the raw weights, if `network` holds averaged ones.
    index: the pipeline's file, which may be missing.
    scheduler: the scheduler's file; None if there is none.
    codec: the folder of an autoencoder; None if there is none.
    step: the training step in the folder's name, or None.
    notes: what was taken, one line each.
  """

  network: files.Path
  weights: files.Path
  raw: files.Path | None
  index: files.Path
  scheduler: files.Path | None
  codec: files.Path | None
  step: int | None
  notes: list[str]


def model_in(path, depth: int = 0) -> files.Path | None:
  """The folder or file of the model that a path leads to; None if none.

  Args:
    path: a model's folder, a file of weights, or a folder around a model: a
      download's cache with its snapshots/, a training's output with its
      checkpoint-N/ (the newest counts), or a folder with only one folder in it.
    depth: how many folders have been entered.
  """
  path = files.at(path)
  if path.is_file():
    return path if states.is_weights(path) else None
  if not path.is_dir() or depth > DEEPEST:
    return None
  parts = any((path / name).is_dir() for name in (UNET, *AVERAGES))
  if parts or (path / PIPELINE).is_file():
    return path
  if (path / SETTINGS).is_file():
    return path if _is_network(path / SETTINGS) else None
  inner = _inside(path)
  return inner and model_in(inner, depth + 1)


def find(path) -> Place:
  """The parts of the model at a path that `model_in` accepts.

  Raises:
    UserError: a file of weights has no settings next to it.
  """
  given = files.absolute(path)
  model = model_in(given)
  notes = [] if model == given else [f'the model is that in {model}']
  folder, weights = model, None
  if model.is_file():
    folder, weights = model.parent, model
    if not (folder / SETTINGS).is_file():
      raise UserError(
        f'{model} has no {SETTINGS} next to it, which describes its network: '
        'give the folder that the weights were saved in'
      )
  there = [name for name in (*AVERAGES, UNET) if (folder / name).is_dir()]
  network = folder / there[0] if there else folder
  raw = folder / UNET if len(there) > 1 else None
  if raw:
    notes.append(
      f'the averaged weights are those in {there[0]}, the raw ones those in '
      f'{UNET}'
    )
  # Of a network that was given alone, its pipeline is around it.
  is_alone = not there and not (folder / PIPELINE).exists()
  is_part = is_alone and folder.name in (UNET, *AVERAGES)
  whole = folder.parent if is_part else folder
  beside = [n for n in AVERAGES if n != folder.name and (whole / n).is_dir()]
  if is_part and beside:
    notes.append(
      f'{whole / beside[0]} is left out, which holds averaged weights: give '
      f'{whole} to take both'
    )
  step = CHECKPOINT.fullmatch(whole.name)
  if there == [UNET] and step:
    notes.append(f'there is no {AVERAGES[0]}: {UNET} is taken for the average')
  around = [whole.parent] * bool(step)  # the output of the training
  scheduler = _scheduler((folder, whole, *around))
  if scheduler and folder not in scheduler.parents:
    notes.append(f'the scheduler is that of {scheduler}')
  codecs = [whole / name for name in CODECS if (whole / name).is_dir()]
  return Place(
    network,
    weights or network,
    raw,
    whole / PIPELINE,
    scheduler,
    codecs[0] if codecs and network.name in (UNET, *AVERAGES) else None,
    int(step[1]) if step else None,
    notes,
  )


def _scheduler(folders):
  """The first file of a scheduler in some folders, or None."""
  for folder in folders:
    for path in (folder / 'scheduler' / SCHEDULER, folder / SCHEDULER):
      if path.exists():
        return path
  return None


def _is_network(path) -> bool:
  return b'_class_name' in path.read_bytes()


def _inside(path):
  """The folder in a folder around a model, or None."""
  snapshots = path / 'snapshots'
  if snapshots.is_dir():  # the cache of huggingface_hub
    main = path / 'refs' / 'main'
    if main.is_file() and (snapshots / main.read_text().strip()).is_dir():
      return snapshots / main.read_text().strip()
    path = snapshots
  folders = [
    path / name
    for name in sorted(files.entries(path))
    if not name.startswith('.') and (path / name).is_dir()
  ]
  steps = {
    int(match[1]): folder
    for folder in folders
    if (match := CHECKPOINT.fullmatch(folder.name))
  }
  if steps:
    return steps[max(steps)]
  return folders[0] if len(folders) == 1 else None
