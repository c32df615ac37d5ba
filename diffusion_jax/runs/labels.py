"""The labels of a run's samples: which are asked for, and what they are called.

Without a wish, the label of a sample depends on its seed and index only, and
labels occur as often as in the training images.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.conditioning import Conditioner
from diffusion_jax.runs import dataset, draw
from diffusion_jax.samplers.plan import Plan
from diffusion_jax.system.errors import UserError, hint

ALL = 'all'


def condition(workdir, config: Mapping, asked=None, other=None) -> dict:
  """The condition of a plan, see `samplers.plan.Plan`.

  Args:
    workdir: the run's folder.
    config: its config.
    asked: a label or several, which samples get in turn, by index: numbers,
      names of classes, text with commas, or 'all'. None: as in the data.
    other: a classifier that guides the run, whose labels are taken if the run
      has none: anything with a workdir and a config.

  Raises:
    UserError: the run has no labels, or none of that name or number.
  """
  workdir, count = _whose(workdir, config, other)
  if not count:
    if asked is not None:
      raise UserError(
        f'label={_text(asked)}: the run is unconditional: leave the label out, '
        "or train with conditioning.name='label'"
      )
    return {}
  known = dataset.read_labels(workdir, count)
  if asked is None:
    if known is None:
      raise UserError(
        f'{workdir}/{dataset.DATA} does not say how frequent the labels are: '
        'give a label, such as label=all'
      )
    return {'label': 'data', 'label_counts': known['counts']}
  names = known['names'] if known else []
  return {'label': numbers(asked, count, names)}


def names(workdir, config: Mapping, other=None) -> list[str]:
  """The names of the classes that samples may be of; numbers without names.

  Args:
    workdir: the run's folder.
    config: its config.
    other: see `condition`.
  """
  return names_in(*_whose(workdir, config, other))


def names_in(workdir, count: int) -> list[str]:
  """The names of a run's classes; their numbers where they have no names.

  Args:
    workdir: the run's folder.
    count: the number of classes.
  """
  found = (dataset.read_labels(workdir, count) or {}).get('names', [])
  return [*found, *map(str, range(len(found), count))]


def _whose(workdir, config, other):
  """(the folder of the run whose classes samples are of, their number)."""
  count = dataset.num_classes(config['conditioning'])
  if not count and other is not None:
    workdir = other.workdir
    count = dataset.num_classes(other.config['conditioning'])
  return workdir, count


def given(cond: Mapping, conditioner: Conditioner) -> dict[str, jax.Array]:
  """The inputs that are given to a network; what is left out is null.

  Args:
    cond: door -> array; without a mask, all tokens are valid.
    conditioner: the run's.

  Raises:
    UserError: a door that the run does not have; or no label, and the run has
      no model without.
  """
  doors = conditioner.doors
  # A mask may come with tokens.
  if unknown := cond.keys() - doors - ({'mask'} if 'tokens' in cond else set()):
    raise UserError(
      f'cond has {", ".join(sorted(unknown))}, but the run takes '
      f'{", ".join(doors) or "no condition"}'
    )
  for door in {'label', 'tokens'} & doors.keys() - cond.keys():
    check_null(conditioner, f"cond={{'{door}': [one for each row]}}")
  found = {door: jnp.asarray(x) for door, x in cond.items()}
  if 'tokens' in found:  # the null condition's mask is for its own tokens
    found.setdefault('mask', jnp.ones(found['tokens'].shape[:2], bool))
  return found


def check_null(conditioner: Conditioner, remedy: str) -> None:
  """Raises UserError for a model without a condition that was not trained.

  Args:
    conditioner: the run's.
    remedy: what to give, for the message.
  """
  for door, what in (('label', 'label'), ('tokens', 'caption')):
    if door in conditioner.doors and not conditioner.drop:
      raise UserError(
        'the run was trained with conditioning.drop=0 and has no model without '
        f'a {what}: give {remedy}'
      )


def numbers(asked, count: int, names: Sequence[str]) -> list[int]:
  """The labels that are asked for.

  Args:
    asked: see `condition`.
    count: the number of classes.
    names: their names, if they have any. A number is always a label.

  Raises:
    UserError: there is no such label.
  """
  parts = asked
  if isinstance(asked, str):
    parts = [part.strip() for part in asked.split(',')]
  elif not isinstance(asked, Sequence):
    parts = [asked]
  if list(parts) == [ALL]:
    return list(range(count))
  if not len(parts):
    raise UserError(f'label is empty: {_allowed(count, names)}')
  return [_number(part, count, names) for part in parts]


def of_samples(plan: Plan, count: int) -> np.ndarray | None:
  """The labels of the first samples: int32 [count]; None without labels."""
  if 'label' not in plan.condition:
    return None
  indices = np.arange(count, dtype=np.uint32)
  found = jax.jit(lambda at: draw.conditions(plan, at))(indices)
  return np.asarray(found['label'])


def _number(part, count, names) -> int:
  text = str(part)
  if text.isdecimal():
    if int(text) < count:
      return int(text)
  elif text in names:
    return names.index(text)
  raise UserError(f'label={text}: {_allowed(count, names)}{hint(text, names)}')


def _allowed(count, names) -> str:
  told = f'0 to {count - 1}, several with commas between, or {ALL}'
  if not names or all(name.isdecimal() for name in names):
    return told
  shown = ', '.join(names[:10]) + ', ...' * (len(names) > 10)
  return f'{told}, or a name ({shown})'


def _text(asked) -> str:
  return asked if isinstance(asked, str) else str(asked).strip('[()]')
