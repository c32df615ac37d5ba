"""Compares samplers at equal numbers of network evaluations.

Every sampler gets the same budgets of evaluations and takes as many steps as
fit into each, so the cells of a column cost the same.
"""

from collections.abc import Callable, Sequence

from diffusion_jax import samplers
from diffusion_jax.evaluation import cards
from diffusion_jax.samplers import grid as grids
from diffusion_jax.samplers.plan import Plan
from diffusion_jax.system import terminal
from diffusion_jax.system.errors import UserError

# Type of an option -> (word -> value, what the word must be).
VALUES = {
  bool: ({'true': True, 'false': False}.__getitem__, 'true or false'),
  int: (int, 'a whole number'),
  float: (float, 'a number'),
  str: (str, 'a word'),
}


GUIDANCE = {
  'guidance': float,
  'guidance_interval': str,
  'guidance_rescale': float,
  'classifier_scale': float,
}
AVERAGE = 'ema_profile'


def parse(text: str) -> dict:
  """Parses NAME:key=value:key=value into arguments of `plans.for_run`.

  Args:
    text: the text; keys are grid, clip, the sampler's options, and those of
      guidance, with an interval as LO/HI, and ema_profile, with decay/0.999 for
      decay:0.999.

  Raises:
    UserError: the text is not valid.
  """
  name, *pairs = text.split(':')
  if name in samplers.ADAPTIVE:
    raise UserError(
      f'--sweep={text}: {name} chooses its own number of evaluations: leave it '
      'out'
    )
  options = samplers.defaults(name)
  kinds = {k: float if x is None else type(x) for k, x in options.items()}
  kinds |= {'grid': str, 'clip': bool, **GUIDANCE, AVERAGE: str}
  given = {'sampler': name, 'grid': 'uniform'}
  for pair in pairs:
    key, equals, word = pair.partition('=')
    if not equals or key not in kinds:
      raise UserError(
        f'--sweep={text}: {pair} is not KEY=VALUE with one of '
        f'{", ".join(kinds)}'
      )
    read, what = VALUES[kinds[key]]
    try:
      given[key] = read(word)
    except (ValueError, KeyError):
      raise UserError(f'--sweep={text}: {key} must be {what}') from None
  if AVERAGE in given:
    given[AVERAGE] = given[AVERAGE].replace('/', ':')
  if given['grid'] not in grids.NAMES:
    raise UserError(
      f'--sweep={text}: grid must be one of {", ".join(grids.NAMES)}, which '
      'exist for any number of steps'
    )
  return given


def budgets(texts: Sequence[str]) -> list[int]:
  """Parses numbers of evaluations; returns them sorted.

  Raises:
    UserError: a text is not a whole number above 0, or there are none.
  """
  if not texts or not all(text.isdecimal() and int(text) for text in texts):
    raise UserError(
      f'--sweep_evaluations={",".join(texts)}: give whole numbers above 0, '
      'separated by commas'
    )
  return sorted(set(map(int, texts)))


def longest(
  text: str,
  plan_fn: Callable[[dict], Plan],
  evaluations: int,
  num_timesteps: int,
) -> Plan:
  """The plan with the most steps whose evaluations fit into a budget.

  Args:
    text: the sampler and its options, see `parse`.
    plan_fn: arguments of `plans.for_run` -> plan; raises UserError if there is
      none.
    evaluations: the budget.
    num_timesteps: T, the largest number of steps.

  Raises:
    UserError: no number of steps has a plan; the error is that of the largest.
  """
  asked, errors = parse(text), []
  for num_steps in range(min(evaluations, num_timesteps), 0, -1):
    try:
      plan = plan_fn({**asked, 'num_steps': num_steps})
    except UserError as e:
      errors.append(e)
      continue
    if plan.evaluations <= evaluations:
      return plan
  raise UserError(f'--sweep={text} at {evaluations} evaluations: {errors[0]}')


def best(cells: Sequence[dict]) -> dict[str, dict]:
  """Budget -> the cell with the smallest value.

  Args:
    cells: dicts with 'sampler', 'budget', 'evaluations', 'num_steps', 'value'.
  """
  return {
    str(budget): min(
      (cell for cell in cells if cell['budget'] == budget),
      key=lambda cell: cell['value'],
    )
    for budget in dict.fromkeys(cell['budget'] for cell in cells)
  }


def text(sweep: dict) -> str:
  """A sweep as a table, with the best of each column marked and listed below.

  Args:
    sweep: 'result', 'cells' (see `best`) and 'best'.
  """
  cells, best = sweep['cells'], sweep['best']

  def shown(cell):
    fewer = cell['evaluations'] != cell['budget']
    of = f'({cell["evaluations"]}) ' * fewer
    mark = '*' if cell in best.values() else ' '
    return f'{of}{cards.number(cell["value"])}{mark}'

  rows = [
    [name, *(shown(cell) for cell in cells if cell['sampler'] == name)]
    for name in dict.fromkeys(cell['sampler'] for cell in cells)
  ]
  heads = ['evaluations', *(f'{budget} ' for budget in best)]
  title = cards.distance(sweep['result'])
  lines = [f'{title} by network evaluations per sample', '']
  lines += [*terminal.table(heads, rows), '']
  if any(cell['evaluations'] != cell['budget'] for cell in cells):
    lines += ['(n): the actual number of evaluations, of whole steps', '']
  if any(cell.get('network_rows', 0) > cell['evaluations'] for cell in cells):
    lines += ['guided samplers evaluate two rows of the network at once', '']
  lines += [
    f'best at {budget}: {cell["sampler"]}, {cards.number(cell["value"])}'
    for budget, cell in best.items()
  ]
  return '\n'.join(lines)
