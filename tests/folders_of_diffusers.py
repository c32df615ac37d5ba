"""Folders as diffusers writes them, for the tests."""

import json

import safetensors.numpy
from parity import pipelines, unet

from diffusion_jax.weights import diffusers

WEIGHTS = 'unet/diffusion_pytorch_model.safetensors'
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
  weights = path / (WEIGHTS.split('/')[1] if flat else WEIGHTS)
  safetensors.numpy.save_file(tensors, weights, {'format': 'pt'})
  return path


def tiny_folder(path, **changes):
  """Of the network whose images are known."""
  tensors = diffusers.to_tensors(unet.weights_of(unet.TINY))
  return folder_of('tiny', path, tensors, **changes)
