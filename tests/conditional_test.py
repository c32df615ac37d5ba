"""Runs with labels: their data, the labels of samples, and guidance."""

import contextlib
import dataclasses
import json
import shutil

import binaries
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl import flags
from absl.testing import flagsaver
from flax import traverse_util

import diffusion_jax
from diffusion_jax import conditioning, data, models, runs
from diffusion_jax.cli import config_files, drawing
from diffusion_jax.codecs import Codec
from diffusion_jax.data import labels as labels_of_data
from diffusion_jax.data import pipeline, sources
from diffusion_jax.evaluation import bits, classifier, features, kept
from diffusion_jax.evaluation.batches import Batches
from diffusion_jax.process import schedules
from diffusion_jax.runs import (
  dataset,
  draw,
  guided,
  labels,
  programs,
  recipe,
  trajectories,
  validation,
)
from diffusion_jax.samplers.inversion import ddim_inversion
from diffusion_jax.samplers.plan import Plan
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, sharding

COUNTS = [100, 0, 300]
CLASSIFIER = {
  'loss.name': 'classification', 'model.name': 'encoder', 'sample_every': 0,
}  # fmt: skip


def source(images_labels, num_classes=3, **kwargs):
  image = np.zeros((8, 8, 1), np.uint8)
  return sources.create(
    'set', len(images_labels), (8, 8, 1), num_classes,
    lambda i: (image + i, images_labels[i]), **kwargs,
  )  # fmt: skip


# --- the data ----------------------------------------------------------------


def test_a_run_keeps_the_frequencies_and_names_of_its_labels(tmp_path):
  digits = data.splits(tiny_config()['data'])
  known = dataset.check(
    tmp_path, digits, 'test', False, {'name': 'label', 'num_classes': 10}
  )
  dataset.write(tmp_path, known)
  found = dataset.read_labels(tmp_path, 10)
  assert sum(found['counts']) == found['counted'] == 1438
  assert min(found['counts']) > 100
  assert found['names'] == list('0123456789')
  assert dataset.read_labels(tmp_path, 11) is None
  # A run without labels keeps what it always did.
  plain = dataset.check(tmp_path / 'other', digits, 'test', False)
  assert list(plain.facts) == ['train', 'heldout', 'heldout_split']


@pytest.mark.parametrize(
  ('train', 'heldout', 'said'),
  [
    (source([0] * 9, 4), None, 'set conditioning.num_classes=4'),
    (source([-1] * 9, 0), None, 'needs one class for each image'),
    (
      source([-1] * 9, 0, notes=['the labels are left out: two of them']),
      None, '(the labels are left out: two of them)',
    ),
    (source([0] * 9), source([-1] * 9, 0), 'unlabelled: give labelled images'),
  ],
)  # fmt: skip
def test_data_that_do_not_fit_the_condition_are_one_line(train, heldout, said):
  with pytest.raises(UserError) as error:
    labels_of_data.check(train, heldout, 3)
  assert said in str(error.value)
  assert '\n' not in str(error.value)


def test_a_label_out_of_range_is_found_and_named():
  given = source([0, 1, 2, 5, 1, -1])
  with pytest.raises(UserError, match=r'image 3 .* has label 5: .* 0 to 2'):
    labels_of_data.describe(given, 3)
  # Labels are read without the images where the set can do so.
  apart = source([9] * 6, label_fn=[0, 2, 2, 0, 0, 0].__getitem__)
  assert labels_of_data.describe(apart, 3)['counts'] == [4, 0, 2]


# --- the labels of samples ---------------------------------------------------


def drawn(condition, indices, seed=0):
  plan = Plan('ddim', {}, [9, -1], True, seed, condition)
  of = jax.jit(lambda at: draw.conditions(plan, at)['label'])
  return np.asarray(of(jnp.asarray(indices, jnp.uint32)))


