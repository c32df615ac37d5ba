"""Fine-tuning: what is taken, what is not, and that it happens once."""

import json
import shutil

import binaries
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_jax import models, runs
from diffusion_jax.configs import default
from diffusion_jax.runs import finetune
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, metrics, optim, sharding, state

OPTIMIZER = optim.create(1e-3, 5, 1.0)
MESHES = {'1x1x1': (1, 1, 1), '1x8x1': (1, 8, 1), '2x2x2': (2, 2, 2)}


def unet(shape=(8, 8, 1), **changes):
  how = {
    'channels': 8, 'multipliers': (1, 1), 'num_blocks': 1,
    'attention_resolutions': (4,), 'num_groups': 4, 'dropout': 0.0,
  }  # fmt: skip
  return models.create('unet', shape, **{**how, **changes})


def named(tree):
  return dict(zip(models.names(tree), jax.tree.leaves(tree), strict=True))


def abstract(model, mesh=None):
  mesh = mesh or tiny.one_device()
  return state.abstract_state(model.init, OPTIMIZER, mesh).params


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """(folder, params, averaged params) of a checkpoint at step 7."""
  folder = tmp_path_factory.mktemp('run') / 'checkpoints'
  made = state.create(
    jax.random.key(5), tiny.few_arrays().init, OPTIMIZER, tiny.one_device()
  )
  made = made._replace(ema_params=jax.tree.map(jnp.cos, made.params))
  with checkpoint.Checkpoints(folder) as kept:
    kept.save(7, made)
  made = jax.device_get(made)
  return folder, named(made.params), named(made.ema_params)


@pytest.fixture(scope='module')
def saved_unet(tmp_path_factory):
  """(folder, number of arrays) of a U-Net's checkpoint at step 7."""
  folder = tmp_path_factory.mktemp('run') / 'checkpoints'
  params = tiny.random_arrays(abstract(unet()))
  checkpoint.save_params(folder, 7, params)
  return folder, len(jax.tree.leaves(params))


@pytest.mark.parametrize('sizes', MESHES.values(), ids=MESHES)
@pytest.mark.parametrize('ema', [True, False])
def test_all_of_the_same_model_is_taken_in_pieces(saved, sizes, ema):
  mesh = sharding.make_mesh(
    *sizes, devices=jax.devices()[: int(np.prod(sizes))]
  )
  wanted = abstract(tiny.few_arrays(), mesh)
  taken, left = checkpoint.load_common(saved[0], 7, wanted, ema=ema)
  assert left == []
  assert taken.keys() == named(wanted).keys()
  for name, leaf in named(wanted).items():
    np.testing.assert_array_equal(taken[name], saved[2 if ema else 1][name])
    assert taken[name].sharding == leaf.sharding
  split = [a for a in taken.values() if a.size >= sharding.SMALL]
  parts = mesh.shape['fsdp'] * mesh.shape['tensor']
  assert split
  for array in split:
    assert array.addressable_shards[0].data.size * parts == array.size


def test_other_colours_leave_the_ends(saved):
  """Of a grey model in colour, all but the first and the last layer."""
  taken, left = checkpoint.load_common(
    saved[0], 7, abstract(tiny.few_arrays(channels=3))
  )
  assert left == [
    {'name': 'conv_in/kernel', 'there': (3, 3, 1, 64), 'here': (3, 3, 3, 64)},
    {'name': 'conv_out/bias', 'there': (1,), 'here': (3,)},
    {'name': 'conv_out/kernel', 'there': (3, 3, 64, 1), 'here': (3, 3, 64, 3)},
  ]
  assert taken.keys() == saved[2].keys() - {row['name'] for row in left}
  for name, array in taken.items():
    np.testing.assert_array_equal(array, saved[2][name])


