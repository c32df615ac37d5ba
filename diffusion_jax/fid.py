r"""Computes FID and other metrics between two sets of images.

  python -m diffusion_jax.fid --samples=DIR --reference=OTHER_DIR --download
  python -m diffusion_jax.fid --samples=samples.npz --reference=tfds:cifar10 \
    --metrics=fid,kid,is,pr --card=card.json

No trained run is needed. A set is a folder of images, a .npz or .npy of images,
a prepared data set, or a .npz of statistics. Images are judged by Inception,
whose published weights --download fetches once, or by another network
(--features). Prints the results, and writes a metric card to --card.

Features are cached (--cache), so an interrupted call resumes.
"""

from absl import flags

from diffusion_jax import runs
from diffusion_jax.cli import command, declare, judges, judging
from diffusion_jax.evaluation import statistics, tables
from diffusion_jax.system import compilation, distributed, files, terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(distributed)
flags.adopt_module_key_flags(judging)
FLAGS.set_default('features', 'inception')
declare.table(
  samples=(str, 'The images to judge, given like --reference.'),
  image_size=(
    int,
    'Crop all images to squares and resize them to this many pixels.',
  ),
  channels=(
    int,
    'Read all images with this many channels: 1 (grey) or 3 (RGB).',
  ),
  card=(str, 'File to write the metric card to.'),
  batch_size=(64, 'Images per batch, over all devices.'),
)


def main():
  distributed.initialize()
  if FLAGS.download:
    judges.download()
    if not FLAGS.samples:
      return
  command.need('samples', 'reference')
  judging.check_flags()
  command.at_least(batch_size=1, image_size=1, channels=1)
  compilation.keep()
  if FLAGS.card:
    runs.usable_file('card', FLAGS.card)
  shown, source = (
    judging.open_set(name, FLAGS.image_size, FLAGS.channels)
    for name in ('samples', 'reference')
  )
  shapes = [one[0]['image'].shape for one in (shown, source) if one]
  if len(set(shapes)) > 1:
    raise UserError(
      f'{shown.description}, and {source.description}, cannot be compared; '
      f'{_to_one_shape(shapes)}, and the card records it'
    )
  shape = shapes[0] if shapes else None
  judge = judges.judge_of(source, None, shape)
  samples = judging.set_of('samples', shown, judge, shape)
  reference = judging.set_of('reference', source, judge, shape)
  about = {
    'data': 'images' if source else 'statistics',
    'rounding': 'none',
    'image_size': FLAGS.image_size or 0,
    **({'channels': FLAGS.channels} if FLAGS.channels else {}),
  }
  task = judging.task(judge, samples, reference, about=about, usual=['fid'])
  subject = {
    'samples': judging.described('samples', samples),
    'samples_sha256': statistics.sha256_of(samples),
  }
  path = files.at(FLAGS.card).expanduser() if FLAGS.card else None
  card = judging.carry_out(
    task,
    samples,
    subject,
    path,
    batch_size=FLAGS.batch_size,
    mesh=sharding.make_mesh(),
    sample_cache=judges.cache() if judge.keys else None,
  )
  told = f'\n\ncard: {path}' if path else ''
  terminal.report(card, f'{tables.text(card)}{told}', FLAGS.json)


def _to_one_shape(shapes) -> str:
  """The flags that make images of two shapes comparable."""
  (*size, channels), (*other_size, other_channels) = shapes
  remedies = []
  if size != other_size:
    remedies.append('--image_size=N crops and resizes all of them')
  if channels != other_channels:
    remedies.append('--channels=3 reads all of them as RGB')
  return ' and '.join(remedies)


if __name__ == '__main__':
  command.run(main, __doc__)
