"""Writes tests/golden/inception.npz, and files of torch.save to be read.

From the root, where FID's tools are installed (CONTRIBUTING.md):

  PYTHONPATH=.:tests python tests/golden/make_inception.py

inception.npz holds what the Inception networks of torch-fidelity and
pytorch-fid answer, with random weights. torch_zip.pth and torch_stream.pth are
one small state dict in both layouts. To be run again when the names, the random
weights or the images change, and then only.
"""

import collections

import numpy as np
import torch
from parity import inception


def small_state() -> collections.OrderedDict:
  """Tensors of all kinds: views of one storage, types, none, a parameter."""
  numbers = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4) / 8
  module = torch.nn.Linear(2, 1)
  with torch.no_grad():
    module.weight.copy_(torch.tensor([[0.5, -2.0]]))
    module.bias.zero_()
  state = module.state_dict()  # it brings attributes
  state['parameter'] = module.weight
  state['numbers'] = numbers
  state['turned'] = numbers.permute(2, 0, 1)
  state['part'] = numbers.flatten()[5:9]
  state['half'] = numbers[0].half()
  state['double'] = numbers[1].double()
  state['count'] = torch.tensor(7)
  state['flags'] = torch.tensor([True, False])
  state['bytes'] = torch.tensor([0, 255], dtype=torch.uint8)
  state['none'] = torch.zeros(0, 3)
  state['note'] = 'no tensor'
  return state


def main():
  reference = inception.reference_live()
  np.savez(inception.FILE, **reference)
  print(f'{inception.FILE}: {inception.FILE.stat().st_size} bytes')
  for name, error in inception.errors(reference, inception.ours()).items():
    print(f'{name}: {error:.1e}')
  for layout, is_zip in (('zip', True), ('stream', False)):
    torch.save(
      small_state(),
      inception.GOLDEN / f'torch_{layout}.pth',
      _use_new_zipfile_serialization=is_zip,
    )


if __name__ == '__main__':
  main()
