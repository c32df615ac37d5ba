"""Converts settings of diffusers' schedulers to configs and back.

The table below lists the settings that a scheduler needs. Errors name the
setting that makes a process another one; `unets` does the same for networks.
"""

import json
from collections.abc import Mapping

from diffusion_jax.system.errors import UserError

# Settings of a scheduler: (diffusers' default, required value).
PROCESS = {
  'clip_sample_range': (1.0, 1.0),
  'thresholding': (False, False),
  'trained_betas': (None, None),
}
NUMBERS = {'num_train_timesteps': 1000, 'beta_start': 1e-4, 'beta_end': 0.02}
PREDICTIONS = {'epsilon': 'eps', 'sample': 'x0', 'v_prediction': 'v'}
# Schedulers with DDPM's betas; their sampling method does not matter here.
SCHEDULERS = (
  *('DDPMScheduler', 'DDIMScheduler', 'PNDMScheduler'),
  *('DPMSolverMultistepScheduler', 'DPMSolverSinglestepScheduler'),
  *('UniPCMultistepScheduler', 'EulerDiscreteScheduler'),
  *('EulerAncestralDiscreteScheduler', 'LMSDiscreteScheduler'),
)
# Those that clip unless they say otherwise; in diffusers, the others have no
# such setting, and never clip.
CLIPPED = ('DDPMScheduler', 'DDIMScheduler')
# Sampling as a scheduler does, class -> (sampler, the settings that it must
# have, as in PROCESS).
LEADING = {'timestep_spacing': ('leading', 'leading'), 'steps_offset': (0, 1)}
UNCLIPPED = {'clip_sample': (True, False)}
TRAILING = {**UNCLIPPED, 'set_alpha_to_one': (True, True)}
SAMPLERS = {
  'DDIMScheduler': ('ddim', {**LEADING, **UNCLIPPED}),
  'PNDMScheduler': ('plms', {**LEADING, 'skip_prk_steps': (False, True)}),
  'EulerDiscreteScheduler': (
    'euler',
    {
      **LEADING,
      'timestep_spacing': ('linspace', 'leading'),
      'rescale_betas_zero_snr': (False, False),
      'interpolation_type': ('linear', 'linear'),
      'final_sigmas_type': ('zero', 'zero'),
      'timestep_type': ('discrete', 'discrete'),
      'sigma_min': (None, None),
      'sigma_max': (None, None),
      **dict.fromkeys(
        (f'use_{kind}_sigmas' for kind in ('karras', 'exponential', 'beta')),
        (False, False),
      ),
    },
  ),
}
USUAL = 'ddim'  # in place of others
VARIANCES = {
  **{'fixed_small': 'fixedsmall', 'fixed_large': 'fixedlarge'},
  **{'learned_range': 'learned'},
}
SCHEDULES = {
  **{'linear': 'linear', 'scaled_linear': 'scaled_linear'},
  **{'squaredcos_cap_v2': 'cosine', 'sigmoid': 'sigmoid'},
}

LARGEST = 10**6  # bound on any number in a folder


def scheduler_of(config: Mapping) -> dict:
  """Converts a run's process and variance to DDPMScheduler settings.

  Args:
    config: the run's config.

  Raises:
    UserError: a DDPMScheduler has no such process.
  """
  process, sample = config['process'], config['sample']

  def theirs(key, value, names):
    found = [name for name, ours in names.items() if ours == value]
    if not found:
      raise UserError(
        f'{key}={value}: a DDPMScheduler only has '
        f'{", ".join(names.values())}: such a run cannot be written'
      )
    return found[0]

  # With any other variance, theirs takes no network that learns one.
  learned = config['loss']['variance'] == 'learned'
  variance = 'learned' if learned else sample['variance']
  if process['shift'] != 1:
    raise UserError(
      f'process.shift={process["shift"]}: a DDPMScheduler has none: such a run '
      'cannot be written'
    )
  if config['loss'].get('level', 'auto') != 'auto':
    raise UserError(
      f'loss.level={config["loss"]["level"]}: networks of diffusers are told '
      'the time: such a run cannot be written'
    )
  schedule = {'quadratic': 'scaled_linear'}.get(
    process['schedule'], process['schedule']
  )
  return {
    '_class_name': 'DDPMScheduler',
    'num_train_timesteps': process['num_timesteps'],
    'beta_schedule': theirs('process.schedule', schedule, SCHEDULES),
    'beta_start': process['beta_start'],
    'beta_end': process['beta_end'],
    'rescale_betas_zero_snr': process['zero_snr'],
    'prediction_type': theirs(
      'loss.prediction', config['loss']['prediction'], PREDICTIONS
    ),
    'variance_type': theirs('sample.variance', variance, VARIANCES),
    'clip_sample': sample['clip'],
    **{name: value for name, (_, value) in PROCESS.items()},
  }


