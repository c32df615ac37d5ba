"""Writes report.html of a run: samples, results, curves, cost, config.

  python -m diffusion_jax.report --workdir=runs/digits

One file with everything in it, to look at and to send; it replaces the one
before. It can be written at any time, while the run trains too.
"""

from absl import flags

from diffusion_jax import cli
from diffusion_jax.evaluation import page

FLAGS = flags.FLAGS
flags.DEFINE_string('workdir', None, 'Folder of the run.')
flags.DEFINE_bool('json', False, 'Print the result as JSON.')


def main():
  problems = []
  path = page.write(FLAGS.workdir, problems.append)
  for line in problems:
    cli.say(line)
  cli.report(
    {'report': str(path), 'problems': problems},
    f'the report is {path}',
    FLAGS.json,
  )


if __name__ == '__main__':
  cli.run(main, __doc__, required=('workdir',))
