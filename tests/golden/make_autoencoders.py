"""Writes tests/golden/autoencoders.npz: what diffusers' autoencoders answer.

From the root, with torch and diffusers installed (the extra `parity`):

  PYTHONPATH=.:tests python tests/golden/make_autoencoders.py

To be run again when a case, the names of the parameters or the random weights
change, and then only.
"""

import numpy as np
from parity import autoencoders

NAMES = ('kl', 'vq')


def main():
  found = {name: autoencoders.live(name) for name in NAMES}
  np.savez(
    autoencoders.GOLDEN,
    **{
      f'{n}/{key}': x
      for n, answers in found.items()
      for key, x in answers.items()
    },
  )
  for name in NAMES:
    print(name, autoencoders.compare(name, autoencoders.golden(name)))


if __name__ == '__main__':
  main()
