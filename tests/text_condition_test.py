"""Captions as the condition: training, sampling by prompts, and mistakes."""

import functools
import json
import types

import binaries
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny  # noqa: F401, which adds the network 'dense'
from flax import nnx
from PIL import Image

import diffusion_jax
from diffusion_jax import conditioning, data, models, runs
from diffusion_jax.cli import command, config_files, drawing, grids, run_data
from diffusion_jax.conditioning import conditioner, text
from diffusion_jax.configs import default
from diffusion_jax.data import captions, pipeline
from diffusion_jax.evaluation.batches import Batches
from diffusion_jax.models import layers
from diffusion_jax.planning import arguments
from diffusion_jax.planning.compiled import device_bytes
from diffusion_jax.reporting import pictures
from diffusion_jax.runs import (
  addresses,
  dataset,
  finetune,
  preparation,
  programs,
  prompts,
  recipe,
  texts,
  trajectories,
  validation,
)
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, sharding

BATCH, WIDTH, LENGTH = 8, 4, 8
WORDS = ['red', 'green', 'blue']
HOW = {'sampler': 'ddim', 'grid': '400', 'clip': False, 'dtype': 'float32'}


class Worded(nnx.Module):
  """Its input, plus a layer of the mean of the valid tokens."""

  DOORS = ('tokens',)

  def __init__(self, image_shape, *, doors, out_channels, rngs, **kwargs):
    self.shape = (*image_shape[:-1], out_channels)
    self.out = layers.linear(
      doors['tokens'], int(np.prod(self.shape)), dtype=jnp.float32, rngs=rngs
    )

  def __call__(self, xt, t, keys=None, cond=None):
    every = jnp.ones(cond['tokens'].shape[:2])
    mask = cond.get('mask', every)[..., None]
    mean = jnp.sum(cond['tokens'] * mask, axis=1) / jnp.sum(mask, axis=1)
    return xt + self.out(mean).reshape(-1, *self.shape)


models.MODELS['worded'] = Worded


def config_of(folder, **changes):
  """24 images of one colour, named once or twice."""
  path = folder / 'words.npz'
  if not path.exists():
    kinds = np.arange(24) % 3
    images = np.zeros((24, 4, 4, 3), np.uint8)
    images[np.arange(24), :, :, kinds] = 255 - np.arange(24)[:, None, None]
    each = [[f'a {WORDS[k]} square', WORDS[k] if k else ''] for k in kinds]
    np.savez(path, images=images, captions=each)
  config = config_files.load('configs/digits.py')
  with config.ignore_type(), config.unlocked():
    config.conditioning = default.text()
    config.update_from_flattened_dict({
      'num_steps': 4, 'batch_size': BATCH, 'data.name': 'arrays',
      'data.path': str(path), 'data.image_size': 4, 'data.channels': 3,
      'data.heldout_every': 6, 'model.name': 'worded',
      'conditioning.width': WIDTH, 'conditioning.num_layers': 1,
      'conditioning.num_heads': 2, 'conditioning.vocabulary': 530,
      'conditioning.drop': 0.5, 'optim.warmup_steps': 0, 'optim.lr': 0.01,
      **changes,
    })  # fmt: skip
  return config


class Run:
  """A run of a few steps, in the process."""

  def __init__(
    self, folder, workdir, sizes=(1, 1, 1), make=config_of, **changes
  ):
    self.config, self.workdir = make(folder, **changes), workdir
    assert not validation.check(self.config, jax.devices()[:1])
    count = int(np.prod(sizes))
    self.mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:count])
    preparation.complete(self.config, workdir)
    splits = data.splits(self.config.data)
    known = dataset.check(
      workdir, splits, 'test', False, self.config.conditioning
    )
    runs.check(workdir, self.config)
    self.splits, parts = preparation.prepare(
      self.config, self.mesh, workdir, splits
    )
    self.made = recipe.create(self.config, parts)
    self.program = programs.create(self.config, self.mesh, self.made)
    self.state = self.program.create_state(self.mesh)
    self.write = functools.partial(self._write, known, parts)

  def _write(self, known, parts):
    self.workdir.mkdir(exist_ok=True)
    dataset.write(self.workdir, known)
    runs.write_config(self.workdir, self.config)
    preparation.keep(self.workdir, parts, self.splits)
    with checkpoint.Checkpoints(self.workdir / 'checkpoints') as kept:
      kept.save(int(self.state.step), self.state)
    return self

  def restore(self):
    with checkpoint.Checkpoints(self.workdir / 'checkpoints') as kept:
      self.state = kept.restore_newest(self.program.abstract)
    return self

  def train(self, until=4) -> list[float]:
    batches = pipeline.batches(
      self.splits[0], batch_size=BATCH, seed=0, flip=True, end_step=until,
      start_step=int(self.state.step),
      sharding=sharding.batch_sharding(self.mesh),
    )  # fmt: skip
    losses = []
    for batch in batches:
      rows = programs.rows(self.config, self.made, BATCH)
      assert all(batch[k].shape == shape for k, (shape, _) in rows.items())
      self.state, found = self.program.step_fn(
        self.state, self.program.frozen, batch
      )
      losses.append(float(found['loss']))
    return losses


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('words')