def whole(name: str, value, path) -> int:
  """Returns a setting that must be a whole number above 0.

  Args:
    name: the name of the setting.
    value: the value in the file.
    path: the path of the file, for the message.

  Raises:
    UserError: it is something else.
  """
  if type(value) is not int or not 0 < value < LARGEST:
    raise UserError(f'{path}: {name} is {shown(value)}: a whole number')
  return value


def process_of(settings: dict, path) -> dict:
  """Converts scheduler settings to parts of a run's config.

  Args:
    settings: the content of its scheduler_config.json; missing settings have
      diffusers' defaults.
    path: the path of that file, for messages.

  Returns:
    'process', 'loss', and 'sample' (variance and clip only).

  Raises:
    UserError: the process is not supported; the message names the setting.
  """
  kind = settings.get('_class_name', 'DDPMScheduler')
  agree(path, '_class_name', kind, SCHEDULERS)
  must_be(settings, PROCESS, path)
  prediction = settings.get('prediction_type', 'epsilon')
  variance = settings.get('variance_type', 'fixed_small')
  schedule = settings.get('beta_schedule', 'linear')
  rescale = settings.get('rescale_betas_zero_snr', False)
  agree(path, 'beta_schedule', schedule, SCHEDULES)
  agree(path, 'rescale_betas_zero_snr', rescale, [False, True])
  agree(path, 'prediction_type', prediction, PREDICTIONS)
  agree(path, 'variance_type', variance, VARIANCES)

  def number(name, kinds):
    value = settings.get(name, NUMBERS[name])
    if not isinstance(value, kinds) or not 0 < value < LARGEST:
      raise UserError(f'{path}: {name} is {shown(value)}: a number above 0')
    return value

  return {
    'process': {
      'schedule': SCHEDULES[schedule],
      'zero_snr': rescale,
      'shift': 1.0,
      'num_timesteps': number('num_train_timesteps', int),
      'beta_start': float(number('beta_start', int | float)),
      'beta_end': float(number('beta_end', int | float)),
    },
    'loss': {'prediction': PREDICTIONS[prediction]},
    'sample': {
      'variance': VARIANCES[variance],
      'clip': bool(settings.get('clip_sample', kind in CLIPPED)),
    },
  }


def sampling_of(settings: dict, path) -> tuple[dict, list[str]]:
  """How a pipeline of Stable Diffusion samples with a scheduler.

  Args:
    settings: the content of its scheduler_config.json, as the pipeline changes
      it; missing settings have diffusers' defaults.
    path: the path of that file, for messages.

  Returns:
    ('sampler' and its options, and 'grid', as `samplers.plan.create` takes
    them; a line if no sampler here does exactly the same, else none).
  """
  kind = settings.get('_class_name')
  sampler, rules = SAMPLERS.get(kind, (USUAL, {}))
  # The others end in clean data; DDIM does by default.
  choose = kind in ('DDIMScheduler', 'PNDMScheduler')
  default = kind == 'DDIMScheduler'
  clean = not choose or settings.get('set_alpha_to_one', default)
  grid = 'sdxl' if clean else 'stable_diffusion'
  if sampler == USUAL and settings.get('timestep_spacing') == 'trailing':
    grid, rules = 'trailing', rules and TRAILING
  options = {'variant': 'improved_euler'} if sampler == 'plms' else {}
  found = {'sampler': sampler, 'grid': grid, **options}
  given = {name: settings.get(name, rules[name][0]) for name in rules}
  other = [
    f'{name} is {shown(given[name])} in place of {shown(wanted)}'
    for name, (_, wanted) in rules.items()
    if given[name] != wanted
  ]
  if kind not in SAMPLERS:
    other = [f'_class_name is {shown(kind)}']
  if not other:
    return found, []
  return found, [
    f'{path}: {", ".join(other)}, which no sampler here follows exactly: '
    f'samples are drawn with --sampler={sampler} --grid={grid}, unless flags '
    'say otherwise'
  ]


def must_be(settings: Mapping, rules: Mapping, path) -> None:
  """Raises UserError unless settings have the values that are required.

  Args:
    settings: name -> value.
    rules: name -> (diffusers' default, required value).
    path: the path of the file, for the message.
  """
  for name, (default, wanted) in rules.items():
    agree(path, name, settings.get(name, default), [wanted])


def agree(path, name, value, allowed) -> None:
  """Raises UserError unless a setting has one of the allowed values.

  Args:
    path: the path of the file, for the message.
    name: the name of the setting.
    value: the value in the file.
    allowed: allowed values, of any type.
  """
  allowed = list(allowed)  # supports `in` for values of any type, even lists
  if value not in allowed:
    raise UserError(
      f'{path}: {name} is {shown(value)}, but must be '
      f'{" or ".join(map(shown, allowed))}: it is another network or process'
    )


def shown(value) -> str:
  """A setting for a message, shortened."""
  text = json.dumps(value)
  return text if len(text) < 100 else f'{text[:97]}...'
