"""Runs in a bucket, without one: fsspec's memory stands in for gcsfs.

tests/bucket_test.py does the same through the real packages, and takes minutes.
"""

import errno
import itertools
import json
import time

import fsspec
import numpy as np
import pytest
import tiny
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from ml_collections import ConfigDict
from PIL import Image

from configs import digits
from diffusion_jax import data, runs
from diffusion_jax.evaluation import cards, classifier, tables
from diffusion_jax.reporting import facts, page, pictures
from diffusion_jax.runs import finetune, store
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import checkpoint, held, loop, metrics, stored


class Memory(MemoryFileSystem):
  protocol = ('gcs', 'gs')
  store, pseudo_dirs = {}, ['']
  refused = ''  # writes to paths that hold this

  @classmethod
  def _strip_protocol(cls, path):
    return '/' + path.removeprefix('gs://').strip('/')

  def glob(self, path, **kwargs):
    return [found.lstrip('/') for found in super().glob(path, **kwargs)]

  def put_file(self, local, path, **kwargs):
    if self.refused and self.refused in path:
      raise OSError('Forbidden: b/ours\nno storage.objects.create')
    super().put_file(local, path, **kwargs)

  def call(self, method, path, bucket, timeout):
    assert (method, path) == ('GET', 'b/{}')
    assert timeout <= 60
    if bucket == 'silent':
      raise fsspec.FSTimeoutError
    if bucket != 'ours':
      raise FileNotFoundError('b/' + bucket)


@pytest.fixture
def bucket(monkeypatch):
  """gs://ours, empty."""
  forget = epath.backend.fsspec_backend._get_filesystem.cache_clear
  monkeypatch.setitem(_registry, 'gcs', Memory)
  monkeypatch.setitem(fsspec.config.conf, 'gcs', {})
  monkeypatch.setattr(files, 'PACKAGES', ())
  monkeypatch.setattr(Memory, 'store', {})
  monkeypatch.setattr(Memory, 'pseudo_dirs', [''])
  for clear in (forget, files._reach.cache_clear):
    clear()
  yield files.at('gs://ours/runs/a')
  for clear in (forget, files._reach.cache_clear):
    clear()


def objects():
  return sorted(name.removeprefix('/ours/') for name in Memory.store)


# --- paths ------------------------------------------------------------------


def test_a_local_path_is_what_it_was(tmp_path):
  assert type(files.at(str(tmp_path))) is type(tmp_path)
  assert files.at(tmp_path) == tmp_path
  assert not files.in_bucket(files.at('gs/x'))
  (tmp_path / 'link').symlink_to(tmp_path / 'there')
  assert files.resolved(tmp_path / 'link') == tmp_path / 'there'


def test_a_path_in_a_bucket_stays_in_it(bucket):
  assert str(bucket) == 'gs://ours/runs/a'
  assert files.in_bucket(bucket / 'x')
  for same in (files.at(bucket), files.at(bucket.expanduser())):
    assert str(files.resolved(same)) == str(files.absolute(same)) == str(bucket)
  assert list(map(str, files.parents(bucket))) == [
    'gs://ours/runs', 'gs://ours',
  ]  # fmt: skip


@pytest.mark.parametrize(
  'path', ['s3://ours/a', 'gs:/ours/a', 'gs://', 'gs://ours/../a', 'http://x/y']
)
def test_other_addresses(bucket, path):
  with pytest.raises(UserError, match=r'give a local folder, or gs://BUCKET'):
    files.at(path)


def test_a_bucket_that_is_not_there(bucket):
  with pytest.raises(UserError, match='gs://theirs: there is no such bucket'):
    runs.read_config('gs://theirs/run')


def test_a_bucket_that_does_not_answer(bucket):
  with pytest.raises(UserError, match=r'be reached \(no answer in 30 s\)'):
    files.at('gs://silent/run')


def test_credentials_that_are_not_there(bucket, monkeypatch):
  def find(self, **kwargs):
    raise RuntimeError('no credentials were found')

  monkeypatch.setattr(Memory, '__init__', find)
  Memory.clear_instance_cache()
  with pytest.raises(UserError) as raised:
    files.at('gs://mine/run')
  assert '(no credentials were found)' in str(raised.value)
  assert 'gcloud auth application-default login' in str(raised.value)
  assert '\n' not in str(raised.value)


