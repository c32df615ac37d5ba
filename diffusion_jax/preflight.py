r"""Checks that a run fits, and predicts its cost, before you rent chips.

  python -m diffusion_jax.preflight --config=cifar10 --topology=v5e:4x4

Compiles the real training step and the sampling program, either for TPUs or
GPUs that you need not have (the compilers come with pip install
'diffusion_jax[tpu]' and 'diffusion_jax[cuda]') or, without --topology, for this
machine's devices. Prints the bytes per chip against its memory, the FLOPs, the
kernels and the bytes that they move, the communication between chips, and the
time per step at the chips' published rates. Nothing is trained or saved.

First it checks what fails most often on pods: the batch size, the data, the
workdir, versions, TensorFlow. To compare all hosts, start it on every host, as
training is. --all_images decodes every image and lists the broken ones.

--measure also runs both programs on this machine's devices for some seconds,
with random images and new parameters, and reports the time per step.
"""

import functools
import os
from concurrent import futures
from typing import NamedTuple

import jax
from absl import flags
from ml_collections import config_dict

from diffusion_jax.cli import command
from diffusion_jax.evaluation import features
from diffusion_jax.models import inception
from diffusion_jax.planning import (
  arguments,
  checks,
  chips,
  compiled,
  page,
  rates,
  room,
  slices,
  timing,
)
from diffusion_jax.planning.compiled import Compiled, device_bytes
from diffusion_jax.planning.page import gib
from diffusion_jax.runs import preparation, programs, validation
from diffusion_jax.system import distributed, environment, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

FLAGS = flags.FLAGS
command.define_config()
flags.adopt_module_key_flags(distributed)
flags.DEFINE_string(
  'topology', None,
  f'TPU slice to compile for, as CHIP:SIZES with {", ".join(chips.TPUS)}, '
  'such as v5e:4x4 or v4:2x2x2; or the GPUs of a host, or hosts x GPUs, with '
  f'{", ".join(chips.GPUS)}, such as h100:8 or h100:2x8; or a name in the '
  "cloud, such as v5litepod-16 or a3-highgpu-8g; by default this machine's "
  'devices.',
)  # fmt: skip
flags.DEFINE_string('workdir', None, 'Folder of the planned run, to check.')
flags.DEFINE_bool(
  'fast', False,
  'TPUs: compile at low effort, several times faster. Memory is then an '
  'estimate; those we compared were 8% to 22% too low.',
)  # fmt: skip
flags.DEFINE_bool('sampling', True, 'Also compile the sampling program.')
flags.DEFINE_integer(
  'sample_batch_size', 256, 'Images per sampling batch, over all devices.',
  lower_bound=1,
)  # fmt: skip
flags.DEFINE_bool(
  'judging', False, 'Also compile Inception up to the features of FID.'
)
flags.DEFINE_bool(
  'largest_batch', False, 'Find the largest batch_size that fits. This '
  'compiles the training step about six times.',
)  # fmt: skip
flags.DEFINE_bool(
  'measure', False, 'Also run and time both programs; not with --topology.'
)
flags.DEFINE_bool(
  'all_images', False,
  f'Decode all images, and list the broken ones; otherwise {checks.LOOKED_AT} '
  'are looked at.',
)  # fmt: skip
flags.DEFINE_bool('json', False, 'Print the result as JSON.')


