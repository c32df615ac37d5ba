"""Writes tests/golden/{diffusers.json,pipelines.npz}: folders and images.

From the root, with torch and diffusers installed (the extra `parity`):

  PYTHONPATH=.:tests python tests/golden/make_pipelines.py

The first holds what diffusers' own folders say of their networks, the second
what its pipelines draw. To be run again when tests/parity/pipelines.py changes.
"""

import json
import pathlib
import tempfile

import numpy as np
from parity import pipelines


def main():
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    described = {
      name: pipelines.described_live(shape, folder / name)
      for name, shape in pipelines.FOLDERS.items()
    }
    drawn = {
      name: pipelines.drawn_live(name, folder / f'draw_{name}')
      for name in pipelines.DRAWS
    }
  path = pipelines.GOLDEN / 'diffusers.json'
  path.write_text(json.dumps(described) + '\n')
  np.savez_compressed(pipelines.GOLDEN / 'pipelines.npz', **drawn)


if __name__ == '__main__':
  main()
