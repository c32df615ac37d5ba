"""Fills in the tables of scaling.md and launch/README.md, and scaling.png.

  pip install '.[tpu]' '.[cuda]'
  python docs/build_scaling.py              # all
  python docs/build_scaling.py gpus --anew  # only the tables of GPUs

What is in docs/scaling.json already is not compiled again, except with --anew.
Each of the compilations takes minutes, of any machine's CPU.
"""

import json
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

from diffusion_jax.planning import slices

DOCS = Path(__file__).parent
RESULTS = DOCS / 'scaling.json'
FOUND = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

# (config, slice, batch, flags) that people rent.
RENTED = [
  ('cifar10', 'v5e:2x2', 128),
  ('cifar10', 'v5p:2x2x1', 128),
  ('cifar10', 'v6e:2x2', 128),
  ('celebahq256', 'v4:2x2x2', 64),
  ('cifar10', 'v5e:2x2', 128, '--config.mesh.data=1', '--config.mesh.fsdp=4'),
  ('cifar10', 'v5e:16x16', 8192),
]
# (config, GPUs, batch): 256 images on each.
OF_GPUS = [
  ('cifar10', 'h100:1', 256),
  ('cifar10', 'h100:8', 2048),
  ('cifar10', 'h100:2x8', 4096),
]
SLICES = ('v5e:2x2', 'v5e:4x4', 'v5e:8x8', 'v5e:16x16', 'v5p:8x8x16')
# Title of a panel -> the last column, config -> batches of these slices.
SCALED = {
  'equal images a chip': (
    'efficiency',
    {
      'cifar10': (128, 512, 2048, 8192, 32768),
      'celebahq256': (32, 128, 512, 2048, 8192),
    },
  ),
  "the paper's batch": (
    'relative speed',
    {'cifar10': (128, 128, 128), 'celebahq256': (64, 64, 64)},
  ),
}
SHARE = 0.19  # of the published rate, see scaling.md
EVALUATIONS = 50_000 * 1000  # of the papers' FID


