"""Writes tests/golden/text.npz: what transformers' text encoders answer.

From the root, with torch and transformers installed (the extra `parity`):

  PYTHONPATH=.:tests python tests/golden/make_text.py

To be run again when a case, the names of the parameters or the random weights
change, and then only.
"""

import numpy as np
from parity import text


def main():
  found = {name: text.live(name) for name in text.CASES}
  np.savez(
    text.GOLDEN,
    **{
      f'{n}/{key}': x
      for n, answers in found.items()
      for key, x in answers.items()
    },
  )
  for name in text.CASES:
    print(name, text.compare(name, text.golden(name)))


if __name__ == '__main__':
  main()
