"""Checkpoints: what is saved comes back, on any mesh; damage is told."""

import errno
import json
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_jax import models
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, held, optim, sharding, state

NETWORK = tiny.few_arrays()
OPTIMIZER = optim.create(1e-3, 5, 1.0)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """(folder, state) of a run with checkpoints at 1, 2, 4, 6 and 7.

  Six and seven are the last two, the others multiples of 2; the odd ones went.
  """
  folder = tmp_path_factory.mktemp('run') / 'checkpoints'
  made = state.create(
    jax.random.key(0), NETWORK.init, OPTIMIZER, tiny.one_device()
  )
  with checkpoint.Checkpoints(folder, keep_last=2, keep_every=2) as kept:
    for step in range(1, 8):
      kept.save(step, made._replace(step=made.step + step))
      kept.wait()
  return folder, jax.device_get(made)


@pytest.fixture
def folder(saved, tmp_path):
  """A copy, to be damaged."""
  shutil.copytree(saved[0], tmp_path / 'checkpoints')
  return tmp_path / 'checkpoints'


def abstract():
  return state.abstract_state(NETWORK.init, OPTIMIZER, tiny.one_device())


def restore(folder, step, mesh=None, network=NETWORK, optimizer=OPTIMIZER):
  mesh = mesh or tiny.one_device()
  abstract = state.abstract_state(network.init, optimizer, mesh)
  with checkpoint.Checkpoints(folder) as kept:
    return kept.restore(step, abstract)


def test_the_last_and_every_nth_are_kept(saved):
  assert checkpoint.steps(saved[0]) == [2, 4, 6, 7]


@pytest.mark.parametrize('sizes', [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_every_bit_comes_back_on_any_mesh(saved, sizes):
  folder, made = saved
  count = sizes[0] * sizes[1] * sizes[2]
  mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:count])
  back = restore(folder, 4, mesh)
  assert isinstance(back, state.TrainState)
  assert back.step == 4
  jax.tree.map(
    np.testing.assert_array_equal,
    made._replace(step=0),
    jax.device_get(back)._replace(step=0),
  )
  assert back.step.sharding.mesh.shape['fsdp'] == sizes[1]


@pytest.mark.parametrize('ema', [True, False])
def test_parameters_come_without_the_optimiser(saved, ema):
  folder, made = saved
  mesh = tiny.one_device()
  shapes = state.abstract_state(NETWORK.init, OPTIMIZER, mesh).params
  params = checkpoint.load_params(folder, 6, shapes, ema=ema)
  wanted = made.ema_params if ema else made.params
  jax.tree.map(np.testing.assert_array_equal, wanted, jax.device_get(params))


def one_line(error, *must):
  text = str(error.value)
  assert '\n' not in text
  for word in must:
    assert word in text, text


def test_another_model_is_named_not_loaded(saved):
  wider = tiny.few_arrays(width=128)
  with pytest.raises(UserError) as error:
    restore(saved[0], 7, network=wider)
  one_line(error, 'checkpoint 7', 'another model', 'conv_in')
  with pytest.raises(UserError) as error:
    restore(saved[0], 7, optimizer=optim.create(1e-3, 5, clip_norm=0.0))
  one_line(error, 'checkpoint 7', 'opt_state')


