"""The agreement of samples with their prompts: its flags.

`flags.adopt_module_key_flags(agreeing)` makes these flags a binary's own.
"""

from collections.abc import Mapping

import numpy as np
from absl import flags

from diffusion_jax import data, runs
from diffusion_jax.cli import declare, guiding
from diffusion_jax.data import captions
from diffusion_jax.evaluation import agreement, clip, features
from diffusion_jax.evaluation.metrics import retrieval
from diffusion_jax.runs import dataset, pairs, prompts
from diffusion_jax.runs.trained import Trained, load
from diffusion_jax.samplers.plan import Plan
from diffusion_jax.system import terminal
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import clip as weights

FLAGS = flags.FLAGS
declare.table(
  text_judge=(
    str,
    'Runs with captions: also measure how often samples are found to show '
    'their prompts, by a run with loss.name=contrastive, or WORKDIR@STEP; or '
    'the CLIP score, too, by a folder of CLIP (CLIPModel of transformers).',
  ),
  captions=(
    str,
    '--text_judge: the captions among which prompts are to be found, a file '
    "with one a line; by default all of the judge's data, with CLIP of the "
    "run's.",
  ),
)


def check(workdir) -> None:
  """Checks the flags, before anything is loaded.

  Args:
    workdir: the folder of the run to judge.

  Raises:
    UserError: the run, or the judge, cannot be judged, or judge.
  """
  if FLAGS.text_judge is None:
    if FLAGS.captions is not None:
      raise UserError(
        f'--captions={FLAGS.captions} has no effect without --text_judge: give '
        'it too, or leave the captions out'
      )
    return
  given = f'--text_judge={FLAGS.text_judge}'
  own = runs.read_config(workdir)
  if not dataset.has_captions(own['conditioning']):
    raise UserError(
      f'{given}: the run takes no text, so that its samples have no prompts: '
      'leave the judge out'
    )
  folder, _ = guiding.parsed('text_judge', FLAGS.text_judge)
  if weights.is_folder(folder):
    return
  theirs = runs.read_config(folder, '--text_judge')
  if not pairs.trains(theirs):
    raise UserError(
      f'{given} has loss.name={theirs["loss"]["name"]}: give a run with '
      'loss.name=contrastive, such as one of emoji_judge, or a folder of CLIP'
    )
  shapes = [runs.image_shape(one['data']) for one in (theirs, own)]
  if shapes[0] != shapes[1]:
    there, here = ('x'.join(map(str, shape)) for shape in shapes)
    raise UserError(
      f'{given} is for images of {there}, this run for {here}: give a judge of '
      'the same size'
    )


def asked(trained: Trained, plan: Plan) -> agreement.Asked | None:
  """The prompts of a plan, among captions; None without --text_judge.

  Args:
    trained: the run to judge.
    plan: how samples are drawn.

  Raises:
    UserError: the judge or its captions cannot be read.
  """
  if FLAGS.text_judge is None:
    return None
  candidates = FLAGS.captions and prompts.read(FLAGS.captions, 'captions')
  folder, step = guiding.parsed('text_judge', FLAGS.text_judge)
  if weights.is_folder(folder):
    candidates = candidates or of_data(trained.config)
    encoders = clip.of_folder(folder, trained.mesh)
  else:
    judge = load(folder, step)
    candidates = candidates or of_data(judge.config)
    encoders = agreement.of_run(judge, features.BLOCK)
  own = [[prompt] for prompt in plan.condition['prompts']]
  return agreement.ask(encoders, candidates, own)


def of_data(config: Mapping) -> list[str]:
  """All captions of a run's images, of the held-out ones, too.

  Args:
    config: the run's config.

  Raises:
    UserError: the images cannot be opened.
  """
  try:
    opened = data.splits(config['data'])
  except UserError as e:
    raise UserError(
      f'the captions of --text_judge: {e} (--captions=FILE gives others)'
    ) from e
  captions.check(*opened)
  return [
    text
    for source in opened
    if source
    for several in captions.of(source, np.arange(len(source)))
    for text in several
  ]


def protocol(found: agreement.Asked | None) -> dict:
  """What the numbers depend on, for cards; {} without a judge."""
  if found is None:
    return {}
  return {**found.protocol, 'permutations': retrieval.PERMUTATIONS}


def measured(
  found: agreement.Asked | None, images: features.Images
) -> tuple[dict, dict]:
  """(results, details) of samples for a card; empty without a judge."""
  if found is None:
    return {}, {}
  with terminal.Progress(
    'finding captions', images.count, unit='images'
  ) as progress:
    return agreement.measure(found, images, progress.update)
