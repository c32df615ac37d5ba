r"""Every method of `edit` at every task, beside answers without a model.

  python benchmarks/editing.py --workdir=runs/digits --tasks=digits \
    --output=docs/editing_digits.json
  python benchmarks/editing.py --workdir=runs/cifar10 --tasks=cifar10 \
    --num_images=32 --features=INCEPTION --output=docs/editing_cifar10.json

Held-out images of the run are measured, with noise of standard deviation 0.05
in units of [-1, 1] (6.4 levels of 255; denoise: 0.3 or 40 levels, too), and
answered. Columns:

  psnr, ssim   of an answer, the mean over images. SSIM: a uniform window of 7x7
  distance     digits: Frechet distance of the answers to the held-out images,
               by features of a classifier of the digits; others: the mean
               distance of an answer to its image, by 768 features of Inception
  class        digits: the share of answers that the classifier takes for what
               the image is
  residual     the root mean square of y - A x, over the level of noise
  evaluations  of the network, forwards, per answer; seconds per answer

The noise, the masks and the answers are those of seed 0. A cell that --output
has is not computed again, so an interrupted job goes on.
"""

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import rounds
from absl import flags

from diffusion_jax import data, load
from diffusion_jax.cli import command, declare, judges
from diffusion_jax.codecs import pixels
from diffusion_jax.editing import kernels, measurements
from diffusion_jax.evaluation import features, inception
from diffusion_jax.evaluation.metrics import frechet
from diffusion_jax.runs import edit_plans, edits
from diffusion_jax.system import files, terminal

FLAGS = flags.FLAGS
NOISE = 0.05 * 127.5
LARGER = 40.0  # levels of 255, of the second task of denoising
BATCHES = 4
# Without gradients of several steps where one evaluation is nearly as good.
LEFT_OUT = {'denoise': ('replacement', 'repaint', 'covariance', 'dps')}


def _box(side, inner):
  mask = np.ones((side, side), bool)
  first = (side - inner) // 2
  mask[first : first + inner, first : first + inner] = False
  return mask


def _half(side, inner):
  mask = np.ones((side, side), bool)
  mask[side - inner :] = False
  return mask


def _random(count, side, share):
  """Masks of each image: bool [count, side, side]."""
  rng = np.random.default_rng(0)
  places = rng.random((count, side * side)).argsort(1)
  return (places >= round(share * side * side)).reshape(count, side, side)


def tasks(name: str, count: int) -> dict:
  """Task -> (what is known, level of noise, masks or None).

  Args:
    name: 'digits' or 'cifar10'.
    count: the number of images.
  """

  def all_alike(mask):
    return np.broadcast_to(mask, (count, *mask.shape))

  def blur(kernel):
    return {'name': 'deblur', 'kernel': np.round(kernel, 12).tolist()}

  inpaint = {'name': 'inpaint'}
  if name == 'cifar10':
    return {
      'x4': ({'name': 'upscale', 'factor': 4}, NOISE, None),
      'box 16x16': (inpaint, NOISE, all_alike(_box(32, 16))),
      'random 70%': (inpaint, NOISE, _random(count, 32, 0.7)),
      'colourise': ({'name': 'colourise'}, NOISE, None),
      'denoise 6.4': ({'name': 'denoise'}, NOISE, None),
    }
  return {
    'box 4x4': (inpaint, NOISE, all_alike(_box(8, 4))),
    'lower half': (inpaint, NOISE, all_alike(_half(8, 4))),
    'random 70%': (inpaint, NOISE, _random(count, 8, 0.7)),
    'x2': ({'name': 'upscale', 'factor': 2}, NOISE, None),
    'x4': ({'name': 'upscale', 'factor': 4}, NOISE, None),
    'Gaussian blur': (blur(kernels.gaussian(1.0)), NOISE, None),
    'motion blur': (blur(kernels.motion(4, 30)), NOISE, None),
    'denoise 6.4': ({'name': 'denoise'}, NOISE, None),
    'denoise 40': ({'name': 'denoise'}, LARGER, None),
  }


def main():
  command.need('workdir', 'tasks', 'output')
  rounds.need('skimage', extra='benchmarks')
  import edit_rivals

  trained = load(FLAGS.workdir)
  _, heldout = data.splits(trained.config['data'])
  count = FLAGS.num_images or len(heldout)
  images = features.images_of(heldout, count, heldout.num_classes > 0)
  whole = np.concatenate(list(images.stream()))
  judge = _judge(trained, whole, images.labels)
  path = Path(FLAGS.output)
  found = json.loads(path.read_text()) if path.exists() else {}
  found.setdefault('cells', {})
  for task, (kind, noise, masks) in tasks(FLAGS.tasks, count).items():
    if FLAGS.only and task not in FLAGS.only:
      continue
    known = measured(kind, whole, noise, masks)
    cells = found['cells'].setdefault(task, {})
    answers = {
      **_ours(trained, kind, known, noise, masks, whole.shape[1:]),
      **edit_rivals.of(task, kind, noise, masks, whole.shape[1:]),
    }
    for name, answer in answers.items():
      if name in cells or (FLAGS.methods and name not in FLAGS.methods):
        continue
      cells[name] = _cell(answer, known, whole, noise, judge)
      terminal.say(f'{task}, {name}: {cells[name]}')
      found['machine'] = rounds.machine('jax', 'jaxlib')
      files.write_json(path, found)
  terminal.write(text(found['cells']))


