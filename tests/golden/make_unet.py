"""Writes tests/golden/{unet_*,guided}.npz: what diffusers' networks answer.

From the root, with torch and diffusers installed (the extra `parity`):

  PYTHONPATH=.:tests python tests/golden/make_unet.py [NAME ...]

Without names, all shapes of tests/parity/unet.py and the guided samples of
tests/parity/guided.py. To be run again when a shape, the names of the
parameters or the random weights change, and then only.
"""

import sys

import numpy as np
from parity import guided, unet


def main(names):
  for name in names or [*unet.SHAPES, 'guided']:
    if name == 'guided':
      np.savez(
        guided.GOLDEN, **{case: guided.live(case) for case in guided.CASES}
      )
      continue
    shape = unet.SHAPES[name]
    reference = unet.reference_live(shape)
    path = unet.GOLDEN / f'unet_{name}.npz'
    np.savez(path, **reference._asdict())
    print(
      f'{path}: {path.stat().st_size} bytes', unet.compare(shape, reference)
    )


if __name__ == '__main__':
  main(sys.argv[1:])
