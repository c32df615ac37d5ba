"""Ten minutes of one GPU; see launch/ten_minutes.sh, which calls it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import rounds
import ten_bench
import ten_files
import ten_parts
import ten_train
from absl import flags
from ml_collections import config_flags

from diffusion_jax import runs
from diffusion_jax.cli import command, config_files, declare
from diffusion_jax.evaluation import statistics
from diffusion_jax.runs import validation
from diffusion_jax.system import files, terminal
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
command.define_config(default=config_files.shipped_config('cifar10'))
declare.table(
  call=(('a', 'b', 'pack'), 'What to do, see launch/ten_minutes.sh.'),
  data=(str, 'pack: a .npz with train_images and test_images.'),
  inception=(str, 'pack: Inception weights, a .npz, at least up to mixed_7.'),
  files=(str, 'Folder of the files that the calls need.'),
  output=(str, 'Folder of the results.'),
  work=(str, 'Folder for everything else; by default OUTPUT.work.CALL.'),
  minutes=(float, 'Minutes of the call; by default 4 for a and 7 for b.'),
  started=(float, 'Unix time from which the minutes count; by default now.'),
  rehearse=(False, 'Allow a CPU: a narrow network, few samples.'),
  images=(int, 'pack: the first N training images only.'),
  heldout=(int, 'pack: the first N held-out images only.'),
  statistics=(
    False,
    'pack: write the statistics of both splits, and no held-out images.',
  ),
  train_share=(0.55, 'b: share of the minutes after which training is saved.'),
  num_samples=(int, 'b: samples of each sampler [10000, rehearsed 128].'),
  ode_steps=(int, 'b: steps of UniPC [20, rehearsed 10].'),
  ancestral_steps=(int, 'b: ancestral steps [100, rehearsed 20].'),
)

MINUTES = {'a': 4.0, 'b': 7.0}
TAP = '768'
# Prints the platform that JAX uses here; another process must hold the GPU.
LOOK = 'import jax; print(jax.default_backend(), jax.devices()[0].device_kind)'


def main():
  begin = time.time()
  jax.config.update('jax_platforms', 'cpu')  # the parts need the GPU
  command.need('files')
  if FLAGS.call == 'pack':
    _pack(Path(FLAGS.files).expanduser())
    return 0
  call = FLAGS.call
  minutes = FLAGS.minutes or MINUTES[call]
  clock = rounds.Clock(minutes - (begin - (FLAGS.started or begin)) / 60)
  folder, output, work = _folders(call)
  config = _config(call)
  index = _checked(call, config, folder, clock)
  device = _device(FLAGS.rehearse)
  # Nothing has been written yet: all checks come before this point.
  for path in (output, work):
    path.mkdir(parents=True, exist_ok=True)
  _log_to(output / f'{call}.log')
  compiled = _compiled(folder)
  here = rounds.machine()
  here['device'] = device
  about = [
    f'call {call}, {minutes:g} minutes' + ', rehearsed' * FLAGS.rehearse,
    rounds.described(here),
  ]
  head = {'about': about, 'machine': here, 'config': runs.to_plain(config)}
  record = ten_parts.Record(output, call, head)
  path = work / 'config.py'
  path.write_text(config_files.source(config))
  if call == 'a':
    ten_bench.carry_out(record, path, work, clock, FLAGS.rehearse)
  else:
    asked = ten_train.Asked(
      folder, output, work, path, config, index, FLAGS.train_share,
      **{name: _number(name) for name in REHEARSED},
    )  # fmt: skip
    ten_train.carry_out(record, asked, clock)

  def pack_compiled(_):
    there = [x.stat().st_size for x in output.iterdir()]
    room = ten_files.MOST_IN_ALL - sum(there)
    room *= len(there) < ten_files.MOST_FILES
    told = ten_files.write_compiled(output, compiled, room)
    record.text['files'] = [*record.text.get('files', []), told]

  record.part('compiled programs', pack_compiled, clock.left, due=False)
  terminal.write(record.summary())
  return int(record.failed)


# Flag -> its value, and its value in a rehearsal.
REHEARSED = {
  'num_samples': (10_000, 128),
  'ode_steps': (20, 10),
  'ancestral_steps': (100, 20),
}


def _number(name: str) -> int:
  given = FLAGS[name].value
  return given or REHEARSED[name][FLAGS.rehearse]


def _folders(call: str) -> tuple[Path, Path, Path]:
  """The folders of the files, of the results, and of everything else."""
  command.need('output')
  command.at_least(num_samples=2, ode_steps=1, ancestral_steps=1)
  if not 0.1 <= FLAGS.train_share <= 0.9:
    raise UserError(f'--train_share={FLAGS.train_share:g}: from 0.1 to 0.9')
  folder, output = (
    Path(x).expanduser().absolute() for x in (FLAGS.files, FLAGS.output)
  )
  work = FLAGS.work or output.with_name(f'{output.name}.work.{call}')
  work = Path(work).expanduser().absolute()
  if not folder.is_dir():
    raise UserError(f'FILES={FLAGS.files}: there is no such folder; see --help')
  runs.usable_output(output)
  runs.usable_folder('work', work)
  for path in (work, output / f'{call}.json'):
    if path.exists():
      raise UserError(
        f'{path} is there from an earlier call: give a new OUTPUT'
      )
  others = files.entries(output) if output.exists() else set()
  if strange := sorted(x for x in others if not x.startswith(('a.', 'b.'))):
    known = (ten_files.COMPILED, 'curves.png', 'grid.png')
    if strange := [x for x in strange if x not in known]:
      raise UserError(
        f'OUTPUT={FLAGS.output} holds other files, as {strange[0]}: give a new '
        'folder'
      )
  return folder, output, work


def _config(call: str):
  """The config of the call: the file's, what the call changes, the flags."""
  config = FLAGS.config.copy_and_resolve_references()
  flat = {**(ten_train.RECIPE if call == 'b' else ten_bench.RECIPE)}
  if FLAGS.rehearse:
    flat |= ten_train.NARROW
  given = _overrides()
  config.update_from_flattened_dict(
    {key: value for key, value in flat.items() if key not in given}
  )
  if wrong := validation.check(config, jax.devices()):
    raise UserError(wrong[0])
  return config


