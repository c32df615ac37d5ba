r"""Writes a labelled set of new images, or of varied training images.

  python -m diffusion_jax.edit augment --workdir=runs/digits_conditional \
    --per_class=100 --output=more.npz --sampler=ddim --num_steps=50

The run is one with labels. Every class gets --per_class images, or with --label
those that it names. Near-copies of training images are left out, and others are
drawn in their place: a sample is one if it is as near to a training image as
less than a share --near of the held-out images.

--output=FILE.npz writes `images` and `labels`, another path a folder of PNGs by
class, and --format=arrayrecord a prepared set of TFDS; data.name is then
arrays, folder or tfds:NAME (docs/augmentation.md). OUTPUT.json says what the
images depend on, which samples they are and how many were left out.

--from=train varies training images in place of new ones (SDEdit): noised to
--strength of the steps, and drawn again from there with their label.

All that is drawn is kept in WORKDIR/samples, as by sample: an interrupted job
resumes, and a larger set draws only what it lacks.
"""

import json
import math
from typing import NamedTuple

import numpy as np
from absl import flags

from diffusion_jax import runs
from diffusion_jax.cli import command, declare, drawing, run_data
from diffusion_jax.data import Source, written
from diffusion_jax.data import labels as data_labels
from diffusion_jax.evaluation import classifier, copies, features
from diffusion_jax.runs import addresses, dataset, labels, store, varied
from diffusion_jax.runs.trained import Trained
from diffusion_jax.samplers.plan import Plan
from diffusion_jax.system import (
  compilation,
  distributed,
  files,
  numerics,
  terminal,
)
from diffusion_jax.system.errors import UserError, one_line, one_of
from diffusion_jax.training import sharding

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(drawing)
flags.adopt_module_key_flags(run_data)
declare.shared('json', 'accept_data')
declare.table(
  per_class=(int, 'Images of each class in the set.'),
  format=(
    str,
    f'One of {", ".join(written.WRITERS)}; by default npz if --output ends in '
    '.npz, otherwise folder.',
  ),
  near=(
    0.05,
    'Leave out samples as near to a training image as less than this share of '
    'held-out images are; 0 = only those equal to one.',
  ),
  features=(
    'pixels',
    'What is compared for --near: pixels, averaged to at most 16x16, or a '
    'classifier of the data, RUN/evaluations/classifier_*.npz.',
  ),
  strength=(
    0.5,
    '--from=train: share of the sampling steps that are taken, above 0 and at '
    'most 1.',
  ),
  **{
    'from': (
      ('noise', 'train'),
      'noise = new images; train = varied training images.',
    )
  },
)


class Candidates(NamedTuple):
  """Samples to choose from, with labels in turn by index.

  Attributes:
    trained: the network.
    plan: their plan.
    output: the store that keeps them.
    pools: the indices of the training images of each class that are varied, by
      class in the order of the plan's labels; None for new images.
  """

  trained: Trained
  plan: Plan
  output: files.Path
  pools: list[np.ndarray] | None

  @property
  def labels(self) -> list[int]:
    return self.plan.condition['label']

  def source(self, index: int) -> int:
    """The index of the training image that a sample varies."""
    turn, which = divmod(int(index), len(self.pools))
    return int(self.pools[which][turn % len(self.pools[which])])


def task(name: str):
  """(main, what --help says, the flags that must be given) of the task."""
  del name
  FLAGS['output'].help = 'The set: a file .npz, or a folder.'
  return main, __doc__, ('workdir', 'output')


def main():
  if drawing.listed():
    return
  distributed.initialize()
  path, kind, config = _checked()
  compilation.keep()
  train, heldout = run_data.splits(config)
  candidates = _candidates(config, train)
  trained = candidates.trained
  made = copies.ruler(
    _judge(trained.image_shape), features.images_of(train),
    heldout and features.images_of(heldout), FLAGS.batch_size, trained.mesh,
  )  # fmt: skip
  protocol = _protocol(candidates, made)
  beside = path.with_name(f'{path.name}.json')
  if distributed.on_first(lambda: _is_there(path, beside, protocol, kind)):
    terminal.say(f'{path} is there, with these settings: nothing to do')
    facts = distributed.on_first(lambda: json.loads(beside.read_text()))
  else:
    draw_fn = _filler(candidates, train)
    found = copies.choose(
      made, draw_fn, candidates.labels, FLAGS.per_class, FLAGS.near
    )
    facts = _facts(kind, candidates, made, protocol, found)
    if distributed.is_first():
      files.write_json(beside, facts)
      text_fn = _addresses(candidates, found)
      of_run = labels.names(trained.workdir, config)
      written.write(
        kind, path,
        written.Labelled(
          found.images, np.array(facts['labels'], np.int32), of_run, text_fn
        ),
      )  # fmt: skip
  _report(path, facts)


