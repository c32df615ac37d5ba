r"""Puts a trained run to use on your own pictures, without training it again.

  python -m diffusion_jax.edit TASK --workdir=W --input=PLACE --output=FOLDER

  python -m diffusion_jax.edit inpaint --workdir=runs/digits --input=pictures \
    --box=2,2,4,4 --samples=4 --output=filled

Tasks, each with flags of its own, which `edit TASK --help` lists:
"""

import importlib

from absl import flags

from diffusion_jax.cli import command

# Task -> (its module in `cli`, what it does). Only the module of the task that
# is asked for is imported, as each declares its flags.
TASKS = {
  'inpaint': ('editing', 'fills in what a mask, a box or alpha leaves unknown'),
  'upscale': ('editing', 'makes pictures 2, 4 or 8 times as large'),
  'colourise': ('editing', 'gives grey pictures their colours'),
  'deblur': ('editing', 'undoes a Gaussian, a motion or any other blur'),
  'denoise': ('editing', 'removes noise of a given or an estimated level'),
  'restyle': ('editing', 'draws a picture again, from noise of a strength'),
  'vary': ('editing', 'draws variations of a picture'),
  'anomaly': ('anomalies', 'scores pictures by how unlike the data they are'),
  'augment': ('augmenting', 'writes a labelled set of new or varied images'),
}


if __name__ == '__main__':
  told = {task: what for task, (_, what) in TASKS.items()}
  name = command.task(__doc__, told)
  module = importlib.import_module(f'diffusion_jax.cli.{TASKS[name][0]}')
  main, doc, required = module.task(name)
  flags.adopt_module_key_flags(module)
  command.run(main, doc, required)
