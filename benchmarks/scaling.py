r"""Time and memory of a step against batch, width, resolution and devices.

  python benchmarks/scaling.py --config=digits --json=FILE --plot=FILE.png
  python benchmarks/scaling.py --config=cifar10 --batch=32,64,128 \
    --width=64,128 --resolution=32,64,128,256 --devices= --topology=v5e:2x2

One value is changed at a time, the others are the config's. Attention stays at
the map sizes of the config. The same batch is divided over the devices, which
on a CPU are simulated: they share its cores, so the time should stay the same.
With --topology nothing runs: the step is compiled for TPU slices or GPUs that
are not attached, the first one for all but the devices, and times are those at
published rates, see docs/scaling.md.

The last columns compare neighbours: the exponent of the time in the FLOPs, and
that of the temporaries in the number of activations. Above 1, the larger one is
worse than proportional. A row is kept in the file of --json as it ends.
"""

import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ours_step
import rounds
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from diffusion_jax import runs
from diffusion_jax.cli import command
from diffusion_jax.planning import compiled, rates, slices
from diffusion_jax.runs import programs, validation
from diffusion_jax.system import files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

FLAGS = flags.FLAGS
AXES = {
  'batch': 'batch_size',
  'width': 'model.channels',
  'resolution': 'data.image_size',
}
DEVICES = 'devices'
HEADS = (
  *('axis', 'value', 'devices', 'GFLOP', 'ms', 'temporaries'),
  *('time / FLOPs', 'memory / maps'),
)
WIDTHS = (10, 8, 8, 9, 28, 12, 12, 13)


class Point(NamedTuple):
  """A config and the devices on which it is measured.

  Attributes:
    axis: what is changed: a key of AXES, or DEVICES.
    value: its value.
    config: the run's config.
    devices: the number of devices, or the slice for which it is compiled.
  """

  axis: str
  value: int
  config: ConfigDict
  devices: int | slices.Slice


def main():
  command.at_least(rounds=1)
  several = rounds.numbers('devices', FLAGS.devices) if FLAGS.devices else []
  where = [slices.parse(name) for name in FLAGS.topology]
  if not where and several:
    _simulate(max(several))
  values = {
    axis: rounds.numbers(axis, FLAGS[axis].value)
    for axis in AXES
    if FLAGS[axis].value
  }
  found = points(FLAGS.config, values, where or several)
  for name in ('json', 'plot'):
    if FLAGS[name].value:
      runs.usable_file(name, FLAGS[name].value)
  here = rounds.machine()
  if not where:
    rounds.warn_if_busy(here)
  terminal.write(rounds.described(here))
  table = rounds.Table(
    HEADS, WIDTHS, FLAGS.json, {**here, 'config': runs.to_plain(FLAGS.config)}
  )
  measure = (
    predicted if where else functools.partial(measured, count=FLAGS.rounds)
  )
  for point in found:
    row = measure(point)
    row |= exponents(table.result['rows'], row)
    table.add(row, [_cells(row)])
  if FLAGS.plot:
    plot(table.result['rows'], files.at(FLAGS.plot).expanduser())


def points(
  config: ConfigDict,
  values: Mapping[str, Sequence[int]],
  devices: Sequence[int | slices.Slice],
) -> list[Point]:
  """All that is to be measured, each axis in ascending order.

  Args:
    config: the run's config.
    values: a key of AXES -> values.
    devices: numbers of devices, or slices. What is on the other axes takes one
      device, or the first slice.

  Raises:
    UserError: a config is not valid.
  """
  first = devices[0] if devices and not isinstance(devices[0], int) else 1
  found = [
    Point(axis, value, changed(config, axis, value), first)
    for axis, listed in values.items()
    for value in sorted(listed)
  ]
  found += [
    Point(DEVICES, _size(one), ours_step.on_one_device(config), one)
    for one in sorted(devices, key=_size)
  ]
  for point in found:
    wrong = validation.check(point.config, [None] * _size(point.devices))
    if wrong:
      raise UserError(f'{point.axis} {point.value}: {wrong[0]}')
  return found


