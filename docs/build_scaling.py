"""Builds docs/scaling.md and scaling.png from preflights of TPU slices.

  pip install '.[tpu]'
  python docs/build_scaling.py

What is in docs/scaling.json already is not compiled again: delete that file to
begin anew. Each of the compilations takes minutes, of any machine's CPU.
"""

import json
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent
RESULTS = DOCS / 'scaling.json'
COMMON = ['--fast', '--config.model.dtype=bfloat16']

# (config, topology, batch) of images on a chip, at the papers' batch, and what
# else people rent.
WEAK = {
  'cifar10': [
    ('v5e:2x2', 128), ('v5e:4x4', 512), ('v5e:8x8', 2048),
    ('v5e:16x16', 8192), ('v5p:8x8x16', 32768),
  ],
  'celebahq256': [
    ('v5e:2x2', 32), ('v5e:4x4', 128), ('v5e:8x8', 512), ('v5e:16x16', 2048),
    ('v5p:8x8x16', 8192),
  ],
}  # fmt: skip
STRONG = {
  'cifar10': [('v5e:2x2', 128), ('v5e:4x4', 128), ('v5e:8x8', 128)],
  'celebahq256': [('v5e:2x2', 64), ('v5e:4x4', 64), ('v5e:8x8', 64)],
}
RENTED = [
  ('cifar10', 'v5e:2x2', 128, []),
  ('cifar10', 'v5p:2x2x1', 128, []),
  ('cifar10', 'v6e:2x2', 128, []),
  ('celebahq256', 'v4:2x2x2', 64, []),
  ('cifar10', 'v5e:2x2', 128, ['--config.mesh.data=1', '--config.mesh.fsdp=4']),
  ('cifar10', 'v5e:16x16', 8192, []),
]


def runs():
  """All preflights, the most wanted first."""
  yield from RENTED
  for kind in (WEAK, STRONG):
    for config, sizes in kind.items():
      for topology, batch in sizes:
        yield config, topology, batch, []


def key(config, topology, batch, flags) -> str:
  return ' '.join([config, topology, str(batch), *flags])


def compiled() -> dict:
  """Key -> result of preflight; those that are missing are compiled."""
  found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  for run in runs():
    if key(*run) in found:
      continue
    config, topology, batch, flags = run
    command = [
      *(sys.executable, '-m', 'diffusion_jax.preflight', f'--config={config}'),
      *(*COMMON, *flags),
      f'--topology={topology}',
      f'--config.batch_size={batch}',
      '--json',
    ]
    if run not in RENTED:
      command.append('--nosampling')
    print(' '.join(command[1:]), file=sys.stderr, flush=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if result.returncode:
      print(f'{key(*run)}: left out', file=sys.stderr)
      continue
    found[key(*run)] = json.loads(result.stdout)
    del found[key(*run)]['checks']  # of the machine that compiled
    RESULTS.write_text(json.dumps(found, indent=1) + '\n')
  return found


if __name__ == '__main__':
  compiled()