@pytest.fixture(scope='module')
def whole(folder):
  """A run of four steps and its losses."""
  run = Run(folder, folder / 'run')
  losses = run.train()
  run.write()
  return run, losses


@pytest.fixture(scope='module')
def trained(whole):
  return diffusion_jax.load(whole[0].workdir)


# --- training ----------------------------------------------------------------


@pytest.mark.slow
def test_the_losses_are_the_same_on_any_mesh_in_any_pieces(folder, whole):
  run = Run(folder, folder / 'other', (2, 2, 2), microbatches=2)
  np.testing.assert_allclose(run.train(), whole[1], rtol=3e-6)


def test_a_run_resumes_with_its_tokenizer(folder, whole, tmp_path):
  first = Run(folder, tmp_path / 'run')
  losses = first.train(2)
  first.write()
  kept = json.loads((tmp_path / 'run/config.json').read_text())['conditioning']
  assert kept['length'] == 5  # a red square, with start and end
  assert set(kept['ids']) == {'bos', 'eos', 'pad'}
  again = Run(folder, tmp_path / 'run').restore()
  losses += again.train()
  np.testing.assert_allclose(losses, whole[1], rtol=3e-6)
  jax.tree.map(
    np.testing.assert_array_equal, again.state.params, whole[0].state.params
  )
  path = tmp_path / 'run/parts/tokenizer.json'
  path.write_text(path.read_text() + ' ')
  with pytest.raises(UserError, match='not what was saved: copy the folder'):
    Run(folder, tmp_path / 'run')
  with pytest.raises(UserError, match=r'conditioning\.length'):
    Run(folder, tmp_path / 'run', **{'conditioning.length': 7})


def test_grids_of_training_have_captions(whole):
  run, _ = whole
  given = texts.of_grid(run.splits[0], 8)
  encode = run.splits[0].encode_fn
  want = encode(['a red square', 'a blue square'])
  np.testing.assert_array_equal(given[1]['tokens'][:2], want)
  drawn, _ = jax.eval_shape(
    run.program.draw_fn, run.state.params, np.arange(8, dtype=np.uint32), *given
  )
  assert drawn.shape == (8, 4, 4, 3)
  images = np.arange(8 * 48, dtype=np.uint8).reshape(drawn.shape) % 200
  got = grids.of_training(run.made, images, run.splits[0], run.workdir)
  told = ['a red square', 'a blue square'] * 4
  np.testing.assert_array_equal(got, pictures.grid(images, None, told))


def test_both_parts_are_trained(whole, folder):
  run, _ = whole
  assert run.state.params.keys() == {'net', 'text'}
  begun = Run(folder, folder / 'other').state.params['text']
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), begun, run.state.params['text']
  )
  assert min(jax.tree.leaves(moved['blocks'])) > 0


# --- the condition -----------------------------------------------------------


