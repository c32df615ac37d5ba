"""Writes tests/golden/clip.npz: what transformers' CLIP answers.

From the root, with torch and transformers installed (the extra `parity`):

  PYTHONPATH=.:tests python tests/golden/make_clip.py

To be run again when the settings, the names of the parameters or the random
weights change, and then only.
"""

import pathlib
import tempfile

import numpy as np
from parity import clip


def main():
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    clip.write(folder)
    np.savez(clip.GOLDEN, **clip.live(folder))


if __name__ == '__main__':
  main()
