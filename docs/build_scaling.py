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

from matplotlib.figure import Figure

from diffusion_jax.planning import chips

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
  for kind in (STRONG, WEAK):
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


# --- the page -----------------------------------------------------------------

HEAD = """# Memory and speed on TPU slices

Each row is the result of `python -m diffusion_jax.preflight --fast` with
`--config.model.dtype=bfloat16`, which compiles the real training step for a TPU
slice that is not attached. Nothing on this page was run on a TPU. `--fast`
compiles at low effort, so memory is an estimate: for cifar10 with fsdp 4 on
v5e:2x2, compilation at the default effort gives 917 MB in total, where this
page has 845 MB. To rebuild the page: `python docs/build_scaling.py`.
"""

ASSUMED = """
## Assumptions

The predicted time is a lower bound: it uses the published rates of the chips,
which no program reaches.

- Computation and memory traffic of a chip overlap: the longer of the two
  counts. FLOPs and bytes are XLA's own count for the compiled step.
- Communication follows and does not overlap with them. A gather or scatter
  among n chips sends (n - 1)/n of each byte, a sum twice that.
- Sums over all chips use all their links, at half the rate where an axis of the
  slice is too short to form a ring.
- Data arrive in time, and no host is slow.

With four images of 256x256 per chip, the program compiled at low effort moves
more bytes than with sixteen, as the row of 16 chips shows. It was not tested
whether the default effort avoids this.

DDPM's authors report 21 steps of 128 images per second on a TPU v3-8 (arXiv
2006.11239, appendix B). That is 94 TFLOP/s of products on four chips of 123
TFLOP/s: 19% of the published rate. Expect such a share, not 100%.
"""

COLUMNS = """| chips | slice | batch | products | memory | communication | images/s per chip | {} |
|---:|---|---:|---:|---:|---:|---:|---:|
"""  # noqa: E501


def page(found) -> str:
  parts = [HEAD, '\n## Memory and work\n', *_rented(found)]
  parts += [
    '\n## More chips\n\n![Efficiency](scaling.png)\n\n'
    'The time of a step: convolutions and matrix products, memory traffic and\n'
    'communication, under the [assumptions below](#assumptions). Efficiency is '
    'the share\nof time without communication. The relative speed is per chip, '
    'compared with four\nchips.\n'
  ]
  for config in WEAK:
    parts += [
      f'\n{config}, the same number of images on each chip:\n\n',
      COLUMNS.format('efficiency'),
    ]
    for topology, batch in WEAK[config]:
      if row := found.get(key(config, topology, batch, [])):
        parts.append(_line(row, row['predicted']['efficiency']))
    parts += [
      f"\n{config}, the paper's batch over all chips:\n\n",
      COLUMNS.format('relative speed'),
    ]
    parts += [_line(row, share) for row, share in _strong(found, config)]
  return ''.join([*parts, ASSUMED])


def _strong(found, config):
  """(result, speed a chip beside that on the fewest chips)."""
  first = None
  for topology, batch in STRONG[config]:
    if row := found.get(key(config, topology, batch, [])):
      speed = row['predicted']['images_per_sec_per_chip']
      first = first or speed
      yield row, speed / first


def _line(row, share) -> str:
  predicted = row['predicted']
  times = ' | '.join(
    f'{1e3 * predicted[f"{name}_seconds"]:.2f} ms'
    for name in ('compute', 'memory', 'exchange')
  )
  return (
    f'| {row["num_devices"]} | {row["topology"]} | {row["batch_size"]:,} | '
    f'{times} | {predicted["images_per_sec_per_chip"]:,.0f} | {share:.0%} |\n'
  )