def test_a_dropped_caption_is_the_empty_one_for_its_row_only(whole):
  run, _ = whole
  made, params = run.made.conditioner, run.state.params
  encode = run.splits[0].encode_fn
  said = ['a red square', 'green', 'blue', 'a red square'] * 4
  ids = jnp.asarray(encode(said))
  keys = jax.vmap(jax.random.key)(jnp.arange(16))
  apply = jax.jit(made.condition)
  got = apply(params, {'tokens': ids}, keys)
  own = apply(params, {'tokens': ids}, None)
  null = made.condition(params, {}, None)
  same = np.asarray(encode(['']))
  written = made.condition(params, {'tokens': same}, None)
  np.testing.assert_array_equal(null['mask'], written['mask'])
  np.testing.assert_allclose(null['tokens'], written['tokens'], atol=1e-6)
  assert own['mask'].sum(1).tolist() == [5, 3, 3, 5] * 4
  dropped = np.asarray([
    np.allclose(row, null['tokens'][0], atol=1e-5) for row in got['tokens']
  ])  # fmt: skip
  assert 2 < dropped.sum() < 14
  for i, is_dropped in enumerate(dropped):
    want = null['tokens'][0] if is_dropped else own['tokens'][i]
    np.testing.assert_allclose(got['tokens'][i], want, atol=1e-5)
  # By its own key, wherever the row is.
  turned = apply(params, {'tokens': ids[::-1]}, keys[::-1])
  np.testing.assert_allclose(turned['tokens'][::-1], got['tokens'], atol=1e-5)


def test_the_network_may_be_told_the_caption_as_one_vector():
  options = {
    'name': 'text', 'drop': 0.5, 'vocabulary': 530, 'length': LENGTH,
    'width': WIDTH, 'num_layers': 1, 'num_heads': 2,
  }  # fmt: skip
  plain = conditioning.create(**options)
  told = conditioning.create(**options, pooled=True)
  assert plain.doors == {'tokens': WIDTH}
  assert told.doors == {'tokens': WIDTH, 'vector': WIDTH}
  encoder = text.network(options)
  params = {text.PART: encoder.init(jax.random.key(0))}
  eos, pad = text.ids_of(options)['eos'], text.ids_of(options)['pad']
  rows = jnp.array([[7, 9, eos], [9, 8, eos]] * 4)
  rows = jnp.pad(rows, ((0, 0), (0, LENGTH - 3)), constant_values=pad)
  own = told.condition(params, {text.ROW: rows}, None)
  want = encoder.apply(params[text.PART], rows, own['mask'])
  np.testing.assert_array_equal(own['vector'], want.pooled)
  # The end token's, for which order counts.
  np.testing.assert_allclose(own['vector'], own['tokens'][:, 2], atol=1e-6)
  assert np.abs(own['vector'][0] - own['vector'][1]).max() > 1e-3
  # It is dropped with the caption.
  keys = jax.vmap(jax.random.key)(jnp.arange(8))
  null = told.condition(params, {}, None)
  got = told.condition(params, {text.ROW: rows}, keys)
  is_dropped = np.asarray(text.dropped(keys, 0.5))
  assert 0 < is_dropped.sum() < 8
  for i in range(8):
    want = null['vector'][0] if is_dropped[i] else own['vector'][i]
    np.testing.assert_allclose(got['vector'][i], want, atol=1e-5)


# --- sampling ----------------------------------------------------------------


def x0_of(trained, count, **how):
  return trained.sample(count, **{**HOW, **how}) / 127.5 - 1


def test_samples_follow_their_prompts(trained, whole):
  x = trajectories.noises(trained, 0, 4)
  encode = whole[0].splits[0].encode_fn

  def x0(said):
    made = trained.recipe.conditioner
    cond = made.condition(trained.params, {'tokens': encode(said)}, None)
    return trained.denoise(x, 400, cond).x0

  said = ['a red square', 'blue']
  c, u = x0(said * 2), trained.denoise(x, 400).x0
  assert np.abs(c - u).max() > 0.05

  def close(got, want):
    np.testing.assert_allclose(got, np.clip(want, -1, 1), atol=1e-4)

  close(x0_of(trained, 4, prompts=said), c)
  close(x0_of(trained, 4, prompts=said, guidance=2.5), u + 2.5 * (c - u))
  close(x0_of(trained, 4, first=2, prompts=said)[:2], c[2:])
  negative = x0(['green'] * 4)
  got = x0_of(trained, 4, prompts=said, guidance=2.5, negative_prompt='green')
  close(got, negative + 2.5 * (c - negative))
  programs_made = trained.compiled.drawer.cache_info().currsize
  close(x0_of(trained, 4, prompts=['green'] * 2), negative)
  assert trained.compiled.drawer.cache_info().currsize == programs_made
  # Without a wish, captions of training images.
  shown = trained.plan(**HOW_OF_PLAN).condition['prompts']
  assert len(shown) == 20
  assert shown[1] == 'a green square'


