r"""Tells, before chips are rented, whether a run fits and what it takes.

  python -m diffusion_jax.preflight --config=cifar10 --topology=v5e:4x4

Compiles the real training step, and the sampling program, for the chips of a
TPU slice that need not be there (v4, v5e, v5p and v6e, by the compiler that pip
install 'diffusion_jax[tpu]' brings), or without --topology for this machine's
devices. Prints bytes a chip against its memory, FLOPs, what chips exchange, and
the time that a step takes at the chips' published rates.

Before it compiles, it looks at what fails most often on pods: the batch's
arithmetic, the data, the workdir, versions, TensorFlow. Started on all hosts as
training is, it compares them. Nothing is trained, and nothing is kept.

--measure runs both programs on this machine's devices for some seconds, with
random images and new parameters, and tells what a step takes.
"""

import math
import os
import time
from concurrent import futures
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_dict

from diffusion_jax import runs
from diffusion_jax.cli import command
from diffusion_jax.planning import checks, chips, compiled, page, rates
from diffusion_jax.planning.compiled import Compiled, TooLarge, device_bytes
from diffusion_jax.planning.page import gib
from diffusion_jax.runs import programs, validation
from diffusion_jax.system import distributed, environment, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

FLAGS = flags.FLAGS
command.define_config()
flags.adopt_module_key_flags(distributed)
flags.DEFINE_string(
  'topology', None,
  f'Chips that are not here: {", ".join(chips.CHIPS)}, and a slice of them, '
  "such as v5e:4x4 or v4:2x2x2. This machine's devices by default.",
)  # fmt: skip
flags.DEFINE_string('workdir', None, 'Folder of the run to come, to be tried.')
flags.DEFINE_bool(
  'fast', False,
  'TPUs: compile at low effort, several times faster. Memory is then an '
  'estimate, seen to be 8% to 22% too low.',
)  # fmt: skip
flags.DEFINE_bool('sampling', True, 'The sampling program too.')
flags.DEFINE_integer(
  'sample_batch_size', 256, 'Images drawn at once, over all devices.',
  lower_bound=1,
)  # fmt: skip
flags.DEFINE_bool(
  'largest_batch', False, 'Find the largest batch_size that fits; compiles '
  'the training step about six times.',
)  # fmt: skip
flags.DEFINE_bool(
  'measure', False, 'Also run both, and time them; only on this machine.'
)
flags.DEFINE_bool('json', False, 'Print the result as JSON.')

MEASURED_SECS = 2.0  # of each program; one run, where that takes longer


class Place(NamedTuple):
  """A config on the devices that it is looked at for.

  Attributes:
    config: the run's.
    name: of the devices, for people.
    mesh: of them.
    program: what is compiled.
    limit: bytes that a device has for it.
    where: the slice; None = this machine.
    options: the compiler's.
  """

  config: config_dict.ConfigDict
  name: str
  mesh: jax.sharding.Mesh
  program: programs.Programs
  limit: int
  where: chips.Slice | None
  options: dict | None


def main():
  where = chips.parse(FLAGS.topology) if FLAGS.topology is not None else None
  if not where:
    distributed.initialize()
  elif FLAGS.coordinator:
    raise UserError('--topology is for one process: leave --coordinator out')
  if FLAGS.measure and (where or FLAGS.largest_batch):
    other = 'topology' if where else 'largest_batch'
    raise UserError(f'--measure runs what fits here: leave --{other} out')
  devices = chips.devices(where) if where else jax.devices()
  wrong = validation.check(FLAGS.config, devices)
  if wrong:
    raise UserError(wrong[0])
  place = _place(FLAGS.config, where, devices)
  looked_at = _look(place)
  if FLAGS.largest_batch:
    _largest(place)
    return
  train, sample = _compile_both(place)
  if _used(train) > _limit(place, train):
    raise UserError(_too_large(place, place.config.batch_size, train))
  if sample and _used(sample) > _limit(place, sample):
    raise UserError(_too_many_samples(place, sample))
  distributed.gather(None)  # who is through first waits for the others
  result = _result(place, train, sample)
  if FLAGS.measure:
    result['measured'] = _measure(place, train, sample)
    result['environment'] = environment.describe()
  result['checks'] = [check._asdict() for check in looked_at]
  terminal.report(result, '\n'.join(page.lines(result)), FLAGS.json)


