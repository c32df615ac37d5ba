"""The layout of a run's folder, config.json, and checks of output folders.

config.json            the resolved config
data.json              what the training images are, see dataset.py
init_from.json         the run that the parameters came from, see finetune.py
converted.json         the source of converted weights
checkpoints/           one folder per step
parts/                 parts that are not trained, see frozen.py, and the
                       tokenizer of captions, see texts.py
licences/              of weights from elsewhere, see licences.py
saved.json             the newest saved step, see training/saved.py
held.json              checkpoints not to be deleted, see training/held.py
starts.jsonl           one object per start: time, step, versions, devices,
                       config, the settings that numbers depend on
heartbeats/            of multi-process runs, see training/watchdog.py
metrics.jsonl          one object per line; TensorBoard event files next to it
samples/               grids of training (train_*.png) and sample stores
inversions/            images inverted to noise, and reconstructed from it
calibration/           errors of a checkpoint's denoiser, see calibration.py
evaluations/           metric cards, and the networks they were computed with
report.html            a report of all of the above
"""

import datetime
import json
import os

from ml_collections import config_dict

from diffusion_jax.process import schedules, tables
from diffusion_jax.runs import completion, folder
from diffusion_jax.runs.locking import lock  # noqa: F401
from diffusion_jax.system import environment, files, jsonl, numerics, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, optim, saved
from diffusion_jax.weights import lpips

# Keys that may differ from config.json when a run resumes, besides *_every:
# they change no number that is trained.
MAY_CHANGE = (
  *('num_steps', 'microbatches', 'mesh', 'keep_last', 'eval_images', 'sample'),
  *('data.path', 'data.heldout_split', 'data.skip_broken', 'data.on_device'),
  # Of the same content.
  *('process.path', 'codec.path', 'codec.step', 'loss.lpips_path'),
  *('steps_per_dispatch', 'codec.cache', 'codec.decode_rows'),
  *('conditioning.path', 'conditioning.cache'),
  'conditioning.tokenizer',  # the run has its own
)
# Keys that may change on purpose: the run goes on, but from there on it is not
# the run that one config describes. The optimiser's state must keep its form.
ON_PURPOSE = ('optim', 'ema', 'batch_size')

PATHS = (
  *(('data', 'path'), ('process', 'path')),
  *(('codec', 'path'), ('codec', 'cache'), ('loss', 'lpips_path')),
  *(('conditioning', 'path'), ('conditioning', 'cache')),
  ('conditioning', 'tokenizer'),
)
VARIANCE = 'sample.variance'

STARTS = 'starts.jsonl'
INIT = 'init_from.json'
CONVERTED = 'converted.json'
PARTS = ('data', 'model', 'process', 'loss', 'sample')  # of any run's config


def flatten(config: dict, prefix: str = '') -> dict:
  """{'a': {'b': 1}} -> {'a.b': 1}."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, dict):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = value
  return flat


def to_plain(config: config_dict.ConfigDict) -> dict:
  """The config as read back from JSON: tuples become lists.

  With the hashes of the files of the noise schedule and of LPIPS, if there are
  any.

  Raises:
    UserError: a file cannot be read.
  """
  plain = json.loads(json.dumps(config.to_dict()))
  process = plain['process']
  if process['schedule'] in schedules.FROM_FILES:
    process['sha256'] = tables.sha256(process['path'])
  loss = plain['loss']
  if loss.get('lpips'):
    loss['lpips_sha256'] = lpips.sha256(loss['lpips_path'])
  return plain


def image_shape(data) -> tuple[int, int, int]:
  """(H, W, C) of a config's data."""
  size = data['image_size']
  height, width = (size, size) if isinstance(size, int) else size
  return height, width, data['channels']


def may_change(key: str) -> bool:
  """Whether a run may resume with another value of this (dotted) key."""
  if '.' not in key and key.endswith('_every'):
    return True
  return _is_among(key, MAY_CHANGE)


def _is_among(key, names):
  return any(key == name or key.startswith(f'{name}.') for name in names)


def changes(old: dict, new: dict) -> dict[str, list]:
  """Dotted key -> [old value, new value], for two plain configs."""
  old, new = flatten(old), flatten(new)
  return {
    key: [old.get(key), new.get(key)]
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
  }


def differences(old: dict, new: dict) -> dict[str, str]:
  """Dotted key -> 'key: VALUE there, VALUE now', for two plain configs."""
  return {
    key: f'{key}: {there} there, {now} now'
    for key, (there, now) in changes(old, new).items()
  }


