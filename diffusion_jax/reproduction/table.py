"""The table of our and the published numbers, the bands, and the verdict.

There is a verdict only if everything that the number depends on is as
published; otherwise each difference is listed.
"""

from collections.abc import Mapping, Sequence

from diffusion_jax import runs
from diffusion_jax.evaluation import cards, tables
from diffusion_jax.reproduction import published
from diffusion_jax.reproduction.published import Band, Recipe, Row
from diffusion_jax.system import terminal

# Keys that may differ from a shipped config without changing the result, except
# for noise. Not data.heldout_every: it takes images away from training.
FREE = (
  *('seed', 'microbatches', 'mesh', 'keep_last', 'eval_images', 'data.path'),
  *('data.heldout_split', 'model.dtype'),
)
# In addition, for imported weights: how their authors trained them.
FREE_IF_IMPORTED = (
  *(*FREE, 'num_steps', 'batch_size', 'optim', 'ema', 'data.flip'),
  'model.dropout',
)
# Keys that do not change the loss at a step after the warm-up.
FREE_FOR_LOSS = (*FREE, 'num_steps', 'data.name', 'ema', 'optim.warmup_steps')


def differences(
  shipped: Mapping, config: Mapping, free: Sequence[str] = FREE
) -> list[str]:
  """The differences of a config from the recipe, one line per key.

  Args:
    shipped: the recipe, as a plain dict.
    config: the run's config, as a plain dict.
    free: keys, or groups of keys, that may differ.
  """
  there, here = runs.flatten(shipped), runs.flatten(config)
  return [
    f'{key}: {there.get(key)} in the recipe, {here.get(key)} here'
    for key in runs.differences(shipped, config)
    if not (
      (key.endswith('_every') and '.' not in key)
      or (key.startswith('sample.') and key != 'sample.variance')
      or any(key == name or key.startswith(f'{name}.') for name in free)
    )
  ]


def samples_unlike(
  card: Mapping, recipe: Recipe, config: Mapping, known: bool
) -> list[str]:
  """The differences of a card of samples from the paper's protocol.

  Args:
    card: a card from `evaluate`.
    recipe: the published recipe.
    config: the recipe's config, as a plain dict.
    known: whether the Inception weights are those of 2015-12-05, by the hash of
      the published file.

  Returns:
    one line per difference.
  """
  names = [title(n) for n in cards.DISTANCES if n in card['results']]
  is_fid, told = 'FID' in names, []
  if not is_fid:
    told.append(
      f'the distance is {names[0] if names else "missing"}, not FID by the '
      '2048 features of Inception'
    )
  elif not known:
    told.append(
      'the weights of Inception are not known to be those of 2015-12-05: give '
      '--features=inception, or the published .pth'
    )
  ancestral = card['subject'].get('sampler') == 'ancestral'
  return told + _unlike(
    card,
    convention='tf1' if is_fid else None,
    num_samples=published.NUM_SAMPLES,
    num_reference=recipe.num_train,
    split=config['data']['train_split'],
    rounding='float',
    sampler='ancestral',
    evaluations=config['process']['num_timesteps'],
    clip=True,
    ema=True,
    variance=config['sample']['variance'] if ancestral else None,
  )


def bits_unlike(card: Mapping, recipe: Recipe, config: Mapping) -> list[str]:
  """Like `samples_unlike`, for a card of bits per dimension."""
  told = _unlike(
    card,
    bits='bpd',
    split=config['data']['heldout_split'],
    num_images=recipe.num_heldout,
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


def judge(
  bands: Mapping[str, Band],
  results: Mapping[str, float],
  reasons: Sequence[str] = (),
) -> dict:
  """The verdict, as JSON.

  Args:
    bands: result -> band.
    results: our results: 'fid', 'bpd'.
    reasons: differences from the recipe and its protocol.

  Returns:
    'verdict': 'reproduced', 'not reproduced' or 'no verdict'; 'checks' of the
    numbers that have a band: 'result', 'value', 'band', 'well'; 'reasons' why
    there is no verdict, one line each.
  """
  reasons = list(reasons)
  if not bands:
    reasons.insert(0, 'no published score of this recipe is known')
  # `samples_unlike` reports a missing FID.
  missing = (name for name in bands if name not in results and name != 'fid')
  reasons += [f'{title(name)} was not measured' for name in missing]
  checks = [
    {'result': name, 'value': results[name], 'band': list(band),
     'well': band.low <= results[name] <= band.high}
    for name, band in bands.items()
    if name in results
  ]  # fmt: skip
  well = all(check['well'] for check in checks)
  word = 'reproduced' if well else 'not reproduced'
  return {
    'verdict': 'no verdict' if reasons else word,
    'checks': checks,
    'reasons': reasons,
  }


def row_of(card: Mapping, bits: Mapping | None, imported: bool) -> Row:
  """Our row of the table.

  Args:
    card: the card of samples.
    bits: the card of bits per dimension; None = not measured.
    imported: whether the weights are published ones.
  """
  results, subject = card['results'], card['subject']
  told = {
    name: tables.result(card, name).text
    for name in (*cards.DISTANCES, 'inception_score')
    if name in results
  }
  if bits:
    told['bpd'] = f'≤ {tables.result(bits, "bpd").text}'
  return Row(
    f'{"imported" if imported else "ours"}, step {subject["step"]:,}',
    subject['sampler'],
    subject['evaluations'],
    f'{card["protocol"]["num_samples"]:,} samples',
    told,
  )


def rows(recipe: Recipe, ours: Row) -> list[Row]:
  """The table: our row, then published rows of the paper's or our sampler."""
  used = (ours.sampler, ours.evaluations)
  return [ours] + [
    row
    for row in recipe.rows
    if row.sampler == 'ancestral' or (row.sampler, row.evaluations) == used
  ]


def title(name: str) -> str:
  """The name of a result, without the arrow."""
  return tables.head(name).rstrip(' ↓↑')


def text(table: Sequence[Row], verdict: Mapping, recipe: Recipe) -> list[str]:
  """The table, the bands and the verdict, as lines.

  Args:
    table: the result of `rows`.
    verdict: the result of `judge`.
    recipe: the published recipe.
  """
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