def test_packages_that_are_not_there(bucket, monkeypatch):
  monkeypatch.setattr(files, 'PACKAGES', ('no_such.package',))
  with pytest.raises(UserError, match='pip install gcsfs google-cloud-storage'):
    files.at('gs://mine/run')


def test_data_do_not_lie_in_a_bucket():
  for name in ('arrays', 'folder', 'tfds:cifar10'):
    with pytest.raises(UserError, match=r'path=gs://ours/x: .*gcsfuse'):
      data.create(name, path='gs://ours/x', image_size=8, channels=1)


# --- files ------------------------------------------------------------------


def test_an_object_is_replaced_whole_or_not_at_all(bucket):
  with files.replacing(bucket / 'x') as file:
    file.write(b'old')
  writing = files.replacing(bucket / 'x')
  writing.__enter__().write(b'half of the n')
  assert not writing.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
  assert (bucket / 'x').read_bytes() == b'old'
  assert objects() == ['runs/a/x']
  with files.replacing(bucket / 'x') as file:
    file.write(b'new')
  assert (bucket / 'x').read_bytes() == b'new'


def test_what_a_bucket_refuses_is_told_in_one_line(bucket, monkeypatch):
  monkeypatch.setattr(Memory, 'refused', 'config.json')
  with pytest.raises(UserError) as raised:
    runs.write_config(bucket, digits.get_config())
  assert str(raised.value) == (
    'gs://ours/runs/a/config.json cannot be written (no storage.objects.create)'
  )


