"""The condition and guidance of samples: their flags.

`flags.adopt_module_key_flags(guiding)` makes these flags a binary's own.
"""

import functools
import hashlib
import re

from absl import flags

from diffusion_jax import runs
from diffusion_jax.cli import declare
from diffusion_jax.runs import guided, labels, prompts
from diffusion_jax.runs.trained import Trained, load
from diffusion_jax.samplers import guided as options
from diffusion_jax.samplers.plan import Plan
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
declare.table(
  label=(
    str,
    'Conditional runs: the class, as a number or a name; several with commas '
    'between, which samples get in turn; or all. By default a random one, as '
    'often as in the training images.',
  ),
  prompts=(
    str,
    'Runs with captions: a file with a prompt a line, which samples get in '
    'turn.',
  ),
  negative_prompt=(
    str,
    'Runs with captions: what --guidance leads away from; by default the empty '
    'caption.',
  ),
  guidance=(
    float,
    f"Conditional runs: {options.WEIGHT}. By default the config's, 1.",
  ),
  guidance_interval=(
    str,
    '--guidance only at LO <= log-SNR < HI, given as LO,HI; the conditional '
    'model elsewhere.',
  ),
  guidance_rescale=(
    float,
    '--guidance: how far the deviation of the guided prediction is brought '
    'back to that of the conditional one, from 0 to 1 (arXiv 2305.08891).',
  ),
  guide=(
    str,
    'Another network as the u of --guidance: a run or WORKDIR@STEP, such as an '
    'earlier checkpoint (arXiv 2406.02507).',
  ),
  guide_ema_profile=(
    str,
    "--guide: the average of that network, as --ema_profile for the run's; by "
    'default that of its ema.decay.',
  ),
  classifier=(
    str,
    'A classifier that guides by its gradient (arXiv 2105.05233): a run with '
    'loss.name=classification, or WORKDIR@STEP.',
  ),
  classifier_scale=(
    float,
    "--classifier: factor on the gradient, the paper's s; by default 1.",
  ),
)
flags.DEFINE_multi_string(
  'prompt', None,
  'Runs with captions: what to draw; given several times, samples get the '
  'prompts in turn. By default captions of training images.',
)  # fmt: skip


def asked() -> dict:
  """The flags of a plan's guidance, see `plans.for_run`."""
  return {name: FLAGS[name].value for name in options.OPTIONS}


def condition(workdir, config: dict, others: dict) -> dict:
  """The condition that flags ask for, see `prompts.condition`.

  Args:
    workdir: the run's folder.
    config: its config.
    others: a result of `others_of`.

  Raises:
    UserError: the run does not take that, or --prompts is no file of prompts.
  """
  asked = FLAGS.label, prompts_asked(), FLAGS.negative_prompt
  return prompts.condition(
    workdir, config, dict(zip(prompts.NAMES, asked, strict=True)),
    others.get(guided.CLASSIFIER),
  )  # fmt: skip


def prompts_asked() -> list[str] | None:
  """The prompts of --prompt or --prompts; None without.

  Raises:
    UserError: both are given, or --prompts is no file of prompts.
  """
  if FLAGS.prompts is None:
    return FLAGS.prompt
  if FLAGS.prompt:
    raise UserError(
      f'--prompts={FLAGS.prompts} and --prompt={FLAGS.prompt[0]!r}: give one '
      'of them'
    )
  return prompts.read(FLAGS.prompts)


def name(plan: Plan) -> list[str]:
  """The parts of a name of samples that say how they are guided."""
  asked, how = plan.condition.get('label', 'data'), plan.guidance
  parts = []
  if asked != 'data':
    every = asked == list(range(len(asked))) and len(asked) > 1
    parts.append('label' + (labels.ALL if every else '-'.join(map(str, asked))))
  if texts := plan.condition.get('prompts'):
    parts.append(_of_texts('prompt', texts))
  if 'negative_prompt' in plan.condition:
    parts.append(_of_texts('not', [plan.condition['negative_prompt']]))
  if 'guidance' in how:
    parts.append(f'guidance{how["guidance"]:g}')
  if 'guidance_interval' in how:
    parts.append('from{:g}to{:g}'.format(*how['guidance_interval']))
  if 'guidance_rescale' in how:
    parts.append(f'rescale{how["guidance_rescale"]:g}')
  for other in (guided.GUIDE, guided.CLASSIFIER):
    if other in how:
      parts.append(f'{other}{how[f"{other}_sha256"][:8]}')
  if 'classifier_scale' in how:
    parts.append(f'scale{how["classifier_scale"]:g}')
  return parts


def _of_texts(word: str, texts: list[str]) -> str:
  """A short name of texts: the first one's letters, their number, a hash."""
  letters = re.sub('[^a-z0-9]+', '-', texts[0].lower()).strip('-')[:24]
  more = [f'and{len(texts) - 1}'] * (len(texts) > 1)
  digest = hashlib.sha256('\n'.join(texts).encode(errors='replace'))
  return '-'.join([word, letters, *more, digest.hexdigest()[:8]])


@functools.cache
def _load(flag: str, text: str, ema: bool, average: str | None) -> Trained:
  workdir, step = parsed(flag, text)
  return load(workdir, step, ema, ema_profile=average)


def others_of(config: dict) -> dict[str, Trained]:
  """The networks that --guide and --classifier name, by the flag's name.

  Args:
    config: the run's config.

  Raises:
    UserError: there is no such network, or it is of other data.
  """
  if FLAGS.guide_ema_profile is not None and not FLAGS.guide:
    raise UserError(
      f'--guide_ema_profile={FLAGS.guide_ema_profile} has no effect without '
      '--guide: give it too, or leave the average out'
    )
  found = {}
  for flag in (guided.GUIDE, guided.CLASSIFIER):
    if text := FLAGS[flag].value:
      workdir, _ = parsed(flag, text)
      theirs = runs.read_config(workdir, f'--{flag}')
      guided.check(config, theirs, workdir, flag)
      average = FLAGS.guide_ema_profile if flag == guided.GUIDE else None
      found[flag] = _load(flag, text, FLAGS.ema, average)
  return found


def applied(trained: Trained, others: dict[str, Trained]) -> Trained:
  """The network with the others that guide it.

  Args:
    trained: the network.
    others: a result of `others_of`.
  """
  if guided.GUIDE in others:
    trained = trained.guided_by(others[guided.GUIDE])
  if guided.CLASSIFIER in others:
    trained = trained.classified_by(others[guided.CLASSIFIER])
  return trained


def parsed(flag: str, text: str) -> tuple[files.Path, int | None]:
  """WORKDIR or WORKDIR@STEP -> the folder, and the step or None.

  Args:
    flag: the name of the flag that gave it, for the message.
    text: its value.

  Raises:
    UserError: the step is no number.
  """
  workdir, at, step = text.rpartition('@')
  if not at or files.at(text).expanduser().exists():
    workdir, step = text, None
  elif not step.isdecimal():
    raise UserError(
      f'--{flag}={text}: the step after @ must be a number, as in WORKDIR@1000'
    )
  return files.at(workdir).expanduser(), step and int(step)