def test_labels_occur_as_in_the_data_by_seed_and_index():
  by_chance = {'label': 'data', 'label_counts': COUNTS}
  found = drawn(by_chance, np.arange(4000))
  shares = np.bincount(found, minlength=3) / 4000
  assert shares[1] == 0
  np.testing.assert_allclose(shares[0], 0.25, atol=4 * 0.0068)  # deviations
  backwards = drawn(by_chance, np.arange(4000)[::-1])
  np.testing.assert_array_equal(backwards[::-1], found)
  other = drawn(by_chance, np.arange(4000), seed=1)
  assert np.mean(other != found) > 0.3  # 2 x 0.25 x 0.75 by chance


def test_labels_that_are_asked_for_come_in_turn():
  np.testing.assert_array_equal(
    drawn({'label': [2, 0]}, [0, 1, 2, 5]), [2, 0, 2, 0]
  )
  names = ['cat', 'dog', 'ship']
  for asked, want in (
    ('2', [2]), ('0, 2', [0, 2]), ('all', [0, 1, 2]), ('dog,0', [1, 0]),
    (1, [1]), ([2, 'cat'], [2, 0]),
  ):  # fmt: skip
    assert labels.numbers(asked, 3, names) == want
  for asked in ('3', 'dok', '-1', '', '1,,2'):
    with pytest.raises(UserError, match='0 to 2, several with commas') as error:
      labels.numbers(asked, 3, names)
    assert ('did you mean dog?' in str(error.value)) == (asked == 'dok')


# --- what a guided evaluation computes ---------------------------------------


def counted(drop=0.1):
  """(a recipe whose network is a table of labels, the rows of each call)."""
  seen = []

  def apply(params, xt, t, keys=None, cond=None):
    seen.append(len(xt))
    return xt * params['table'][cond['label']][:, None]

  table = {'net': {'table': jnp.array([0.5, 1.0, 2.0, 4.0])}}
  net = models.Model(None, apply, ('label',))
  codec = Codec(None, None, (2,))
  made = recipe.Recipe(
    {'net': net}, {}, {}, codec,
    conditioning.create('label', num_classes=3, drop=drop),
    schedules.linear(1000), 'eps', None,
  )  # fmt: skip
  return made, table, seen


@pytest.mark.parametrize(
  ('guidance', 'rows', 'factors'),
  [
    ({}, 5, [0.5, 1.0, 2.0, 2.0, 0.5]),
    ({'guidance': 0.0}, 5, [4.0] * 5),
    ({'guidance': 3.0}, 10, [-6.5, -5.0, -2.0, -2.0, -6.5]),
  ],
)
def test_both_halves_are_one_call_and_each_row_keeps_its_label(
  guidance, rows, factors
):
  made, params, seen = counted()
  label = {'label': jnp.array([0, 1, 2, 2, 0])}
  mesh, x = tiny.one_device(), jnp.arange(1.0, 11).reshape(5, 2)
  denoise = guided.denoiser(made, params, label, guidance, mesh)
  eps = denoise(x, jnp.asarray(500)).eps
  np.testing.assert_allclose(eps, x * np.array(factors)[:, None], rtol=1e-6)
  assert seen == [rows]


def test_a_guide_gets_the_same_labels():
  made, params, seen = counted()
  other = {'net': {'table': jnp.array([1.0, 3.0, 0.0, 9.0])}}
  label, x = {'label': jnp.array([0, 1])}, jnp.ones((2, 2))
  denoise = guided.denoiser(
    made, {**params, guided.GUIDE: other}, label, {'guidance': 2.0},
    tiny.one_device(), made,
  )  # fmt: skip
  eps = denoise(x, jnp.asarray(500)).eps
  np.testing.assert_allclose(eps, [[0.0] * 2, [-1.0] * 2], atol=1e-6)
  assert seen == [2, 2]


# --- a run -------------------------------------------------------------------


def tiny_config(**changes):
  config = config_files.load('configs/digits.py')
  with config.ignore_type():
    config.update_from_flattened_dict({
      'num_steps': 2, 'batch_size': 16, 'model.channels': 4,
      'model.num_groups': 2, 'model.multipliers': (1,),
      'model.attention_resolutions': (), 'conditioning.name': 'label',
      'conditioning.num_classes': 10, 'sample.num_steps': 2, **changes,
    })  # fmt: skip
  return config


