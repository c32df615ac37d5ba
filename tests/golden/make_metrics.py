"""Writes tests/golden/metrics.json: what torch-fidelity answers.

From the root, where FID's tools are installed (CONTRIBUTING.md):

  PYTHONPATH=.:tests python tests/golden/make_metrics.py

To be run again when what is asked in tests/parity/metrics.py changes.
"""

import json

from parity import metrics


def main():
  reference = metrics.reference_live()
  metrics.GOLDEN.write_text(json.dumps(reference, indent=2) + '\n')
  print(f'{metrics.GOLDEN.name}: {metrics.compare(reference):.1g} apart')


if __name__ == '__main__':
  main()
