"""Likelihoods of a run: the flags that say how, and their metric cards.

`flags.adopt_module_key_flags(likelihoods)` makes these flags a binary's own.
"""

from absl import flags

from diffusion_jax import runs
from diffusion_jax.cli import command, drawing, judging
from diffusion_jax.evaluation import bits, cards, features
from diffusion_jax.process import flow
from diffusion_jax.reporting import page, plots
from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(judging)
flags.DEFINE_enum(
  'split', 'heldout', ['heldout', 'train'],
  'Bits per dimension: of which images of the run.',
)  # fmt: skip
flags.DEFINE_integer(
  'num_images', None,
  'Bits per dimension: of so many images at even distances; all by default.',
)  # fmt: skip
flags.DEFINE_enum(
  'dequantisation', 'uniform', bits.DEQUANTISATIONS, 'bpd_ode: from 8 bits.'
)
flags.DEFINE_enum(
  'divergence', 'rademacher', flow.DIVERGENCES,
  "bpd_ode: probes of Hutchinson's estimator; exact is for few dimensions.",
)  # fmt: skip
flags.DEFINE_float(
  'tolerance', 1e-5, 'bpd_ode: of the solver, relative and absolute.'
)
flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'float64'], "bpd_ode: the solver's numbers."
)


# Of which kind a flag is; the others are no part of likelihoods.
OF_BOUNDS = ('num_steps', 'grid', 'variance', 'clip')
OF_FLOW = ('dequantisation', 'divergence', 'tolerance', 'dtype')
OF_SAMPLES = (
  *('num_samples', 'sampler', 'rounding', 'reference', 'features', 'output'),
  'write_statistics',
  *(name for name in drawing.OPTIONS if name != 'variance'),
)


def check_flags(kinds: list[str]) -> None:
  """Raises UserError for flags out of range, or of something else.

  Args:
    kinds: keys of `bits.KINDS`.
  """
  idle = list(OF_SAMPLES)
  idle += OF_BOUNDS if set(kinds) == {'bpd_ode'} else ()
  idle += OF_FLOW if 'bpd_ode' not in kinds else ()
  _refuse(idle, ','.join(kinds))
  command.at_least(num_images=2)
  if not 0 < FLAGS.tolerance < 1:
    raise UserError(f'--tolerance={FLAGS.tolerance}: above 0 and below 1')


def check_absent() -> None:
  """Raises UserError for flags that only likelihoods heed."""
  _refuse(('split', 'num_images', *OF_FLOW), 'distances between samples')


def _refuse(names, what):
  for name in names:
    if FLAGS[name].present:
      raise UserError(f'--{name} has no part in {what}: leave it out')


def carry_out(kinds: list[str]) -> None:
  """Measures, writes a card for each protocol, and tells.

  Args:
    kinds: keys of `bits.KINDS`.

  Raises:
    UserError: there is no run, or there are no such images.
  """
  trained, plan, _ = drawing.chosen()
  workdir = files.at(FLAGS.workdir).expanduser()
  folder = workdir / 'evaluations'
  for part in (folder, workdir / 'likelihoods'):
    runs.usable_folder('workdir', part)
  config = trained.config['data']
  train, heldout = judging.splits_of(trained.config)
  source = train if FLAGS.split == 'train' else heldout
  if source is None:
    raise UserError('the run holds no images out: give --split=train')
  images = features.images_of(
    source, min(FLAGS.num_images or len(source), len(source))
  )
  about = {
    'data': config['name'],
    'split': config[f'{FLAGS.split}_split'],
    'num_images': images.count,
    'images_sha256': features.sha256_of(images),
  }
  hows = [_how(kind, trained, plan) for kind in dict.fromkeys(kinds)]
  for how in hows:
    bits.check(how, trained.schedule, trained.image_shape)
  made = []
  for how in hows:
    kind = how.kind
    protocol = {**about, **how.protocol()}
    subject = {
      'workdir': str(workdir),
      'step': trained.step,
      'ema': trained.ema,
      'weights_sha256': trained.weights_sha256,
    }
    subject_name = f'step{trained.step}' + '_raw' * (not trained.ema)
    name = cards.name(subject_name, f'{kind}_{images.count}', protocol)
    parts = f'{name}_{trained.weights_sha256[:8]}'
    work = images.count * bits.work(how)
    unit = 'images' if kind == 'bpd_ode' else 'evaluations'
    with terminal.Progress(kind, work, unit=unit) as progress:
      found = bits.measure(
        trained, images, how, workdir / 'likelihoods' / parts,
        FLAGS.batch_size, progress.update,
      )  # fmt: skip
    details = {'images': source.description, **found.details}
    card = cards.create(subject, protocol, found.results, details)
    path = folder / f'{name}.json'
    distributed.on_first(lambda path=path, card=card: _keep(path, card))
    made.append({**card, 'path': str(path)})
  told = [f'{bits.text(card)}\n\ncard: {card["path"]}' for card in made]
  terminal.report({'cards': made}, '\n\n'.join(told), FLAGS.json)
  distributed.on_first(lambda: page.write(workdir, terminal.say) and None)


def _how(kind, trained, plan) -> bits.How:
  """As the flags say."""
  variance = FLAGS.variance or trained.config['sample'].get('variance')
  return bits.How(
    kind=kind,
    seed=plan.seed,
    grid=plan.grid,
    variance=variance or 'fixedlarge',
    clip=plan.clip,
    dequantisation=FLAGS.dequantisation,
    divergence=FLAGS.divergence,
    tolerance=FLAGS.tolerance,
    dtype=FLAGS.dtype if kind == 'bpd_ode' else 'float32',
  )


def _keep(path, card):
  details = card['details']
  if 'rate' in details:
    plots.rate_distortion(
      path.with_name(f'{path.stem}_rate_distortion.png'),
      details['rate'], details['rmse'],
    )  # fmt: skip
  cards.write(path, card)
