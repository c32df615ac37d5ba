"""Writes the report of a run: samples, results, curves, cost, config.

  python -m diffusion_jax.report --workdir=runs/digits

Writes WORKDIR/report.html, one self-contained file to view or send. It replaces
an earlier report, and can be written at any time, even during training.
"""

from absl import flags

from diffusion_jax.cli import command, declare
from diffusion_jax.reporting import page
from diffusion_jax.system import terminal

FLAGS = flags.FLAGS
declare.shared('workdir', 'json')


def main():
  problems = page.write(FLAGS.workdir)
  path = declare.workdir() / 'report.html'
  result = {'report': str(path), 'problems': problems}
  terminal.report(result, f'the report is {path}', FLAGS.json)


if __name__ == '__main__':
  command.run(main, __doc__, required=('workdir',))
