"""What is published of the recipes that are shipped. Figures only, no code.

Where a figure was read in a table that somebody else reprinted, `second_hand`
says so: check it before quoting it.
"""

import types
from collections.abc import Mapping
from typing import NamedTuple

NONE = types.MappingProxyType({})
DDPM = 'arXiv 2006.11239'


class Row(NamedTuple):
  """A line of the table, not ours.

  Attributes:
    system: what was trained, and by whom.
    fid: one or more, against the training images; several are of several
      runs, unless they are the ends of a range.
    inception_score: mean, and its spread where one is told.
    bits: per dimension of the test images, at most.
    sampler: 'ancestral' or 'ddim'.
    evaluations: of the network, for a sample.
    source: where it was read.
    second_hand: read in a reprint.
    is_range: whether `fid` are the ends of a range.
  """

  system: str
  fid: tuple[float, ...]
  sampler: str
  evaluations: int
  source: str
  inception_score: tuple[float, ...] = ()
  bits: float | None = None
  second_hand: bool = False
  is_range: bool = False


class Band(NamedTuple):
  """Where a number has to lie, the ends included; None = no end."""

  low: float | None
  high: float


class Recipe(NamedTuple):
  """What is known of a shipped config's run.

  Attributes:
    rows: of the table.
    own: result -> band, for a run that was trained here to the last step.
    imported: the same for the published weights.
    loss: (step, training loss) of a healthy run.
    fid: (step, FID) of it, 50,000 samples of 1000 steps.
    curve: whose run that was.
    images_per_sec: of training, on the paper's TPU v3-8.
    evaluations_per_sec: of the network for one image, while drawing there.
    flops: (of a training image, of an evaluation), by `planning.flops`, which
      leaves out what falls on padding.
    num_train: training images, which are the reference; None = not on record.
    num_heldout: test images, of which the bits are; None = likewise.
  """

  rows: tuple[Row, ...] = ()
  own: Mapping[str, Band] = NONE
  imported: Mapping[str, Band] = NONE
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

NUM_SAMPLES = 50_000  # of every FID below

# What mistakes are known to cost, in FID of the same weights (3.17).
WITHOUT_EMA = 12.2
AGAINST_TEST = 5.24
TWO_DRAWS = 0.1  # two draws of 50,000 differ by 0.05 to 0.1

# Of the 256x256 networks no score is on record here: their tables will have no
# verdict.
AT_256 = Recipe(
  images_per_sec=2.2 * 64,
  evaluations_per_sec=128 * 1000 / 300,
  flops=(1470.5e9, 490.3e9),
)

RECIPES = {
  'cifar10': Recipe(
    rows=(
      Row(
        'the paper, DDPM with L_simple', (3.17,), 'ancestral', 1000,
        f'{DDPM}, table 1', (9.46, 0.11), 3.75,
      ),
      Row(
        'public retrains of the recipe', (3.188, 3.24, 3.249), 'ancestral',
        1000, 'public re-implementations', (9.475,),
      ),
      Row(
        'official weights in other hands', (3.21, 3.25), 'ancestral', 1000,
        'public re-implementations', is_range=True,
      ),
      *(
        Row(
          'official weights, DDIM', (fid,), 'ddim', steps,
          'arXiv 2010.02502, table 1', second_hand=True,
        )
        for steps, fid in (
          (10, 13.36), (20, 6.84), (50, 4.67), (100, 4.16), (1000, 4.04),
        )
      ),
    ),
    own={'fid': Band(3.10, 3.35)},
    # The paper has at most 3.75 bits; 0.02 are for the noise that the bound is
    # estimated with. Fewer bits than published are no failure.
    imported={'fid': Band(3.1, 3.3), 'bpd': Band(None, 3.77)},
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
  'lsun:church': AT_256,
  'lsun:bedroom': AT_256,
  'lsun:cat': AT_256,
}  # fmt: skip


def find(name: str) -> Recipe:
  """Of a config's name, such as 'lsun:cat'; an empty one where none is known.

  Args:
    name: the file without .py, and what followed the colon.
  """
  return RECIPES.get({'lsun': 'lsun:church'}.get(name, name), Recipe())
