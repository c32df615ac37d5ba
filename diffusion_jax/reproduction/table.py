"""Ours beside the published ones, bands, and a verdict or why there is none.

A verdict is given only where all that the number depends on is as published;
else each difference is named.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffusion_jax import runs
from diffusion_jax.evaluation import cards
from diffusion_jax.reproduction import published
from diffusion_jax.reproduction.published import Band, Recipe
from diffusion_jax.system import terminal

# What may differ from a shipped config without another result, but for noise.
# Not data.heldout_every: it takes its images from those of training.
FREE = (
  *('seed', 'microbatches', 'mesh', 'keep_last', 'eval_images', 'data.path'),
  *('data.heldout_split', 'model.dtype'),
)
# Of weights that others trained, how they did.
FREE_IF_IMPORTED = (
  *(*FREE, 'num_steps', 'batch_size', 'optim', 'ema', 'data.flip'),
  'model.dropout',
)
# And what leaves the loss of a step as it is, once the warm-up is over.
FREE_FOR_LOSS = (*FREE, 'num_steps', 'data.name', 'ema', 'optim.warmup_steps')


class Check(NamedTuple):
  """A number and its band."""

  result: str
  value: float
  band: Band

  @property
  def well(self) -> bool:
    low, high = self.band
    return (low is None or low <= self.value) and self.value <= high


class Verdict(NamedTuple):
  """What came of it.

  Attributes:
    word: 'reproduced', 'not reproduced' or 'no verdict'.
    checks: the numbers that have a band.
    reasons: why there is none, a line each.
  """

  word: str
  checks: tuple[Check, ...]
  reasons: tuple[str, ...]


def differences(
  shipped: Mapping, config: Mapping, free: Sequence[str] = FREE
) -> list[str]:
  """What of a config is not the recipe, a line for each key.

  Args:
    shipped: the recipe, plain.
    config: the run's, plain.
    free: keys that may differ, or groups of them.
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


def not_as_published(
  card: Mapping, recipe: Recipe, config: Mapping, known: bool
) -> list[str]:
  """What of a card of samples is not the paper's protocol, a line each.

  Args:
    card: of `evaluate`.
    recipe: whose protocol.
    config: the recipe's, plain.
    known: whether the weights of Inception are those of 2015-12-05, by the hash
      of the published file.
  """
  told = []
  protocol, subject = card['protocol'], card['subject']
  if 'fid' not in card['results']:
    names = [n for n in cards.DISTANCES if n in card['results']]
    told.append(
      f'the distance is {cards.DISTANCES[names[0]] if names else "missing"}, '
      'not FID by the 2048 features of Inception'
    )
  else:
    told += _unlike([(protocol, {'convention': 'tf1'})])
    if not known:
      told.append(
        'the weights of Inception are not known to be those of 2015-12-05: '
        'give --features=inception, or the published .pth'
      )
  told += _unlike([
    (protocol, {
      'num_samples': published.NUM_SAMPLES,
      'num_reference': recipe.num_train,
      'split': config['data']['train_split'],
      'rounding': 'float',
    }),
    (subject, {
      'sampler': 'ancestral',
      'evaluations': config['process']['num_timesteps'],
      'clip': True,
      'ema': True,
    }),
  ])  # fmt: skip
  if subject.get('sampler') == 'ancestral':
    told += _unlike([(subject, {'variance': config['sample']['variance']})])
  return told


def bits_not_as_published(
  card: Mapping, recipe: Recipe, config: Mapping
) -> list[str]:
  """The same for a card of bits per dimension."""
  protocol = card['protocol']
  told = _unlike([
    (protocol, {
      'bits': 'bpd',
      'split': config['data']['heldout_split'],
      'num_images': recipe.num_heldout,
      'variance': config['sample']['variance'],
      'clip': True,
    }),
    (card['subject'], {'ema': True}),
  ])  # fmt: skip
  steps = len(protocol.get('grid', [])) - 1
  if steps != config['process']['num_timesteps']:
    told.append(f'bits per dimension of {steps} steps, not of all')
  return [f'bits/dim: {line}' for line in told]


def _unlike(wanted) -> list[str]:
  return [
    f'{key}: {there.get(key)}, not {value}'
    for there, values in wanted
    for key, value in values.items()
    if value is not None and there.get(key) != value
  ]


