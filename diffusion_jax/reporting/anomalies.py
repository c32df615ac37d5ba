"""Scores of anomalies as files: a table, heat maps, a picture and a card."""

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps

from diffusion_jax.evaluation import features
from diffusion_jax.evaluation.anomalies import SCORES, How
from diffusion_jax.evaluation.anomaly_scores import Scored
from diffusion_jax.reporting import pictures
from diffusion_jax.system import files, terminal

MAPS, TABLE, PICTURE, CARD = (
  *('heat_maps', 'scores.csv', 'anomalies.png', 'anomalies.json'),
)
FILES = {MAPS, TABLE, PICTURE, CARD}
LEAST_TOP = 3.0  # deviations, so that noise alone is not bright
COLOURS = 'inferno'


def usual_top(maps: np.ndarray) -> float:
  """The standardised error that is drawn brightest by default.

  Args:
    maps: [N, H, W].
  """
  return max(LEAST_TOP, float(np.quantile(maps, 0.99)))


def heat(maps: np.ndarray, top: float) -> np.ndarray:
  """Heat maps as colours: 0 and less is black.

  Args:
    maps: [N, H, W] standardised errors.
    top: what is the brightest colour.

  Returns:
    uint8 [N, H, W, 3].
  """
  return colormaps[COLOURS](np.clip(maps / top, 0, 1), bytes=True)[..., :3]


def lines(
  how: How,
  scored: Mapping[str, Scored],
  names: Mapping[str, Sequence[str]],
  classes: Mapping[str, Sequence[str]],
) -> list[list[str]]:
  """The rows of the table: a head, and a line an image of the input.

  Then those of the inliers, if there are any.

  Args:
    how: the settings.
    scored: set -> its scores.
    names: set -> the name of each image.
    classes: set -> the class of each image, or ''.
  """
  times = {'bound': how.bound_times, 'reconstruction': how.start_times}
  levels = [f'{name}@{time}' for name in SCORES for time in times[name]]
  rows = [['set', 'name', 'class', *SCORES, 'share_above', 'anomaly', *levels]]
  for flag in ('input', 'inliers'):
    if flag not in scored:
      continue
    one = scored[flag]
    each = np.concatenate([one.levels[name] for name in SCORES], axis=1)
    for i, name in enumerate(names[flag]):
      numbers = [one.score(score)[i] for score in SCORES]
      rows.append([
        flag, name, classes[flag][i], *(f'{x:.6g}' for x in numbers),
        f'{one.shares[i]:.6g}', 'yes' if one.above[i] else 'no',
        *(f'{x:.6g}' for x in each[i]),
      ])  # fmt: skip
  return rows


def write(
  output: files.Path,
  card: Mapping,
  rows: Sequence[Sequence[str]],
  images: features.Images,
  names: Sequence[str],
  scores: np.ndarray,
  maps: np.ndarray,
  shown: int,
) -> None:
  """Writes all files; the card is the last, so it says that all are there.

  Args:
    output: the folder; results of an earlier call in it are replaced.
    card: see `evaluation.cards`; its details hold 'heat_max'.
    rows: see `lines`.
    images: the images of the input.
    names: their names; a name that repeats is of one map.
    scores: [N], by which the picture is sorted.
    maps: [N, H, W].
    shown: rows of the picture.
  """
  output = files.make(output)
  if (output / CARD).exists():
    (output / CARD).unlink()
  files.remove(output / MAPS)
  top = card['details']['heat_max']
  told = {'black': '0', 'brightest': f'{top:.6g}', 'unit': 'deviations'}
  for name, one in zip(names, maps, strict=True):
    path = output / MAPS / f'{name}.png'
    files.make(path.parent)
    pictures.save(path, heat(one[None], top)[0], told)
  pictures.save(output / PICTURE, _picture(images, scores, maps, top, shown))
  table = io.StringIO()
  csv.writer(table, lineterminator='\n').writerows(rows)
  with files.replacing(output / TABLE) as file:
    file.write(table.getvalue().encode(errors='surrogateescape'))
  files.write_json(output / CARD, card)


def _picture(images, scores, maps, top, shown) -> np.ndarray:
  """The most and the least anomalous images beside their maps."""
  order = np.argsort(-scores, kind='stable')
  shown = min(shown, len(order))
  columns = []
  for which in (order[:shown], order[::-1][:shown]):
    seen = np.stack([images.image(int(i)) for i in which])
    seen = np.broadcast_to(seen, (*seen.shape[:-1], 3))
    columns += [seen, heat(maps[which], top)]
  heads = ['most', 'its map', 'least', 'its map']
  return pictures.columns(np.stack(columns), heads)


def text(card: Mapping) -> str:
  """The results as a table for people."""
  protocol, results, details = (
    card[part] for part in ('protocol', 'results', 'details')
  )
  count, decides = protocol['input_num_images'], protocol['score']
  told = [
    f'{count} images of {details["input"]}',
    f'{protocol["reference_num_images"]} reference images of '
    f'{details["reference"]}',
    f'{protocol["evaluations"]} evaluations per image',
    '',
    f'{results["above"]} of {count} images are above {results["threshold"]:.4g}'
    f', which a share of {protocol["rate"]:g} of normal images exceeds '
    f'({decides})',
  ]
  if 'detected' in results:
    told += [
      f'anomalies above it: {results["detected"]:.1%}, normal images: '
      f'{results["false_alarms"]:.1%}',
      '',
      *terminal.table(
        ['score', 'AUROC', 'error'],
        [
          (
            name, f'{results[f"auroc_{name}"]:.4f}',
            f'{results[f"auroc_{name}_error"]:.4f}',
          )
          for name in SCORES
        ],
      ),
    ]  # fmt: skip
  return '\n'.join(told)
