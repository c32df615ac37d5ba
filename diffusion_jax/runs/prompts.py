"""The prompts of a run's samples: checked, and as tokens.

Sample i gets prompt i % n of n prompts, or the negative prompt in place of the
empty caption where guidance compares. Without a wish, the prompts are captions
of the training images.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from diffusion_jax.conditioning import low_resolution
from diffusion_jax.runs import dataset, labels, texts
from diffusion_jax.samplers.plan import Plan
from diffusion_jax.system import files, terminal
from diffusion_jax.system.errors import UserError

NAMES = ('label', 'prompts', 'negative_prompt')  # what can be asked for
LARGEST = 2**24  # bytes of a file of prompts


def condition(workdir, config: Mapping, asked: Mapping, other=None) -> dict:
  """The condition of a plan, see `samplers.plan.Plan`.

  Args:
    workdir: the run's folder.
    config: its config.
    asked: NAMES -> the wish, None or absent for none: a label, see
      `labels.condition`; prompts, one or several; a negative prompt.
    other: a classifier that guides the run, see `labels.condition`.

  Raises:
    UserError: the run does not take what is asked for.
  """
  label, prompts, negative = (asked.get(name) for name in NAMES)
  if not dataset.has_captions(config['conditioning']):
    for name, value in (('prompt', prompts), ('negative_prompt', negative)):
      if value is not None:
        raise UserError(
          f'{name}={_shown(value)}: the run takes no text: leave the {name} '
          "out, or train with conditioning.name='text'"
        )
    return labels.condition(workdir, config, label, other)
  found = {}
  if other is not None:
    found = labels.condition(workdir, config, label, other)
  elif label is not None:
    raise UserError(
      f"label={label}: the run takes text: give a prompt, such as 'a red apple'"
    )
  if isinstance(prompts, str):
    prompts = [prompts]
  if prompts is None:
    captions = (dataset.read(workdir) or {}).get('captions') or {}
    prompts = captions.get('examples')
    if not prompts:
      raise UserError(
        f'{workdir}/{dataset.DATA} has no captions: give a prompt, such as '
        "'a red apple'"
      )
  prompts = [*prompts]
  wrong = [x for x in (*prompts, negative or '') if not isinstance(x, str)]
  if wrong or not prompts:
    raise UserError(
      f'prompts={_shown(prompts)}: a text, or a list of one and more texts'
    )
  for text in (*prompts, negative or ''):
    if text.encode(errors='replace').decode() != text:
      raise UserError(
        f'prompts have {_shown(text)}, which is not Unicode (half of a pair): '
        'write its signs anew'
      )
  found['prompts'] = prompts
  if negative is not None:
    found['negative_prompt'] = negative
  return found


def read(path, flag: str = 'prompts') -> list[str]:
  """The prompts, or captions, in a file, one a line.

  Args:
    path: the file.
    flag: the flag that gave it, for messages.

  Raises:
    UserError: there is no such file, it is not UTF-8, or a line is empty.
  """
  path = files.at(path).expanduser()
  if not path.is_file():
    other = ', or --prompt="a red apple"' * (flag == 'prompts')
    raise UserError(
      f'--{flag}={path} is not a file: give one with a text a line{other}'
    )
  content = files.content(path, 'give another file')
  if len(content) > LARGEST:
    raise UserError(
      f'--{flag}={path} has {len(content):,} bytes, at most {LARGEST:,}: give '
      'a shorter one'
    )
  try:
    lines = content.decode().removeprefix('\ufeff').splitlines()
  except UnicodeDecodeError as error:
    raise UserError(
      f'--{flag}={path} is not UTF-8 (byte {error.start}): save it as UTF-8'
    ) from error
  for number, line in enumerate(lines, 1):
    if not line.strip():
      raise UserError(
        f'--{flag}={path}: line {number} is empty: remove it'
        + ' (--prompt="" samples without words)' * (flag == 'prompts')
      )
  if not lines:
    raise UserError(f'--{flag}={path} is empty: write a text a line')
  return [line.strip() for line in lines]


def tables(
  workdir, config: Mapping, plan: Plan
) -> tuple[Plan, dict[str, np.ndarray] | None]:
  """Splits a plan into a program's and what the program is given.

  So that other prompts need no other program.

  Args:
    workdir: the run's folder.
    config: its config.
    plan: the plan.

  Returns:
    (the plan without prompts, and without what it says of pictures, which are
    given by rows; the tokens of the prompts, see `draw.conditions`, or None
    without prompts). Prompts that are too long are cut, which is said once.
  """
  rest = {**plan.condition}
  if rest.pop(low_resolution.ROW, None):
    plan = plan._replace(condition=rest)
  prompts = rest.pop('prompts', None)
  negative = rest.pop('negative_prompt', None)
  if prompts is None:
    return plan, None
  made = texts.kept(workdir, config)
  both = [*prompts, *([] if negative is None else [negative])]
  each = made.encode(both)
  for number, left in each.cut.items():
    prompt = both[number]
    terminal.say_once(
      f'the prompt {_shown(prompt)} is longer than the {made.length} tokens of '
      f'the run: {left[:60]!r} is left out'
    )
  found = {'tokens': each.ids[: len(prompts)]}
  if negative is not None:
    found['negative'] = each.ids[len(prompts) :]
  return plan._replace(condition=rest), found


def _shown(value: str | Sequence[str]) -> str:
  return repr(value) if len(repr(value)) <= 60 else f'{value!r:.57}...'