def measured(kind, whole, noise, masks) -> np.ndarray:
  """What is known of images, with noise: float [N, ...] in [0, 255]."""
  shape = whole.shape[1:]
  rows = {'noise': jnp.full(len(whole), noise / 127.5, jnp.float32)}
  if masks is not None:
    rows['mask'] = jnp.asarray(masks[..., None], jnp.float32)
  measurement = measurements.create(kind, shape)(rows)
  size = (len(whole), *measurements.shape_of(kind, shape))
  standard = jax.random.normal(jax.random.key(0), size)
  y = measurements.observe(kind, measurement, pixels.to_float(whole), standard)
  return np.asarray((y + 1) * 127.5)


def _ours(trained, kind, known, noise, masks, shape) -> dict:
  """Method -> a function from what is known to (answers, facts)."""
  found = {}
  for name in edit_plans.able(kind['name']):
    if name in LEFT_OUT.get(kind['name'], ()):
      continue
    try:
      plan = edit_plans.plan(trained, kind, shape, method=name)
    except edit_plans.UserError:
      continue  # the method cannot do the task

    def answer(known, plan=plan):
      given = edits.rows(plan, known, noise, masks)
      first = -(-len(known) // BATCHES)  # compiles, and is not timed
      parts = []
      for some in (slice(first), slice(first, None)):
        start = time.perf_counter()
        part = {key: x[some] for key, x in given.items()}
        zeros = np.zeros(len(part['input']), np.uint32)
        parts.append(edits.answer(trained, plan, part, zeros, first).images)
      seconds = (time.perf_counter() - start) / len(parts[1])
      answers = np.concatenate(parts)
      off = edits.residuals(plan, given, answers).mean() / noise
      return answers, {
        'residual': float(off), 'evaluations': plan.evaluations,
        'seconds': seconds,
      }  # fmt: skip

    found[name] = answer
  return found


def _judge(trained, whole, labels):
  """answers -> their distance, and the share that keeps its class."""
  if FLAGS.features is None:
    folder = Path(trained.workdir) / 'evaluations'
    judge = judges.judge_of(
      *data.splits(trained.config['data']), trained.image_shape, folder
    )
  else:
    judge = inception.load(FLAGS.features, taps=['768'])
  tap = next(iter(judge.taps))

  def seen(images):
    each = [x for _, x in features.passes(judge, [images], 64, trained.mesh)]
    return {key: np.concatenate([x[key] for x in each]) for key in each[0]}

  real = seen(whole)

  def judged(answers):
    found = seen(answers)
    if FLAGS.features is not None:
      off = np.linalg.norm(found[tap] - real[tap], axis=1)
      return {'distance': float(off.mean())}
    own = found[judge.logits].argmax(1)
    both = (frechet.moments_of(x[tap]) for x in (found, real))
    return {
      'distance': float(frechet.distance(*both)),
      'class': float((own == labels).mean()),
    }

  return judged


def _cell(answer, known, whole, noise, judge) -> dict:
  """The numbers of a method at a task."""
  start = time.perf_counter()
  answers = answer(known)
  facts = {'seconds': (time.perf_counter() - start) / len(known)}
  if isinstance(answers, tuple):
    answers, facts = answers
  from skimage import metrics

  each = [
    metrics.structural_similarity(
      a, b, win_size=7, data_range=255, channel_axis=-1
    )
    for a, b in zip(answers, whole, strict=True)
  ]
  error = np.square(np.float64(answers) - whole).mean((1, 2, 3))
  psnr = 10 * np.log10(255**2 / np.maximum(error, 1e-3))
  return {
    'psnr': float(psnr.mean()), 'ssim': float(np.mean(each)),
    **judge(answers), **facts,
  }  # fmt: skip


def text(cells: dict) -> str:
  """A Markdown table for each number: a row a method, a column a task."""
  rows = dict.fromkeys(name for found in cells.values() for name in found)
  keys = dict.fromkeys(
    key for found in cells.values() for row in found.values() for key in row
  )
  lines = []
  for key in keys:
    lines += [
      f'| {key} | {" | ".join(cells)} |',
      '|---|' + '---:|' * len(cells),
    ]
    for name in rows:
      shown = [_shown(found.get(name, {}).get(key)) for found in cells.values()]
      if any(shown):
        lines.append(f'| {name} | {" | ".join(shown)} |')
    lines.append('')
  return '\n'.join(lines)


def _shown(value) -> str:
  return '' if value is None else f'{value:.3g}'


declare.shared('workdir')
declare.table(
  tasks=(('digits', 'cifar10'), 'Which tasks.'),
  num_images=(int, 'Held-out images; by default all.'),
  only=(list, 'Only these tasks, such as x2,x4; by default all.'),
  methods=(list, 'Only these, ours or others; by default all.'),
  output=(str, 'The result as JSON; cells in it are not computed again.'),
)

if __name__ == '__main__':
  command.run(main, __doc__)