def make_run(workdir, **changes):
  """A run with random parameters at steps 1 and 2."""
  config = tiny_config(**changes)
  splits = data.splits(config['data'])
  known = dataset.check(workdir, splits, 'test', False, config['conditioning'])
  workdir.mkdir(exist_ok=True)
  dataset.write(workdir, known)
  runs.write_config(workdir, config)
  program = programs.create(config, tiny.one_device())
  state = tiny.random_state(program.abstract)
  with checkpoint.Checkpoints(workdir / 'checkpoints') as kept:
    kept.save(1, state)
    weaker = jax.tree.map(lambda x: 0.5 * x, state.ema_params)
    kept.save(2, state._replace(ema_params=weaker))
  return workdir


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp('runs') / 'labels')


@pytest.fixture(scope='module')
def trained(run):
  return diffusion_jax.load(run, 1)


HOW = {'sampler': 'ddim', 'grid': '400', 'clip': False, 'dtype': 'float32'}


def x0_of(trained, count, **how):
  """x0 of one step, which is the denoiser's."""
  found = trained.sample(count, **{**HOW, **how})
  return found / 127.5 - 1


def test_samples_are_the_guided_denoisers(trained):
  """One step from noise is u + w (c - u) at the noise of seed and index."""
  x = trajectories.noises(trained, 0, 4)
  label = [3, 7, 3, 7]
  c = trained.denoise(x, 400, {'label': label}).x0
  u = trained.denoise(x, 400).x0
  assert np.abs(c - u).max() > 0.05
  got = x0_of(trained, 4, label='3,7', guidance=2.5)
  want = np.clip(u + 2.5 * (c - u), -1, 1)
  np.testing.assert_allclose(got, want, atol=1e-4)
  guide = diffusion_jax.load(trained.workdir, 2)
  weaker = guide.denoise(x, 400, {'label': label}).x0
  got = x0_of(trained.guided_by(guide), 4, label='3,7', guidance=2.0)
  want = np.clip(2 * c - weaker, -1, 1)
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.fixture
def given(run):
  """Parses flags afresh."""
  with contextlib.ExitStack() as stack:

    def parse(*arguments):
      stack.close()
      stack.enter_context(flagsaver.flagsaver())
      flags.FLAGS([
        'test', f'--workdir={run}', '--step=1', '--sampler=ddim', '--grid=400',
        *arguments,
      ])  # fmt: skip

    yield parse


def test_the_store_says_label_and_guidance(run, given):
  given('--label=3,7', '--guidance=2', '--guidance_rescale=0.5',
        f'--guide={run}@2')  # fmt: skip
  trained, plan, output = drawing.chosen()
  digest = trained.guides['guide'].weights_sha256
  assert output.name == (
    f'step1_ddim1_400_label3-7_guidance2_rescale0.5_guide{digest[:8]}_seed0'
  )
  assert drawing.fill(trained, plan, output, 3) == 3
  told = json.loads((output / 'store.json').read_text())
  assert told.items() >= {
    'label': [3, 7], 'guidance': 2.0, 'guidance_rescale': 0.5,
    'guide': 'labels@2', 'guide_sha256': digest, 'network_rows': 2,
  }.items()  # fmt: skip
  given()
  trained, plan, output = drawing.chosen()
  assert output.name == 'step1_ddim1_400_seed0'
  counts = dataset.read_labels(run, 10)['counts']
  facts = drawing.protocol(trained, plan)
  assert (facts['label'], facts['label_counts']) == ('data', counts)
  assert 'network_rows' not in facts


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    (['--label=10'], 'label=10: 0 to 9, several with commas'),
    (['--guide=RUN@7', '--guidance=2'], 'step=7'),
    (['--guide=RUN@x', '--guidance=2'], 'the step after @ must be a number'),
    (['--guide=/nothing', '--guidance=2'], '--guide=/nothing holds no run'),
    (['--guide=RUN@2'], 'has no effect with guidance=1'),
    (['--guide_ema_profile=0.1'], 'has no effect without --guide'),
    (
      ['--guide=RUN@2', '--guidance=2', '--guide_ema_profile=decay:0.5'],
      'the run keeps decay:0.995',
    ),
  ],
)
def test_mistakes_about_conditions_are_one_line(run, given, arguments, said):
  given(*(text.replace('RUN', str(run)) for text in arguments))
  with pytest.raises(UserError) as error:
    drawing.chosen()
  assert said in str(error.value)
  assert '\n' not in str(error.value)


