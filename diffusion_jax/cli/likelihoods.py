"""Likelihoods of a run: their flags and their metric cards.

`flags.adopt_module_key_flags(likelihoods)` makes these flags a binary's own.
"""

from absl import flags

from diffusion_jax import runs
from diffusion_jax.cli import (
  command,
  declare,
  drawing,
  judging,
  low_rank,
  run_data,
)
from diffusion_jax.evaluation import bits, cards, features, tables
from diffusion_jax.evaluation.batches import Batches
from diffusion_jax.process import flow
from diffusion_jax.reporting import page, plots
from diffusion_jax.runs import averaged
from diffusion_jax.samplers import guided
from diffusion_jax.samplers import plan as plans
from diffusion_jax.system import distributed, files, terminal
from diffusion_jax.system.errors import UserError

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(judging)
declare.table(
  split=(('heldout', 'train'), 'Bits per dimension: which images of the run.'),
  num_images=(
    int,
    'Bits per dimension: number of images, evenly spaced; by default all.',
  ),
  dequantisation=(bits.DEQUANTISATIONS, 'bpd_ode: how 8 bits are dequantised.'),
  divergence=(
    flow.DIVERGENCES,
    "bpd_ode: probes of Hutchinson's estimator, or exact, for few dimensions.",
  ),
  tolerance=(1e-5, "bpd_ode: the solver's relative and absolute tolerance."),
  dtype=(('float32', 'float64'), 'bpd_ode: precision of the solver.'),
)


# Which likelihoods a flag applies to, with `bits.OF_FLOW`; OF_SAMPLES apply to
# none.
OF_BOUNDS = ('num_steps', 'grid', 'variance', 'clip')
OF_SAMPLES = (
  *('num_samples', 'sampler', 'rounding', 'reference', 'features', 'output'),
  'write_statistics',
  *(name for name in drawing.OPTIONS if name != 'variance'),
  *('label', 'guide', 'guide_ema_profile', 'classifier', *guided.OPTIONS),
  *('prompt', 'prompts', 'negative_prompt'),
  *('control', 'control_image', 'control_scale'),
  *('low_resolution', 'low_resolution_noise'),
)


def are_asked() -> bool:
  return not set(bits.KINDS).isdisjoint(FLAGS.metrics)


def check_absent() -> None:
  """Raises UserError for flags that apply only to likelihoods."""
  names = ('split', 'num_images', *bits.OF_FLOW)
  command.refuse(names, 'distances between samples')


def _kinds() -> list[str]:
  """The requested kinds, after checking the flags."""
  kinds, asked = list(dict.fromkeys(FLAGS.metrics)), ','.join(FLAGS.metrics)
  if not set(kinds) <= set(bits.KINDS) or FLAGS.follow:
    known = ','.join(name for name in kinds if name in bits.KINDS)
    raise UserError(
      f'--metrics={asked}: likelihoods are not measured together with other '
      f'metrics or with --follow; give --metrics={known}'
    )
  idle = OF_SAMPLES
  idle += OF_BOUNDS if kinds == ['bpd_ode'] else ()
  idle += bits.OF_FLOW if 'bpd_ode' not in kinds else ()
  command.refuse(idle, asked)
  command.at_least(num_images=2)
  if not 0 < FLAGS.tolerance < 1:
    raise UserError(f'--tolerance={FLAGS.tolerance}: above 0 and below 1')
  return kinds


def carry_out() -> None:
  """Measures likelihoods, writes a card for each protocol, and reports them.

  Raises:
    UserError: the flags conflict, or there is no such run or image set.
  """
  kinds = _kinds()
  trained, plan, _ = drawing.chosen(labelled=False)  # images have labels
  for part in ('evaluations', 'likelihoods'):
    runs.usable_folder('workdir', trained.workdir / part)
  config = trained.config['data']
  images = run_data.images(trained.config, FLAGS.split, FLAGS.num_images)
  about = {
    'data': config['name'],
    'split': config[f'{FLAGS.split}_split'],
    **features.facts_of(images),
    **({} if images.labels is None else {'condition': 'label'}),
    **run_data.of_conditions(trained.config),
  }
  hows = [_how(kind, trained, plan) for kind in kinds]
  for how in hows:
    bits.check(how, trained.schedule, trained.image_shape)
  made = [_card(trained, images, how, about) for how in hows]
  told = [f'{tables.text(card)}\n\ncard: {card["path"]}' for card in made]
  terminal.report({'cards': made}, '\n\n'.join(told), FLAGS.json)
  page.update(trained.workdir)


def _card(trained, images, how, about) -> dict:
  """Measures one kind of likelihood; writes and returns its card."""
  protocol = {**about, **how.protocol()}
  name = cards.name(
    '_'.join([f'step{trained.step}', *low_rank.name()])
    + averaged.suffix(trained.weights),
    f'{how.kind}_{images.count}',
    protocol,
  )
  folder = f'{name}_{trained.weights_sha256[:8]}'
  work = images.count * bits.work(how)
  unit = 'images' if how.kind == 'bpd_ode' else 'evaluations'
  place = trained.workdir / 'likelihoods' / folder
  with terminal.Progress(
    *(how.kind, work),
    unit=unit,
    kept=lambda _: f'finished batches are kept in {place}',
  ) as progress:
    found = bits.measure(
      Batches(trained, images, place, FLAGS.batch_size, progress.update), how
    )
  details = {'images': images.description, **found.details}
  subject = cards.subject_of(trained)
  card = cards.create(subject, protocol, found.results, details)
  path = trained.workdir / 'evaluations' / f'{name}.json'

  def keep():
    if 'rate' in details:
      plot = path.with_name(f'{name}_rate_distortion.png')
      plots.rate_distortion(plot, details['rate'], details['rmse'])
    files.write_json(path, card)

  distributed.on_first(keep)
  return {**card, 'path': str(path)}


def _how(kind, trained, plan) -> bits.How:
  """The protocol that the flags describe."""
  given = FLAGS.variance or trained.config['sample'].get('variance')
  variance = given or 'fixedlarge'
  plans.check_variance(variance, trained.config)
  if plan.grid[-1] != -1:
    raise UserError(
      f'grid={FLAGS.grid} ends at noised data, but a likelihood is that of '
      'clean data: use --grid=uniform'
    )
  names = bits.OF_FLOW if kind == 'bpd_ode' else ()
  own = {name: FLAGS[name].value for name in names}
  return bits.How(kind, plan.seed, plan.grid, variance, plan.clip, **own)