def test_tokens_without_a_mask_are_all_valid(trained):
  x = np.zeros((2, 4, 4, 3), np.float32)
  tokens = np.linspace(-1, 1, 2 * 5 * WIDTH).reshape(2, 5, WIDTH)
  tokens[:, 2:] *= 3  # another mean than that of the first two
  ones = {'tokens': tokens, 'mask': np.ones((2, 5), bool)}
  want, first = trained.denoise(x, 400, ones).x0, ones['mask'].copy()
  np.testing.assert_array_equal(
    trained.denoise(x, 400, {'tokens': tokens}).x0, want
  )
  first[:, 2:] = False
  other = trained.denoise(x, 400, {**ones, 'mask': first}).x0
  assert np.abs(other - want).max() > 1e-3


HOW_OF_PLAN = {k: x for k, x in HOW.items() if k != 'dtype'}


def test_a_prompt_that_is_too_long_is_cut_and_said(trained, capsys):
  long = 'a red square in a green square'
  plan = trained.plan(**HOW_OF_PLAN, prompts=[long])
  bare, tables = prompts.tables(trained.workdir, trained.config, plan)
  assert bare.condition == {}
  assert tables['tokens'].shape == (1, 5)
  assert "'in a green square' is left out" in capsys.readouterr().err
  assert plan.protocol()['prompts'] == [long]


MISTAKES = [
  ({'label': 3}, 'the run takes text: give a prompt'),
  ({'prompts': []}, 'a list of one and more'),
  ({'prompts': [3]}, 'a list of one and more'),
  ({'prompts': ['a', 'b\ud83c']}, r"'b\\ud83c', which is not Unicode"),
  ({'negative_prompt': 'x'}, 'no effect with guidance=1'),
]


@pytest.mark.parametrize(('asked', 'told'), MISTAKES)
def test_a_wrong_wish_is_one_line(trained, asked, told):
  with pytest.raises(UserError, match=told) as error:
    trained.plan(**HOW_OF_PLAN, **asked)
  assert '\n' not in str(error.value)


def test_a_run_without_captions_takes_no_prompt(tmp_path):
  config = config_files.load('configs/digits.py')
  for asked in ({'prompts': ['a cat']}, {'negative_prompt': 'a cat'}):
    with pytest.raises(UserError, match=r"=.*'a cat'.*: the run"):
      prompts.condition(tmp_path, config, asked)


def test_a_file_of_prompts(tmp_path):
  path = tmp_path / 'prompts.txt'
  path.write_text('\ufeffa red apple \r\ngrün\n')
  assert prompts.read(path) == ['a red apple', 'grün']
  for content, told in (
    (b'a\n\nb\n', 'line 2 is empty'), (b'', 'is empty'),
    (b'a\xff', 'not UTF-8 \\(byte 1\\)'),
  ):  # fmt: skip
    path.write_bytes(content)
    with pytest.raises(UserError, match=told):
      prompts.read(path)
  with pytest.raises(UserError, match='is not a file'):
    prompts.read(tmp_path / 'none')


def test_a_prompt_may_be_given_several_times():
  given = ['sample', '--prompt=a', '--prompt', 'b', '--seed=1', '--prompt=a']
  assert 'prompt' in drawing.FLAGS
  assert command._last(given) == given


def test_the_flags_reach_the_store(whole):
  workdir = whole[0].workdir
  how = [
    f'--workdir={workdir}', '--sampler=ddim', '--num_steps=1', '--noclip',
    '--num_samples=3', '--batch_size=3',
  ]  # fmt: skip
  asked = ['--prompt=a red square', '--prompt=blue', '--negative_prompt=green']
  binaries.here('sample', *how, *asked, '--guidance=2')
  (output,) = (workdir / 'samples').glob('*prompt-a-red-square-and1-*')
  assert 'not-green-' in output.name
  facts = json.loads((output / 'store.json').read_text())
  assert facts['prompts'] == ['a red square', 'blue']
  images = np.load(output / 'samples.npz')['arr_0']
  assert len(images) == 3
  want = pictures.grid(images, None, ['a red square', 'blue', 'a red square'])
  np.testing.assert_array_equal(Image.open(output / 'grid.png'), want)
  for given, told in (
    ('--prompts=x.txt', 'give one of them'),
    ('--guide_ema_profile=0.1', 'no effect without --guide'),
  ):
    with pytest.raises(UserError, match=told):
      binaries.here('sample', *how, *asked, given)