def test_a_run_and_its_guide_have_an_average_each(run, given):
  average = 'decay:0.995'
  for flag, own, theirs in (
    ('ema_profile', {'ema_profile': average}, {}),
    ('guide_ema_profile', {}, {'ema_profile': average}),
  ):
    given('--guidance=2', f'--guide={run}@2', f'--{flag}={average}')
    trained, plan, _ = drawing.chosen()
    assert (trained.average, trained.guides['guide'].average) == (own, theirs)
    suffix = '_emadecay0.995' if theirs else ''
    assert plan.guidance['guide'] == f'labels@2{suffix}'


def test_a_run_that_dropped_no_label_has_no_model_without(trained):
  conditioner = trained.recipe.conditioner._replace(drop=0.0)
  changed = trained.recipe._replace(conditioner=conditioner)
  never = dataclasses.replace(trained, recipe=changed)
  x = trajectories.noises(trained, 0, 1)
  with pytest.raises(UserError, match=r"drop=0 .* give cond=\{'label'"):
    never.denoise(x, 400)
  given = {'label': [3]}
  np.testing.assert_array_equal(
    never.denoise(x, 400, given).x0, trained.denoise(x, 400, given).x0
  )


def test_a_guide_of_other_data_is_one_line():
  own = runs.to_plain(tiny_config())
  for changes, said in (
    ({'data.image_size': 16}, 'is for images of 16x16x1, this run for 8x8x1'),
    ({'conditioning.num_classes': 12}, 'knows 12 classes, this run 10'),
  ):
    with pytest.raises(UserError, match=said):
      guided.check(own, runs.to_plain(tiny_config(**changes)), 'runs/b')
  plain = runs.to_plain(tiny_config(**{'conditioning.name': 'none'}))
  guided.check(own, plain, 'runs/b')  # an unconditional guide is one


def test_an_unconditional_run_takes_no_label(tmp_path):
  config = {'conditioning': {'name': 'none'}}
  assert labels.condition(tmp_path, config) == {}
  with pytest.raises(UserError, match='label=3: the run is unconditional'):
    labels.condition(tmp_path, config, 3)
  of_labels = {'conditioning': {'name': 'label', 'num_classes': 10}}
  with pytest.raises(UserError, match='give a label, such as label=all'):
    labels.condition(tmp_path, of_labels)
  assert labels.condition(tmp_path, of_labels, 'all')['label'][-1] == 9


def heldout_of(trained, count):
  _, held = data.splits(trained.config['data'])
  return features.images_of(held, count, labelled=True), held


