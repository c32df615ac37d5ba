"""Declares flags from tables, including those that several binaries share."""

from collections.abc import Callable
from typing import Any

from absl import flags

from diffusion_jax.runs.trained import Trained, load
from diffusion_jax.system import distributed, files
from diffusion_jax.training import checkpoint

# The flags belong to the modules that call this one.
flags.disclaim_key_flags()

KINDS = {
  bool: flags.DEFINE_bool,
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  str: flags.DEFINE_string,
  list: flags.DEFINE_list,
  tuple: lambda name, of, what: flags.DEFINE_enum(name, of[0], of, what),
}

SHARED = {
  'workdir': (str, 'Folder of the run.'),
  'step': (int, 'Checkpoint; by default the newest.'),
  'ema': (True, 'Use the averaged weights; --noema: the raw ones.'),
  'ema_profile': (
    str,
    'Another average, by its relative width, such as 0.13, reconstructed from '
    'those of ema.profiles; or a kept one, such as decay:0.999. See '
    'docs/training.md.',
  ),
  'json': (False, 'Print the result as JSON.'),
  'accept_data': (
    False,
    'Accept images that differ from those of the run, and held-out images '
    'that are also training images.',
  ),
  'data_path': (
    str,
    "Folder of the data, such as TFDS's data_dir; by default the config's.",
  ),
}


def table(**declared: tuple) -> None:
  """Declares flags.

  Args:
    **declared: name = (default, help). For a flag without a default, give its
      type instead. A tuple declares an enum: the allowed values, the first one
      being the default.
  """
  for name, (default, what) in declared.items():
    if isinstance(default, type):
      KINDS[default](name, None, what)
    else:
      KINDS[type(default)](name, default, what)


def shared(*names: str) -> None:
  """Declares flags of SHARED."""
  table(**{name: SHARED[name] for name in names})


def workdir() -> files.Path:
  """The folder that --workdir names."""
  return files.at(flags.FLAGS.workdir).expanduser()


def network(step: int | None, **others) -> Trained:
  """The network of the run that --workdir, --ema and --ema_profile name.

  Args:
    step: the step of the checkpoint; None = the newest.
    **others: more arguments of `trained.load`, in place of the flags'.
  """
  flag = flags.FLAGS
  how = {'ema': flag.ema, 'ema_profile': flag.ema_profile, **others}
  return load(workdir(), step, **how)


def of_run(read: Callable[[int], Any]) -> Any:
  """Reads the checkpoint of the run that --workdir and --step name.

  Args:
    read: step -> what is read of the checkpoint. It is called again with an
      older one if the newest is damaged and --step is not given.

  Raises:
    UserError: there is no such checkpoint.
  """
  folder, step = workdir() / 'checkpoints', flags.FLAGS.step
  if step is None:
    return checkpoint.read_newest(folder, read)
  return read(distributed.on_first(lambda: checkpoint.find_step(folder, step)))