def _checked() -> tuple[files.Path, str, dict]:
  """(the output, its format, the run's config); nothing is written.

  Raises:
    UserError: the flags are not valid.
  """
  if FLAGS.per_class is None:
    command.need('per_class')
  command.at_least(per_class=1, batch_size=1)
  if FLAGS.output == '':
    raise UserError('--output is empty: give a file .npz, or a folder')
  if not 0 <= FLAGS.near < 1:
    raise UserError(f'--near={FLAGS.near:g}: a share, at least 0 and below 1')
  config = runs.read_config(declare.workdir())
  if not dataset.num_classes(config['conditioning']):
    raise UserError(
      f'--workdir={FLAGS.workdir} is a run without labels, and a labelled set '
      "needs them: train with conditioning.name='label', or draw unlabelled "
      'images with python -m diffusion_jax.sample'
    )
  if FLAGS['from'].value != 'train':
    command.refuse(['strength'], 'new images (--from=train takes it)')
  path = files.absolute(files.at(FLAGS.output).expanduser())
  usual = 'npz' if path.suffix == '.npz' else 'folder'
  kind = one_of('--format', FLAGS.format or usual, written.WRITERS)
  written.check(kind, path, runs.image_shape(config['data'])[-1])
  if kind == 'npz':
    runs.usable_file('output', path)
  else:
    runs.usable_output(path)
  beside = path.with_name(f'{path.name}.json')
  if path.exists() and not beside.is_file():
    raise UserError(
      f'--output={FLAGS.output} exists, and {beside.name} beside it does not, '
      'so it is no set of this task: give another --output'
    )
  return path, kind, config


def _is_there(path, beside, protocol, kind) -> bool:
  """Whether the set is complete; UserError if another one is in its place."""
  if not path.exists():
    return False  # perhaps with the JSON of an interrupted job
  with one_line(f'{beside} is damaged (', '): give another --output'):
    facts = json.loads(beside.read_text())
    there = {**facts['protocol'], 'format': facts['format']}
  wanted = json.loads(json.dumps({**protocol, 'format': kind}))
  for name in sorted(there.keys() | wanted.keys()):
    if there.get(name) != wanted.get(name):
      raise UserError(
        f'{path} is a set with {name}={there.get(name)!s:.60}, not '
        f'{wanted.get(name)!s:.60}: give another --output'
      )
  return True


def _judge(image_shape) -> features.Judge:
  if FLAGS.features == 'pixels':
    return features.pixels(image_shape)
  return classifier.load(FLAGS.features, image_shape)


def _candidates(config, train: Source) -> Candidates:
  """The network, the plan and the store that the flags select.

  Raises:
    UserError: the flags are not valid.
  """
  varies = FLAGS['from'].value == 'train'

  def read(step):
    plan_of, network = drawing.prepared(step)
    plan = plan_of(drawing.asked())
    asked = plan.condition['label']
    if asked == 'data':
      asked = range(dataset.num_classes(config['conditioning']))
    plan = plan._replace(condition={'label': [*dict.fromkeys(asked)]})
    name = drawing.name(step, plan)
    if varies:
      varied.times(plan, FLAGS.strength)
      name += f'_varied{FLAGS.strength:g}'
    return network(drawing.asked()), plan, name

  trained, plan, name = declare.of_run(read)
  output = declare.workdir() / 'samples' / name
  pools = None
  if varies:
    found = data_labels.of(train, np.arange(len(train)))
    pools = [np.flatnonzero(found == k) for k in plan.condition['label']]
    for k, pool in zip(plan.condition['label'], pools, strict=True):
      if not len(pool):
        raise UserError(
          f'no training image has label {k}, so none can be varied: choose '
          'others with --label'
        )
  return Candidates(trained, plan, output, pools)


