"""Writes tests/golden/schedulers.npz: the ways of diffusers' schedulers.

From the root, with torch and diffusers installed (the extra `parity`):

  PYTHONPATH=.:tests python tests/golden/make_schedulers.py

To be run again when tests/parity/schedulers.py or tests/mixture.py changes.
"""

import numpy as np
from parity import schedulers


def main():
  ways = {
    f'{name}_{steps}': schedulers.way_live(name, steps)
    for name in schedulers.CASES
    for steps in schedulers.STEPS
  }
  np.savez_compressed(schedulers.PATH, **ways)


if __name__ == '__main__':
  main()
