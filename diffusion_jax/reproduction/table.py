"""The table of our and the published numbers, the bands, and the verdict.

There is a verdict only if everything that the number depends on is as
published; otherwise each difference is listed.
"""

from collections.abc import Mapping, Sequence

from diffusion_jax import runs
from diffusion_jax.evaluation import cards, tables
from diffusion_jax.reproduction import published
from diffusion_jax.reproduction.published import Row
from diffusion_jax.reproduction.task import Task
from diffusion_jax.system import terminal


def samples_unlike(task: Task, card: Mapping) -> list[str]:
  """The differences of a card of samples from the paper's protocol.

  Args:
    task: the task.
    card: a card from `evaluate`.

  Returns:
    one line per difference.
  """
  config = task.shipped or task.config
  names = [title(n) for n in cards.DISTANCES if n in card['results']]
  is_fid, told = 'FID' in names, []
  if not is_fid:
    told.append(
      f'the distance is {names[0] if names else "missing"}, not FID by the '
      '2048 features of Inception'
    )
  elif not task.published_judge:
    told.append(
      'the weights of Inception are not known to be those of 2015-12-05: give '
      '--features=inception, or the published .pth'
    )
  ancestral = card['subject'].get('sampler') == 'ancestral'
  return told + _unlike(
    card,
    convention='tf1' if is_fid else None,
    num_samples=published.NUM_SAMPLES,
    num_reference=task.recipe.num_train,
    split=config['data']['train_split'],
    rounding='float',
    sampler='ancestral',
    evaluations=config['process']['num_timesteps'],
    clip=True,
    ema=True,
    variance=config['sample']['variance'] if ancestral else None,
  )


def bits_unlike(task: Task, card: Mapping) -> list[str]:
  """Like `samples_unlike`, for a card of bits per dimension."""
  config = task.shipped or task.config
  told = _unlike(
    card,
    bits='bpd',
    split=config['data']['heldout_split'],
    num_images=task.recipe.num_heldout,
    variance=config['sample']['variance'],
    clip=True,
    ema=True,
  )
  steps = len(card['protocol'].get('grid', [])) - 1
  if steps != config['process']['num_timesteps']:
    told.append(f'{steps} steps, not all')
  return [f'bits/dim: {line}' for line in told]


def _unlike(card, **wanted) -> list[str]:
  there = {**card['protocol'], **card['subject']}
  return [
    f'{key}: {there.get(key)}, not {value}'
    for key, value in wanted.items()
    if value is not None and there.get(key) != value
  ]


def judge(task: Task, step: int, card: Mapping, bits: Mapping | None) -> dict:
  """The verdict, as JSON.

  Args:
    task: the task.
    step: the last step.
    card: the card of its samples.
    bits: the card of bits per dimension; None = not measured.

  Returns:
    'verdict': 'reproduced', 'not reproduced' or 'no verdict'; 'checks' of the
    numbers that have a band: 'result', 'value', 'band', 'well'; 'reasons' why
    there is no verdict, one line each.
  """
  bands = task.recipe.imported if task.origin else task.recipe.own
  results = {**card['results'], **(bits['results'] if bits else {})}
  reasons = [] if bands else ['no published score of this recipe is known']
  reasons += task.differences
  if not task.origin:
    if (task.workdir / runs.INIT).exists():
      reasons.append('the run started from the parameters of another run')
    if step != task.config['num_steps']:
      reasons.append(f'step {step:,} of {task.config["num_steps"]:,}')
  reasons += samples_unlike(task, card)
  if bits and 'bpd' in bands:
    reasons += bits_unlike(task, bits)
  # `samples_unlike` reports a missing FID.
  missing = (name for name in bands if name not in results and name != 'fid')
  reasons += [f'{title(name)} was not measured' for name in missing]
  checks = [
    {'result': name, 'value': results[name], 'band': [low, high],
     'well': low <= results[name] <= high}
    for name, (low, high) in bands.items()
    if name in results
  ]  # fmt: skip
  well = all(check['well'] for check in checks)
  verdict = 'reproduced' if well else 'not reproduced'
  verdict = 'no verdict' if reasons else verdict
  return {'verdict': verdict, 'checks': checks, 'reasons': reasons}


def rows(task: Task, card: Mapping, bits: Mapping | None) -> list[Row]:
  """The table: our row, then published rows of the paper's or our sampler.

  Args:
    task: the task.
    card: the card of samples.
    bits: the card of bits per dimension; None = not measured.
  """
  told = {
    name: tables.result(card, name).text
    for name in (*cards.DISTANCES, 'inception_score')
    if name in card['results']
  }
  if bits:
    told['bpd'] = f'≤ {tables.result(bits, "bpd").text}'
  subject, count = card['subject'], card['protocol']['num_samples']
  used = (subject['sampler'], subject['evaluations'])
  who = 'imported' if task.origin else 'ours'
  ours = Row(
    f'{who}, step {subject["step"]:,}', *used, f'{count:,} samples', told
  )
  return [ours] + [
    row
    for row in task.recipe.rows
    if row.sampler == 'ancestral' or (row.sampler, row.evaluations) == used
  ]


def title(name: str) -> str:
  """The name of a result, without the arrow."""
  return tables.head(name).rstrip(' ↓↑')


def text(task: Task, table: Sequence[Row], verdict: Mapping) -> list[str]:
  """The table, the bands and the verdict, as lines.

  Args:
    task: the task.
    table: the result of `rows`.
    verdict: the result of `judge`.
  """
  recipe = task.recipe
  names = list(dict.fromkeys(name for row in table for name in row.results))
  lines = terminal.table(
    ['', *map(title, names), 'sampler', 'evaluations', 'source'],
    [
      [row.system, *(row.results.get(name, '-') for name in names), row.sampler,
       str(row.evaluations), row.source]
      for row in table
    ],
  )  # fmt: skip
  lines.append('')
  for what, bands in (
    ('a run of 800,000 steps', recipe.own),
    ('the published weights', recipe.imported),
  ):
    if bands:
      each = (f'{title(n)} {_span(*band)}' for n, band in bands.items())
      lines.append(f'band for {what}: {", ".join(each)}')
  for paper in recipe.rows[:1]:
    missing = [
      f'{title(name)} ({value} in the paper)'
      for name, value in paper.results.items()
      if name not in recipe.own
    ]
    lines += [f'no band is known for a run: {", ".join(missing)}', '']
  if reasons := verdict['reasons']:
    return [*lines, 'no verdict, because', *(f'  {line}' for line in reasons)]
  checks = (
    f'{title(check["result"])} {check["value"]:.3f} is '
    f'{"in" if check["well"] else "outside"} the band, {_span(*check["band"])}'
    for check in verdict['checks']
  )
  return [*lines, f'{verdict["verdict"]}: {"; ".join(checks)}']


def _span(low: float, high: float) -> str:
  return f'{low:.2f} to {high:.2f}' if low else f'at most {high:.2f}'