def _place(config, where, devices) -> Place:
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  limit = where.chip.memory if where else _memory()
  fast = FLAGS.fast and devices[0].platform == 'tpu'
  name = where.name if where else f'{len(devices)} {devices[0].device_kind}'
  return Place(
    config, name, mesh, programs.create(config, mesh), limit, where,
    compiled.FAST if fast else None,
  )  # fmt: skip


def _memory() -> int:
  """Bytes that a device may use, of all that there are the least."""
  stats = jax.local_devices()[0].memory_stats() or {}
  whole = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  limit = stats.get('bytes_limit', whole // jax.local_device_count())
  return min(distributed.gather(limit))


def _look(place) -> list[checks.Check]:
  """Raises UserError for what is wrong, where the run is to be."""
  workdir = FLAGS.workdir and os.path.expanduser(FLAGS.workdir)
  batch = checks.Check('batch', True, _batch(place))
  looked_at = [batch, *checks.run(place.config, workdir)]
  failed = []
  for check in looked_at:
    if check.well:
      terminal.say(f'ok        {check.name}: {check.told}')
    elif place.where and check.name == 'data':
      # That they are not here is no mistake where the chips are not either.
      terminal.say(f'not here  {check.name}: {check.told}')
    else:
      failed.append(f'{check.name}: {check.told}')
  if failed:
    raise UserError('; '.join(failed))
  return looked_at


def _batch(place) -> str:
  config, sizes = place.config, place.mesh.shape
  each = config.batch_size // (
    sizes['data'] * sizes['fsdp'] * config.microbatches
  )
  on = ' x '.join(f'{axis} {size}' for axis, size in sizes.items())
  pieces = f', {config.microbatches} microbatches' * (config.microbatches > 1)
  return (
    f'{config.batch_size} images on mesh {on}{pieces}: {each} at once a device'
  )


# --- compiling ----------------------------------------------------------------


def _compile_both(place) -> tuple:
  """The training step, and the sampling program if it is wanted.

  At once: XLA compiles a program on one core, for the most part. A step that
  does not fit waits for nothing.
  """
  what = f'the training step, {place.config.batch_size} images'
  if FLAGS.sampling:
    what += f', and the sampling program, {_sampled(place)} images'
  with terminal.waiting(f'compiling {what}{_effort(place)}'):
    pool = futures.ThreadPoolExecutor()
    train = pool.submit(_compile_step, place, place.config.batch_size)
    sample = pool.submit(_compile_sampling, place) if FLAGS.sampling else None
    step = train.result()
    fits = _used(step) <= _limit(place, step)
    return step, sample.result() if sample and fits else None


def _effort(place) -> str:
  return ' at low effort' if place.options else ''


def _compile_step(place, batch_size) -> Compiled | TooLarge:
  shape = (batch_size, *runs.image_shape(place.config.data))
  batch = {'image': _rows(place, shape, jnp.uint8)}
  program = place.program
  args = (program.abstract, program.frozen, batch)
  return _compile(place, program.step_fn, args)


