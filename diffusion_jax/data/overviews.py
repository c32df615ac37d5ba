"""Recognises pictures of many images (grids) in a folder of single ones.

Programs that draw samples save a grid of them beside. In a set to be evaluated
it is no sample. A file is left out if all of this holds:

- it has FACTOR times as many bytes as the median file;
- it shows AREA times as many pixels as the other images, whose sizes agree;
- there are no more such files than MOST, or a hundredth of the set;
- if the images are resized anyway, so that a set may be of mixed sizes: its
  name has one of WORDS.
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
  step = max(1, len(others) // COMPARED)
  sizes = {size_fn(name) for name in others[::step]}
  if len(sizes) != 1 or None in sizes:
    return []
  ((width, height),) = sizes
  return [
    name
    for name in large
    if (size := size_fn(name)) and size[0] * size[1] >= AREA * width * height
  ]