def test_a_picture_of_a_prompt_is_drawn_again(whole, tmp_path, capsys):
  binaries.here(
    'sample', f'--workdir={whole[0].workdir}', '--sampler=ddim', '--grid=400',
    '--noclip', '--num_samples=3', '--png', '--prompt=a red square',
    '--prompt=grün', '--negative_prompt=green', '--guidance=2',
    f'--output={tmp_path}/one',
  )  # fmt: skip
  path = tmp_path / 'one/png/000001.png'
  facts = addresses.read(path).facts
  assert (facts['prompt'], facts['negative_prompt']) == ('grün', 'green')
  capsys.readouterr()
  binaries.here('sample', f'--like={path}', f'--output={tmp_path}', '--json')
  assert json.loads(capsys.readouterr().out)['largest_difference'] == 0


def test_other_commands_know_what_the_run_has_found_out(
  folder, whole, tmp_path, monkeypatch, capsys
):
  (tmp_path / 'words.json').write_text(config_of(folder).to_json())
  how = [f'--config={tmp_path}/words.json', f'--workdir={whole[0].workdir}']
  asked = ['--features=pixels', '--nobits', '--nomeasure', '--plan']
  binaries.here('reproduce', *how, *asked)
  assert 'training' in capsys.readouterr().out
  with pytest.raises(UserError, match=r'another config.*conditioning\.length'):
    binaries.here('reproduce', *how, *asked, '--config.conditioning.length=7')

  class Reached(Exception):
    pass

  def create(config, mesh):
    raise Reached(config.conditioning.to_dict())

  monkeypatch.setattr(programs, 'create', create)
  with pytest.raises(Reached) as error:
    binaries.here('preflight', *how)
  assert error.value.args == (whole[0].config.conditioning.to_dict(),)


def test_preflight_plans_guided_samples_of_a_prompt(tmp_path):
  config = config_of(tmp_path, **{'sample.guidance': 3.0})
  mesh = sharding.make_mesh(2, 1, 1, devices=jax.devices()[:2])
  program = programs.create(config, mesh)
  args = arguments.of_drawing(config, mesh, program, 6)
  images, is_finite = program.draw_fn.trace(*args).out_info
  assert images.shape == (6, 4, 4, 3)
  assert is_finite.shape == ()
  _, _, batch = arguments.of_step(config, mesh, program, 8)
  # Pixels and tokens.
  assert device_bytes(batch) == 8 // 2 * (4 * 4 * 3 + 77 * 4)


def test_likelihoods_need_an_empty_caption_that_was_trained(tmp_path):
  made = conditioner.Conditioner(lambda *_: {}, {'tokens': WIDTH}, drop=0.0)
  trained = types.SimpleNamespace(
    recipe=types.SimpleNamespace(conditioner=made), codec=None
  )
  images = types.SimpleNamespace(labels=None)
  how = {'seed': 0, 'stream': 2, 'dtype': 'uint8'}
  with pytest.raises(UserError, match='no model without a caption'):
    Batches(trained, images, tmp_path, 2).program(None, **how)
  trained.recipe.conditioner = made._replace(drop=0.1)
  assert Batches(trained, images, tmp_path, 2).program(None, **how)
  told = run_data.of_conditions(config_of(tmp_path))
  assert told == {'condition': 'empty caption'}


def test_a_grid_has_a_row_for_each_label_and_for_few_prompts():
  def rows(condition, shown):
    return grids.rows(types.SimpleNamespace(condition=condition), shown)

  assert rows({}, 8) == rows({'label': 'data'}, 8) == 1
  assert rows({'label': [0, 1, 2, 3, 4]}, 8) == 5
  assert rows({'prompts': ['a'] * 4}, 8) == 4
  assert rows({'prompts': ['a'] * 5, 'label': [0, 1]}, 8) == 1