def test_likelihoods_and_calibration_take_the_labels_of_images(
  trained, tmp_path
):
  images, held = heldout_of(trained, 6)
  batches = Batches(trained, images, tmp_path, 4)
  program = batches.program(
    lambda params, cond, x0, keys: cond['label'], seed=0, stream=2,
    dtype='uint8',
  )  # fmt: skip
  found = batches.each(
    'labels', lambda *given: {'label': program(*given[:2])}, 1, ''
  )
  want = [held[i * len(held) // 6]['label'] for i in range(6)]
  np.testing.assert_array_equal(found['label'], want)


def test_a_protocol_says_by_which_labels(trained):
  images, _ = heldout_of(trained, 6)
  told, other, none = (
    features.facts_of(images._replace(labels=labels))
    for labels in (images.labels, images.labels[::-1], None)
  )
  assert told['labels_sha256'] != other.pop('labels_sha256')
  del told['labels_sha256']
  assert told == other == none


# --- binaries ----------------------------------------------------------------


def answer(capsys, *arguments):
  binaries.here(*arguments, '--json')
  return json.loads(capsys.readouterr().out)


def judge(folder):
  """A classifier of the digits that has learnt nothing."""
  params = classifier.network((8, 8, 1), 10).init(jax.random.key(0))
  flat = traverse_util.flatten_dict(jax.device_get(params), sep='/')
  facts = {'image_shape': [8, 8, 1], 'num_classes': 10, 'trained_on': 'nothing'}
  path = folder / 'judge.npz'
  kept.write(path, {**flat, classifier.FACTS: json.dumps(facts)})
  return path


def counted_by_label(capsys, tmp_path, *arguments):
  card = answer(
    capsys, 'evaluate', f'--features={judge(tmp_path)}', '--num_samples=21',
    '--step=1', '--sampler=ddim', '--grid=400', '--label=all',
    '--neighbours=0', f'--cache={tmp_path}', *arguments,
  )  # fmt: skip
  counts = np.array(card['details']['confusion'])
  np.testing.assert_array_equal(counts.sum(1), [3] + [2] * 9)
  assert card['results']['label_accuracy'] == np.trace(counts) / 21
  assert np.sum(card['details']['heldout_confusion']) == 21
  (told,) = (x for x in card['details']['caveats'] if 'by class' in x)
  assert 'of the samples, class 1 has 2' in told


def test_evaluate_counts_samples_by_the_label_asked_for(run, tmp_path, capsys):
  counted_by_label(capsys, tmp_path, f'--workdir={run}')


@pytest.mark.slow
def test_so_it_does_where_a_classifier_guides(tmp_path, capsys):
  none = {'conditioning.name': 'none', 'conditioning.num_classes': 0}
  plain = make_run(tmp_path / 'plain', **none)
  noised = make_run(tmp_path / 'noised', **CLASSIFIER)
  how = f'--workdir={plain}', f'--classifier={noised}'
  counted_by_label(capsys, tmp_path, *how)


def test_likelihoods_need_no_frequencies_of_labels(run, tmp_path, given):
  """Their labels are those of the images; imported runs have no data.json."""
  workdir = shutil.copytree(run, tmp_path / 'run')
  (workdir / dataset.DATA).unlink()
  given(f'--workdir={workdir}')
  with pytest.raises(UserError, match='give a label, such as label=all'):
    drawing.chosen()
  _, plan, _ = drawing.chosen(labelled=False)
  assert plan.condition == {}


@pytest.mark.slow
def test_a_card_of_likelihoods_says_by_which_labels(run, tmp_path, capsys):
  workdir = shutil.copytree(run, tmp_path / 'run')
  (workdir / dataset.DATA).unlink()
  how = ('--metrics=bpd', '--num_steps=2', '--num_images=3', '--step=1')
  (card,) = answer(capsys, 'evaluate', f'--workdir={workdir}', *how)['cards']
  assert card['protocol']['condition'] == 'label'
  assert len(card['protocol']['labels_sha256']) == 64


@pytest.mark.slow
def test_images_are_inverted_by_a_label(run, tmp_path, capsys):
  """Each by its own, which is what a run without a null label has."""
  never = make_run(tmp_path / 'never', **{'conditioning.drop': 0.0})
  how = [f'--workdir={never}', '--num_images=4', '--num_steps=2', '--step=1',
         '--iterations=1']  # fmt: skip
  with pytest.raises(UserError, match=r'drop=0 .* give --label, such as --lab'):
    binaries.here('invert', *how)
  found = answer(capsys, 'invert', *how, '--label=own')
  network = diffusion_jax.load(never, 1)
  images, _ = heldout_of(network, 4)
  assert found['label'] == images.labels.tolist()
  x0 = trajectories.to_x0(network, np.concatenate(list(images.stream())))
  noises = np.load(f'{found["output"]}/noises.npy')
  sampler = ddim_inversion(1)
  for label, same in ((images.labels, True), (3, False)):
    carry = trajectories.carrier(
      network, sampler, [-1, 0, 999], clip=False, batch_size=64, label=label
    )
    assert np.allclose(carry(x0), noises, atol=1e-4) == same
  with pytest.raises(UserError, match='interpolate=2 needs one label'):
    binaries.here('invert', *how, '--label=own', '--interpolate=2')
  with pytest.raises(UserError, match='label=12: 0 to 9'):
    binaries.here('invert', *how, '--label=12')


@pytest.mark.slow
def test_the_flow_takes_each_images_own_label(trained, tmp_path):
  images, _ = heldout_of(trained, 3)
  how = bits.How('bpd_ode', 0, [999, 0, -1], 'fixedlarge', True,
                 divergence='rademacher', tolerance=1e-3)  # fmt: skip

  def of(labels):
    given = images._replace(labels=np.array(labels, np.int32))
    name = '-'.join(map(str, labels))
    return bits.measure(Batches(trained, given, tmp_path / name, 3), how)

  one, other = of([1, 2, 3]), of([1, 2, 4])
  assert one.results['bpd_ode'] != other.results['bpd_ode']


# --- a classifier of noised images -------------------------------------------


@pytest.fixture(scope='module')
def classifier_run(tmp_path_factory):
  """A classifier, trained for 60 steps on the digits."""
  workdir = tmp_path_factory.mktemp('runs') / 'classifier'
  config = tiny_config(**CLASSIFIER, **{
    'model.channels': 8, 'model.num_groups': 4, 'optim.lr': 1e-2,
    'optim.warmup_steps': 1,
  })  # fmt: skip
  assert not validation.check(config, jax.devices()[:1])
  source, _ = splits = data.splits(config['data'])
  mesh = tiny.one_device()
  program = programs.create(config, mesh)
  state, losses = program.create_state(mesh), []
  how = {'batch_size': 64, 'seed': 0, 'flip': False}
  for _, batch in zip(range(60), pipeline.stream(source, **how), strict=False):
    state, metrics = program.step_fn(state, {}, sharding.put_batch(batch, mesh))
    losses.append(float(metrics['loss']))
  known = dataset.check(workdir, splits, 'test', False, config['conditioning'])
  workdir.mkdir(exist_ok=True)
  dataset.write(workdir, known)
  runs.write_config(workdir, config)
  with checkpoint.Checkpoints(workdir / 'checkpoints') as kept:
    kept.save(60, state._replace(ema_params=state.params))
  return workdir, losses, jax.device_get(metrics)


@pytest.mark.slow
def test_a_classifier_learns_and_guides(trained, classifier_run):
  workdir, losses, metrics = classifier_run
  assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5])
  clear = metrics['accuracy_q1']
  assert clear.total / clear.count > 0.3  # 0.1 by chance
  judge = diffusion_jax.load(workdir)
  with pytest.raises(UserError, match='give it as --classifier'):
    judge.sample(1, **HOW)
  with pytest.raises(UserError, match='give it as --classifier'):
    trained.guided_by(judge)
  with pytest.raises(UserError, match='give it as --guide'):
    trained.classified_by(trained)
  both = trained.classified_by(judge)
  one, two = (x0_of(both, 4, label=3, classifier_scale=s) for s in (0.0, 3.0))
  np.testing.assert_allclose(one, x0_of(trained, 4, label=3), atol=1e-4)
  assert np.abs(one - two).max() > 0.01
  plan = both.plan(label=3, classifier_scale=3.0)
  assert plan.guidance['classifier'] == 'classifier@60'
  # An unconditional run takes the labels of the classifier.
  assert labels.condition(
    workdir, {'conditioning': {'name': 'none'}}, 'all', judge
  ) == {'label': list(range(10))}  # fmt: skip


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'model.name': 'unet'}, 'go together'),
    ({'conditioning.name': 'none'}, "so it must be 'label'"),
    ({'sample_every': 5}, 'sample_every=5: a classifier draws no samples'),
  ],
)
def test_a_classifier_that_cannot_be_trained_is_one_line(changes, said):
  config = tiny_config(**{
    'loss.name': 'classification', 'model.name': 'encoder', 'sample_every': 0,
    **changes,
  })  # fmt: skip
  (told, *_) = validation.check(config, jax.devices()[:1])
  assert said in told