def result(config, topology, batch, *flags) -> dict:
  """What preflight finds, compiled unless it is on record."""
  key = ' '.join([config, topology, str(batch), *flags])
  if key not in FOUND:
    command = [
      *(sys.executable, '-m', 'diffusion_jax.preflight', f'--config={config}'),
      *('--fast', '--config.model.dtype=bfloat16', *flags),
      *(f'--topology={topology}', f'--config.batch_size={batch}', '--json'),
      *['--nosampling'] * ((config, topology, batch, *flags) not in RENTED),
    ]
    print(' '.join(command[1:]), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    FOUND[key] = json.loads(done.stdout)
    del FOUND[key]['checks']  # of the machine that compiled
    RESULTS.write_text(json.dumps(FOUND, indent=1) + '\n')
  return FOUND[key]


def memory(config, topology, batch, *flags) -> dict:
  """A row: what a program takes of a chip."""
  found = result(config, topology, batch, *flags)
  train, size = found['train'], found['train']['bytes']
  state = size['parameters'] + size['EMA'] + size['optimiser']
  products = train['product_flops_per_image']
  return {
    'run': config + ', fsdp 4' * bool(flags),
    'slice': topology,
    'batch': f'{batch:,}',
    'state': f'{state / 1e6:,.0f} MB',
    **{k: f'{size[k] / 1e6:,.0f} MB' for k in ('temporaries', 'code')},
    'total': f'{size["total"] / 1e6:,.0f} MB',
    'share of a chip': f'{size["total"] / found["memory"]:.0%}',
    'GFLOP per image, products': f'{products / 1e9:,.2f}',
    'GFLOP per image, total': f'{train["xla_flops_per_image"] / 1e9:,.2f}',
    'communication': ', '.join(
      f'{one["kind"]} {one["bytes"] / 1e6:,.1f} MB'
      for one in train['collectives']
    ),
  }


def on_gpus(config, topology, batch) -> dict:
  """A row: the memory, the kernels and the shortest time of a step on GPUs."""
  found = result(config, topology, batch)
  train, time, size = (
    found['train'],
    found['predicted'],
    found['train']['bytes'],
  )
  state = size['parameters'] + size['EMA'] + size['optimiser']
  number = sum(kind['count'] for kind in train['kernels'])
  return {
    'run': config,
    'GPUs': topology,
    'batch': f'{batch:,}',
    'state': f'{state / 1e6:,.0f} MB',
    'temporaries': f'{size["temporaries"] / 1e6:,.0f} MB',
    'kernels': f'{number:,}',
    'per image': f'{train["kernel_bytes_per_image"] / 1e6:,.1f} MB',
    'products': f'{1e3 * time["compute_seconds"]:.2f} ms',
    'memory': f'{1e3 * time["memory_seconds"]:.2f} ms',
    'communication': f'{1e3 * time["exchange_seconds"]:.2f} ms',
    'images/s per GPU': f'{time["images_per_sec_per_chip"]:,.0f}',
  }


def by_kind(config, topology, batch) -> list[dict]:
  """Rows: the kernels of each kind, and what they move."""
  found = result(config, topology, batch)
  kinds, images = found['train']['kernels'], batch / found['num_devices']
  whole = sum(kind['bytes'] for kind in kinds)
  return [
    {
      'kernels': kind['name'],
      'number': f'{kind["count"]:,}',
      'per image': f'{kind["bytes"] / images / 1e6:.1f} MB',
      'share': f'{kind["bytes"] / whole:.1%}',
    }
    for kind in kinds
  ]


def costs(config, topology, batch) -> dict:
  """A row: hours of the paper's run, at the share that it reached."""
  found = result(config, topology, batch)
  rate = SHARE * slices.parse(topology).chip.flops * found['num_devices']
  images, sample = found['num_steps'] * batch, found['sample']
  train = images * found['train']['product_flops_per_image'] / rate / 3600
  once = sample['product_flops_per_image'] / sample['num_steps']
  draw = EVALUATIONS * once / rate / 3600
  return {
    'run': config,
    'slice': topology,
    'training': f'{train:.1f} h',
    '50,000 samples, 1000 steps': f'{draw:.1f} h',
    'chip-hours': f'{(train + draw) * found["num_devices"]:,.0f}',
  }


def scaled(config, batches, share_name) -> tuple[list[dict], list[float]]:
  """Rows of predicted times, and the share in each one's last column."""
  speed = 'images_per_sec_per_chip'
  found = [result(config, *pair) for pair in zip(SLICES, batches, strict=False)]
  times = [one['predicted'] for one in found]
  if share_name == 'relative speed':
    shares = [time[speed] / times[0][speed] for time in times]
  else:
    shares = [time['efficiency'] for time in times]
  rows = [
    {
      'chips': str(one['num_devices']),
      'slice': one['topology'],
      'batch': f'{one["batch_size"]:,}',
      'products': f'{1e3 * time["compute_seconds"]:.2f} ms',
      'memory': f'{1e3 * time["memory_seconds"]:.2f} ms',
      'communication': f'{1e3 * time["exchange_seconds"]:.2f} ms',
      'images/s per chip': f'{time[speed]:,.0f}',
      share_name: f'{share:.0%}',
    }
    for one, time, share in zip(found, times, shares, strict=True)
  ]
  return rows, shares


def fill_in(path, name, rows) -> None:
  """Puts a table between the marks of its name."""
  begin, end = f'<!-- {name}: docs/build_scaling.py -->\n', '<!-- end -->\n'
  before, _, rest = path.read_text().partition(begin)
  after = rest.partition(end)[2]
  rule = ['---:' if cell[0].isdigit() else '---' for cell in rows[0].values()]
  lines = [rows[0], rule, *(row.values() for row in rows)]
  table = ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)
  path.write_text(f'{before}{begin}{table}{end}{after}')


def gpus():
  """The tables of GPUs."""
  page = DOCS / 'scaling.md'
  fill_in(page, 'gpus', [on_gpus(*run) for run in OF_GPUS])
  fill_in(page, 'kernels', by_kind(*OF_GPUS[0]))


def tpus():
  """The tables of TPUs, and the plot."""
  page = DOCS / 'scaling.md'
  fill_in(page, 'memory', [memory(*run) for run in RENTED])
  # Batches that are not the paper's train in other ways.
  fill_in(
    DOCS.parent / 'launch' / 'README.md', 'costs',
    [costs(*run) for run in RENTED if len(run) == 3 and run[2] <= 128],
  )  # fmt: skip
  figure = Figure(figsize=(7, 3.2), layout='constrained')
  panels = figure.subplots(1, 2, sharey=True)
  for axes, (title, (name, runs)) in zip(panels, SCALED.items(), strict=True):
    for config, batches in runs.items():
      rows, shares = scaled(config, batches, name)
      fill_in(page, f'{config}, {title}', rows)
      axes.plot([int(x['chips']) for x in rows], shares, 'o-', label=config)
    axes.set(title=title, xlabel='chips', ylim=(0, 1.05), xscale='log')
    axes.set_xticks([4, 16, 64, 256, 1024], ['4', '16', '64', '256', '1024'])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
  panels[0].set_ylabel('predicted efficiency')
  panels[0].legend()
  figure.savefig(DOCS / 'scaling.png', dpi=120)


def main(*arguments):
  tables = {'tpus': tpus, 'gpus': gpus}
  wanted = [kind for kind in tables if kind in arguments] or [*tables]
  if '--anew' in arguments:
    for key in [*FOUND]:
      topology = key.split()[1]
      kind = 'gpus' if slices.parse(topology).chip.card else 'tpus'
      if kind in wanted:
        del FOUND[key]
  for kind in wanted:
    tables[kind]()


if __name__ == '__main__':
  main(*sys.argv[1:])