def test_the_captions_of_labels_are_their_names(monkeypatch):
  known = {'labels': {'counts': [2, 0, 2], 'names': ['cat', 'dog']}}
  monkeypatch.setattr(dataset, 'read', lambda workdir: known)
  run = types.SimpleNamespace(
    workdir='run', config={'conditioning': {'name': 'label', 'num_classes': 3}},
    guides={},
  )  # fmt: skip

  def told(**condition):
    plan = types.SimpleNamespace(condition=condition, seed=0)
    return grids.told(run, plan, 5)

  assert told(label=[2, 0]) == ['2', 'cat', '2', 'cat', '2']
  assert told(label=[1], prompts=['a', 'b']) == ['a', 'b', 'a', 'b', 'a']
  assert set(told(label='data', label_counts=[2, 0, 2])) <= {'cat', '2'}
  assert told() is None
  doors = types.SimpleNamespace(doors={'label': 3})
  made = types.SimpleNamespace(conditioner=doors)
  source = types.SimpleNamespace(encode_fn=None)
  images = np.zeros((6, 64, 64, 1), np.uint8)
  want = pictures.in_turn(images, 3, ['cat', 'dog', '2'] * 2)
  got = grids.of_training(made, images, source, 'run')
  np.testing.assert_array_equal(got, want)


# --- mistakes of configs -----------------------------------------------------


def test_mistakes_of_the_keys(tmp_path):
  for key, value, told in (
    ('conditioning.vocabulary', 100, 'at least 515'),
    ('conditioning.length', 2, '3 and more'),
    ('conditioning.num_heads', 3, 'does not divide'),
    ('conditioning.drop', 1.0, r'in \[0, 1\)'),
  ):
    config = config_of(tmp_path, **{key: value})
    (message, *_) = validation.check(config, jax.devices()[:1])
    assert key in message
    assert told.replace('\\', '') in message
  wrong = {'conditioning.pooled': True, 'data.augment': 0.1}
  told = validation.check(config_of(tmp_path, **wrong), jax.devices()[:1])
  assert 'data.augment=0.1 with conditioning.pooled=True' in told[0]
  config = config_of(tmp_path, **{'model.name': 'dense'})
  with pytest.raises(UserError, match='tokens'):
    recipe.create(config)


def test_captions_that_are_cut_are_counted(folder, tmp_path, capsys):
  run = Run(folder, tmp_path / 'run', **{'conditioning.length': 4})
  told = capsys.readouterr().err
  assert '20 of 32 captions are longer than conditioning.length=4' in told
  batch = pipeline.stream(run.splits[0], batch_size=4, seed=0, flip=False)[0]
  assert batch['tokens'].shape == (4, 4)
  assert captions.describe(run.splits[0])['captions'] == 32


def test_the_tokenizer_of_another_run(folder, whole, tmp_path):
  path = str(whole[0].workdir)
  run = Run(folder, tmp_path / 'run', **{'conditioning.tokenizer': path})
  assert run.config.conditioning.sha256 == whole[0].config.conditioning.sha256


def test_embeddings_that_are_taken_keep_their_tokenizer(
  folder, whole, tmp_path, capsys
):
  captions = [[text.upper() + ' and more'] for text in WORDS * 4]
  images = np.zeros((12, 4, 4, 3), np.uint8)
  np.savez(tmp_path / 'words.npz', images=images, captions=captions)
  there = whole[0].config.conditioning
  origin = finetune.Origin(str(whole[0].workdir), 4, True)

  def begun(origin, **changes):
    config = config_of(tmp_path, **changes)
    splits = texts.prepare(config, None, data.splits(config.data), origin)
    return config, splits

  config, _ = begun(origin)
  assert config.conditioning.sha256 == there.sha256
  assert f'the tokenizer is that of {origin.workdir}' in capsys.readouterr().err
  nothing = finetune.Begun({}, [])
  (line,) = finetune.told(origin, nothing, runs.to_plain(config))
  assert 'warning' not in line
  own, _ = begun(None)
  assert own.conditioning.sha256 != there.sha256
  texts.write(tmp_path, begun(None)[1][0])
  chosen, _ = begun(
    origin,
    **{'conditioning.tokenizer': str(tmp_path), 'conditioning.num_heads': 4},
  )
  assert chosen.conditioning.sha256 == own.conditioning.sha256
  lines = finetune.told(origin, nothing, runs.to_plain(chosen))
  assert 'conditioning.num_heads: 2 there, 4 now' in lines[1]
  assert 'conditioning.sha256: ' in lines[1]


def test_a_guide_needs_the_same_tokenizer(trained, whole):
  from diffusion_jax.runs import guided

  other = {**trained.config, 'conditioning': {
    **trained.config['conditioning'], 'sha256': 'x'
  }}  # fmt: skip
  guided.check(trained.config, trained.config, 'w')
  with pytest.raises(UserError, match='another tokenizer'):
    guided.check(trained.config, other, 'w')
