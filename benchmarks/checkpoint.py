r"""Seconds and bytes of a checkpoint: saving, restoring, and the step's wait.

  python benchmarks/checkpoint.py --config=cifar10 --folder=/scratch

Saves the whole training state of a config as training does, with a checksum of
each array, and restores it. Training goes on while a checkpoint is written: it
is held only until the state has been copied. Nothing is left in the folder.
"""

import tempfile
import time
from pathlib import Path

import jax
import ours_step
import rounds
from absl import flags
from ml_collections import ConfigDict

from diffusion_jax import runs
from diffusion_jax.cli import command, config_files
from diffusion_jax.runs import validation
from diffusion_jax.system import files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint

FLAGS = flags.FLAGS
ROWS = {
  'held': 'the step is held',
  'saved': 'saved, from the start',
  'restored': 'restored',
}


def main():
  command.at_least(rounds=1)
  config = ours_step.on_one_device(FLAGS.config)
  if wrong := validation.check(config, jax.devices()[:1]):
    raise UserError(wrong[0])
  if FLAGS.folder and not Path(FLAGS.folder).is_dir():
    raise UserError(f'--folder={FLAGS.folder}: there is no such folder')
  if FLAGS.json:
    runs.usable_file('json', FLAGS.json)
  here = rounds.machine()
  rounds.warn_if_busy(here)
  with tempfile.TemporaryDirectory(dir=FLAGS.folder) as folder:
    result = {**here, **measured(config, Path(folder), FLAGS.rounds)}
  if FLAGS.json:
    files.write_json(FLAGS.json, result)
  terminal.report(result, '\n'.join(_shown(result)), as_json=False)


def measured(config: ConfigDict, folder: Path, count: int) -> dict:
  """Saves and restores a new state so many times.

  Args:
    config: the run's config, on one device.
    folder: an empty folder.
    count: the number of rounds.

  Returns:
    Seconds of each of ROWS, and the bytes of the state and on the disk.
  """
  state = jax.block_until_ready(ours_step.state(config, ours_step.mesh()))
  abstract = ours_step.abstract(config, ours_step.mesh())
  seconds = {name: [] for name in ROWS}
  for i in range(count):
    place = folder / str(i) / 'checkpoints'
    with checkpoint.Checkpoints(place) as checkpoints:
      start = time.perf_counter()
      checkpoints.save(0, state)
      seconds['held'].append(time.perf_counter() - start)
      checkpoints.wait()
      seconds['saved'].append(time.perf_counter() - start)
      start = time.perf_counter()
      jax.block_until_ready(checkpoints.restore(0, abstract))
      seconds['restored'].append(time.perf_counter() - start)
    disk = sum(p.stat().st_size for p in place.rglob('*') if p.is_file())
    files.remove(place.parent)
  return {
    **{name: rounds.quartiles(times) for name, times in seconds.items()},
    'state_bytes': sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    'disk_bytes': disk,
  }


def _shown(result):
  yield rounds.described(result)
  rows = [(told, rounds.spread(result[name])) for name, told in ROWS.items()]
  yield from terminal.table(['', 'seconds'], rows)
  state, disk = result['state_bytes'], result['disk_bytes']
  rate = disk / result['saved']['median']
  yield (
    f'{state / 1e6:,.1f} MB of state, {disk / 1e6:,.1f} MB on the disk, '
    f'{rate / 1e6:,.0f} MB/s'
  )


def _declare():
  command.define_config(
    'The run: a config file, or the name of a shipped config.',
    config_files.shipped_config('cifar10'),
  )
  flags.DEFINE_string('folder', None, 'Where to write; by default TMPDIR.')
  flags.DEFINE_integer('rounds', 3, 'How often to save and restore.')
  flags.DEFINE_string('json', None, 'JSON file for the result.')


if __name__ == '__main__':
  _declare()
  command.run(main, __doc__)
