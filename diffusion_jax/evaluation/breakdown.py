"""What a metric card says of each label, or each prompt, as tables of text."""

from diffusion_jax.evaluation import cards
from diffusion_jax.evaluation.cards import number

SHOWN = 20  # with more labels or prompts, there is no table of them


def of_card(card: dict) -> list[tuple[list[str], list[list[str]]]]:
  """The tables of a card, as text: (heads, rows) each.

  They are the distances of the samples of each label, the classes that the
  judge gives them, the places at which prompts are found, and the samples that
  are very near a training image. With more than SHOWN rows there are none.
  """
  details = card.get('details', {})
  made = {
    'frechet_by_class': _distances,
    'confusion': _confusion,
    'by_prompt': _prompts,
    'copied': _copied,
  }
  return [
    table_of(details)
    for name, table_of in made.items()
    if len(details.get(name, ())) in range(1, SHOWN + 1)
  ]


def _distances(details):
  """The distance of the samples of each label to its training images."""
  by_class = details['frechet_by_class']
  names = dict(enumerate(details.get('class_names', ())))
  heads = ['label', *(str(names.get(int(k), k)) for k in by_class)]
  row = [cards.DISTANCES['frechet'], *map(number, by_class.values())]
  return heads, [row]


def _confusion(details):
  """Samples of each label by their class, and the share that is right."""
  counts, real = details['confusion'], details.get('heldout_confusion', [])
  names = [*map(str, details.get('class_names', ()))]
  names += map(str, range(len(names), len(counts)))

  def right(of, k):
    row = of[k] if k < len(of) else []
    return f'{row[k] / sum(row):.1%}' if sum(row) and k < len(row) else '–'

  rows = [
    [name, *map(str, row), right(counts, k), right(real, k)]
    for k, (name, row) in enumerate(zip(names, counts, strict=False))
  ]
  classes = map(str, range(len(counts[0])))
  return ['label, by class', *classes, 'right', 'held-out'], rows


def _prompts(details):
  """How samples of each prompt find it: places from 1, and recall."""
  heads = ['prompt', 'samples', 'median place', 'first', 'in 5']
  rows = [
    [text, str(count), f'{place:g}', *(f'{x:.1%}' for x in recalls)]
    for text, count, place, *recalls in details['by_prompt']
  ]
  return heads, rows


def _copied(details):
  """Samples nearer to a training image than 95% of held-out images are."""
  heads = ['near', 'prompt', 'nearest training image', 'distance']
  rows = [
    [f'sample {sample}', prompt, caption, number(distance)]
    for sample, prompt, caption, distance in details['copied']
  ]
  return heads, rows
