r"""Judges samples of a trained run against its data.

  python -m diffusion_jax.evaluate --workdir=runs/digits --num_samples=2000 \
    --sampler=ddim --num_steps=50
  python -m diffusion_jax.evaluate --compare=runs/a,runs/b

Draws what the sample store lacks, as the sampling binary does, and compares the
samples to all training images: the Frechet distance, beside that of held-out
images (the floor), and the nearest training images, beside the held-out images'
(has it copied? Then far more samples than held-out images are near to one).
Labelled data also get the classes of the samples, by a classifier that is
trained once. Leaves a metric card and a picture of the neighbours in
WORKDIR/evaluations, and WORKDIR/report.html.

Without --sampler: DDPM's own, 1000 ancestral steps, which takes its time.
"""

import numpy as np
from absl import flags

from diffusion_jax import (
  cli,
  data,
  distributed,
  files,
  pictures,
  runs,
  sampling,
)
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
  'labels), pixels, or the file of a judge: RUN/evaluations/classifier_*.npz.',
)  # fmt: skip
flags.DEFINE_integer(
  'neighbours', 20,
  'On the picture: so many samples, those nearest to a training image first.',
)  # fmt: skip
flags.DEFINE_string(
  'data_path', None, "Where the data lie, if not the config's."
)
flags.DEFINE_list(
  'compare', [],
  'Prints metric cards of one protocol in a table and ends: files or runs, '
  'with commas between them.',
)  # fmt: skip
flags.DEFINE_bool('json', False, 'Print the result as JSON.')

NUM_NEAR = 4  # training images beside each sample
SHOWN_CLASSES = 20  # with more of them, their table is left to the card


def main():
  distributed.initialize()
  if FLAGS.compare:
    _compare()
    return
  if not FLAGS.workdir:
    raise UserError('--workdir is missing; see --help')
  sampling.check_flags(num_samples=2, neighbours=0)
  trained, plan, output = sampling.chosen()
  workdir = files.at(FLAGS.workdir).expanduser()
  folder = workdir / 'evaluations'
  runs.usable_folder('workdir', workdir)
  runs.usable_folder('workdir', folder)
  config = dict(trained.config['data'])
  if FLAGS.data_path is not None:
    config['path'] = FLAGS.data_path
  try:
    reference, heldout = data.splits(config)
  except UserError as e:
    moved = ' (--data_path says where the data lie now)'
    raise UserError(f'{e}{moved}') from e
  for source in filter(None, (reference, heldout)):
    if len(source) < 2:
      raise UserError(f'{source.description}: a distance takes two or more')
  judge = _judge(folder, reference, heldout, trained.image_shape)

  drawn = sampling.fill(trained, plan, output, FLAGS.num_samples)
  total = FLAGS.num_samples + len(reference)
  total += min(FLAGS.num_samples, len(heldout)) if heldout else 0
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
    {
      'data': config['name'],
      'split': config['train_split'],
      'heldout_split': config['heldout_split'] if heldout else '',
      **measured.protocol,
    },
    measured.results,
    measured.details,
  )
  name = cards.name(sampling.name(trained.step, plan), card['protocol'])
  path = folder / f'{name}.json'

  def finish():
    if FLAGS.neighbours:
      _draw_neighbours(
        folder / f'{name}_neighbours.png', measured, output, reference
      )
    cards.write(path, card)

  distributed.on_first(finish)
  report = workdir / 'report.html'
  cli.report(
    {**card, 'path': str(path), 'report': str(report), 'drawn': drawn},
    f'{_text(card)}\n\ncard: {path}\nreport: {report}',
    FLAGS.json,
  )
  distributed.on_first(lambda: page.write(workdir, cli.say) and None)


def _judge(folder, reference, heldout, image_shape):
  """The network that --features asks for, trained if need be."""
  name = FLAGS.features or ('classifier' if reference.num_classes else 'pixels')
  if name == 'pixels':
    return features.pixels(image_shape)
  path = files.at(name).expanduser()
  if name == 'classifier':
    path = _train_classifier(folder, reference, image_shape)
  judge = classifier.load(path, image_shape)
  if reference.num_classes not in (0, judge.protocol['num_classes']):
    raise UserError(
      f'--features={name} judges {judge.protocol["num_classes"]} classes, and '
      f'the data have {reference.num_classes}: give another'
    )
  right = classifier.accuracy(judge, heldout) if heldout else None
  return judge._replace(details={**judge.details, 'classifier_accuracy': right})


