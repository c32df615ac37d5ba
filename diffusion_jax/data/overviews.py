"""Recognises pictures of many images (grids) in a folder of single ones.

Programs that draw samples save a grid of them beside. In a set to be evaluated
it is no sample. A file is left out if all of this holds:

- it has FACTOR times as many bytes as the median file;
- it shows AREA times as many pixels as the other images, whose sizes agree;
- there are no more such files than MOST, or a hundredth of the set;
- if the images are resized anyway, so that a set may be of mixed sizes: its
  name has one of WORDS.

Pictures beside the folders that hold the images are left out too if each has
BESIDE times as many pixels as those images, whose sizes agree.
"""

import re
import statistics
from collections.abc import Callable, Sequence

WORDS = re.compile(
  r'(?<![a-z])(grid|samples|sheet|preview|overview|montage|collage|mosaic)'
  r's?(?![a-z])',
  re.IGNORECASE,
)
FACTOR = 2
AREA = 8
BESIDE = 2
MOST = 3
COMPARED = 8  # other images whose size is read


def find(
  images: Sequence[tuple[str, int]],
  size_fn: Callable[[str], tuple[int, int] | None],
  is_resized: bool,
) -> list[str]:
  """The names of the overviews in a set.

  Args:
    images: (name, size in bytes).
    size_fn: name -> (width, height); None if it cannot be read.
    is_resized: whether the set is read at another size than its files have.
  """
  usual = statistics.median(size for _, size in images)
  large = [
    name
    for name, size in images
    if size >= FACTOR * usual and (not is_resized or WORDS.search(name))
  ]
  if len(large) > max(MOST, len(images) // 100):
    return []
  others = [name for name, _ in images if name not in large]
  return _larger(large, others, AREA, size_fn)


def beside(
  names: Sequence[str],
  size_fn: Callable[[str], tuple[int, int] | None],
  is_resized: bool,
) -> list[str]:
  """The names of the overviews beside the folders of a set.

  Args:
    names: the images, with '/'.
    size_fn: name -> (width, height); None if it cannot be read.
    is_resized: whether the set is read at another size than its files have.

  Returns:
    all images beside the folders, or [] if one of them may be no overview.
  """
  least = min(name.count('/') for name in names)
  outer = [name for name in names if name.count('/') == least]
  inner = [name for name in names if name.count('/') > least]
  if len(outer) >= len(inner) or (
    is_resized and not all(map(WORDS.search, outer))
  ):
    return []
  found = _larger(outer, inner, BESIDE, size_fn)
  return found if found == outer else []


def _larger(names, others, factor, size_fn) -> list[str]:
  """Those with `factor` times the pixels of the others, whose sizes agree."""
  step = max(1, len(others) // COMPARED)
  sizes = {size_fn(name) for name in others[::step]}
  if len(sizes) != 1 or None in sizes:
    return []
  ((width, height),) = sizes
  return [
    name
    for name in names
    if (size := size_fn(name)) and size[0] * size[1] >= factor * width * height
  ]
