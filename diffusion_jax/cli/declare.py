"""Flags as tables, and those that several binaries have."""

from absl import flags

from diffusion_jax.system import files

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
  'step': (int, 'Checkpoint; the newest by default.'),
  'ema': (True, 'Averaged weights, or the raw ones.'),
  'json': (False, 'Print the result as JSON.'),
  'data_path': (str, "Where the data lie, if not the config's; TFDS's folder."),
}


def table(**declared: tuple) -> None:
  """Declares flags.

  Args:
    **declared: name = (default, help). A type in place of the default is that
      of a flag without one; a tuple holds the words that the flag may be, the
      first by default.
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