def _train_classifier(folder, reference, image_shape):
  """The file of the classifier of these data, trained unless it is there."""
  if not reference.num_classes:
    raise UserError(
      f'--features=classifier: {reference.description}; give --features=pixels'
    )
  for what, value, most in (
    ('pixels', max(image_shape), classifier.LARGEST),
    ('classes', reference.num_classes, classifier.MOST_CLASSES),
  ):
    if value > most:
      raise UserError(
        f'--features=classifier is for at most {most} {what}, not {value}: '
        'give --features=pixels'
      )

  def train():
    digest = classifier.fingerprint(reference)
    path = folder / f'classifier_{digest[:8]}.npz'
    if not path.exists():
      cli.say(f'training a classifier on {reference.description}, once')
      with cli.Progress('classifier', classifier.NUM_STEPS) as progress:
        classifier.train(path, reference, on_step=progress.update)
    return str(path)

  return files.at(distributed.on_first(train))


def _draw_neighbours(path, measured, output, reference):
  """The samples nearest to training images first."""
  nearest = measured.nearest
  samples = store.load(output, len(nearest.indices))
  order = np.argsort(nearest.distances[:, 0], kind='stable')
  order = order[: FLAGS.neighbours]
  rows, labels = [], []
  for i in order:
    real = [reference[int(j)]['image'] for j in nearest.indices[i]]
    rows.append(np.stack([samples[i], *real]))
    label = f'number {i}, at {nearest.distances[i, 0]:.3g}'
    if measured.nearer is not None:
      label += f'; {measured.nearer[i]:.0%} of the held-out are nearer'
    labels.append(label)
  files.make(path.parent)
  pictures.save(path, pictures.neighbours(np.stack(rows), labels))


def _text(card):
  """The card as people read it."""
  subject, protocol = card['subject'], card['protocol']
  results, details = card['results'], card['details']
  count, held = protocol['num_samples'], protocol['num_heldout']
  lines = [
    f'{count} samples of step {subject["step"]}: {subject["sampler"]}, '
    f'{subject["evaluations"]} evaluations each, seed {subject["seed"]}',
    f'against {details["reference"]}',
    _judged_by(protocol, details),
    '',
  ]
  percent = '{:.1%}'.format

  def row(text, name, form=cards.number):
    real = cards.heldout(card)
    return [text, form(results[name]), form(real[name]) if name in real else '']

  table = []
  if held != count:
    table += [row(f'Frechet distance, {count} images', 'frechet')]
  if held:
    table += [row(f'Frechet distance, {held} images', 'frechet_heldout_count')]
  if 'frechet_ratio' in results:
    table += [row('  samples / held-out', 'frechet_ratio')]
  if 'confident' in results:
    table += [
      row('class with probability > 0.8', 'confident', percent),
      row('least frequent class', 'smallest_class', percent),
    ]
  table += [
    row('identical to a training image', 'identical', percent),
    row('nearest training image, median', 'nearest'),
  ]
  if held:
    table += [row('  nearer than 95% of held-out', 'nearest_share', percent)]
  heads = ['', 'samples', 'held-out' if held else '']
  lines += cli.table(heads, table)
  if len(details.get('class_histogram', ())) in range(1, SHOWN_CLASSES + 1):
    shares = [['samples', *map(percent, details['class_histogram'])]]
    if 'heldout_class_histogram' in details:
      shares += [
        ['held-out', *map(percent, details['heldout_class_histogram'])]
      ]
    classes = map(str, range(len(shares[0]) - 1))
    lines += ['', *cli.table(['class', *classes], shares)]
  return '\n'.join(lines)


def _judged_by(protocol, details):
  if 'classifier_trained_on' not in details:
    return f'judged by {protocol["features"]}'
  trained_on = details['classifier_trained_on']
  same = trained_on == details['reference']
  told = f'judged by a classifier of {"them" if same else trained_on}'
  accuracy = details['classifier_accuracy']
  if accuracy is not None:
    told += f', right on {accuracy:.1%} of the held-out images'
  return told


def _compare():
  groups = cards.compare(FLAGS.compare)
  tables = []
  for group in groups:
    protocol = group[0]['protocol']
    head = ', '.join(
      f'{name} {protocol[name]}'
      for name in ('data', 'split', 'num_reference', 'num_samples', 'features')
      if name in protocol
    )
    tables.append('\n'.join([head, '', *cli.table(*cards.table(group))]))
  cli.report({'tables': groups}, '\n\n'.join(tables), FLAGS.json)


if __name__ == '__main__':
  cli.run(main, __doc__)
