"""Judges the samples of a run: the task, and the card of drawn samples."""

import numpy as np
from absl import flags

from diffusion_jax.cli import (
  agreeing,
  drawing,
  judges,
  judging,
  run_data,
  sharpening,
)
from diffusion_jax.data import labels as labels_of_data
from diffusion_jax.evaluation import cards, features, measure
from diffusion_jax.runs import dataset, guided, labels, store
from diffusion_jax.runs.trained import Trained
from diffusion_jax.samplers.plan import Plan
from diffusion_jax.system import distributed, files

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(agreeing)
# Images per batch; a judge's feature maps may be larger than the images.
JUDGED = 64


def dtype() -> str:
  """The dtype of the samples on disk."""
  return 'uint8' if FLAGS.rounding == 'round' else 'float32'


def task(trained: Trained, plan: Plan) -> measure.Task:
  """How samples of any step are judged, checked before any is drawn.

  Args:
    trained: the network.
    plan: how samples are drawn, of which only the prompts count here.

  Raises:
    UserError: the images, a judge or a metric are not there.
  """
  workdir = trained.workdir
  config, shape = trained.config['data'], trained.image_shape
  heldout = None
  if FLAGS.reference:
    source = judging.open_set('reference', shape[:2], shape[2])
    about = {'data': 'images' if source else 'statistics'}
  else:
    source, heldout = run_data.splits(trained.config)
    about = {
      'data': config['name'],
      'split': config['train_split'],
      'heldout_split': config['heldout_split'] if heldout else '',
    }
  count = FLAGS.num_samples
  samples = features.Images(count, None, f'--num_samples={count}')
  judge = judges.judge_of(source, heldout, shape, workdir / 'evaluations')
  labelled = _of_labels(trained)
  if names := labelled and _class_names(labelled):
    judge = judge._replace(details={**judge.details, 'class_names': names})
  # Labels that are read with the images would need one more pass over them.
  known = labelled and not FLAGS.reference and labels_of_data.are_quick(source)
  reference = judging.set_of('reference', source, judge, shape, bool(known))
  # Spread over the set: in a sorted one the first images are of one class.
  held = heldout and features.images_of(
    heldout, min(count, len(heldout)), bool(labelled)
  )
  usual = ['fid']
  if not FLAGS.sweep:  # a sweep caches the reference's statistics
    usual += ['copies'] * bool(source)
    usual += ['classes'] * ('num_classes' in judge.protocol)
  asked = agreeing.asked(trained, plan)
  about |= {'rounding': FLAGS.rounding, **agreeing.protocol(asked)}
  made = judging.task(judge, samples, reference, held, about=about, usual=usual)

  if asked is None and trained.low_resolution is None:
    return made

  def more(images):
    results, details = agreeing.measured(asked, images)
    return results | sharpening.measured(trained, images), details

  return made._replace(more=more)


def _of_labels(trained):
  """Whose labels samples get: the run's, or those of its classifier."""
  if dataset.num_classes(trained.config['conditioning']):
    return trained
  return trained.guides.get(guided.CLASSIFIER)


def _class_names(labelled) -> list[str]:
  count = dataset.num_classes(labelled.config['conditioning'])
  known = dataset.read_labels(labelled.workdir, count)
  return known['names'] if known else []


def card_path(
  task: measure.Task, workdir, step: int, plan: Plan, how: dict | None = None
) -> files.Path:
  """The file of a card.

  Args:
    task: how samples are judged.
    workdir: the run's folder.
    step: the step of the checkpoint.
    plan: how samples are drawn.
    how: see `drawing.name`.
  """
  what = f'{task.protocol["features"]}_{task.protocol["num_samples"]}'
  name = cards.name(drawing.name(step, plan, how=how), what, task.protocol)
  return workdir / 'evaluations' / f'{name}.json'


def subject(trained: Trained, plan: Plan, output=None) -> dict:
  """The subject of a card.

  Args:
    trained: the network.
    plan: how samples are drawn.
    output: the folder of the samples, for an adaptive plan.
  """
  told = {**cards.subject_of(trained), **plan.protocol()}
  if not plan.adaptive:
    rows = {'network_rows': plan.rows} if plan.rows != plan.evaluations else {}
    return {**told, 'evaluations': plan.evaluations, **rows}
  took = drawing.took(output, FLAGS.num_samples)  # the sampler chose its steps
  return {
    **told,
    'evaluations': round(float(took.evaluations.mean()), 2),
    'unfinished': int((~took.finished).sum()),
  }


def judge(
  task: measure.Task, path, trained: Trained, plan: Plan, output
) -> tuple[dict, int]:
  """Draws missing samples and judges: (the card, the number drawn).

  Args:
    task: how samples are judged.
    path: the file of the card.
    trained: the network.
    plan: how samples are drawn.
    output: the folder of the samples.
  """
  count = FLAGS.num_samples
  drawn = drawing.fill(trained, plan, output, count, dtype())

  def stream():
    for images in store.stream(output, 0, count, features.BLOCK):
      # No value is negative, so this rounds down.
      yield images.astype(np.uint8) if FLAGS.rounding == 'truncate' else images

  def shown(i):
    (images,) = store.stream(output, i, i + 1, 1)
    return features.whole(images[0])

  asked, prompts = labels.of_samples(plan, count), plan.condition.get('prompts')
  samples = features.Images(
    count, stream, f'samples in {output}', shown, asked,
    prompts and (lambda i: prompts[i % len(prompts)]),
  )  # fmt: skip
  card = judging.carry_out(
    task,
    samples,
    subject(trained, plan, output),
    path,
    batch_size=min(FLAGS.batch_size, JUDGED),
    mesh=trained.mesh,
    sample_cache=output,
  )
  distributed.on_first(lambda: sharpening.draw(trained, samples, path))
  return card, drawn