def _filler(candidates: Candidates, train: Source):
  """(first index, last + 1) -> images, which are drawn if the store lacks them.

  All processes call it, and read what all of them have drawn.
  """
  trained, plan, output, pools = candidates

  def fill(first, end):
    if pools is None:
      drawing.fill(trained, plan, output, end)
    else:
      _vary(candidates, train, end)
    return np.concatenate([*store.stream(output, first, end, store.BLOCK)])

  return fill


def _vary(candidates: Candidates, train: Source, count: int) -> None:
  """Varies training images until the store has so many of them."""
  trained, plan, output, _ = candidates
  facts = {
    **drawing.protocol(trained, plan),
    'strength': FLAGS.strength,
    'varied': train.identity,
  }

  def begin():
    store.open_store(output, facts, numerics.describe())
    absent = store.missing(output, count)
    return store.consecutive(absent) if len(absent) else []

  runs_of_absent = distributed.on_first(begin)
  if not runs_of_absent:
    return
  absent = np.concatenate([np.arange(*run) for run in runs_of_absent])
  draw_fn = varied.drawer(trained, plan, FLAGS.strength)
  its = np.array(candidates.labels, np.int32)

  def local(indices):
    images = [train[candidates.source(i)]['image'] for i in indices]
    rows = {
      'index': indices.astype(np.uint32), 'image': np.stack(images),
      'label': its[indices % len(its)],
    }  # fmt: skip
    return sharding.local_rows(draw_fn(rows))

  with terminal.Progress(
    *('varying', count, count - len(absent), 'images'),
    kept=lambda done: f'{done} images are kept in {output}',
  ) as progress:
    batch = min(FLAGS.batch_size, len(absent))
    store.fill(output, absent, batch, local, progress.update)
  distributed.on_first(lambda: None)


def _protocol(candidates: Candidates, made: copies.Ruler) -> dict:
  """Everything that the set depends on."""
  trained, plan = candidates.trained, candidates.plan
  found = {
    **drawing.protocol(trained, plan),
    'from': FLAGS['from'].value,
    'per_class': FLAGS.per_class,
    'near': FLAGS.near,
    **made.judge.protocol,
    'new': made.basis,
    'train': features.facts_of(made.train),
  }
  return {**found, 'strength': FLAGS.strength} if candidates.pools else found


def _facts(kind, candidates: Candidates, made, protocol, found) -> dict:
  """The content of the JSON beside the set."""
  its = candidates.labels
  facts = {
    'format': kind,
    'workdir': FLAGS.workdir,
    'num_images': len(found.images),
    'class_names': labels.names(
      candidates.trained.workdir, candidates.trained.config
    ),
    'candidates': found.looked_at,
    'left_out_near': found.near,
    'left_out_identical': found.identical,
    # What --near leaves out of images that copy no more than new ones do.
    'left_out_expected': math.ceil(FLAGS.near * len(made.new))
    / (len(made.new) + 1),
    'threshold': copies.threshold(made, FLAGS.near),
    'protocol': protocol,
    'labels': [its[i % len(its)] for i in found.indices.tolist()],
    'indices': found.indices.tolist(),
  }
  if candidates.pools:
    facts['varied'] = [candidates.source(i) for i in found.indices]
  return facts


def _addresses(candidates: Candidates, found):
  """Number of an image -> its address, by which `sample --like` draws it."""
  if candidates.pools:
    return lambda number: {}
  protocol = drawing.protocol(candidates.trained, candidates.plan)
  its = candidates.labels

  def text_of(number):
    index = int(found.indices[number])
    return addresses.of_sample(
      protocol, FLAGS.workdir, index, its[index % len(its)]
    )

  return text_of


def _report(path, facts) -> None:
  looked_at, near, same = (
    sum(facts[name].values())
    for name in ('candidates', 'left_out_near', 'left_out_identical')
  )
  share, expected = (near + same) / looked_at, facts['left_out_expected']
  terminal.report(
    {
      'output': str(path), 'num_images': facts['num_images'],
      'candidates': looked_at, 'left_out_near': near,
      'left_out_identical': same, 'left_out_expected': expected,
    },
    f'{facts["num_images"]} labelled images, {FLAGS.per_class} of each class, '
    f'of {looked_at} candidates: {path}\n{near} near-copies of training images '
    f'and {same} that equal one are left out, {share:.1%}; of images that copy '
    f'no more than new ones do it would be {expected:.1%}',
    FLAGS.json,
  )  # fmt: skip
