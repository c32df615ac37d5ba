r"""Judges samples of a trained run against its data.

  python -m diffusion_jax.evaluate --workdir=runs/digits --num_samples=2000 \
    --sampler=ddim --num_steps=50
  python -m diffusion_jax.evaluate --compare=runs/a,runs/b

Draws what the sample store lacks, as the sampling binary does, and compares the
samples to all training images: the Frechet distance, beside that of held-out
images (the floor), and the nearest training images, beside the held-out images'
(has it copied?). Labelled data also get the classes of the samples, by a
classifier that is trained once. Leaves a metric card and a picture of the
neighbours in WORKDIR/evaluations, and WORKDIR/report.html.
"""

from pathlib import Path

import numpy as np
from absl import flags

from diffusion_jax import cli, data, files, pictures, runs, sampling
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import cards, classifier, features, page
from diffusion_jax.evaluation.measure import measure
from diffusion_jax.samplers import store

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(sampling)
flags.DEFINE_integer('num_samples', 1000, 'How many samples are judged.')
flags.DEFINE_string(
  'features', None,
  'What judges: classifier (trained on the data, the default where they have '
  'labels), pixels, or a file of another run: RUN/evaluations/classifier.npz.',
)  # fmt: skip
flags.DEFINE_integer('neighbours', 20, 'Samples on the picture of neighbours.')
flags.DEFINE_string(
  'data_path', None, "Where the data lie, if not the config's."
)
flags.DEFINE_list(
  'compare', [],
  'Prints a table of metric cards (files or runs, with commas) and ends.',
)  # fmt: skip
flags.DEFINE_bool('json', False, 'Print the result as JSON.')

NUM_NEAR = 4  # training images beside each sample


def main():
  if FLAGS.compare:
    _compare()
    return
  if not FLAGS.workdir:
    raise UserError('--workdir is missing; see --help')
  sampling.check_flags(num_samples=2, neighbours=0)
  trained, plan, output = sampling.chosen()
  workdir = Path(FLAGS.workdir).expanduser()
  folder = workdir / 'evaluations'
  runs.usable_folder('workdir', folder)
  config = dict(trained.config['data'])
  if FLAGS.data_path is not None:
    config['path'] = FLAGS.data_path
  reference, heldout = data.splits(config)
  for source in filter(None, (reference, heldout)):
    if len(source) < 2:
      raise UserError(f'{source.description}: a distance takes two or more')
  judge = _judge(folder, reference, heldout, trained.image_shape)

  drawn = sampling.fill(trained, plan, output, FLAGS.num_samples)
  total = FLAGS.num_samples + len(reference) + len(heldout or ())
  with cli.Progress('judging', total, unit='images') as progress:
    measured = measure(
      judge,
      lambda first, end: store.stream(output, first, end, FLAGS.batch_size),
      FLAGS.num_samples,
      reference,
      heldout,
      batch_size=FLAGS.batch_size,
      mesh=trained.mesh,
      num_near=NUM_NEAR,
      on_images=progress.update,
    )
  subject = {
    'workdir': str(workdir),
    'step': trained.step,
    'ema': trained.ema,
    'weights_sha256': trained.weights_sha256,
    **plan.protocol(),
    'evaluations': plan.num_steps,
  }
  card = cards.create(
    subject,
    {'data': config['name'], 'split': config['train_split'],
     **measured.protocol},
    measured.results,
    measured.details,
  )  # fmt: skip
  name = cards.name(sampling.name(trained.step, plan), card['protocol'])
  path = folder / f'{name}.json'
  if FLAGS.neighbours:
    _draw_neighbours(
      folder / f'{name}_neighbours.png', measured, output, reference
    )
  cards.write(path, card)
  report = page.write(workdir, cli.say)
  cli.report(
    {**card, 'path': str(path), 'report': str(report), 'drawn': drawn},
    f'{_text(card)}\n\ncard: {path}\nreport: {report}',
    FLAGS.json,
  )