def _sampled(place) -> int:
  """Images drawn at once: what was asked for, rounded up to the mesh."""
  parts = place.mesh.shape['data'] * place.mesh.shape['fsdp']
  return -(-FLAGS.sample_batch_size // parts) * parts


def _compile_sampling(place) -> Compiled | TooLarge:
  indices = _rows(place, (_sampled(place),), jnp.uint32)
  return _compile(
    place, place.program.draw_fn, (place.program.abstract.ema_params, indices)
  )


def _rows(place, shape, dtype):
  where = sharding.batch_sharding(place.mesh)
  return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _compile(place, fn, args) -> Compiled | TooLarge:
  try:
    return compiled.compile(fn, args, options=place.options)
  except TooLarge as e:
    return e


def _used(found) -> int:
  return found.used if isinstance(found, TooLarge) else found.total


def _limit(place, found) -> int:
  return found.limit if isinstance(found, TooLarge) else place.limit


def _largest(place) -> None:
  """Prints the largest batch that fits, and the next that does not."""
  sizes = place.mesh.shape
  unit = sizes['data'] * sizes['fsdp'] * place.config.microbatches
  tried = {}

  def used(count):
    what = f'the training step, {count * unit} images'
    with terminal.waiting(f'compiling {what}{_effort(place)}'):
      found = tried[count] = _compile_step(place, count * unit)
    takes, limit = _used(found), _limit(place, found)
    terminal.say(
      f'batch_size={count * unit}: {gib(takes)} of {gib(limit)} a chip'
    )
    return takes, limit

  fits, does_not = rates.largest(used, max(place.config.batch_size // unit, 1))
  if not fits.count:
    raise UserError(_too_large(place, unit, tried[does_not.count]))
  terminal.report(
    {
      'topology': FLAGS.topology,
      'batch_size': fits.count * unit,
      'bytes': fits.used,
      'too_large': does_not.count * unit,
      'too_large_bytes': does_not.used,
      'memory': does_not.limit,
      'fast': place.options is not None,
    },
    f'{place.name}: batch_size={fits.count * unit} fits ({gib(fits.used)} a '
    f'chip), {does_not.count * unit} does not ({gib(does_not.used)} of '
    f'{gib(does_not.limit)})' + page.ESTIMATE * (place.options is not None),
    FLAGS.json,
  )


# --- measuring ----------------------------------------------------------------


def _measure(place, train, sample) -> dict:
  """Seconds of both programs as they run here."""
  config, mesh, program = place.config, place.mesh, place.program
  peak = chips.peak(mesh.devices.flat[0].device_kind)

  def share(flops, seconds):  # of the peak; None where that is not known
    return peak and flops / seconds / mesh.size / peak

  shape = (config.batch_size, *runs.image_shape(config.data))
  noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  batch = {'image': _put(mesh, noise)}
  now = [program.create_state(mesh)]

  def step():
    now[0], values = train.program(now[0], program.frozen, batch)
    return values

  with terminal.waiting('measuring the training step'):
    seconds, count = _timed(step)
  found = {
    'train': {
      'seconds_per_step': seconds,
      'steps': count,
      'images_per_sec': config.batch_size / seconds,
      'share_of_peak': share(sum(train.product_flops.values()), seconds),
    }
  }
  if sample:
    indices = _put(mesh, np.arange(_sampled(place), dtype=np.uint32))
    params = now[0].ema_params
    with terminal.waiting('measuring the sampling program'):
      seconds, count = _timed(lambda: sample.program(params, indices))
    evaluations = len(indices) * config.sample.num_steps
    found['sample'] = {
      'seconds_per_evaluation': seconds / evaluations,  # of one image
      'evaluations': count * evaluations,
      'batch_size': len(indices),
      'share_of_peak': share(sum(sample.product_flops.values()), seconds),
    }
  return found


def _put(mesh, rows: np.ndarray) -> jax.Array:
  """Rows that every process has, split over the devices."""
  return jax.make_array_from_callback(
    rows.shape, sharding.batch_sharding(mesh), lambda index: rows[index]
  )


def _timed(call) -> tuple[float, int]:
  """(seconds a call, calls): after one to warm up, unless that takes long."""

  def seconds(count):
    start = time.monotonic()
    for _ in range(count):
      values = call()
    jax.block_until_ready(values)
    # All processes must come to the same count.
    return max(distributed.gather(time.monotonic() - start)) / count

  first = seconds(1)
  if first > MEASURED_SECS:
    return first, 1
  count = max(1, min(int(MEASURED_SECS / seconds(1)), 1000))
  return seconds(count), count


# --- words and numbers ------------------------------------------------------


def _too_large(place, batch_size, found) -> str:
  """What does not fit, by how much, and what may."""
  used, limit = _used(found), _limit(place, found)
  config, sizes = place.config, place.mesh.shape
  parts = sizes['data'] * sizes['fsdp']
  each, pieces = batch_size // parts, config.microbatches
  state = device_bytes(place.program.abstract)
  remedies = []
  # Activations, which are the rest, follow the images at once.
  share = (0.9 * limit - state) / max(used - state, 1)
  at_once = int(each / pieces * share)
  if at_once >= 1:
    smaller = [m for m in range(pieces + 1, each + 1) if each % m == 0]
    fitting = [m for m in smaller if each // m <= at_once]
    remedies += [f'--config.microbatches={m}' for m in fitting[:1]]
    remedies.append(f'--config.batch_size={at_once * pieces * parts}')
  if sizes['data'] > 1 and state > 0.2 * limit:
    remedies.append(f'--config.mesh.data=1 --config.mesh.fsdp={parts}')
  if config.model.dtype == 'float32':
    remedies.append('--config.model.dtype=bfloat16')
  remedies.append('more or larger chips')
  return (
    f'batch_size={batch_size} does not fit {place.name}: {gib(used)} a chip, '
    f'{gib(used - limit)} more than its {gib(limit)}; what may make it fit: '
    f'{", or ".join(remedies)}'
  )


def _too_many_samples(place, found) -> str:
  used, limit = _used(found), _limit(place, found)
  return (
    f'--sample_batch_size={_sampled(place)} does not fit {place.name}: '
    f'{gib(used)} a chip, {gib(used - limit)} more than its {gib(limit)}; draw '
    'fewer'
  )


def _result(place, train, sample) -> dict:
  config, state = place.config, place.program.abstract
  parts = {
    'parameters': device_bytes(state.params),
    'EMA': device_bytes(state.ema_params),
    'optimiser': device_bytes(state.opt_state),
  }
  image = math.prod(runs.image_shape(config.data))
  num_devices = place.mesh.size
  rows = place.mesh.shape['data'] * place.mesh.shape['fsdp']
  result = {
    'topology': FLAGS.topology,
    'device': place.mesh.devices.flat[0].device_kind,
    'num_devices': num_devices,
    'mesh': dict(place.mesh.shape),
    'dtype': config.model.dtype,
    'num_steps': config.num_steps,
    'batch_size': config.batch_size,
    'microbatches': config.microbatches,
    'fast': place.options is not None,
    'memory': place.limit,
    'fits': True,  # what does not is refused
    'train': {
      'bytes': _bytes(
        {**parts, 'batch': config.batch_size // rows * image}, train
      ),
      **_program(train, config.batch_size, num_devices),
    },
  }
  if sample:
    count = _sampled(place)
    result['sample'] = {
      'batch_size': count,
      'sampler': config.sample.sampler,
      'num_steps': config.sample.num_steps,
      'bytes': _bytes(
        {'EMA': parts['EMA'], 'batch': count // rows * 4}, sample
      ),
      **_program(sample, count, num_devices),
    }
  if place.where and train.flops:
    predicted = rates.predict(place.where, train)
    result['predicted'] = {
      **predicted._asdict(),
      'images_per_sec_per_chip': (
        config.batch_size / num_devices / predicted.seconds
      ),
      'hours': config.num_steps * predicted.seconds / 3600,
    }
  return result


def _bytes(arguments: dict, program) -> dict:
  """The parts, which add up; padding is the devices' own, of the arguments."""
  return {
    **arguments,
    'padding': program.arguments - sum(arguments.values()),
    'outputs': program.outputs - program.aliased,
    'temporaries': program.temporaries,
    'code': program.code,
    'total': program.total,
  }


def _program(program, images, num_devices) -> dict:
  whole = program.flops and program.flops * num_devices / images
  return {
    'product_flops_per_image': sum(program.product_flops.values()) / images,
    'products': program.product_flops,
    'xla_flops_per_image': whole,
    'bytes_accessed': program.bytes_accessed,
    'aliased': program.aliased,
    'outputs': program.outputs,
    'collectives': [one._asdict() for one in program.collectives],
    'compile_seconds': round(program.seconds, 1),
  }


if __name__ == '__main__':
  command.run(main, __doc__, required=('config',))