@pytest.mark.slow
def test_attention_elsewhere_is_new_and_unused(saved_unet):
  """At 8x8 in place of 4x4: level 0 has it, level 1 does not."""
  taken, left = checkpoint.load_common(
    saved_unet[0], 7, abstract(unet(attention_resolutions=(8,)))
  )
  new = {row['name'] for row in left if row['there'] is None}
  unused = {row['name'] for row in left if row['here'] is None}
  assert len(new) + len(unused) == len(left)
  # One block down and two up, of ten arrays each; up/0 is the deepest level.
  assert len(new) == len(unused) == 3 * 10
  parts = {'/'.join(name.split('/')[:3]) for name in new}
  assert parts == {'down/0/attentions', 'up/1/attentions'}
  parts = {'/'.join(name.split('/')[:3]) for name in unused}
  assert parts == {'down/1/attentions', 'up/0/attentions'}
  assert len(taken) == saved_unet[1] - 30


def test_the_image_size_does_not_matter(saved_unet):
  wider = unet((16, 16, 1), attention_resolutions=(8,))
  _, left = checkpoint.load_common(saved_unet[0], 7, abstract(wider))
  assert left == []


def test_nothing_in_common_is_one_line(saved):
  other = tiny.few_arrays(channels=3, width=32)
  with pytest.raises(UserError) as error:
    checkpoint.load_common(saved[0], 7, abstract(other))
  assert 'of the same name and shape' in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('sizes', [(1, 8, 1), (2, 2, 2)])
def test_a_state_begins_with_what_is_given(saved, sizes):
  """Both parameters and average; the rest is what it is without."""
  mesh = sharding.make_mesh(
    *sizes, devices=jax.devices()[: int(np.prod(sizes))]
  )
  model, key = tiny.few_arrays(channels=3), jax.random.key(3)
  taken, left = checkpoint.load_common(saved[0], 7, abstract(model, mesh))
  plain = state.create(key, model.init, OPTIMIZER, mesh)
  begun = state.create(key, model.init, OPTIMIZER, mesh, taken)
  rest = {row['name'] for row in left}
  for tree in (begun.params, begun.ema_params):
    for name, array in named(tree).items():
      wanted = named(plain.params) if name in rest else saved[2]
      np.testing.assert_array_equal(array, wanted[name])
      assert array.sharding == named(plain.params)[name].sharding
  assert begun.step == 0
  jax.tree.map(np.testing.assert_array_equal, begun.opt_state, plain.opt_state)
  # The state is donated to the first step: no buffer may be in it twice.
  jax.jit(lambda state: state, donate_argnums=0)(begun)


def test_what_is_said(tmp_path):
  config = runs.to_plain(default.get_config())
  (tmp_path / 'config.json').write_text(json.dumps(config))
  origin = finetune.Origin(str(tmp_path), 7, True)
  assert finetune.told(
    origin, finetune.Begun({'a': 0, 'b': 0}, []), config
  ) == [
    f'starting from the averaged parameters of {tmp_path}, step 7: 2 of 2 '
    'arrays'
  ]
  left = [
    {'name': 'c', 'there': [1], 'here': [2]},
    *({'name': f'n{i}', 'there': None, 'here': []} for i in range(9)),
    {'name': 'u', 'there': [3], 'here': None},
  ]
  config['loss']['prediction'] = 'v'
  config['data']['channels'] = 1
  config['model']['num_heads'] = 2
  lines = finetune.told(origin, finetune.Begun({'a': 0}, left), config)
  assert lines[0].endswith('step 7: 1 of 11 arrays')
  assert lines[1:4] == [
    '  1 of another shape, random: c',
    '  9 new, random: n0, n1, n2, n3 and 5 more, see init_from.json',
    '  1 unused: u',
  ]
  assert lines[4].startswith('  warning: loss.prediction: eps there, v now; ')
  assert 'model.num_heads: 1 there, 2 now' in lines[4]
  assert 'channels' not in lines[4]
  assert len(lines) == 5


# --- runs ---------------------------------------------------------------------