def judge(
  recipe: Recipe,
  results: Mapping[str, float],
  *,
  imported: bool,
  reasons: Sequence[str] = (),
) -> Verdict:
  """The verdict.

  Args:
    recipe: what is published.
    results: of our cards: 'fid', 'bpd'.
    imported: whether published weights were judged, not ours.
    reasons: what differs from the recipe and its protocol.
  """
  bands = recipe.imported if imported else recipe.own
  checks = tuple(
    Check(name, results[name], band)
    for name, band in bands.items()
    if name in results
  )
  reasons = list(reasons)
  if not bands:
    reasons.insert(0, 'no score of this recipe is on record')
  reasons += [
    f'{cards.DISTANCES.get(name, "bits/dim")} was not measured'
    for name in bands
    if name not in results and name != 'fid'  # of which more was said
  ]
  if reasons:
    return Verdict('no verdict', checks, tuple(reasons))
  well = all(check.well for check in checks)
  return Verdict('reproduced' if well else 'not reproduced', checks, ())


def rows(
  recipe: Recipe, ours: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
  """The table: ours first, then what is published of the same samplers.

  Args:
    recipe: what is published.
    ours: 'system', 'sampler', 'evaluations', and of the results 'distance' (its
      name), its value, 'inception_score', 'bits'.

  Returns:
    dicts of one shape, as JSON can hold them.
  """
  used = {(row['sampler'], row['evaluations']) for row in ours}
  theirs = [
    {
      'system': row.system,
      'ours': False,
      'fid': list(row.fid),
      'is_range': row.is_range,
      'inception_score': list(row.inception_score),
      'bits': row.bits,
      'sampler': row.sampler,
      'evaluations': row.evaluations,
      'source': row.source + ' (second-hand)' * row.second_hand,
    }
    for row in recipe.rows
    if row.sampler == 'ancestral' or (row.sampler, row.evaluations) in used
  ]
  own = {'ours': True, 'is_range': False}
  return [*({**row, **own} for row in ours), *theirs]


def text(
  table: Sequence[Mapping[str, Any]], verdict: Verdict, recipe: Recipe
) -> list[str]:
  """The table and the verdict, as lines.

  Args:
    table: of `rows`.
    verdict: of `judge`.
    recipe: what is published.
  """
  # Distances by other features have columns of their own: none is a FID.
  names = list(dict.fromkeys(
    row['distance'] for row in table if row.get('distance', 'fid') != 'fid'
  ))  # fmt: skip
  heads = ['', *(cards.DISTANCES.get(n, n) for n in names), 'FID', 'IS',
           'bits/dim', 'sampler', 'evaluations', 'source']  # fmt: skip
  body = []
  for row in table:
    other = row.get('distance', 'fid')
    body.append([
      row['system'],
      *(_cell(row['fid'] if other == name else []) for name in names),
      _cell(row['fid'] if other == 'fid' else [], row['is_range']),
      ' ± '.join(f'{x:.4g}' for x in row['inception_score']) or '-',
      '-' if row['bits'] is None else f'≤ {row["bits"]:.2f}',
      row['sampler'],
      str(row['evaluations']),
      row['source'],
    ])  # fmt: skip
  lines = terminal.table(heads, body)
  bands = [
    f'{what}: ' + ', '.join(
      f'{cards.DISTANCES.get(name, "bits/dim")} {_span(band)}'
      for name, band in of.items()
    )
    for what, of in (
      ('band for a run of 800,000 steps', recipe.own),
      ('band for the published weights', recipe.imported),
    )
    if of
  ]  # fmt: skip
  if bands:
    lines += ['', *bands, *_without_band(recipe)]
  lines += ['', *told(verdict)]
  return lines


def _cell(values, is_range=False) -> str:
  return (' to ' if is_range else ', ').join(f'{x:.4g}' for x in values) or '-'


def _span(band: Band) -> str:
  if band.low is None:
    return f'at most {band.high:.2f}'
  return f'{band.low:.2f} to {band.high:.2f}'


def _without_band(recipe: Recipe) -> list[str]:
  """What the paper has a number of, and nobody a band."""
  missing = []
  if not recipe.rows:
    return missing
  paper = recipe.rows[0]
  if paper.inception_score:
    score = ' ± '.join(f'{x:.4g}' for x in paper.inception_score)
    missing.append(f'the Inception Score (in the paper {score})')
  if paper.bits and 'bpd' not in recipe.own:
    missing.append(
      f'the bits/dim of a run of ours (in the paper ≤ {paper.bits:.2f})'
    )
  return [f'no band is on record: {"; ".join(missing)}'] if missing else []


def told(verdict: Verdict) -> list[str]:
  """The verdict, line by line."""
  if verdict.word == 'no verdict':
    return ['no verdict, since', *(f'  {line}' for line in verdict.reasons)]
  return [
    f'{verdict.word}: '
    + '; '.join(
      f'{cards.DISTANCES.get(check.result, "bits/dim")} {check.value:.3f} is '
      f'{"in" if check.well else "outside"} the band, {_span(check.band)}'
      for check in verdict.checks
    )
  ]


def markdown(lines: Sequence[str], title: str) -> str:
  """The text as a page, columns and all."""
  return '\n'.join([f'# {title}', '', '```', *lines, '```', ''])
