"""Published numbers of the shipped recipes. Figures only, no code.

A figure that was read in a reprint is marked as second-hand in its source:
check it before quoting it.
"""

import types
from collections.abc import Mapping
from typing import NamedTuple

NONE = types.MappingProxyType({})
DDPM = 'arXiv 2006.11239'


class Row(NamedTuple):
  """A row of the table.

  Attributes:
    system: what was trained, and by whom.
    sampler: 'ancestral' or 'ddim'.
    evaluations: network evaluations per sample.
    source: the source of the figures.
    results: name on metric cards -> text. FIDs are against the training images;
      several values are from several runs, or the ends of a range. Bits are an
      upper bound for the test images.
  """

  system: str
  sampler: str
  evaluations: int
  source: str
  results: Mapping[str, str]


class Recipe(NamedTuple):
  """The published facts about a shipped config's run.

  Attributes:
    rows: rows of the table.
    own: result -> (low, high), the band that the result of a run trained here
      to the last step must be in, ends included.
    imported: the same for the published weights.
    loss: (step, training loss) of a healthy run.
    fid: (step, FID) of that run, with 50,000 samples of 1000 steps.
    curve: a description of that run.
    images_per_sec: training rate on the paper's TPU v3-8.
    evaluations_per_sec: network evaluations of one image per second, in
      sampling on the same TPU.
    flops: FLOPs (per training image, per evaluation), by `planning.flops`,
      which does not count padding.
    num_train: number of training images, the reference; None = not known.
    num_heldout: number of test images, for the bits; None = not known.
  """

  rows: tuple[Row, ...] = ()
  own: Mapping[str, tuple[float, float]] = NONE
  imported: Mapping[str, tuple[float, float]] = NONE
  loss: tuple[tuple[int, float], ...] = ()
  fid: tuple[tuple[int, float], ...] = ()
  curve: str = ''
  images_per_sec: float | None = None
  evaluations_per_sec: float | None = None
  flops: tuple[float, float] | None = None
  num_train: int | None = None
  num_heldout: int | None = None


# A TPU v3-8 is four chips; cloud.google.com has 123 TFLOP/s of bfloat16 each.
PAPER_PEAK = 4 * 123e12

NUM_SAMPLES = 50_000  # for every FID below

# FIDs of the same weights (3.17) after known mistakes.
WITHOUT_EMA = 12.2
AGAINST_TEST = 5.24
TWO_DRAWS = 0.1  # two draws of 50,000 differ by 0.05 to 0.1

DDIM = {10: '13.36', 20: '6.84', 50: '4.67', 100: '4.16', 1000: '4.04'}

# There are no published scores of the 256x256 networks here, so their tables
# have no verdict.
AT_256 = Recipe(
  images_per_sec=2.2 * 64,
  evaluations_per_sec=128 * 1000 / 300,
  flops=(1470.5e9, 490.3e9),
)

RECIPES = {
  'cifar10': Recipe(
    rows=(
      Row(
        'the paper, DDPM with L_simple', 'ancestral', 1000,
        f'{DDPM}, table 1',
        {'fid': '3.17', 'inception_score': '9.46 ± 0.11', 'bpd': '≤ 3.75'},
      ),
      Row(
        'public retrains of the recipe', 'ancestral', 1000,
        'public re-implementations',
        {'fid': '3.188, 3.24, 3.249', 'inception_score': '9.475'},
      ),
      Row(
        'official weights, other evaluations', 'ancestral', 1000,
        'public re-implementations', {'fid': '3.21 to 3.25'},
      ),
      *(
        Row(
          'official weights, DDIM', 'ddim', steps,
          'arXiv 2010.02502, table 1 (second-hand)', {'fid': fid},
        )
        for steps, fid in DDIM.items()
      ),
    ),
    own={'fid': (3.10, 3.35)},
    # The paper has at most 3.75 bits; 0.02 allows for the noise of the
    # estimated bound. Fewer bits than published are not a failure.
    imported={'fid': (3.1, 3.3), 'bpd': (0, 3.77)},
    loss=(
      (46_800, 0.0295), (93_600, 0.0293), (187_000, 0.0291),
      (421_000, 0.0284), (796_000, 0.0277),
    ),
    fid=(
      (46_800, 9.16), (93_600, 5.78), (187_000, 4.08), (421_000, 3.31),
      (796_000, 3.19),
    ),
    curve='a public run of the recipe',
    images_per_sec=21.0 * 128,
    evaluations_per_sec=256 * 1000 / 17,
    flops=(34.86e9, 11.62e9),
    num_train=50_000,
    num_heldout=10_000,
  ),
  'celebahq256': AT_256,
  **dict.fromkeys(('lsun', 'lsun:church', 'lsun:bedroom', 'lsun:cat'), AT_256),
}  # fmt: skip


def find(name: str) -> Recipe:
  """The recipe of a config such as 'lsun:cat', or an empty one.

  Args:
    name: the file's name without .py, with the part after the colon.
  """
  return RECIPES.get(name, Recipe())