TINY = {
  'batch_size': 16,
  'log_every': 1,
  'eval_every': 1,
  'eval_images': 30,
  'sample_every': 0,
  'checkpoint_every': 10,
  'keep_last': 2,
  'model.channels': 8,
  'model.num_groups': 4,
  'model.multipliers': '(1,)',
  'model.attention_resolutions': '()',
  'optim.warmup_steps': 5,
  'ema.decay': 0.8,
}


def command(workdir, *arguments, **changes):
  changes = {**TINY, **changes}
  return (
    '--config=configs/digits.py',
    f'--workdir={workdir}',
    *arguments,
    *(f'--config.{key}={value}' for key, value in changes.items()),
  )


def train(workdir, *arguments, **changes):
  result = binaries.run('train', *command(workdir, *arguments, **changes))
  assert result.code == 0, result.err
  return result


def rows(workdir):
  return [
    (row['step'], row['loss'], row['heldout_loss'])
    for row in metrics.read(workdir / 'metrics.jsonl')
  ]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run of 30 steps whose network has a block less."""
  return tiny.trained(tmp_path_factory.mktemp('runs') / 'finished')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A run of 30 steps, with checkpoints at 20 and 30."""
  workdir = tmp_path_factory.mktemp('runs') / 'source'
  train(workdir, num_steps=30)
  return workdir


@pytest.fixture(scope='module')
def tuned(source, tmp_path_factory):
  """6 steps from there, without an interruption."""
  workdir = tmp_path_factory.mktemp('runs') / 'tuned'
  result = train(workdir, f'--init_from={source}', num_steps=6)
  assert f'the averaged parameters of {source}, step 30' in result.err
  return workdir


@pytest.mark.slow
def test_it_starts_where_the_other_ended(source, tuned):
  """The first rate is 0, so the first row is of the parameters taken.

  Both runs have one seed, and so the same held-out noise: the loss is the
  source's last but for the rounding of an average with itself. A fresh run
  starts at its first, which is that of knowing nothing, 1.
  """
  first, last = rows(source)[0], rows(source)[-1]
  start = rows(tuned)[0]
  assert start[0] == 1
  np.testing.assert_allclose(start[2], last[2], rtol=1e-5)
  assert start[2] < 0.75 * first[2]
  assert start[1] < 0.75 * first[1]


@pytest.mark.slow
def test_what_it_began_with_is_kept(source, tuned):
  facts = json.loads((tuned / 'init_from.json').read_text())
  count = facts.pop('taken')
  assert facts == {
    'workdir': str(source), 'step': 30, 'ema': True, 'left': [],
  }  # fmt: skip
  assert count > 50
  assert not (source / 'init_from.json').exists()


@pytest.mark.slow
def test_it_happens_once(source, tuned, tmp_path):
  """After a kill the same command goes on, bit for bit, and asks no one."""
  other, workdir = tmp_path / 'source', tmp_path / 'stopped'
  shutil.copytree(source, other)
  train(workdir, f'--init_from={other}', num_steps=3)
  before_a_checkpoint = tmp_path / 'early'
  shutil.copytree(workdir, before_a_checkpoint)
  shutil.rmtree(before_a_checkpoint / 'checkpoints')
  (before_a_checkpoint / 'saved.json').write_text('{"step": 0}')

  # Killed before its first checkpoint, and the source has gone on since.
  shutil.copytree(other / 'checkpoints' / '20', other / 'checkpoints' / '40')
  result = train(before_a_checkpoint, f'--init_from={other}', num_steps=6)
  assert 'step 30: ' in result.err
  assert rows(before_a_checkpoint) == rows(tuned)

  # Killed later: the source is not even looked at.
  shutil.rmtree(other)
  result = train(workdir, f'--init_from={other}', num_steps=6)
  assert 'resuming from checkpoint 3 of ' in result.err
  assert '--init_from was applied when this run started' in result.err
  assert rows(workdir) == rows(tuned)


