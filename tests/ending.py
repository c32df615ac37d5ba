"""A binary of the tests: several processes that end in one way or another.

  --how=mistake|crash|hang|loop|end --who=0,1

Those named in --who make the mistake, crash or hang; the others go on with
collectives, which wait for all. `loop` goes on until a signal comes, and `end`
ends well, those in --who some seconds later.
"""

import time
from pathlib import Path

from absl import flags

from diffusion_jax.cli import command
from diffusion_jax.system import distributed
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string('how', None, 'mistake, crash, hang, loop or end.')
flags.DEFINE_list('who', [], 'Indices of processes.')
flags.DEFINE_string('began', None, 'A file, made once all have joined.')
flags.adopt_module_key_flags(distributed)


def main():
  distributed.initialize()
  distributed.gather(0)
  if distributed.is_first() and FLAGS.began:
    Path(FLAGS.began).touch()
  named = str(distributed.index()) in FLAGS.who
  if FLAGS.how == 'end':
    time.sleep(3 * named)
    return
  if named:
    if FLAGS.how == 'mistake':
      raise UserError('it is the way it is')
    if FLAGS.how == 'hang':
      time.sleep(10_000)
    raise RuntimeError('a bug')
  while True:
    distributed.gather(1)
    time.sleep(0.01)


if __name__ == '__main__':
  command.run(main, __doc__, required=('how',))
