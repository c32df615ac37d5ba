"""Writes tests/golden/text_pipelines.*: pipelines of Stable Diffusion.

text_pipelines.json has the settings that diffusers saves, text_pipelines.npz
the pictures that it draws and the noise that they begin with.

From the root, with torch, diffusers and transformers installed (the extra
`parity`):

  PYTHONPATH=.:tests python tests/golden/make_text_pipelines.py

To be run again when tests/parity/text_pipelines.py, the names of parameters or
the random weights change, and then only.
"""

import json
import pathlib
import tempfile

import numpy as np
from parity import text_pipelines as parity


def main():
  pictures = {'noise': parity.first_noise()}
  settings = {}
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    for kind in parity.KINDS:
      made = parity.folder_live(kind, folder / kind)
      settings[kind] = parity.settings_of(made)
    for name, draw in parity.DRAWS.items():
      made = parity.folder_live(draw.kind, folder / name, draw.scheduler)
      pictures[name] = parity.drawn_live(name, made)
      shown = pictures[name]
      inside = ((shown > 0) & (shown < 1)).mean()
      apart = np.abs(shown[0] - shown[1]).max()
      print(f'{name}: {inside:.0%} in range, {apart:.2f} apart')
  parity.SETTINGS.write_text(json.dumps(settings, indent=1) + '\n')
  np.savez_compressed(parity.PICTURES, **pictures)


if __name__ == '__main__':
  main()