def test_starts_add_up(bucket):
  for step in (0, 5):
    runs.note_start(bucket, {'step': step})
  lines = (bucket / 'starts.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [0, 5]


def test_rows_come_with_flush_or_in_time(bucket, monkeypatch):
  writer = metrics.Writer(bucket, 0)
  writer.write(1, {'loss': 1})
  assert metrics.read(bucket / 'metrics.jsonl') == []
  writer.flush()
  assert [r['step'] for r in metrics.read(bucket / 'metrics.jsonl')] == [1]
  monkeypatch.setattr(metrics, 'EVERY', 0)
  writer.write(2, {'loss': 1})
  assert [r['step'] for r in metrics.read(bucket / 'metrics.jsonl')] == [1, 2]
  writer.picture(2, 'samples', np.zeros((8, 8, 3), np.uint8))
  (events,) = bucket.glob('events.out.tfevents.*')
  before = events.stat().length
  writer.close()
  assert events.stat().length > before
  # The next start, from step 1, computes the second row again.
  again = metrics.Writer(bucket, 1)
  again.write(2, {'loss': 3})
  again.close()
  rows = metrics.read(bucket / 'metrics.jsonl')
  assert [(r['step'], r['loss']) for r in rows] == [(1, 1), (2, 3)]


def test_a_checkpoint_finds_its_rows_written(bucket):
  """A kill right after it loses none of them."""
  found = {}

  class Kept:
    directory = bucket / 'checkpoints'

    def save(self, step, state):
      rows = metrics.read(bucket / 'metrics.jsonl')
      found[step] = [row['step'] for row in rows]

    def wait(self):
      pass

  def step_fn(state, batch):
    return state._replace(step=state.step + 1), {'loss': np.float32(1)}

  start = tiny.state.TrainState(*[0] * len(tiny.state.TrainState._fields))
  loop.train(
    start, step_fn=step_fn, batches=itertools.repeat(None), num_steps=7,
    batch_size=1, every=loop.Every(log=1, checkpoint=3), checkpoints=Kept(),
    writer=metrics.Writer(bucket, 0),
  )  # fmt: skip
  assert found == {k: list(range(1, k + 1)) for k in (3, 6, 7)}


def test_only_whole_checkpoints_count(bucket):
  """Orbax gives a step its name at once, and says at the end that it is."""
  assert checkpoint.steps(bucket / 'checkpoints') == []
  for name in ('3/state/d', '3/commit_success.txt', '4/state/d'):
    (bucket / 'checkpoints' / name).write_text('')
  assert checkpoint.steps(bucket / 'checkpoints') == [3]


def test_what_is_held(bucket):
  assert held.steps(bucket / 'checkpoints') == set()
  held.hold(bucket / 'checkpoints', [30, 10])
  assert held.steps(bucket / 'checkpoints') == {10, 30}
  # Not in the folder, where Orbax would take it for a torn save.
  assert objects() == ['runs/a/held.json']
  assert checkpoint.steps(bucket / 'checkpoints') == []


def test_a_bucket_has_no_lock(bucket):
  with runs.lock(bucket), runs.lock(bucket):
    assert objects() == []


# --- what is made of them ---------------------------------------------------


def test_a_store(bucket):
  directory = bucket / 'samples' / 'some'
  images = tiny.images(10)['image']
  store.open_store(directory, {'seed': 0})
  store.save(directory, [0, 1, 2, 7, 8, 9], images[[0, 1, 2, 7, 8, 9]])
  store.open_store(directory, {'seed': 0})
  assert store.missing(directory, 10).tolist() == [3, 4, 5, 6]
  store.save(directory, range(3, 7), images[3:7])
  np.testing.assert_array_equal(store.load(directory, 10), images)
  parts = list(store.stream(directory, 2, 9, 2))
  np.testing.assert_array_equal(np.concatenate(parts), images[2:9])
  path = store.write_npz(directory)
  with path.open('rb') as file, np.load(file) as archive:
    np.testing.assert_array_equal(archive['arr_0'], images)
  with pytest.raises(UserError, match='holds samples with seed=0, not 1'):
    store.open_store(directory, {'seed': 1})


@pytest.mark.parametrize('shape', [(3, 8, 8, 2), (3, 8, 2**40, 1)])
def test_a_part_that_lies_about_its_size(bucket, shape):
  store.open_store(bucket, {})
  store.save(bucket, range(3), tiny.images(3)['image'])
  ((_, _, path),) = store.parts(bucket)
  _, _, pixels = path.read_bytes().partition(b'\n')
  with path.open('wb') as file:
    header = {'descr': '|u1', 'fortran_order': False, 'shape': shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.write(pixels)
  with pytest.raises(UserError, match='is damaged: delete it and sample again'):
    store.load(bucket, 3)


def test_output_does_not_go_into_what_is_another_s(bucket):
  runs.write_config(bucket, digits.get_config())
  runs.usable_output(bucket / 'samples' / 'mine')
  with pytest.raises(UserError, match='is inside the run gs://ours/runs/a:'):
    runs.usable_output(bucket / 'checkpoints')
  with pytest.raises(UserError, match=r'config.json is a file'):
    runs.usable_output(bucket / 'config.json')
  store.open_store(bucket / 'samples' / 'mine', {})
  with pytest.raises(UserError, match='is inside the sample store gs://'):
    runs.usable_output(bucket / 'samples' / 'mine' / 'deeper')


def test_a_run_is_told_from_another_and_from_no_run(bucket):
  config = digits.get_config()
  runs.check(bucket, config)
  runs.write_config(bucket, config)
  runs.check(bucket, config)
  (bucket / 'checkpoints' / '40' / stored.WHOLE).write_text('{}')
  with pytest.raises(UserError, match='seed: 0 there, 1 now'):
    runs.check(bucket, ConfigDict({**config.to_dict(), 'seed': 1}))
  (bucket.parent / 'b' / 'photo.png').write_text('mine')
  with pytest.raises(UserError, match='is not empty and has no config'):
    runs.check(bucket.parent / 'b', config)


def test_fine_tuning_names_the_other_run_as_it_is_written(bucket):
  runs.write_config(bucket, digits.get_config())
  (bucket / 'checkpoints' / '4' / 'commit_success.txt').write_text('')
  other = bucket.parent / 'b'
  origin = finetune.find(other, str(bucket), None, True)
  assert origin == finetune.Origin('gs://ours/runs/a', 4, True)
  finetune.record(other, origin, finetune.Begun({}, []))
  assert finetune.recorded(other) == origin
  with pytest.raises(UserError, match='is the --workdir itself'):
    finetune.find(other, str(other), None, True)


def test_judges_cards_and_the_report(bucket):
  runs.write_config(bucket, digits.get_config())
  subject = {'workdir': str(bucket), 'step': 3, 'sampler': 'ddim'}
  card = cards.create(subject, {'features': 'pixels'}, {'frechet': 1.5}, {})
  files.write_json(bucket / 'evaluations' / 'one.json', card)
  assert cards.find(bucket) == [bucket / 'evaluations' / 'one.json']
  assert cards.compare([str(bucket)]) == [[card]]
  assert 'run a' in '\n'.join(tables.lines([card]))
  grid = bucket / 'samples' / 'train_00000005.png'
  pictures.save(grid, np.zeros((9, 7, 3), np.uint8))
  with Image.open(grid.open('rb')) as image:
    assert image.size == (7, 9)
  store.open_store(bucket / 'samples' / 'mine', subject)
  pictures.save(
    bucket / 'samples' / 'mine' / 'grid.png', np.zeros((8, 8, 3), np.uint8)
  )
  (bucket / 'metrics.jsonl').write_bytes(b'{"step": 1, "loss": 2}\n\xff{\n')
  told = facts.read(bucket)
  assert told.drawn == [(5, grid)]
  assert [folder.name for folder, _ in told.stores] == ['mine']
  assert [row['step'] for row in told.rows] == [1]
  assert told.problems == ['metrics.jsonl is damaged in line 2: skipped']
  page.write(bucket)
  assert '<title>' in (bucket / 'report.html').read_text()


def test_a_classifier_is_read_from_a_bucket(bucket):
  source = data.create('digits', image_size=8, channels=1)
  path = bucket / 'evaluations' / 'classifier.npz'
  classifier.train(path, source, num_steps=1)
  assert classifier.load(path, (8, 8, 1)).protocol['num_classes'] == 10
  path.write_bytes(b'PK something else')
  with pytest.raises(UserError, match='is not a classifier of this package'):
    classifier.load(path, (8, 8, 1))


# --- names from files -------------------------------------------------------


def test_no_name_in_a_file_leads_out_of_a_run(tmp_path):
  """What a run's files say is shown; nothing is written by it but the report.

  All but numbers is '../out', in a run that someone has sent.
  """
  workdir = tmp_path / 'run'
  out = '../out'
  runs.write_config(workdir.parent, digits.get_config())
  config = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').unlink()
  for folder in ('evaluations', 'samples/one/parts', 'checkpoints/..out'):
    (workdir / folder).mkdir(parents=True)
  config['data'] |= {'name': out, 'path': out}
  config['sample'] |= {'sampler': out, 'variance': out}
  subject = {
    'workdir': out,
    'step': 1,
    'sampler': out,
    'seed': out,
    'grid': out,
  }
  card = cards.create(subject, {'features': out, 'data': out}, {out: 1.0}, {})
  for name, value in {
    'config.json': config,
    'init_from.json': {'workdir': out, 'step': 1, 'ema': True, 'left': [out]},
    'starts.jsonl': {'step': 0, 'device': out, 'versions': {out: out}},
    'metrics.jsonl': {'step': 1, 'loss': 1.0},
    'evaluations/..json': card,
    'evaluations/.. .json': card,
    'samples/one/store.json': {**subject, 'out': out},
    'samples/one/parts/..-..npy': 0,
  }.items():
    (workdir / name).write_text(json.dumps(value) + '\n')
  pictures.save(
    workdir / 'samples' / 'one' / 'grid.png', np.zeros((8, 8, 3), np.uint8)
  )
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
  time.sleep(0.01)
  page.write(workdir)
  assert store.parts(workdir / 'samples' / 'one') == []
  assert checkpoint.steps(workdir / 'checkpoints') == []
  after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
  changed = {path for path in after if after[path] != before.get(path)}
  assert changed == {workdir, workdir / 'report.html'}


def test_a_file_system_without_memory_maps(tmp_path, monkeypatch):
  path = tmp_path / 'images.npy'
  np.save(path, np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1))

  def no_maps(*_, **__):
    raise OSError(errno.ENODEV, 'No such device')

  monkeypatch.setattr(np, 'memmap', no_maps)
  monkeypatch.setattr(np.lib.format, 'open_memmap', no_maps)
  assert files.mapped(path).ravel().tolist() == list(range(12))
  with pytest.raises(FileNotFoundError):
    files.mapped(tmp_path / 'nothing.npy')