def _overrides() -> set[str]:
  """The keys that --config.KEY=VALUE sets."""
  return {*config_flags.get_override_values(FLAGS['config'])}


def _checked(call, config, folder, clock) -> dict[str, int]:
  """The number of images of each split; raises UserError for any mistake."""
  least = ten_bench.LEAST if call == 'a' else ten_train.LEAST
  if clock.left < least:
    raise UserError(
      f'--minutes={FLAGS.minutes or MINUTES[call]:g}: only '
      f'{max(clock.left, 0):.0f} s are left, and '
      + ('one benchmark' if call == 'a' else 'one checkpoint')
      + f' needs {least:.0f}: give more minutes'
    )
  if call == 'a':
    return {}
  index = ten_files.read_index(folder)
  if not index['train']:
    raise UserError(f'{folder} has no training images: pack the files again')
  if index['size'] != config.data.image_size:
    size = index['size']
    raise UserError(
      f'{folder} has images of {size}x{size} pixels, but the config of '
      f'{config.data.image_size}: give --config.data.image_size={size}, or '
      'other images'
    )
  if not (folder / ten_files.INCEPTION).exists():
    raise UserError(
      f'{folder} lacks {ten_files.INCEPTION}: launch/ten_minutes.sh pack '
      'writes it'
    )
  for split in ten_files.SPLITS:
    if (path := ten_files.statistics_of(folder, split)).exists():
      statistics.read_gaussian(path, int(TAP))
  return index


def _device(rehearse: bool) -> str:
  """The device that JAX uses here.

  Raises:
    UserError: it is a CPU, and this is no rehearsal.
  """
  found = subprocess.run(
    [sys.executable, '-c', LOOK], capture_output=True, text=True, check=False
  )
  if found.returncode:
    line = (found.stderr.strip().splitlines() or [''])[-1]
    raise UserError(f'JAX does not start here: {line}')
  platform, _, kind = found.stdout.strip().splitlines()[-1].partition(' ')
  if platform == 'cpu' and not rehearse:
    raise UserError(
      'JAX sees no GPU on this machine: check nvidia-smi and that JAX is '
      "installed with pip install '.[cuda]', or give --rehearse"
    )
  return kind


def _compiled(folder: Path) -> Path:
  """The folder of compiled programs, with those of an earlier call.

  Its path is part of their keys, so that it does not depend on OUTPUT. JAX also
  keeps the algorithms there that it has measured on a GPU, so that the second
  training program need not measure them again.
  """
  name = 'JAX_COMPILATION_CACHE_DIR'
  os.environ.setdefault(name, str(files.cache() / 'ten_minutes'))
  compiled = Path(os.environ[name])
  ten_files.read_compiled(folder, compiled)
  return compiled


def _log_to(path: Path) -> None:
  """Copies what this process and its parts write to stderr to a file."""
  tee = subprocess.Popen(
    ['tee', '-a', str(path)], stdin=subprocess.PIPE, stdout=sys.stderr.fileno(),
    start_new_session=True,
  )  # fmt: skip
  os.dup2(tee.stdin.fileno(), 2)
  tee.stdin.close()


def _pack(folder: Path) -> None:
  """Writes the files that the calls need."""
  command.need('data', 'inception')
  command.at_least(images=2, heldout=2)
  ten_files.pack(
    Path(FLAGS.data).expanduser(), Path(FLAGS.inception).expanduser(), folder,
    {'train': FLAGS.images, 'test': FLAGS.heldout}, TAP, FLAGS.statistics,
  )  # fmt: skip
  size = sum(x.stat().st_size for x in folder.rglob('*') if x.is_file())
  terminal.write(f'{folder}: {size / 2**20:.1f} MiB')


if __name__ == '__main__':
  command.run(main, __doc__)
