r"""The speed of a training step, beside PyTorch's and the machine's.

  pip install '.[parity]'
  python benchmarks/train_step.py --vs=diffusers
  python benchmarks/train_step.py --config=digits --batch=32,64 \
    --dtype=float32,bfloat16 --what=step,forward --json=FILE

A step goes from uint8 images on the device through noise, loss and gradient to
clipping, Adam and the average of the parameters. With --vs=diffusers a
UNet2DModel of the same configuration, with the same parameters, does the same
work in PyTorch: channels_last, bfloat16 by autocast, on a GPU compiled by
torch.compile. The two alternate in one process, on one device. The last line is
the ratio.

Utilisation is the FLOPs of the products of an image over the rate of a large
matrix product in the same dtype, measured in the same run. Products with
padding are not counted, and neither is anything but products; what a program
really executes does not matter.

--profile adds the ten most expensive operations of our side, by time, from a
profile of three calls, and by bytes, from the compiled program: what each
kernel reads and writes. Operations that are alike are one.

Each row is printed, and kept in the file of --json, as it ends. --minutes ends
the benchmark before a row that could not end in time.
"""

import os

import operations
import ours_step
import rounds
import step_rows
from absl import flags

from diffusion_jax import runs
from diffusion_jax.cli import command, config_files
from diffusion_jax.system import terminal

FLAGS = flags.FLAGS
command.define_config(
  'The run: a config file, or the name of a shipped config.',
  config_files.shipped_config('cifar10'),
)
flags.DEFINE_list('batch', None, "Batch sizes; by default the config's.")
flags.DEFINE_list('dtype', None, "float32, bfloat16; by default the config's.")
flags.DEFINE_list(
  'what', ['step'], 'step, forward: the training step, the network alone.'
)
flags.DEFINE_list(
  'plain', ['none'],
  'Measures that our network does not take: none, all, or names of '
  'docs/speed.md. A row each; --vs is for none.',
)  # fmt: skip
flags.DEFINE_enum('vs', None, [step_rows.THEIRS], 'What to compare with.')
flags.DEFINE_integer('rounds', 7, 'Number of timed rounds.')
flags.DEFINE_float(
  'secs', 1.0, 'Seconds of a round, at least: steps are repeated until then.'
)
flags.DEFINE_bool(
  'profile', False, 'Also print the ten most expensive operations of ours.'
)
flags.DEFINE_float('minutes', None, 'End within so many minutes.')
flags.DEFINE_string('json', None, 'JSON file for the result.')


def main():
  # JAX would take most of a GPU's memory, and leave none to PyTorch.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  clock = rounds.Clock(FLAGS.minutes)
  places = _checked()
  others = step_rows.PACKAGES if FLAGS.vs else ()
  here = rounds.machine(*others)
  rounds.warn_if_busy(here)
  terminal.write(rounds.described(here, *others))
  config = places[0][1]
  head = {**here, 'config': runs.to_plain(config), 'matrix_rate': {}}
  table = rounds.Table(step_rows.HEADS, step_rows.WIDTHS, FLAGS.json, head)
  rows, rates = table.result['rows'], table.result['matrix_rate']
  now = [ours_step.state(config, ours_step.mesh())]
  for what, config in places:
    if not step_rows.fits(clock, rows, config.batch_size):
      terminal.say(
        f'--minutes={FLAGS.minutes:g}: no time for {what}, batch '
        f'{config.batch_size}, {config.model.dtype}, and what follows'
      )
      break
    row = step_rows.measured(
      what, config, now, rates, clock,
      count=FLAGS.rounds, secs=FLAGS.secs, vs=FLAGS.vs,
      profile=FLAGS.profile,
    )  # fmt: skip
    table.add(row, list(step_rows.lines(row)))
    if FLAGS.profile:
      terminal.write('\n'.join([*operations.tables(row['operations']), '']))
  terminal.write(step_rows.last(rows))


def _checked() -> list[tuple]:
  """What each row measures."""
  command.at_least(rounds=1, secs=0, minutes=0)
  places = step_rows.places(
    FLAGS.config, FLAGS.batch, FLAGS.dtype, FLAGS.what, FLAGS.plain
  )
  if FLAGS.json:
    runs.usable_file('json', FLAGS.json)
  if FLAGS.vs:
    rounds.need(*step_rows.PACKAGES)
    import unet2d_step  # which needs torch

    unet2d_step.check(runs.to_plain(FLAGS.config))
  return places


if __name__ == '__main__':
  command.run(main, __doc__)