class Place(NamedTuple):
  """A config and the devices it is compiled for.

  Attributes:
    config: the run's config.
    mesh: the devices.
    program: the functions to compile.
    limit: memory of a device, in bytes.
    where: the TPU slice or the GPUs; None for this machine.
    fast: whether to compile at low effort.
  """

  config: config_dict.ConfigDict
  mesh: jax.sharding.Mesh
  program: programs.Programs
  limit: int
  where: slices.Slice | None
  fast: bool

  @property
  def device(self) -> str:
    """The kind of the devices."""
    return self.mesh.devices.flat[0].device_kind

  @property
  def name(self) -> str:
    """The devices in words."""
    return self.where.name if self.where else f'{self.mesh.size} {self.device}'

  @property
  def notes(self) -> list[str]:
    """What is not known because the devices are not here."""
    return self.where.notes if self.where else []

  @property
  def rows(self) -> int:
    """Number of devices that a batch is split over."""
    return self.mesh.shape['data'] * self.mesh.shape['fsdp']

  @property
  def sampled(self) -> int:
    """Images per sampling batch: the flag, rounded up to the mesh."""
    return -(-FLAGS.sample_batch_size // self.rows) * self.rows

  @property
  def judged(self) -> int:
    """Images that Inception judges at once, as evaluation does."""
    return -(-features.BLOCK // self.rows) * self.rows


def main():
  where = slices.parse(FLAGS.topology) if FLAGS.topology is not None else None
  if not where:
    distributed.initialize()
  elif FLAGS.coordinator:
    raise UserError('--topology is for one process: leave --coordinator out')
  if FLAGS.measure and (where or FLAGS.largest_batch):
    other = 'topology' if where else 'largest_batch'
    raise UserError(f'--measure is for this machine: leave --{other} out')
  devices = slices.devices(where) if where else jax.devices()
  workdir = FLAGS.workdir and os.path.expanduser(FLAGS.workdir)
  distributed.everywhere(lambda: preparation.complete(FLAGS.config, workdir))
  if wrong := validation.check(FLAGS.config, devices):
    raise UserError(wrong[0])
  config = FLAGS.config
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  limit = where.memory if where else _memory()
  fast = FLAGS.fast and devices[0].platform == 'tpu'
  place = Place(config, mesh, programs.create(config, mesh), limit, where, fast)
  looked_at = _look(place, workdir)
  if FLAGS.largest_batch:
    _largest(place)
    return
  train, sample, judge = _compile_all(place)
  if train.total > train.limit:
    raise _too_large(place, config.batch_size, train.total, train.limit)
  what = f'--sample_batch_size={place.sampled}'
  for one, flag, advice in (
    (sample, what, 'draw fewer'), (judge, '--judging', 'use larger chips')
  ):  # fmt: skip
    if one and one.total > one.limit:
      raise room.does_not_fit(flag, place.name, one.total, one.limit, advice)
  distributed.gather(None)  # wait for the other processes
  result = _result(place, train, sample, judge)
  if FLAGS.measure:
    result['measured'] = timing.measure(
      config, mesh, place.program, train, sample, place.sampled
    )
    result['environment'] = environment.describe()
  result['checks'] = [check._asdict() for check in looked_at]
  terminal.report(result, '\n'.join(page.lines(result)), FLAGS.json)


def _memory() -> int:
  """Bytes that a device may use; the minimum over all processes."""
  stats = jax.local_devices()[0].memory_stats() or {}
  whole = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  limit = stats.get('bytes_limit', whole // jax.local_device_count())
  return min(distributed.gather(limit))


def _look(place, workdir) -> list[checks.Check]:
  """Runs the checks; raises UserError if any fails on the run's machine."""
  batch = checks.Check('batch', True, _batch(place))
  looked_at = [batch, *checks.run(place.config, workdir, FLAGS.all_images)]
  failed = []
  for check in looked_at:
    told = f'{check.name}: {check.told}'
    # Data may be missing here if the chips are elsewhere too.
    if check.well or (place.where and check.name == 'data'):
      terminal.say(f'{"ok" if check.well else "not here":<10}{told}')
    else:
      failed.append(told)
  if failed:
    raise UserError('; '.join(failed))
  return looked_at


def _batch(place) -> str:
  config, microbatches = place.config, place.config.microbatches
  each = config.batch_size // (place.rows * microbatches)
  pieces = f', {microbatches} microbatches' * (microbatches > 1)
  return (
    f'{config.batch_size} images on mesh {page.mesh(place.mesh.shape)}{pieces}'
    f': {each} at once per device'
  )


# --- compiling ----------------------------------------------------------------


def _compile_all(place) -> list[Compiled | None]:
  """Compiles the programs of training and, if asked for, sampling and judging.

  In parallel, because XLA compiles a program mostly on one core. If the
  training step does not fit, the results of the others are not awaited.
  """
  also, sampling = '', FLAGS.sampling and bool(place.program.recipe.prediction)
  if sampling:
    also += f', and the sampling program, {place.sampled} images'
  if FLAGS.judging:
    also += f', and Inception, {place.judged} images'
  with _compiling(place, place.config.batch_size, also):
    pool = futures.ThreadPoolExecutor()
    train = pool.submit(_compile_step, place, place.config.batch_size)
    others = [
      pool.submit(compile_one, place) if wanted else None
      for compile_one, wanted in (
        (_compile_sampling, sampling), (_compile_judging, FLAGS.judging)
      )
    ]  # fmt: skip
    step = train.result()
    fits = step.total <= step.limit
    return [step, *(one.result() if one and fits else None for one in others)]


def _compiling(place, batch_size, also=''):
  effort = ' at low effort' * place.fast
  return terminal.waiting(
    f'compiling the training step, {batch_size} images{also}{effort}'
  )


def _compile_step(place, batch_size) -> Compiled:
  args = arguments.of_step(*place[:3], batch_size)
  return compiled.compile(place.program.step_fn, args, place.limit, place.fast)


def _compile_sampling(place) -> Compiled:
  args = arguments.of_drawing(*place[:3], place.sampled)
  return compiled.compile(place.program.draw_fn, args, place.limit, place.fast)


def _compile_judging(place) -> Compiled:
  args = arguments.of_judging(place.config, place.mesh, place.judged)
  fn = jax.jit(functools.partial(inception.apply, taps=arguments.TAPS))
  return compiled.compile(fn, args, place.limit, place.fast)


def _largest(place) -> None:
  """Prints the largest batch that fits and the next one, which does not."""
  unit = place.rows * place.config.microbatches

  def used(count):
    with _compiling(place, count * unit):
      found = _compile_step(place, count * unit)
    terminal.say(
      f'batch_size={count * unit}: {gib(found.total)} of {gib(found.limit)} '
      'per chip'
    )
    return found.total, found.limit

  first = max(place.config.batch_size // unit, 1)
  fits, does_not = rates.largest(used, first)
  if not fits.count:
    raise _too_large(place, unit, does_not.used, does_not.limit)
  terminal.report(
    {
      'topology': FLAGS.topology,
      'batch_size': fits.count * unit,
      'bytes': fits.used,
      'too_large': does_not.count * unit,
      'too_large_bytes': does_not.used,
      'memory': does_not.limit,
      'fast': place.fast,
    },
    f'{place.name}: batch_size={fits.count * unit} fits ({gib(fits.used)} per '
    f'chip), {does_not.count * unit} does not ({gib(does_not.used)} of '
    f'{gib(does_not.limit)})'
    + page.ESTIMATE * place.fast
    + ''.join(f'\n{note}' for note in place.notes),
    FLAGS.json,
  )


# --- results ----------------------------------------------------------------


def _too_large(place, batch_size, used, limit) -> UserError:
  state = device_bytes((place.program.abstract, place.program.frozen))
  about = place.config, place.mesh.shape
  return room.too_large(batch_size, place.name, used, limit, state, *about)


def _result(place, train, sample, judge) -> dict:
  config, state, count = place.config, place.program.abstract, place.sampled
  parts = {
    'parameters': device_bytes(state.params),
    'EMA': device_bytes((state.ema_params, state.averages)),
    'optimiser': device_bytes(state.opt_state),
    'frozen': device_bytes(place.program.frozen),
  }
  used = 'EMA' if state.ema_params else 'parameters'
  drawing = {used: parts['parameters'], 'frozen': parts['frozen']}
  _, _, batch = arguments.of_step(*place[:3], config.batch_size)
  result = {
    'topology': FLAGS.topology,
    'device': place.device,
    'num_devices': place.mesh.size,
    'mesh': dict(place.mesh.shape),
    'dtype': config.model.dtype,
    'num_steps': config.num_steps,
    'batch_size': config.batch_size,
    'microbatches': config.microbatches,
    'fast': place.fast,
    'memory': place.limit,
    'fits': True,  # otherwise an error was raised
    'notes': place.notes,
    'train': compiled.describe(
      train, {**parts, 'batch': device_bytes(batch)}, config.batch_size,
      place.mesh.size,
    ),
  }  # fmt: skip
  if sample:
    _, *given = arguments.of_drawing(*place[:3], count)
    result['sample'] = {
      'batch_size': count,
      'sampler': config.sample.sampler,
      'num_steps': config.sample.num_steps,
      'network_rows': place.program.plan.rows,
      **compiled.describe(
        sample, {**drawing, 'batch': device_bytes(given)}, count,
        place.mesh.size,
      ),
    }  # fmt: skip
  if judge:
    judged = place.judged
    given = arguments.of_judging(place.config, place.mesh, judged)
    weights, images = map(device_bytes, given)
    parts = {'weights': weights, 'batch': images}
    result['judge'] = {
      'batch_size': judged,
      **compiled.describe(judge, parts, judged, place.mesh.size),
    }
  if place.where:
    predicted = rates.predict(place.where, train)
    seconds = predicted['seconds']
    result['predicted'] = {
      **predicted,
      'images_per_sec_per_chip': config.batch_size / place.mesh.size / seconds,
      'hours': config.num_steps * seconds / 3600,
    }
  return result


if __name__ == '__main__':
  command.run(main, __doc__, required=('config',))
