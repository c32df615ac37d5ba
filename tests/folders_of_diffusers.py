"""Folders as diffusers writes them, for the tests."""

import json

import safetensors.numpy
from parity import autoencoders, pipelines, unet

from diffusion_jax.weights import diffusers

FILE = 'diffusion_pytorch_model.safetensors'
WEIGHTS = f'unet/{FILE}'
DESCRIBED = pipelines.described_golden()


def folder_of(name, path, tensors=None, flat=False, **changes):
  """A folder as diffusers writes it, of random weights.

  Args:
    name: of the network.
    path: of the folder, new.
    tensors: others than random ones.
    flat: everything at the top, as old folders have it.
    **changes: of the settings of network or scheduler.
  """
  there = DESCRIBED[name]
  if tensors is None:
    tensors = pipelines.random_tensors(there['tensors'])
  for part, file in (('unet', 'config'), ('scheduler', 'scheduler_config')):
    folder = path if flat else path / part
    folder.mkdir(parents=True, exist_ok=True)
    mine = {k: v for k, v in changes.items() if k in there[part]}
    (folder / f'{file}.json').write_text(json.dumps({**there[part], **mine}))
  (path / 'model_index.json').write_text(json.dumps(there['index']))
  weights = path / (FILE if flat else WEIGHTS)
  safetensors.numpy.save_file(tensors, weights, {'format': 'pt'})
  return path


def tiny_folder(path, **changes):
  """Of the network whose images are known."""
  tensors = diffusers.to_tensors(unet.weights_of(unet.TINY))
  return folder_of('tiny', path, tensors, **changes)


def network_folder(path, settings, tensors):
  """The folder of one network, new at a path."""
  path.mkdir(parents=True)
  (path / 'config.json').write_text(json.dumps(settings))
  safetensors.numpy.save_file(tensors, path / FILE, {'format': 'pt'})
  return path


def autoencoder_folder(name, path, tensors=None, **changes):
  """The folder of an autoencoder of the parity tests, of random weights.

  Args:
    name: of the autoencoder.
    path: of the folder, new.
    tensors: others than random ones.
    **changes: of the settings.
  """
  if tensors is None:
    tensors = diffusers.to_tensors(autoencoders.create(name)[1])
  return network_folder(
    path, {**autoencoders.settings(name), **changes}, tensors
  )
