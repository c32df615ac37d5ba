r"""Images per second of the input pipeline alone, and of the training step.

  python benchmarks/input_pipeline.py --config=digits
  python benchmarks/input_pipeline.py --config=cifar10 --consumes=9000

Reads, shuffles, flips and places batches of a config's training images on the
devices as training does, and does nothing with them. The training step is
measured on one device of this machine; --consumes gives its rate instead, such
as one that was measured elsewhere. The pipeline should deliver at least three
times what the step consumes: training then never waits for images, also where
other work takes the CPU.
"""

import functools
import itertools
import os
import time

import jax
import ours_step
import rounds
from absl import flags
from ml_collections import ConfigDict

from diffusion_jax import data, runs
from diffusion_jax.cli import command
from diffusion_jax.data import pipeline
from diffusion_jax.runs import validation
from diffusion_jax.system import files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

FLAGS = flags.FLAGS
BAR = 3  # times what the step consumes


def main():
  command.at_least(rounds=1, consumes=1)
  config = ours_step.on_one_device(FLAGS.config)
  if wrong := validation.check(config, jax.devices()[:1]):
    raise UserError(wrong[0])
  source, _ = data.splits(config.data)
  if FLAGS.json:
    runs.usable_file('json', FLAGS.json)
  here = rounds.machine()
  rounds.warn_if_busy(here)
  found = measured(source, config, FLAGS.rounds, FLAGS.secs, FLAGS.consumes)
  result = {**here, 'data': source.description, **found}
  if FLAGS.json:
    files.write_json(FLAGS.json, result)
  terminal.report(result, '\n'.join(_shown(result)), as_json=False)


def measured(
  source, config: ConfigDict, count: int, secs: float, consumes: float | None
) -> dict:
  """The rates of the pipeline and of the step, images per second.

  Args:
    source: the training images.
    config: the run's config, on one device.
    count: the number of rounds.
    secs: the least time of a round.
    consumes: the step's rate; None = measure it.
  """
  mesh, size = ours_step.mesh(), config.batch_size
  # The machine's threads read ahead, so what they have at the start is used up.
  batches = pipeline.batches(
    source,
    batch_size=size,
    seed=config.seed,
    flip=config.data.flip,
    sharding=sharding.batch_sharding(mesh),
  )
  ahead = min(16, os.cpu_count() or 1) + 2
  jax.block_until_ready(list(itertools.islice(batches, ahead)))
  rates = []
  for _ in range(count):
    start, images = time.perf_counter(), 0
    while not images or time.perf_counter() - start < secs:
      jax.block_until_ready(next(batches))
      images += size
    rates.append(images / (time.perf_counter() - start))
  batches.close()
  found = {'batch': size, 'loader': rounds.quartiles(rates)}
  if consumes is None:
    step = ours_step.step(config, mesh, [ours_step.state(config, mesh)])
    step.call(1)
    once = functools.partial(step.call, 1)
    seconds = rounds.alternating({'step': once}, count)['step']
    found['step'] = rounds.quartiles(size / seconds)
    consumes = found['step']['median']
  return {
    **found,
    'consumes': consumes,
    'ratio': found['loader']['median'] / consumes,
  }


def _shown(result):
  yield rounds.described(result)
  yield result['data']
  rows = [('the pipeline alone', rounds.spread(result['loader']))]
  if 'step' in result:
    rows += [('the training step', rounds.spread(result['step']))]
  yield from terminal.table([f'batch {result["batch"]}', 'images/s'], rows)
  well = 'at least' if result['ratio'] >= BAR else 'less than'
  yield (
    f'{result["ratio"]:.3g} times the {result["consumes"]:.4g} images/s that '
    f'the step consumes: {well} {BAR} times'
  )


def _declare():
  command.define_config()
  flags.DEFINE_float('consumes', None, 'Images per second of the step.')
  flags.DEFINE_integer('rounds', 5, 'Number of timed rounds.')
  flags.DEFINE_float('secs', 2.0, 'Seconds of a round of the pipeline.')
  flags.DEFINE_string('json', None, 'JSON file for the result.')


if __name__ == '__main__':
  _declare()
  command.run(main, __doc__, required=('config',))