def _judge(folder, reference, heldout, image_shape):
  """The network that --features asks for, trained if need be."""
  name = FLAGS.features or ('classifier' if reference.num_classes else 'pixels')
  if name == 'pixels':
    return features.pixels(image_shape)
  if name != 'classifier':
    return classifier.load(name, image_shape)
  if not reference.num_classes:
    raise UserError(
      f'--features=classifier: {reference.description}; give --features=pixels'
    )
  if max(image_shape) > classifier.LARGEST:
    raise UserError(
      f'--features=classifier is for images of up to {classifier.LARGEST} '
      f'pixels, not {max(image_shape)}: give --features=pixels'
    )
  path = folder / 'classifier.npz'
  if not path.exists():
    cli.say(f'training a classifier on {reference.description}, once')
    with cli.Progress('classifier', classifier.NUM_STEPS) as progress:
      classifier.train(path, reference, heldout, on_step=progress.update)
  return classifier.load(path, image_shape)


def _draw_neighbours(path, measured, output, reference):
  """The samples nearest to training images first."""
  nearest = measured.nearest
  count = min(FLAGS.neighbours, len(nearest.indices))
  samples = store.load(output, len(nearest.indices))[:count]
  order = np.argsort(nearest.distances[:count, 0])
  rows, labels = [], []
  for i in order:
    real = [reference[int(j)]['image'] for j in nearest.indices[i]]
    rows.append(np.stack([samples[i], *real]))
    label = f'number {i}, at {nearest.distances[i, 0]:.3g}'
    if measured.nearer is not None:
      label += f'; {measured.nearer[i]:.0%} of the held-out are nearer'
    labels.append(label)
  path.parent.mkdir(parents=True, exist_ok=True)
  picture = pictures.neighbours(np.stack(rows), labels)
  with files.replacing(path) as file:
    pictures.save(file, picture)


def _text(card):
  """The card as people read it."""
  subject, protocol = card['subject'], card['protocol']
  results, details = card['results'], card['details']
  accuracy = details.get('classifier_accuracy')
  count, held = protocol['num_samples'], protocol['num_heldout']
  lines = [
    f'{count} samples of step {subject["step"]}: {subject["sampler"]}, '
    f'{subject["evaluations"]} evaluations each, seed {subject["seed"]}',
    f'against {protocol["reference"]}',
    f'judged by {protocol["features"]}'
    + (
      f', right on {accuracy:.1%} of the held-out images'
      if accuracy is not None
      else ''
    ),
    '',
  ]
  percent = '{:.1%}'.format

  def row(text, name, form=cards.number):
    real = cards.heldout(card)
    return [text, form(results[name]), form(real[name]) if name in real else '']

  table = [row(f'Frechet distance, {count} images', 'frechet')]
  if held:
    table += [
      row(f'Frechet distance, {held} images', 'frechet_heldout_count'),
      row('  samples / held-out', 'frechet_ratio'),
    ]
  if 'confident' in results:
    table += [
      row('class with probability > 0.8', 'confident', percent),
      row('least frequent class', 'smallest_class', percent),
    ]
  table += [row('nearest training image, median', 'nearest')]
  if held:
    share = [percent(results['nearest_share']), '5.0%']
    table += [['  nearer than 95% of held-out', *share]]
  heads = ['', 'samples', 'held-out' if held else '']
  lines += cli.table(heads, table)
  if 'class_histogram' in details:
    shares = [['samples', *map(percent, details['class_histogram'])]]
    if 'heldout_class_histogram' in details:
      shares += [
        ['held-out', *map(percent, details['heldout_class_histogram'])]
      ]
    classes = map(str, range(len(shares[0]) - 1))
    lines += ['', *cli.table(['class', *classes], shares)]
  return '\n'.join(lines)


def _compare():
  paths = cards.find(FLAGS.compare)
  found = cards.compare(paths)
  protocol = found[0]['protocol']
  head = ', '.join(
    f'{name} {protocol[name]}'
    for name in ('data', 'split', 'num_reference', 'num_samples', 'features')
    if name in protocol
  )
  text = '\n'.join([head, '', *cli.table(*cards.table(found))])
  cli.report({'protocol': protocol, 'cards': found}, text, FLAGS.json)


if __name__ == '__main__':
  cli.run(main, __doc__)
