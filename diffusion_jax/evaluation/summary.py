"""A metric card as people read it, in a terminal."""

from diffusion_jax.evaluation import cards
from diffusion_jax.system import terminal

SHOWN_CLASSES = 20  # with more of them, their table is left to the card

percent = '{:.1%}'.format


def text(card: dict) -> str:
  """Who was judged, by what, a table of the results, and what to beware of."""
  protocol, details = card['protocol'], card['details']
  lines = [
    _who(card),
    f'against {details["reference"]}',
    _judged_by(protocol, details),
    '',
  ]
  heads = ['', 'samples', 'held-out' if protocol['num_heldout'] else '']
  lines += terminal.table(heads, list(_rows(card)))
  if len(details.get('class_histogram', ())) in range(1, SHOWN_CLASSES + 1):
    lines += ['', *_classes(details)]
  if caveats := details.get('caveats'):
    lines += ['', *(f'beware: {caveat}' for caveat in caveats)]
  return '\n'.join(lines)


def _who(card):
  subject, count = card['subject'], card['protocol']['num_samples']
  if 'sampler' not in subject:
    return subject['samples']
  return (
    f'{count} samples of step {subject["step"]}: {subject["sampler"]}, '
    f'{subject["evaluations"]} evaluations each, seed {subject["seed"]}'
  )


def _judged_by(protocol, details):
  if 'classifier_trained_on' in details:
    trained_on = details['classifier_trained_on']
    same = trained_on == details['reference']
    told = f'judged by a classifier of {"them" if same else trained_on}'
    accuracy = details['classifier_accuracy']
    if accuracy is not None:
      told += f', right on {accuracy:.1%} of the held-out images'
    return told
  told = f'judged by {protocol["features"]}'
  if 'convention' in protocol:
    told += f', input as {protocol["convention"]}'
  return f'{told}, samples {ROUNDING[protocol["rounding"]]}'


ROUNDING = {
  'float': 'not rounded',
  'round': 'rounded to 8 bits',
  'truncate': 'truncated to 8 bits',
  'none': 'as they are',
}


def _rows(card):
  """[what, of the samples, of the held-out images] of each result."""
  results, real, protocol = (
    card['results'],
    cards.heldout(card),
    card['protocol'],
  )
  count, held = protocol['num_samples'], protocol['num_heldout']

  def row(text, name, form=cards.number, error=''):
    def cell(values, tail=''):
      if name not in values:
        return ''
      spread = results.get(f'{error}{tail}')
      return form(values[name]) + (f' ± {spread:.2g}' if spread else '')

    return [text, cell(results), cell(real, '_heldout')]

  for name, title in cards.DISTANCES.items():
    if name not in results:
      continue
    title += ' distance' * (name == 'frechet')
    if held != count or not held:
      of = f', {count} images' if count else ''
      yield row(f'{title}{of}', name)
    if held:
      yield row(f'{title}, {held} images', f'{name}_heldout_count')
    if f'{name}_ratio' in results:
      yield row('  samples / held-out', f'{name}_ratio')
  for title, name, form, error in (
    ('KID', 'kid', cards.number, 'kid_error'),
    ('Inception Score', 'inception_score', cards.number, 'inception_score_std'),
    ('precision', 'precision', percent, ''),
    ('recall', 'recall', percent, ''),
    ('density', 'density', cards.number, ''),
    ('coverage', 'coverage', percent, ''),
    ('class with probability > 0.8', 'confident', percent, ''),
    ('least frequent class', 'smallest_class', percent, ''),
    ('identical to a training image', 'identical', percent, ''),
    ('nearest training image, median', 'nearest', cards.number, ''),
    ('  nearer than 95% of held-out', 'nearest_share', percent, ''),
  ):
    if name in results:
      yield row(title, name, form, error)


def _classes(details):
  shares = [['samples', *map(percent, details['class_histogram'])]]
  if 'heldout_class_histogram' in details:
    shares += [['held-out', *map(percent, details['heldout_class_histogram'])]]
  classes = map(str, range(len(shares[0]) - 1))
  return terminal.table(['class', *classes], shares)