def test_a_truncated_checkpoint_is_named_with_what_to_do(folder):
  files = [p for p in (folder / '7').rglob('*') if p.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  with pytest.raises(UserError) as error:
    restore(folder, 7)
  one_line(error, 'checkpoint 7 is unreadable', 'away to resume from 6')
  assert '--step' not in str(error.value)  # training has no such flag
  assert restore(folder, 6).step == 6


def sums_of(folder, step):
  """(path, its JSON) of the file that holds a checkpoint's checksums."""
  path = folder / str(step) / '_CHECKPOINT_METADATA'
  return path, json.loads(path.read_text())


def test_checkpoints_from_before_parts_are_restored(saved):
  """They hold the network's parameters where there is now {'net': ...}."""
  folder, made = saved
  wanted = state.abstract_state(
    tiny.recipe(NETWORK).init, OPTIMIZER, tiny.one_device()
  )
  with checkpoint.Checkpoints(folder) as kept:
    restored = kept.restore(7, wanted)
  assert jax.tree.structure(restored) == jax.tree.structure(wanted)
  same(jax.tree.leaves(restored)[1:], jax.tree.leaves(made)[1:])
  for ema in (True, False):
    part = 'ema_params' if ema else 'params'
    before = getattr(made, part)
    loaded = checkpoint.load_params(folder, 7, getattr(wanted, part), ema=ema)
    same(loaded['net'], before)
    taken, left = checkpoint.load_common(
      folder, 7, getattr(wanted, part), ema=ema
    )
    assert not left
    assert list(taken) == models.names(wanted.params)
    same(list(taken.values()), jax.tree.leaves(before))


def load_ema(folder, step):
  shapes = state.abstract_state(
    NETWORK.init, OPTIMIZER, tiny.one_device()
  ).params
  return checkpoint.load_params(folder, step, shapes)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (a, b)))


