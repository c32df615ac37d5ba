"""Whether pictures show what their texts say, as a pair of encoders sees it.

A picture agrees with its text if the text is among the first k of many texts,
in the order of their cosines with the picture (recall at k). Beside it stand
the chance of that, and the recall of blank pictures of each one's mean colour,
which is what colour alone would give.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from diffusion_jax.codecs import pixels
from diffusion_jax.evaluation import breakdown, features
from diffusion_jax.evaluation.metrics import retrieval
from diffusion_jax.objectives import contrastive
from diffusion_jax.runs import pairs, texts
from diffusion_jax.runs.trained import Trained
from diffusion_jax.system import terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

FIRST = (1, 5)  # the k of recall at k
BLANK, CHANCE = '_blank', '_chance'


class Encoders(NamedTuple):
  """Encoders of pictures and texts to unit vectors.

  Attributes:
    see: images [n, H, W, C], uint8 or float32 in [0, 255] -> float32 [n, D].
    read: n texts -> float32 [n, D].
    told_apart: n texts -> n values; equal ones for texts that are read alike.
    protocol: what numbers depend on, for cards.
    details: other facts for cards.
    scores: whether the mean of the cosines is the CLIP score.
  """

  see: Callable[[np.ndarray], np.ndarray]
  read: Callable[[Sequence[str]], np.ndarray]
  told_apart: Callable[[Sequence[str]], list[Hashable]]
  protocol: dict
  details: dict
  scores: bool = False


class Asked(NamedTuple):
  """Texts to find, among others.

  Attributes:
    encoders: the encoders.
    texts: C texts, all different.
    vectors: float32 [C, D], theirs.
    own: int [P, M], the numbers of the texts of P pictures, or prompts, filled
      up with repeats.
    added: how many of the texts are not among the candidates.
  """

  encoders: Encoders
  texts: list[str]
  vectors: np.ndarray
  own: np.ndarray
  added: int

  @property
  def protocol(self) -> dict:
    """What the numbers depend on, for cards."""
    digest = hashlib.sha256('\n'.join(sorted(self.texts)).encode())
    return {
      **self.encoders.protocol,
      'num_captions': len(self.texts),
      'captions_sha256': digest.hexdigest(),
    }


def of_run(trained: Trained, batch_size: int) -> Encoders:
  """The encoders of a run with loss.name='contrastive'.

  Args:
    trained: the run.
    batch_size: pictures and texts at once, over all devices.

  Raises:
    UserError: the run's tokenizer is missing or damaged.
  """
  made = texts.kept(trained.workdir, trained.config)
  ids = trained.config['conditioning']['ids']
  parts, mesh = trained.recipe.parts, trained.mesh
  size = sharding.rounded(batch_size, mesh)

  @jax.jit
  def image_fn(params, images):
    params = sharding.gather_fsdp(params, mesh)
    return contrastive.seen(parts[pairs.IMAGE], params, pixels.to_float(images))

  @jax.jit
  def text_fn(params, tokens):
    params = sharding.gather_fsdp(params, mesh)
    return contrastive.read(parts[pairs.TEXT], params, tokens, ids)

  def batched(fn, part, rows):
    own = trained.params[part]
    return sharding.in_batches(lambda x: fn(own, x), rows, size, mesh)

  def read(given):
    each = made.encode(given)
    for number, left in each.cut.items():
      terminal.say_once(
        f'{given[number]!r:.60} is longer than the {made.length} tokens of '
        f'{trained.workdir}: {left[:60]!r} is left out'
      )
    return batched(text_fn, pairs.TEXT, each.ids)

  facts = {
    'text_judge': 'contrastive',
    'text_judge_step': trained.step,
    'text_judge_sha256': trained.weights_sha256,
    'tokenizer_sha256': made.sha256,
  }
  return Encoders(
    lambda images: batched(image_fn, pairs.IMAGE, images),
    read,
    lambda given: [row.tobytes() for row in made.encode(given).ids],
    facts,
    {'judge': f'{trained.workdir}@{trained.step}'},
  )


def ask(
  encoders: Encoders,
  candidates: Iterable[str],
  own: Sequence[Sequence[str]],
) -> Asked:
  """Texts to find among candidates.

  Args:
    encoders: the encoders.
    candidates: texts; those that are read alike count once.
    own: the texts of each picture, or each prompt. Those that are no candidates
      are added.

  Raises:
    UserError: there are fewer than two different texts.
  """
  first, kept = {}, []

  def add(given):
    for text, key in zip(given, encoders.told_apart(given), strict=True):
      if key not in first:
        first[key] = len(kept)
        kept.append(text)

  add(list(candidates))
  before = len(kept)
  flat = [text for several in own for text in several]
  add(flat)
  if len(kept) < 2:
    raise UserError(
      f'{len(kept)} different captions to choose from: give at least 2'
    )
  numbers = iter([first[key] for key in encoders.told_apart(flat)])
  rows = [[next(numbers) for _ in several] for several in own]
  width = max(map(len, rows))
  filled = np.array([row + row[:1] * (width - len(row)) for row in rows])
  vectors = encoders.read(kept)
  return Asked(encoders, kept, vectors, filled, len(kept) - before)


def plain(numbers: np.ndarray, images: np.ndarray) -> np.ndarray:
  """Pictures as they are."""
  del numbers
  return images


def blank(numbers: np.ndarray, images: np.ndarray) -> np.ndarray:
  """Pictures of one colour, the mean of each: float32."""
  del numbers
  colour = images.mean((1, 2), dtype=np.float64, keepdims=True)
  return np.broadcast_to(colour, images.shape).astype(np.float32)


def vectors_of(
  encoders: Encoders,
  images: features.Images,
  changes: Sequence[Callable],
  on_images: Callable[[int], None],
) -> list[np.ndarray]:
  """Vectors of pictures.

  Args:
    encoders: the encoders.
    images: the pictures.
    changes: (numbers [n], images [n, H, W, C]) -> the images to encode, such as
      `plain` and `blank`.
    on_images: called with the number of images after each block.

  Returns:
    float32 [N, D] for each change.

  Raises:
    UserError: a vector is not finite.
  """
  found, first = [[] for _ in changes], 0
  for block in features.blocks(images.stream()):
    rows = np.arange(first, first + len(block), dtype=np.uint32)
    for kept, change in zip(found, changes, strict=True):
      seen = encoders.see(change(rows, block))
      if not np.isfinite(seen).all():
        raise UserError(
          f'{images.description}: an image has a vector that is not finite: '
          'was the training of the run and of its judge healthy?'
        )
      kept.append(seen)
    first += len(block)
    on_images(len(block))
  return [np.concatenate(kept) for kept in found]


def numbers(
  asked: Asked, vectors: np.ndarray, own: np.ndarray, tail=''
) -> dict:
  """The recall of pictures: name -> number.

  Args:
    asked: the texts.
    vectors: [N, D] of the pictures.
    own: int [N, M], the numbers of their texts.
    tail: of the names.
  """
  found = retrieval.ranks(vectors, asked.vectors, own)
  _, groups = np.unique(own[:, 0], return_inverse=True)
  told = {}
  for k in FIRST:
    name = f'text_recall_{k}{tail}'
    told[name] = retrieval.recall(found, k)
    if limits := retrieval.interval(found < k, groups):
      told |= {f'{name}_low': limits[0], f'{name}_high': limits[1]}
  return told


def chance(asked: Asked, own: np.ndarray, k: int) -> float:
  """The recall at k of texts in random order, see `numbers`."""
  return retrieval.chance(own, len(asked.texts), k)


def by_number(results: dict) -> dict:
  """The results of recall at 1 first, then those at 5."""
  return dict(sorted(results.items(), key=lambda x: int(x[0].split('_')[2])))


def measure(
  asked: Asked,
  images: features.Images,
  on_images: Callable[[int], None] = lambda count: None,
) -> tuple[dict, dict]:
  """The agreement of samples with their prompts.

  Args:
    asked: the prompts, one a row: sample i has number i % P.
    images: the samples.
    on_images: called with the number of images after each block.

  Returns:
    (results, details) for a card: recall at k with intervals, that of blank
    pictures and by chance, and the p-value of the prompts permuted over the
    groups of samples that share one.
  """
  seen, empty = vectors_of(asked.encoders, images, (plain, blank), on_images)
  rows = np.arange(images.count) % len(asked.own)
  own = asked.own[rows]
  results = numbers(asked, seen, own)
  of_blank = numbers(asked, empty, own, BLANK)
  results |= {name: x for name, x in of_blank.items() if name.endswith(BLANK)}
  present, groups = np.unique(own[:, 0], return_inverse=True)
  for k in FIRST:
    results[f'text_recall_{k}{CHANCE}'] = chance(asked, own, k)
    if len(present) > 1:
      counts = retrieval.by_text(seen, asked.vectors, groups, present, k)
      results[f'text_recall_{k}_p'] = retrieval.permuted(counts)
  results = by_number(results)
  if asked.encoders.scores:
    results |= scores(asked, seen, empty, own)
  details = {**asked.encoders.details}
  if asked.added:
    details['captions_added'] = asked.added
  if 1 < len(present) <= breakdown.SHOWN:
    details['by_prompt'] = _by_prompt(asked, seen, own)
  return results, details


def scores(
  asked: Asked, vectors: np.ndarray, empty: np.ndarray, own: np.ndarray
) -> dict:
  """The CLIP score (arXiv 2104.08718): 100 times the mean of positive cosines.

  Its factor is 100 in place of the paper's 2.5, as is usual for samples.

  Args:
    asked: the texts.
    vectors: [N, D] of the pictures.
    empty: [N, D] of blank ones.
    own: int [N, M], the numbers of their texts, of which the first one counts.
  """
  texts_of = asked.vectors[own[:, 0]]
  seen, blank_ones = (
    100 * np.maximum((x * texts_of).sum(1), 0) for x in (vectors, empty)
  )
  error = seen.std(ddof=1) / np.sqrt(len(seen)) if len(seen) > 1 else None
  told = {'clip_score': float(seen.mean())}
  told |= {} if error is None else {'clip_score_error': float(error)}
  return {**told, f'clip_score{BLANK}': float(blank_ones.mean())}


def _by_prompt(asked, vectors, own) -> list[list]:
  """For each prompt: [text, samples, median place, recall at each k]."""
  found, rows = retrieval.ranks(vectors, asked.vectors, own), []
  for number in dict.fromkeys(own[:, 0].tolist()):
    mine = found[own[:, 0] == number]
    place = 1 + float(np.median(mine))
    recalls = [retrieval.recall(mine, k) for k in FIRST]
    rows.append([asked.texts[number], len(mine), place, *recalls])
  return rows