def _rented(found):
  yield (
    '\n| run | slice | batch | state | temporaries | code | total | share of a '
    'chip | GFLOP per image, products | GFLOP per image, total | communication '
    '|\n'
    '|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|\n'
  )
  for run in RENTED:
    row = found.get(key(*run))
    if not row:
      continue
    config, topology, batch, flags = run
    train = row['train']
    size = train['bytes']
    state = size['parameters'] + size['EMA'] + size['optimiser']
    cells = [
      config + ', fsdp 4' * bool(flags), topology, f'{batch:,}',
      *(
        f'{count / 1e6:,.0f} MB'
        for count in (state, size['temporaries'], size['code'], size['total'])
      ),
      f'{size["total"] / row["memory"]:.0%}',
      f'{train["product_flops_per_image"] / 1e9:,.2f}',
      f'{train["xla_flops_per_image"] / 1e9:,.2f}',
      ', '.join(
        f'{one["kind"]} {one["bytes"] / 1e6:,.1f} MB'
        for one in train['collectives']
      ),
    ]  # fmt: skip
    yield f'| {" | ".join(cells)} |\n'


SHARE = 0.19  # of the published rate, see ASSUMED
SAMPLES, EVALUATIONS = 50_000, 1000  # of the papers' FID


def costs(found) -> str:
  """Hours of the papers' runs, at the share of the rate that they reached."""
  lines = [
    '| run | slice | training | 50,000 samples, 1000 steps | chip-hours |\n',
    '|---|---|---:|---:|---:|\n',
  ]
  for run in RENTED:
    config, topology, _, flags = run
    row = found.get(key(*run))
    # Others train with batches that are not the paper's.
    if not row or flags or run[2] > 128:
      continue
    rate = SHARE * chips.parse(topology).chip.flops * row['num_devices']
    images = row['num_steps'] * row['batch_size']
    train = images * row['train']['product_flops_per_image'] / rate / 3600
    once = row['sample']['product_flops_per_image'] / row['sample']['num_steps']
    sample = SAMPLES * EVALUATIONS * once / rate / 3600
    lines.append(
      f'| {config} | {topology} | {train:.1f} h | {sample:.1f} h | '
      f'{(train + sample) * row["num_devices"]:,.0f} |\n'
    )
  return ''.join(lines)


def fill_in(path, text) -> None:
  """Puts a text between the marks of a file."""
  marks = '<!-- costs: docs/build_scaling.py -->\n', '<!-- end of costs -->\n'
  before, _, rest = path.read_text().partition(marks[0])
  _, _, after = rest.partition(marks[1])
  path.write_text(''.join([before, marks[0], text, marks[1], after]))


def plot(found, path) -> None:
  figure = Figure(figsize=(7, 3.2), layout='constrained')
  left, right = figure.subplots(1, 2, sharey=True)
  for config, color in (('cifar10', '#1f77b4'), ('celebahq256', '#d62728')):
    rows = [
      found[key(config, topology, batch, [])]
      for topology, batch in WEAK[config]
      if key(config, topology, batch, []) in found
    ]
    left.plot(
      [row['num_devices'] for row in rows],
      [row['predicted']['efficiency'] for row in rows],
      'o-', color=color, label=config,
    )  # fmt: skip
    strong = list(_strong(found, config))
    right.plot(
      [row['num_devices'] for row, _ in strong],
      [share for _, share in strong],
      'o-', color=color, label=config,
    )  # fmt: skip
  for axes, title in (
    (left, 'equal images a chip'), (right, "the paper's batch")
  ):  # fmt: skip
    axes.set(title=title, xlabel='chips', ylim=(0, 1.05), xscale='log')
    axes.set_xlim(3, 1400)
    axes.set_xticks([4, 16, 64, 256, 1024], ['4', '16', '64', '256', '1024'])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
  left.set_ylabel('predicted efficiency')
  left.legend()
  figure.savefig(path, dpi=120)


if __name__ == '__main__':
  results = compiled()
  plot(results, DOCS / 'scaling.png')
  (DOCS / 'scaling.md').write_text(page(results))
  fill_in(DOCS.parent / 'launch' / 'README.md', costs(results))