@pytest.mark.slow
def test_raw_parameters_of_another_step(source, tmp_path):
  flags = (f'--init_from={source}', '--init_step=20', '--noinit_ema')
  result = train(tmp_path / 'w', *flags, num_steps=1)
  assert 'the raw parameters' in result.err
  assert 'step 20: ' in result.err
  # The first row's parameters are those of step 20: its update met rate 0.
  drawn = [
    jax.device_get(
      checkpoint.load_common(
        folder / 'checkpoints', step, {'net': abstract(narrow())}, ema=ema
      )[0]
    )
    for folder, step, ema in (
      (source, 20, False), (tmp_path / 'w', 1, False), (tmp_path / 'w', 1, True)
    )
  ]  # fmt: skip
  jax.tree.map(np.testing.assert_array_equal, drawn[0], drawn[1])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), drawn[0], drawn[2]
  )


def narrow():
  return unet(multipliers=(1,), attention_resolutions=())


def test_a_recorded_origin_that_is_gone_has_remedies(tmp_path):
  """The command does not name it, so neither does a flag of the message."""
  origin = {'workdir': str(tmp_path / 'gone'), 'step': 5, 'ema': True}
  (tmp_path / runs.INIT).write_text(json.dumps(origin))
  with pytest.raises(UserError, match='was started from the averaged') as error:
    finetune.find(tmp_path, None, None, True)
  assert f'or delete {tmp_path}/{runs.INIT}' in str(error.value)
  (tmp_path / runs.INIT).unlink()
  assert finetune.find(tmp_path, None, None, True) is None


@pytest.mark.parametrize(
  ('flags', 'changes', 'must'),
  [
    (['--init_from=/nope'], {}, '--init_from=/nope holds no run'),
    (['--init_from={source}', '--init_step=3'], {}, '--init_step=3: there is'),
    (['--init_from={empty}'], {}, 'holds no checkpoint'),
    (['--init_from={new}/../new'], {}, 'is the --workdir itself'),
    (['--init_step=3'], {}, '--init_step=3 needs --init_from'),
    (['--noinit_ema'], {}, '--noinit_ema needs --init_from'),
    (['--init_from={damaged}', '--init_step=30'], {},
     'with --init_step (10, 20, 25)'),
    (['--init_from={source}'],
     {'model.channels': 12, 'data.channels': 3, 'data.name': 'arrays',
      'data.path': '{colour}'},
     'of the same name and shape'),
  ],
)  # fmt: skip
def test_mistakes_are_one_line_and_write_nothing(
  finished, tmp_path, flags, changes, must
):
  source = finished
  places = {
    name: tmp_path / name for name in ('new', 'empty', 'damaged', 'colour')
  }
  places['colour'] = tmp_path / 'colour.npy'
  np.save(places['colour'], np.zeros((20, 8, 8, 3), np.uint8))
  places['empty'].mkdir()
  shutil.copy(source / 'config.json', places['empty'])
  shutil.copytree(source, places['damaged'])
  files = [
    p for p in (places['damaged'] / 'checkpoints/30').rglob('*') if p.is_file()
  ]
  for path in files:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  before = sorted(tmp_path.rglob('*'))
  flags = [flag.format(source=source, **places) for flag in flags]
  changes = {k: str(v).format(**places) for k, v in changes.items()}
  changes |= {'num_steps': 1, 'model.num_blocks': 1}
  result = binaries.run('train', *command(places['new'], *flags, **changes))
  assert must in result.message
  assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.slow
def test_a_run_cannot_have_begun_otherwise(source, tuned):
  """With other parameters, or, where it began at random, with any."""
  for workdir, init_from, step, ema, began in (
    (tuned, source, 20, True, f'{source}, step 30'),
    (tuned, source, None, False, 'the averaged parameters'),
    (tuned, source.parent, None, True, f'{source}, step 30'),
    (source, tuned, None, True, 'random parameters'),
  ):
    with pytest.raises(UserError) as error:
      finetune.find(workdir, str(init_from), step, ema)
    assert f'the run in {workdir} started from' in str(error.value)
    assert began in str(error.value)
    assert '\n' not in str(error.value)
  assert finetune.find(tuned, str(source), 30, True) is None
  assert finetune.find(tuned, None, None, True) is None