def check(workdir, config: config_dict.ConfigDict) -> None:
  """Raises UserError unless a run of this config may start or resume here.

  The folder must be new, hold nothing that is in the way (see folder.py), or
  hold a run with its checkpoints and a config that differs only in keys that
  may change; the message names the others. A run that has saved nothing takes
  any config. Nothing is written.
  """
  usable_folder('workdir', workdir)
  path = files.at(workdir)
  if (path / CONVERTED).exists():
    raise UserError(
      f'--workdir={workdir} holds converted weights, without an optimiser '
      f'state: fine-tune with --init_from={workdir} in another folder'
    )
  saved.check(path / 'checkpoints')
  usable_folder('workdir', path / 'checkpoints')
  if (path / 'config.json').exists() or _noted_config(path):
    refused = fixed(read_config(workdir), to_plain(config))
    if refused and checkpoint.steps(path / 'checkpoints'):
      raise UserError(
        f'--workdir={workdir} holds a run of another config ('
        f'{"; ".join(refused)}): use the same values, or begin another run '
        f'with its weights: --workdir=NEW --init_from={workdir}'
      )
  elif there := folder.in_the_way(path):
    more = f' and {len(there) - 1} more' * (len(there) > 1)
    restore = 'copy it from a backup, or ' * ('checkpoints' in there)
    raise UserError(
      f'--workdir={workdir} is not empty and has no config.json (in the way: '
      f'{there[0]}{more}): {restore}use a new folder'
    )


def fixed(old: dict, new: dict) -> list[str]:
  """The differences, as text, that a run cannot go on with."""
  keeps_form = optim.same_form(old['optim'], new['optim']) and (
    (old['ema']['decay'] > 0) == (new['ema']['decay'] > 0)
  )
  # The bound's weights are those of the sampler's variance.
  trains_variance = new['loss'].get('weight') == 'bound'
  return [
    line
    for key, line in differences(old, new).items()
    if not (may_change(key) and (not trains_variance or key != VARIANCE))
    and not (
      _is_among(key, ON_PURPOSE)
      and not _is_among(key, ('ema.decays', 'ema.profiles'))
      and (keeps_form or not _is_among(key, (*optim.FORM, 'ema.decay')))
    )
  ]


def write_config(workdir, config: config_dict.ConfigDict) -> None:
  """Writes config.json atomically; relative paths become absolute."""
  plain = to_plain(config)
  for group, key in PATHS:
    path = plain[group].get(key)
    if path and '://' not in path:
      plain[group][key] = os.path.abspath(os.path.expanduser(path))
  files.write_json(files.at(workdir) / 'config.json', plain)


def converted_from(workdir) -> str | None:
  """The absolute source path of converted weights; None for a trained run.

  None also for an unfinished import, which is not a run yet.

  Raises:
    UserError: converted.json is unreadable.
  """
  if not (files.at(workdir) / 'config.json').exists():
    return None
  found = conversion(workdir)
  return found and str(found['from'])


def conversion(workdir) -> dict | None:
  """The content of converted.json: where weights come from; None without.

  Raises:
    UserError: it is unreadable.
  """
  path = files.at(workdir) / CONVERTED
  if not path.exists():
    return None
  try:
    found = json.loads(path.read_text())
    return {**found, 'from': found['from']}
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise UserError(f'{path} is unreadable ({e}): convert again') from e


def begin(
  workdir,
  config: config_dict.ConfigDict,
  step: int,
  goes_on: bool,
  data_change: str = '',
) -> list[str]:
  """Records a start in config.json and starts.jsonl.

  Args:
    workdir: the run's folder, which holds the config of the start before.
    config: the config of this start.
    step: the step that training starts from.
    goes_on: whether it starts from a checkpoint of the run.
    data_change: how the images differ from those of the start before, or ''.

  Returns:
    Lines to print about a resumed run and about what has changed.
  """
  old, new = read_config(workdir), to_plain(config)
  lines, facts = [], {'step': step, 'config': new}
  if data_change:
    facts['data'] = data_change
  if goes_on:
    lines.append(f'resuming from checkpoint {step} of {workdir}')
    lines += _new_meaning(old, new, step)
    broken = {
      key: pair
      for key, pair in changes(old, new).items()
      if _is_among(key, ON_PURPOSE)
    }
    if broken:
      facts['changed'] = broken
      told = ', '.join(f'{key} {a} -> {b}' for key, (a, b) in broken.items())
      lines.append(
        f'from step {step} on, the run differs from an uninterrupted run of '
        f'either config: {told} (recorded in starts.jsonl)'
      )
  elif other := fixed(old, new):
    lines.append(
      f'{workdir} has no checkpoint yet, so it takes this config '
      f'({"; ".join(other)})'
    )
  before, now = last_start(workdir), environment.describe()
  if line := numerics.warning(before.get('numerics', {}), now['numerics']):
    lines.append(line)
  write_config(workdir, config)
  note_start(workdir, {**facts, **now})
  return lines


