r"""Shows how a config's mesh shards the parameters, and the bytes per device.

  python -m diffusion_jax.layout --config=cifar10 --config.mesh.fsdp=8

Prints the bytes of the training state between two steps, and of parts that are
not trained; activations are not included. --all also lists every parameter. It
needs no devices, allocates nothing and compiles nothing.
"""

import math

import jax
from absl import flags
from jax.sharding import AbstractMesh

from diffusion_jax import models
from diffusion_jax.cli import command
from diffusion_jax.planning import page
from diffusion_jax.planning.compiled import device_bytes
from diffusion_jax.runs import frozen, recipe, validation
from diffusion_jax.system import terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import averages, optim, sharding, state

FLAGS = flags.FLAGS
command.define_config()
flags.DEFINE_integer(
  'num_devices',
  None,
  "Number of devices in the mesh; by default this machine's if the mesh can "
  'use them all, otherwise the product of its sizes.',
  lower_bound=1,
)
flags.DEFINE_bool('all', False, 'Also list every parameter.')
flags.DEFINE_bool('json', False, 'Print the result as JSON.')


def main():
  config = FLAGS.config
  frozen.complete(config)
  count = FLAGS.num_devices or _asked_for(config.mesh)
  wrong = validation.check(config, range(count))
  if wrong:
    raise UserError(wrong[0])
  sizes = sharding.mesh_shape(count, **config.mesh)
  mesh = AbstractMesh(sizes, sharding.AXES)
  made = recipe.create(config)
  abstract = state.abstract_state(
    made.init, optim.create(**config.optim), mesh, ema=config.ema.decay > 0,
    averages=averages.updates(config.ema),
  )  # fmt: skip
  rows = [
    {'name': name, **_lies(leaf)}
    for name, leaf in models.named(abstract.params).items()
  ]
  parts = {
    'parameters': abstract.params,
    'EMA': (abstract.ema_params, abstract.averages),
    'optimiser': abstract.opt_state,
    'state': abstract,
    'frozen': sharding.abstract(made.frozen, mesh),
  }
  totals = {
    name: {
      'total': sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part)),
      'device': device_bytes(part),
    }
    for name, part in parts.items()
    if jax.tree.leaves(part)  # there may be no EMA, or nothing frozen
  }
  terminal.report(
    {'mesh': dict(mesh.shape), 'parameters': rows, 'bytes': totals},
    '\n'.join(_shown(mesh, rows, totals)),
    FLAGS.json,
  )


def _asked_for(mesh) -> int:
  here = jax.device_count()
  known = math.prod(size for size in mesh.values() if size > 0)
  return known if here % known else here


def _lies(leaf) -> dict:
  """An array's shape, the mesh axis of each of its axes, bytes per device."""
  where = leaf.sharding
  spec = [*where.spec, *[None] * (leaf.ndim - len(where.spec))]
  split = [axis if where.mesh.shape.get(axis, 1) > 1 else None for axis in spec]
  return {
    'shape': list(leaf.shape),
    'split': split,
    'device_bytes': device_bytes(leaf),
  }


def _shown(mesh, rows, totals):
  count = mesh.size
  if FLAGS.all:
    yield from terminal.table(
      ['parameter', 'shape', 'split over', 'bytes each'],
      [
        (
          row['name'],
          ' '.join(map(str, row['shape'])),
          ' '.join(axis or '-' for axis in row['split']),
          f'{row["device_bytes"]:,}',
        )
        for row in rows
      ],
    )
    yield ''
  yield f'{page.mesh(mesh.shape)} = {count} device{"s" * (count > 1)}'
  yield from terminal.table(
    ['bytes', 'total', f'total / {count}', 'per device', 'ratio'],
    [
      (
        name,
        f'{total["total"]:,}',
        f'{total["total"] / count:,.0f}',
        f'{total["device"]:,}',
        f'{total["device"] * count / total["total"]:.3f}',
      )
      for name, total in totals.items()
    ],
  )
  if not FLAGS.all:
    split = sum(any(row['split']) for row in rows)
    yield f'{len(rows)} parameters, {split} of them split; --all lists them'


if __name__ == '__main__':
  command.run(main, __doc__, required=('config',))