def changed(config: ConfigDict, axis: str, value: int) -> ConfigDict:
  """A config with another value, and what must follow from it."""
  one = ours_step.on_one_device(config)
  one.update_from_flattened_dict({AXES[axis]: value})
  model, side = one.model, min(runs.image_shape(one.data)[:2])
  maps = [side // 2**level for level in range(len(model.multipliers))]
  model.attention_resolutions = tuple(
    at for at in model.attention_resolutions if at in maps
  )
  model.num_groups = math.gcd(model.num_groups, model.channels)
  return one


def measured(point: Point, count: int) -> dict:
  """A row: times a step on devices of this machine.

  Args:
    point: the config and the number of devices.
    count: the number of rounds.
  """
  over = sharding.make_mesh(devices=jax.devices()[: point.devices])
  step = ours_step.step(
    point.config, over, [ours_step.state(point.config, over)]
  )
  step.call(1)
  seconds = rounds.alternating({'': lambda: step.call(1)}, count)['']
  return {
    **_row(point),
    'seconds': rounds.quartiles(seconds),
    'bytes': step.bytes,
    'temporaries': step.program.memory_analysis().temp_size_in_bytes,
    'compile_seconds': step.compile_seconds,
    'load': round(os.getloadavg()[0], 2),
  }


def predicted(point: Point) -> dict:
  """A row: compiles a step for a slice; its time at published rates."""
  where, config = point.devices, point.config
  devices = slices.devices(where)
  over = sharding.make_mesh(devices=devices)
  program = programs.create(config, over)
  batch = jax.ShapeDtypeStruct(
    (config.batch_size, *runs.image_shape(config.data)),
    jnp.uint8,
    sharding=sharding.batch_sharding(over),
  )
  args = program.abstract, program.frozen, {'image': batch}
  found = compiled.compile(
    program.step_fn, args, where.memory, fast=devices[0].platform == 'tpu'
  )
  return {
    **_row(point),
    'topology': where.name,
    'seconds': {'median': rates.predict(where, found)['seconds']},
    'bytes': found.total,
    'temporaries': found.temporaries,
    'compile_seconds': found.seconds,
  }


def exponents(rows: Sequence[Mapping], row: Mapping) -> dict:
  """How a row compares with the one before it on its axis.

  Args:
    rows: the rows before it.
    row: the row.

  Returns:
    The exponents p of seconds ~ FLOPs^p and temporaries ~ activations^p, per
    device; None for the first one of an axis and where nothing changes.
  """
  before = [one for one in rows if one['axis'] == row['axis']]
  if not before:
    return {'time_exponent': None, 'memory_exponent': None}
  last = before[-1]
  # Simulated devices share the cores: their work does not become less.
  shared = 'topology' not in row

  def power(of, by):
    ratio = by(row) / by(last)
    return (
      math.log(of(row) / of(last)) / math.log(ratio) if ratio != 1 else None
    )

  return {
    'time_exponent': power(
      lambda one: one['seconds']['median'],
      lambda one: one['flops'] / (1 if shared else one['devices']),
    ),
    'memory_exponent': power(
      lambda one: one['temporaries'],
      lambda one: one['activations'] / one['devices'],
    ),
  }


def plot(rows: Sequence[Mapping], path) -> None:
  """Draws a column of two panels for each axis: time, and memory.

  Args:
    rows: the rows.
    path: of the picture.
  """
  axes = list(dict.fromkeys(row['axis'] for row in rows))
  figure = Figure(figsize=(3 * len(axes), 5.5), layout='constrained')
  panels = figure.subplots(2, len(axes), squeeze=False, sharex='col')
  for name, (upper, lower) in zip(axes, panels.T, strict=True):
    chosen = [row for row in rows if row['axis'] == name]
    at = [row['value'] for row in chosen]
    times = [1e3 * row['seconds']['median'] for row in chosen]
    work = [row['flops'] for row in chosen]
    upper.plot(at, times, 'o-', label='a step')
    line = [times[0] * one / work[0] for one in work]
    upper.plot(at, line, 'k:', label='as the FLOPs')
    memory = [row['bytes'] / 2**20 for row in chosen]
    lower.plot(at, memory, 'o-', label='in all')
    rest = [row['temporaries'] / 2**20 for row in chosen]
    lower.plot(at, rest, 's--', label='temporaries')
    lower.set(xlabel=name)
    for panel in (upper, lower):
      panel.set(xscale='log', yscale='log')
      panel.set_xticks(at, map(str, at))
      panel.minorticks_off()
      panel.grid(alpha=0.3)
  panels[0, 0].set_ylabel('ms')
  panels[1, 0].set_ylabel('MiB a device')
  for panel in panels[:, 0]:
    panel.legend()
  with files.replacing(path) as file:
    figure.savefig(file, dpi=120)


def _size(devices: int | slices.Slice) -> int:
  return devices if isinstance(devices, int) else devices.size


def _row(point: Point) -> dict:
  config = point.config
  height, width, _ = runs.image_shape(config.data)
  each = ours_step.flops_per_image(config, 'step')
  return {
    'axis': point.axis,
    'value': point.value,
    'devices': _size(point.devices),
    'flops': each * config.batch_size,
    'activations': config.batch_size * height * width * config.model.channels,
  }


def _cells(row) -> Iterator[str]:
  seconds = row['seconds']
  power = (
    '-' if row[name] is None else f'{row[name]:.2f}'
    for name in ('time_exponent', 'memory_exponent')
  )
  return (
    row['axis'],
    str(row['value']),
    str(row['devices']),
    f'{row["flops"] / 1e9:.4g}',
    rounds.spread(seconds, 1e3)
    if 'q1' in seconds
    else rounds.figures(1e3 * seconds['median']),
    f'{row["temporaries"] / 2**20:,.1f} MiB',
    *power,
  )


def _simulate(count: int) -> None:
  """Simulates devices on a CPU; on others there must be as many."""
  jax.config.update('jax_num_cpu_devices', count)
  if len(jax.devices()) < count:
    raise UserError(
      f'--devices: there are {len(jax.devices())} devices, fewer than {count}'
    )


def _declare():
  command.define_config()
  flags.DEFINE_list('batch', ['4', '8', '16', '32'], 'Batch sizes.')
  flags.DEFINE_list('width', ['8', '16', '32', '64'], 'model.channels.')
  flags.DEFINE_list('resolution', ['8', '16', '32'], 'Pixels per side.')
  flags.DEFINE_list(
    'devices', ['1', '2', '4', '8'], 'Numbers of devices; simulated on CPUs.'
  )
  flags.DEFINE_list(
    'topology', [], 'What to compile for, as v5e:2x2 or h100:8.'
  )
  flags.DEFINE_integer('rounds', 5, 'Number of timed rounds.')
  flags.DEFINE_string('json', None, 'JSON file for the result.')
  flags.DEFINE_string('plot', None, 'PNG file for the plots.')


if __name__ == '__main__':
  _declare()
  command.run(main, __doc__, required=('config',))