def _new_meaning(old: dict, new: dict, step: int) -> list[str]:
  """Says if the held-out loss is over other images from a step on."""
  keys = ('eval_images', 'data.heldout_split')
  told = [line for key, line in differences(old, new).items() if key in keys]
  return [
    f'{line}: heldout_loss is over other images after step {step}'
    for line in told
  ]


def note_start(workdir, facts: dict) -> None:
  """Appends a line to starts.jsonl with the time and facts of a start."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  jsonl.append(workdir, STARTS, {'time': now, **facts})


def last_start(workdir) -> dict:
  """The facts of the newest start that can be read; {} if there is none."""
  return [{}, *jsonl.read(files.at(workdir) / STARTS)][-1]


def read_config(workdir, flag: str = '--workdir') -> dict:
  """Reads the config of the run in a workdir.

  Args:
    workdir: the run's folder.
    flag: the flag or argument that gave the folder, for the message.

  Raises:
    UserError: the folder holds no run.
  """
  path = files.at(workdir) / 'config.json'
  try:
    config = json.loads(path.read_text())
    lacking = next((part for part in PARTS if part not in config), None)
    if not isinstance(config, dict) or lacking:
      raise ValueError(f'not a run config: it has no {lacking!r}')
  except (OSError, ValueError, TypeError, RecursionError) as e:
    config = _noted_config(path.parent)
    if config is None and not path.is_file():
      around = files.parents(files.absolute(workdir))[:2]
      run = next((p for p in around if (p / 'config.json').is_file()), None)
      remedy = f'give {run}, which does' if run else 'train first'
      raise UserError(
        f'{flag}={workdir} holds no run (no config.json): {remedy}'
      ) from e
    if config is None:
      alone = not checkpoint.steps(path.parent / 'checkpoints')
      delete = ', or delete it, as there is no checkpoint' * alone
      raise UserError(
        f'{path} is unreadable ({e}): copy it from a backup, or from a run '
        f'of the same config{delete}'
      ) from e
    terminal.say_once(f'{path} is unreadable ({e}): {STARTS} has its content')
  completion.complete(config)  # keys that are newer than the run
  return config


def _noted_config(workdir) -> dict | None:
  """The config of the newest start; None if no start has noted one."""
  starts = jsonl.read(workdir / STARTS, saved.has_step)
  configs = [start['config'] for start in starts if 'config' in start]
  return configs[-1] if configs else None


def usable_folder(flag: str, directory) -> None:
  """Raises UserError unless the folder exists or can be created."""
  path = files.absolute(directory)
  if files.in_bucket(path):
    if path.is_file():
      raise UserError(f'--{flag}={directory} is a file')
    return
  existing = next(p for p in (path, *path.parents) if os.path.lexists(p))
  if not existing.exists():
    raise UserError(f'--{flag}={directory}: {existing} is a broken link')
  if not existing.is_dir():
    raise UserError(f'--{flag}={directory}: {existing} is a file')
  if not os.access(existing, os.W_OK):
    raise UserError(f'--{flag}={directory}: {existing} cannot be written')


def usable_file(flag: str, path) -> None:
  """Raises UserError unless the file can be written; writes nothing."""
  path = files.at(path).expanduser()
  if path.is_dir():
    raise UserError(f'--{flag}={path} is a folder: give a file')
  usable_folder(flag, path.parent)


def usable_output(directory, name: str = 'samples', run=None) -> None:
  """Raises UserError unless a folder is usable for output.

  Inside a run, only the folder `name` is allowed; inside a sample store, none.

  Args:
    directory: the output folder.
    name: the subfolder of a run for this kind of output.
    run: the only run that may contain the folder, existing or not; None = any.
  """
  usable_folder('output', directory)
  path, own = files.resolved(directory), run and files.resolved(run)
  if path == own:
    raise UserError(
      f'--output={directory} is the run itself: choose {own / name}, or a '
      'folder outside'
    )
  for parent in files.parents(path):
    if (parent / 'store.json').exists():
      raise UserError(
        f'--output={directory} is inside the sample store {parent}: choose '
        'another folder'
      )
    inside = path.relative_to(parent).parts[0]
    is_run = parent == own or (parent / 'config.json').exists()
    if is_run and (inside != name or own not in (None, parent)):
      raise UserError(
        f'--output={directory} is inside the run {parent}: choose a folder in '
        f'{(own or parent) / name} or outside'
      )