@pytest.mark.parametrize('flips', [2, pytest.param(60, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_named_or_changes_nothing(saved, folder, flips, capfd):
  """In any file of arrays; a few bytes of those belong to nothing."""
  rng = np.random.default_rng(0)
  whole = restore(folder, 7)
  files = [*folder.glob('7/state/**/d/*'), *folder.glob('7/state/**/*.ocdbt')]
  assert sum(path.stat().st_size for path in files) > 2**18
  told = {}
  for path in files:
    data = path.read_bytes()
    for place in rng.choice(len(data), flips, replace=False):
      damaged = bytearray(data)
      damaged[place] ^= 1 << rng.integers(8)
      path.write_bytes(damaged)
      try:
        same(restore(folder, 7), whole)
      except UserError as e:
        text = str(e)
        assert text.startswith('checkpoint 7 is unreadable ('), text
        assert text.endswith('away to resume from 6'), text
        assert '\n' not in text
        told.setdefault(path, []).append(text)
        if 'unreadable (params/' in text or 'unreadable (opt_state/' in text:
          same(load_ema(folder, 7), whole.ema_params)  # it reads neither
    path.write_bytes(data)
  assert not capfd.readouterr().err
  # One file, which a single process leaves behind, is of no use.
  assert len(told) == len(files) - 1
  assert sum(map(len, told.values())) >= 0.8 * flips * (len(files) - 1)
  same(restore(folder, 7), whole)


@pytest.mark.parametrize('part', ['ema_params', 'params', 'opt_state', 'step'])
def test_what_is_read_is_verified_and_no_more(folder, part):
  path, facts = sums_of(folder, 7)
  sums = facts['custom_metadata']['checksums']
  name = next(name for name in sums if name.split('/')[0] == part)
  sums[name] ^= 1
  path.write_text(json.dumps(facts))
  with pytest.raises(UserError) as error:
    restore(folder, 7)
  one_line(error, f'checkpoint 7 is unreadable ({name} is not what was saved)')
  shapes = state.abstract_state(
    NETWORK.init, OPTIMIZER, tiny.one_device()
  ).params
  for ema, load, flag in (
    (True, checkpoint.load_params, 'step'),
    (False, checkpoint.load_common, 'init_step'),
  ):
    if part == ('ema_params' if ema else 'params'):
      with pytest.raises(UserError) as error:
        load(folder, 7, shapes, ema=ema)
      one_line(error, f'({name} is not what was saved)', f'--{flag}')
    else:
      load(folder, 7, shapes, ema=ema)


def test_common_parameters_are_verified_and_no_others(folder):
  """Of a network of other colours, whose ends are left."""
  shapes = state.abstract_state(
    NETWORK.init, OPTIMIZER, tiny.one_device()
  ).params
  shapes['conv_in']['kernel'] = jax.ShapeDtypeStruct((3, 3, 3, 64), 'float32')
  path, facts = sums_of(folder, 7)
  sums = facts['custom_metadata']['checksums']
  sums['ema_params/conv_in/kernel'] ^= 1
  path.write_text(json.dumps(facts))
  taken, _ = checkpoint.load_common(folder, 7, shapes)
  assert 'conv_in/kernel' not in taken
  sums['ema_params/conv_in/bias'] ^= 1
  path.write_text(json.dumps(facts))
  with pytest.raises(UserError) as error:
    checkpoint.load_common(folder, 7, shapes)
  one_line(error, 'ema_params/conv_in/bias', 'checkpoint 7', '--init_step')


def test_checksums_are_required(folder):
  path, facts = sums_of(folder, 7)
  del facts['custom_metadata']
  path.write_text(json.dumps(facts))
  with pytest.raises(UserError) as error:
    load_ema(folder, 7)
  one_line(error, 'checkpoint 7', 'it has no checksums', 'from 6')
  one_line(error, 'with --step (2, 4, 6)')


@pytest.mark.parametrize('sizes', [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_checksums_do_not_depend_on_the_mesh(saved, tmp_path, sizes):
  folder, _ = saved
  on_mesh = restore(folder, 4, sharding.make_mesh(*sizes))
  with checkpoint.Checkpoints(tmp_path / 'other') as kept:
    kept.save(4, on_mesh)
  wanted = sums_of(folder, 4)[1]['custom_metadata']
  assert sums_of(tmp_path / 'other', 4)[1]['custom_metadata'] == wanted
  assert len(wanted['checksums']) == len(jax.tree.leaves(on_mesh))
  same(restore(tmp_path / 'other', 4), on_mesh)


# --- checkpoints that somebody holds -----------------------------------------


@pytest.fixture
def small():
  """A state that is saved in no time."""
  return state.TrainState(
    *({'x': jnp.full(3, i)} for i in range(len(state.TrainState._fields)))
  )


@pytest.fixture
def warned(monkeypatch):
  """The warnings, as they come."""
  told = []
  held._warn_once.cache_clear()
  monkeypatch.setattr(
    held.logging, 'warning', lambda form, *rest: told.append(form % rest)
  )
  return told


def save(kept, made, *numbers):
  for step in numbers:
    kept.save(step, made)
    kept.wait()
  return checkpoint.steps(kept.directory)


def test_what_is_held_is_kept_until_it_is_let_go(small, tmp_path, warned):
  folder = tmp_path / 'checkpoints'
  assert held.steps(folder) == set()
  with checkpoint.Checkpoints(folder, keep_last=2) as kept:
    assert save(kept, small, 1, 2) == [1, 2]
    held.hold(folder, [np.int64(2)])
    assert held.steps(folder) == {2}
    assert save(kept, small, 3, 4, 5, 6) == [2, 5, 6]
    held.hold(folder, [])
    assert save(kept, small) == [2, 5, 6]
    assert save(kept, small, 7) == [6, 7]
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    'checkpoints', 'held.json', 'saved.json',
  ]  # fmt: skip
  assert not warned


def test_what_is_held_is_kept_beside_every_nth_and_after_a_restart(
  small, tmp_path
):
  folder = tmp_path / 'checkpoints'
  with checkpoint.Checkpoints(folder, keep_last=1, keep_every=4) as kept:
    save(kept, small, 1, 2, 3)
    held.hold(folder, {5, 3, 99})
  assert json.loads((tmp_path / 'held.json').read_text()) == {
    'somebody': [3, 5, 99]
  }
  for step, there in ((4, [3, 4]), (5, [3, 4, 5]), (6, [3, 4, 5, 6])):
    with checkpoint.Checkpoints(folder, keep_last=1, keep_every=4) as kept:
      assert save(kept, small, step) == there
  held.hold(folder, [5])
  with checkpoint.Checkpoints(folder, keep_last=1, keep_every=4) as kept:
    assert save(kept, small, 7) == [4, 5, 7]
    same(kept.restore(5, small), small)


@pytest.mark.parametrize(
  'content',
  ['', '{"steps": [2', '[2]', '{"steps": 2}', '{"steps": ["2"]}', '7',
   '{"steps": [2.0]}', '\xff', '[' * 100_000],
)  # fmt: skip
def test_a_damaged_note_of_what_is_held_holds_none(tmp_path, warned, content):
  (tmp_path / 'held.json').write_bytes(content.encode('latin-1'))
  for _ in range(3):
    assert held.steps(tmp_path / 'checkpoints') == set()
  (told,) = warned  # once
  assert f'{tmp_path}/held.json is unreadable (' in told
  assert told.endswith('held checkpoints: none')
  held.hold(tmp_path / 'checkpoints', [4])
  assert held.steps(tmp_path / 'checkpoints') == {4}


def test_training_goes_on_where_that_note_is_damaged(small, tmp_path, warned):
  """What was read before it was damaged stays held, and no more is."""
  folder = tmp_path / 'checkpoints'
  with checkpoint.Checkpoints(folder, keep_last=1) as kept:
    save(kept, small, 1)
    held.hold(folder, [1])
    save(kept, small, 2)
    (tmp_path / 'held.json').write_text('{"steps": [1, 3')
    assert save(kept, small, 3, 4, 5) == [1, 5]
  (told,) = warned
  assert told.endswith('held checkpoints: 1')
  with checkpoint.Checkpoints(folder, keep_last=1) as kept:
    assert save(kept, small, 6) == [6]
  assert len(warned) == 2


def test_a_save_that_cannot_be_written_is_one_line(saved, tmp_path):
  """What fails on a thread is told by wait(), once, and then it closes."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  made = state.create(
    jax.random.key(0), NETWORK.init, OPTIMIZER, tiny.one_device()
  )
  with checkpoint.Checkpoints(tmp_path / 'few') as kept:
    kept.save(1, made)
    kept.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
      with pytest.raises(UserError) as error:  # noqa: PT012
        kept.save(2, made)
        kept.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    one_line(error, 'checkpoint 2 cannot be written', os.strerror(errno.EFBIG))
    assert checkpoint.steps(tmp_path / 'few') == [1]
  # In another folder: here, unlike in a process that ends, Orbax may still be
  # writing the other arrays of the failed save.
  shutil.copytree(tmp_path / 'few' / '1', tmp_path / 'again' / '1')
  with checkpoint.Checkpoints(tmp_path / 'again') as kept:
    kept.save(2, made)
  same(restore(tmp_path / 'again', 2), made)


def test_an_empty_folder_is_no_checkpoint_in_silence(folder):
  (folder / '9').mkdir()
  with pytest.raises(UserError) as error:
    restore(folder, 9)
  one_line(error, 'checkpoint 9', 'unreadable', 'from 7')


def test_what_a_kill_leaves_is_ignored_and_cleaned(folder):
  torn = folder / '8.orbax-checkpoint-tmp'
  shutil.copytree(folder / '7', torn)
  assert checkpoint.steps(folder) == [2, 4, 6, 7]
  restore(folder, 7)
  assert not torn.exists()


def test_the_step_that_is_asked_for_must_be_there(saved, tmp_path):
  assert checkpoint.find_step(saved[0], None) == 7
  assert checkpoint.find_step(saved[0], 4) == 4
  with pytest.raises(UserError) as error:
    checkpoint.find_step(saved[0], 5)
  one_line(error, '--step=5', '2, 4, 6, 7')
  with pytest.raises(UserError) as error:
    checkpoint.find_step(tmp_path / 'none', None)
  one_line(error, 'no checkpoint')
  assert not (tmp_path / 'none').exists()


def test_reading_writes_nothing(saved):
  """Sampling from a folder that cannot be written must work."""
  before = sorted(str(p) for p in saved[0].rglob('*'))
  shapes = state.abstract_state(
    NETWORK.init, OPTIMIZER, tiny.one_device()
  ).params
  checkpoint.load_params(saved[0], 7, shapes)
  assert sorted(str(p) for p in saved[0].rglob('*')) == before
  assert json.loads((saved[0] / '7' / '_CHECKPOINT_METADATA').read_text())


def test_two_that_hold_do_not_let_go_of_each_others(tmp_path):
  folder = tmp_path / 'checkpoints'
  held.hold(folder, [3, 1], by='a')
  held.hold(folder, [3, 2], by='b')
  assert held.steps(folder) == {1, 2, 3}
  held.hold(folder, [], by='a')
  assert held.steps(folder) == {2, 3}
