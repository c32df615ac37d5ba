"""Writes tests/golden/conditional.npz: what diffusers' U-Nets for text answer.

From the root, with torch and diffusers installed (the extra `parity`):

  PYTHONPATH=.:tests python tests/golden/make_conditional.py

To be run again when a case of tests/parity/conditional.py, the names of the
parameters or the random weights change, and then only.
"""

import numpy as np
from parity import conditional


def main():
  answers = {name: conditional.live(name) for name in conditional.CASES}
  np.savez(conditional.GOLDEN, **answers)
  for name, answer in answers.items():
    print(name, conditional.error(conditional.ours(name), answer))


if __name__ == '__main__':
  main()
