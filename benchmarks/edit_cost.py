r"""What an answer of `edit` costs, beside a sample with as many evaluations.

  python benchmarks/edit_cost.py --config=cifar10 --output=docs/edit_cost.json

The network of the config has random weights, which cost as much as trained
ones. Every method answers the same masked pictures in --evaluations
evaluations, alternating with plain DDIM (eta 1) of as many, in one process.
"""

import copy
import tempfile

import jax
import numpy as np
import rounds
from absl import flags

from diffusion_jax import runs
from diffusion_jax.cli import command, declare
from diffusion_jax.runs import draw, edit_plans, edits, recipe
from diffusion_jax.runs.trained import Trained
from diffusion_jax.system import files, terminal
from diffusion_jax.training import sharding

FLAGS = flags.FLAGS
METHODS = ('replacement', 'repaint', 'ddrm', 'daps', 'pigdm', 'dps')


def main():
  config = runs.to_plain(copy.deepcopy(FLAGS.config))
  mesh = sharding.make_mesh()
  made = recipe.create(config)
  with tempfile.TemporaryDirectory() as folder:
    trained = Trained(
      files.at(folder), config, 0, True, made,
      sharding.placed(made.init(jax.random.key(0)), mesh), mesh,
      draw.compiled(made, mesh),
    )  # fmt: skip
    calls = _calls(trained)
    for call in calls.values():
      call()  # compiles
    seconds = rounds.alternating(calls, FLAGS.rounds)
  plain = seconds['sample']
  result = {
    'evaluations': FLAGS.evaluations,
    'batch_size': FLAGS.batch_size,
    'machine': rounds.machine('jax', 'jaxlib'),
    'methods': {
      name: {
        'seconds_per_picture': rounds.quartiles(times / FLAGS.batch_size),
        'over_sample': rounds.quartiles(times / plain),
      }
      for name, times in seconds.items()
    },
  }
  if FLAGS.output:
    files.write_json(FLAGS.output, result)
  rows = [
    (name, *(rounds.spread(of) for of in one.values()))
    for name, one in result['methods'].items()
  ]
  heads = ['method', 'seconds a picture', 'over a sample']
  told = rounds.described(result['machine'], 'jax', 'jaxlib')
  text = '\n'.join([*terminal.table(heads, rows), '', told])
  terminal.report(result, text, FLAGS.json)


def _calls(trained) -> dict:
  """Name -> a function that draws a batch by a method, or plain samples."""
  shape, count = trained.image_shape, FLAGS.batch_size
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, *shape), np.uint8)
  mask = rng.random((count, *shape[:2])) < 0.5
  numbers = np.arange(count, dtype=np.uint32)
  how = trained.plan(sampler='ddim', eta=1.0, num_steps=FLAGS.evaluations)
  draw_fn = trained.drawer(how)
  found = {'sample': lambda: jax.block_until_ready(draw_fn(numbers))}
  for method in METHODS:
    options = {'num_steps': FLAGS.evaluations}
    if method == 'daps':
      options = {'num_steps': FLAGS.evaluations, 'ode_steps': 1}
    if method == 'repaint':
      options |= {'jump_n_sample': 1}
    plan = edit_plans.plan(
      trained, {'name': 'inpaint'}, shape, method=method, **options
    )
    given = edits.rows(plan, images, 5.0, mask)

    def call(plan=plan, given=given):
      edits.answer(trained, plan, given, numbers, count)

    found[method] = call
  return found


command.define_config(default='cifar10')
declare.shared('json')
declare.table(
  batch_size=(16, 'Pictures at once.'),
  evaluations=(5, 'Evaluations of the network per picture.'),
  rounds=(7, 'Rounds, alternating.'),
  output=(str, 'The result as JSON.'),
)

if __name__ == '__main__':
  command.run(main, __doc__)
