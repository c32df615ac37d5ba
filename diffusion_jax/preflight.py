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
"""

import contextlib
import os

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from diffusion_jax import cli, distributed, programs, runs
from diffusion_jax.errors import UserError
from diffusion_jax.planning import checks, chips, compiled, page, rates
from diffusion_jax.planning.compiled import Compiled, TooLarge, device_bytes
from diffusion_jax.planning.page import gib
from diffusion_jax.training import sharding

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
  'config', None, 'The run: a file, or the name of a shipped config.'
)
flags.adopt_module_key_flags(distributed)
flags.DEFINE_string(
  'topology', None,
  f'Chips that are not here: {", ".join(chips.CHIPS)}, and a slice of them, '
  "such as v5e:4x4 or v4:2x2x2. This machine's devices by default.",
)  # fmt: skip
flags.DEFINE_string('workdir', None, 'Folder of the run to come, to be tried.')
flags.DEFINE_bool(
  'fast', False,
  'TPUs: compile at low effort, in a tenth of the time; memory is within 6%.',
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
flags.DEFINE_bool('json', False, 'Print the result as JSON.')


def main():
  where = chips.parse(FLAGS.topology) if FLAGS.topology else None
  if not where:
    distributed.initialize()
  elif FLAGS.coordinator:
    raise UserError('--topology is for one process: leave --coordinator out')
  config = FLAGS.config
  devices = chips.devices(where) if where else jax.devices()
  wrong = cli.check(config, devices)
  if wrong:
    raise UserError(wrong[0])
  looked_at = [
    checks.Check('batch', True, _batch(config, devices)),
    *checks.run(config, FLAGS.workdir),
  ]
  for check in looked_at:
    # That the data are not here is no mistake where the chips are not either.
    word = 'ok' if check.well else 'not here' if where else 'FAILS'
    cli.say(f'{word:<8} {check.name}: {check.told}')
  failed = [check for check in looked_at if not check.well]
  if failed and not where:
    raise UserError(
      '; '.join(f'{check.name}: {check.told}' for check in failed)
    )
  limit = where.chip.memory if where else _memory(devices[0])
  if FLAGS.largest_batch:
    _largest(config, devices, limit)
    return
  train = _train(config, devices, limit)
  sample = _sample(config, devices) if FLAGS.sampling else None
  result = _result(config, where, devices, limit, train, sample)
  result['checks'] = [check._asdict() for check in looked_at]
  cli.report(result, '\n'.join(page.lines(result)), FLAGS.json)


# --- compiling ----------------------------------------------------------------


def _train(config, devices, limit) -> Compiled:
  """The step, or a line of what to change."""
  try:
    program = _compile_step(config, devices, config.batch_size)
  except TooLarge as e:
    raise UserError(_too_large(config, devices, e.used, e.limit)) from e
  if program.total > limit:
    raise UserError(_too_large(config, devices, program.total, limit))
  return program


def _compile_step(config, devices, batch_size) -> Compiled:
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  program = programs.create(config, mesh)
  shape = (batch_size, *runs.image_shape(config.data))
  batch = {
    'image': jax.ShapeDtypeStruct(
      shape, jnp.uint8, sharding=sharding.batch_sharding(mesh)
    )
  }
  with _waiting(f'the training step, {batch_size} images'):
    return compiled.compile(
      program.step_fn, (program.abstract, batch), options=_options(devices)
    )


def _sample(config, devices) -> Compiled:
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  program = programs.create(config, mesh)
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  count = -(-FLAGS.sample_batch_size // parts) * parts
  indices = jax.ShapeDtypeStruct(
    (count,), jnp.uint32, sharding=sharding.batch_sharding(mesh)
  )
  with _waiting(f'the sampling program, {count} images'):
    try:
      return compiled.compile(
        program.draw_fn, (program.abstract.ema_params, indices),
        options=_options(devices),
      )  # fmt: skip
    except TooLarge as e:
      raise UserError(
        f'--sample_batch_size={count}: {gib(e.used)} a chip, {gib(e.limit)} '
        'there are; draw fewer at once'
      ) from e


def _options(devices):
  return compiled.FAST if FLAGS.fast and devices[0].platform == 'tpu' else None


def _waiting(what) -> contextlib.AbstractContextManager:
  effort = ' at low effort' if FLAGS.fast and FLAGS.topology else ''
  return cli.waiting(f'compiling {what}{effort}')


def _largest(config, devices, limit) -> None:
  """Prints the largest batch that fits, and the next that does not."""
  data, fsdp, _ = sharding.mesh_shape(len(devices), **config.mesh)
  unit = data * fsdp * config.microbatches

  def used(count):
    try:
      return _compile_step(config, devices, count * unit).total, limit
    except TooLarge as e:
      return e.used, e.limit

  fits, does_not = rates.largest(used, max(config.batch_size // unit, 1))
  if not fits.count:
    raise UserError(
      f'even batch_size={unit} does not fit: '
      + _too_large(config, devices, does_not.used, does_not.limit)
    )
  name = FLAGS.topology or f'{len(devices)} {devices[0].device_kind}'
  cli.report(
    {
      'topology': name,
      'batch_size': fits.count * unit,
      'bytes': fits.used,
      'too_large': does_not.count * unit,
      'too_large_bytes': does_not.used,
      'limit': does_not.limit,
    },
    f'{name}: batch_size={fits.count * unit} fits ({gib(fits.used)} a chip), '
    f'{does_not.count * unit} does not ({gib(does_not.used)} of '
    f'{gib(does_not.limit)})',
    FLAGS.json,
  )


# --- words and numbers ------------------------------------------------------


def _batch(config, devices) -> str:
  data, fsdp, tensor = sharding.mesh_shape(len(devices), **config.mesh)
  each = config.batch_size // (data * fsdp * config.microbatches)
  pieces = f', {config.microbatches} microbatches' * (config.microbatches > 1)
  return (
    f'{config.batch_size} images on mesh data {data} x fsdp {fsdp} x tensor '
    f'{tensor}{pieces}: {each} at once a device'
  )


def _too_large(config, devices, used, limit) -> str:
  """What does not fit, by how much, and what would."""
  data, fsdp, _ = sharding.mesh_shape(len(devices), **config.mesh)
  each = config.batch_size // (data * fsdp)
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  state = device_bytes(programs.create(config, mesh).abstract)
  remedies = []
  if state < 0.8 * limit:
    # Activations, which are the rest, follow the images at once.
    share = (0.9 * limit - state) / max(used - state, 1)
    at_once = int(each / config.microbatches * share)
    pieces = next((m for m in _divisors(each) if each // m <= at_once), None)
    if pieces and pieces > config.microbatches:
      remedies.append(f'--config.microbatches={pieces}')
    if at_once:
      smaller = at_once * config.microbatches * data * fsdp
      remedies.append(f'--config.batch_size={smaller}')
  if fsdp < data * fsdp and state > 0.2 * limit:
    remedies.append(f'--config.mesh.data=1 --config.mesh.fsdp={data * fsdp}')
  if config.model.dtype == 'float32':
    remedies.append('--config.model.dtype=bfloat16')
  remedies.append('more or larger chips')
  name = FLAGS.topology or f'{len(devices)} {devices[0].device_kind}'
  return (
    f'batch_size={config.batch_size} does not fit {name}: {gib(used)} a chip, '
    f'{gib(used - limit)} more than its {gib(limit)}; what may make it fit: '
    f'{", or ".join(remedies)}'
  )


def _divisors(number):
  return [n for n in range(1, number + 1) if number % n == 0]


def _memory(device) -> int:
  """Bytes that a device of this machine may use."""
  stats = device.memory_stats() or {}
  if 'bytes_limit' in stats:
    return stats['bytes_limit']
  whole = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return whole // jax.local_device_count()


def _result(config, where, devices, limit, train, sample) -> dict:
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  state = programs.create(config, mesh).abstract
  parts = {
    'parameters': device_bytes(state.params),
    'EMA': device_bytes(state.ema_params),
    'optimiser': device_bytes(state.opt_state),
  }
  batch_size = config.batch_size
  result = {
    'topology': FLAGS.topology,
    'device': devices[0].device_kind,
    'num_devices': len(devices),
    'mesh': dict(mesh.shape),
    'dtype': config.model.dtype,
    'num_steps': config.num_steps,
    'batch_size': batch_size,
    'microbatches': config.microbatches,
    'fast': FLAGS.fast,
    'memory': limit,
    'train': {
      'bytes': {
        **parts,
        'batch': train.arguments - sum(parts.values()),
        'temporaries': train.temporaries,
        'code': train.code,
        'total': train.total,
      },
      **_program(train, batch_size, len(devices)),
    },
  }
  if sample:
    parts = mesh.shape['data'] * mesh.shape['fsdp']
    count = -(-FLAGS.sample_batch_size // parts) * parts
    result['sample'] = {
      'batch_size': count,
      'sampler': config.sample.sampler,
      'num_steps': config.sample.num_steps,
      'bytes': {
        'EMA': device_bytes(state.ema_params),
        'batch': sample.arguments - device_bytes(state.ema_params),
        'outputs': sample.outputs - sample.aliased,
        'temporaries': sample.temporaries,
        'code': sample.code,
        'total': sample.total,
      },
      **_program(sample, count, len(devices)),
    }
  if where:
    result['predicted'] = rates.predict(where, train)._asdict()
    seconds = result['predicted']['seconds']
    result['predicted']['images_per_sec_per_chip'] = (
      batch_size / len(devices) / seconds
    )
    result['predicted']['hours'] = config.num_steps * seconds / 3600
  return result


def _program(program, images, num_devices) -> dict:
  products = sum(program.product_flops.values())
  return {
    'product_flops_per_image': products / images,
    'products': program.product_flops,
    'xla_flops_per_image': program.flops * num_devices / images,
    'bytes_accessed': program.bytes_accessed,
    'aliased': program.aliased,
    'outputs': program.outputs,
    'collectives': [one._asdict() for one in program.collectives],
    'compile_seconds': round(program.seconds, 1),
  }


if __name__ == '__main__':
  cli.run(main, __doc__, required=('config',))
