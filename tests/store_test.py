"""The sample store: every image drawn once, whatever happens on the way."""

import json
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from diffusion_jax.configs import default
from diffusion_jax.runs import store
from diffusion_jax.system.errors import UserError

PROTOCOL = {'step': 9, 'eta': None, 'grid': [999, 0.5, -1], 'seed': 0}
COUNT = 100


class Killed(BaseException):
  """What no handler of ordinary errors may swallow."""


class Artist:
  """Draws image i from i alone, and remembers whatever it was asked for."""

  def __init__(self, fails_at=None, paint=None):
    self.calls = []
    self.fails_at = fails_at
    self.paint = paint or pictures_of

  def __call__(self, indices):
    if len(self.calls) == self.fails_at:
      raise Killed
    self.calls.append(np.array(indices))
    return np.arange(len(indices)), self.paint(indices)

  @property
  def drawn(self):
    return set(np.concatenate(self.calls).tolist()) if self.calls else set()


def pictures_of(indices):
  """uint8 [n, 2, 3, 1]; no two of 256 indices agree, none is all zero."""
  indices = np.asarray(indices)[:, None, None, None]
  return (indices + 17 * np.arange(1, 7).reshape(1, 2, 3, 1)).astype(np.uint8)


def floats_of(indices):
  """float32 of the same shape, in [0, 255], hardly one of them whole."""
  return (pictures_of(indices) * np.float32(0.9931)).astype(np.float32)


def open_new(path, protocol=PROTOCOL):
  store.open_store(path, protocol)
  return path


def tree(path):
  """Every file below, with its bytes."""
  return {
    str(p.relative_to(path)): p.read_bytes()
    for p in Path(path).rglob('*')
    if p.is_file()
  }


def assert_complete(path, count=COUNT):
  images = store.load(path, count)
  assert images.dtype == np.uint8
  np.testing.assert_array_equal(images, pictures_of(np.arange(count)))
  assert store.missing(path, count).size == 0


def test_a_store_older_than_a_config_key_goes_on(tmp_path):
  """Keys that it lacks had their defaults; other values are refused."""
  old = {**PROTOCOL, 'loss': {'prediction': 'eps'}}
  store.open_store(tmp_path / 'a', old)
  newer = {'name': 'denoising', 'prediction': 'eps', 'law': 'uniform'}
  known = dict(default.get_config().loss)
  store.open_store(tmp_path / 'a', {**old, 'loss': {**known, **newer}})
  with pytest.raises(UserError, match='loss'):
    store.open_store(
      tmp_path / 'a', {**old, 'loss': {**known, 'law': 'lognormal'}}
    )


# --- filling -----------------------------------------------------------------


@pytest.mark.parametrize('batch_size', [1, 7, 64, 100, 1000])
def test_any_batch_size_leaves_the_same_images(tmp_path, batch_size):
  artist, kept = Artist(), []
  path = open_new(tmp_path / 'a' / 'store')
  store.fill(path, store.missing(path, COUNT), batch_size, artist, kept.append)
  assert_complete(path)
  assert artist.drawn == set(range(COUNT))
  # One program serves all batches, so the last one is full too.
  assert {len(call) for call in artist.calls} == {batch_size}
  assert len(artist.calls) == -(-COUNT // batch_size)
  assert sum(kept) == COUNT
  assert len(kept) == len(artist.calls)


@pytest.mark.parametrize(
  ('before', 'batches', 'after'),
  [(7, 3, 64), (64, 1, 7), (1, 10, 1), (9, 0, 9)],
)
def test_an_interrupted_job_redraws_nothing(tmp_path, before, batches, after):
  path = open_new(tmp_path / 'store')
  first = Artist(fails_at=batches)
  with pytest.raises(Killed):
    store.fill(path, store.missing(path, COUNT), before, first)
  assert first.drawn == set(range(before * batches))
  second = Artist()
  store.fill(open_new(path), store.missing(path, COUNT), after, second)
  assert second.drawn == set(range(COUNT)) - first.drawn
  assert_complete(path)
  third = Artist()
  store.fill(open_new(path), store.missing(path, COUNT), 5, third)
  assert not third.calls


def test_a_kill_in_the_middle_of_a_file_leaves_none(tmp_path, monkeypatch):
  """Half of the bytes were written, under another name; nothing reads it."""
  path = open_new(tmp_path / 'store')
  store.fill(path, store.missing(path, 8), 4, Artist())
  whole = np.save

  def half(file, block, **kwargs):
    whole(file, block, **kwargs)
    file.truncate(file.tell() - 5)
    raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(np, 'save', half)
    with pytest.raises(Killed):
      store.fill(path, store.missing(path, 16), 4, Artist())
  assert not any(name.endswith('.tmp') for name in tree(path))
  np.testing.assert_array_equal(store.missing(path, 16), np.arange(8, 16))
  again = Artist()
  store.fill(open_new(path), store.missing(path, 16), 3, again)
  assert again.drawn == set(range(8, 16))
  assert_complete(path, 16)


def test_torn_files_are_ignored(tmp_path):
  path = open_new(tmp_path / 'store')
  store.fill(path, store.missing(path, 10), 5, Artist())
  (path / 'store.json.tmp').write_bytes(b'{"step"')
  (path / 'parts' / '000000010-000000014.npy.tmp').write_bytes(b'\x93NUMPY')
  (path / 'samples.npz.tmp').write_bytes(b'PK')
  open_new(path)
  np.testing.assert_array_equal(store.missing(path, 15), np.arange(10, 15))
  assert_complete(path, 10)


def test_more_samples_draw_only_the_rest(tmp_path):
  path = open_new(tmp_path / 'store')
  store.fill(path, store.missing(path, 30), 8, Artist())
  artist = Artist()
  store.fill(path, store.missing(path, COUNT), 8, artist)
  assert artist.drawn == set(range(30, COUNT))
  assert_complete(path)


@pytest.mark.parametrize('count', [1, 7, 8, 9, 31])
def test_fewer_samples_are_the_first_of_them(tmp_path, count):
  path = open_new(tmp_path / 'store')
  store.fill(path, store.missing(path, COUNT), 8, Artist())
  artist = Artist()
  store.fill(path, store.missing(path, count), 8, artist)
  assert not artist.calls
  assert_complete(path, count)


def test_holes_are_filled(tmp_path):
  """A part that was deleted, and one in the middle: only those are drawn."""
  path = open_new(tmp_path / 'store')
  store.fill(path, store.missing(path, COUNT), 10, Artist())
  for first in (0, 40, 60):
    (path / 'parts' / f'{first:09d}-{first + 9:09d}.npy').unlink()
  artist = Artist()
  store.fill(path, store.missing(path, COUNT), 25, artist)
  assert artist.drawn == {*range(10), *range(40, 50), *range(60, 70)}
  assert_complete(path)


def test_overlapping_parts_are_harmless(tmp_path):
  """Two jobs at once: they draw the same, so it is all one who was last."""
  path = open_new(tmp_path / 'store')
  for first, end in ((0, 10), (5, 12), (5, 8), (20, 30), (0, 3)):
    indices = np.arange(first, end)
    store.save(path, indices, pictures_of(indices))
  np.testing.assert_array_equal(store.missing(path, 30), np.arange(12, 20))
  artist = Artist()
  store.fill(path, store.missing(path, COUNT), 16, artist)
  assert artist.drawn == {*range(12, 20), *range(30, COUNT)}
  assert_complete(path)


def test_many_samples_stay_in_order(tmp_path):
  """Names are padded to nine digits; the order may not depend on that."""
  path = open_new(tmp_path / 'store')
  indices = np.arange(999_999_998, 1_000_000_003)
  store.save(path, indices, pictures_of(indices))
  store.save(path, [3], pictures_of([3]))
  found = [(first, end) for first, end, _ in store.parts(path)]
  assert sorted(found) == [(3, 4), (999_999_998, 1_000_000_003)]
  np.testing.assert_array_equal(store.missing(path, 5), [0, 1, 2, 4])


# --- reading -----------------------------------------------------------------


@pytest.mark.parametrize('drawn', [range(0), range(5), range(3, 10)])
def test_a_store_with_holes_is_not_read(tmp_path, drawn):
  """Black images among the drawn would go unnoticed into a metric."""
  path = open_new(tmp_path / 'store')
  if drawn:
    store.save(path, np.array(drawn), pictures_of(drawn))
  with pytest.raises(UserError) as error:
    store.load(path, 10)
  assert str(path) in str(error.value)
  assert '\n' not in str(error.value)


def test_the_npz_holds_one_array(tmp_path):
  path = open_new(tmp_path / 'store')
  store.fill(path, store.missing(path, 12), 5, Artist())
  before = tree(path)
  written = store.write_npz(path)
  assert written == path / 'samples.npz'
  with np.load(written, allow_pickle=False) as arrays:
    assert arrays.files == ['arr_0']
    assert arrays['arr_0'].dtype == np.uint8
    np.testing.assert_array_equal(arrays['arr_0'], pictures_of(np.arange(12)))
  assert tree(path).keys() - before.keys() == {'samples.npz'}
  # It lies in the store, and does not keep the store from being opened.
  assert_complete(open_new(path), 12)


def in_npz(path):
  with np.load(path / 'samples.npz', allow_pickle=False) as arrays:
    return arrays['arr_0']


def test_the_npz_grows_with_the_store_and_never_shrinks(tmp_path):
  path = open_new(tmp_path / 'store')
  for count, batch in ((5, 2), (12, 5), (3, 3)):
    store.fill(path, store.missing(path, count), batch, Artist())
    store.write_npz(path)
    most = max(count, store.drawn(path))
    np.testing.assert_array_equal(in_npz(path), pictures_of(np.arange(most)))
  assert most == 12
  # A part that is deleted takes nothing from the file.
  store.parts(path)[1][2].unlink()
  assert store.drawn(path) == 2
  store.write_npz(path)
  np.testing.assert_array_equal(in_npz(path), pictures_of(np.arange(12)))


@pytest.mark.parametrize(
  ('indices', 'expected'),
  [
    ([7], [(7, 8)]),
    ([0, 1, 2], [(0, 3)]),
    ([0, 2, 3, 9], [(0, 1), (2, 4), (9, 10)]),
  ],
)
def test_runs_of_consecutive_indices(indices, expected):
  assert store.consecutive(np.array(indices)) == expected


def test_a_damaged_npz_is_written_again(tmp_path):
  path = open_new(tmp_path / 'store')
  store.fill(path, store.missing(path, 4), 4, Artist())
  for content in (b'', b'PK', b'not a zip'):
    (path / 'samples.npz').write_bytes(content)
    store.write_npz(path)
    np.testing.assert_array_equal(in_npz(path), pictures_of(np.arange(4)))


def test_the_npz_is_that_of_numpy(tmp_path):
  path = open_new(tmp_path / 'store')
  store.fill(path, store.missing(path, 12), 5, Artist())
  np.savez(tmp_path / 'numpy.npz', store.load(path, 12))
  files = [store.write_npz(path), tmp_path / 'numpy.npz']
  ours, numpys = (zipfile.ZipFile(file).read('arr_0.npy') for file in files)
  assert ours == numpys


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
  """Of 32 MB, in parts of 1 MB, at most a few parts are in memory."""
  path = open_new(tmp_path / 'store')
  block = np.zeros((4096, 16, 16, 1), np.uint8)
  for i in range(32):
    store.save(path, np.arange(len(block)) + i * len(block), block)
  tracemalloc.start()
  try:
    store.write_npz(path)
    streamed = store.stream(path, 0, 32 * len(block), 1000)
    assert sum(map(len, streamed)) == 32 * len(block)
    assert tracemalloc.get_traced_memory()[1] < 4 * block.nbytes
  finally:
    tracemalloc.stop()


def test_the_record_of_rounding_is_kept_and_not_compared(tmp_path):
  path = tmp_path / 'store'
  assert store.open_store(path, PROTOCOL, {'jax': '1'}) == {}
  assert store.open_store(path, PROTOCOL, {'jax': '2'}) == {'jax': '1'}
  assert store.open_store(path, PROTOCOL) == {'jax': '1'}
  with pytest.raises(UserError, match='seed=0, not 1'):
    store.open_store(path, {**PROTOCOL, 'seed': 1}, {'jax': '1'})
  # A store of an older version has no record.
  assert store.open_store(tmp_path / 'old', PROTOCOL) == {}
  assert store.open_store(tmp_path / 'old', PROTOCOL, {'jax': '2'}) == {}


# --- images that are not rounded ---------------------------------------------

FLOAT = {**PROTOCOL, 'dtype': 'float32'}


def test_floats_come_back_bit_by_bit_and_after_a_kill(tmp_path):
  path = open_new(tmp_path / 'store', FLOAT)
  first = Artist(fails_at=3, paint=floats_of)
  with pytest.raises(Killed):
    store.fill(path, store.missing(path, COUNT), 9, first)
  second = Artist(paint=floats_of)
  store.fill(open_new(path, FLOAT), store.missing(path, COUNT), 64, second)
  assert second.drawn == set(range(27, COUNT))
  images = store.load(path, COUNT)
  assert images.dtype == np.float32
  np.testing.assert_array_equal(images, floats_of(np.arange(COUNT)))
  blocks = list(store.stream(path, 20, 70, 8))
  assert {block.dtype for block in blocks} == {np.dtype('float32')}
  np.testing.assert_array_equal(
    np.concatenate(blocks), floats_of(np.arange(20, 70))
  )


@pytest.mark.parametrize(
  ('protocol', 'good', 'bad'),
  [
    (PROTOCOL, pictures_of, floats_of),
    (FLOAT, floats_of, pictures_of),
    (FLOAT, floats_of, lambda i: floats_of(i).astype(np.float64)),
  ],
)
def test_a_part_of_another_dtype_is_damaged(tmp_path, protocol, good, bad):
  path = open_new(tmp_path / 'store', protocol)
  store.save(path, range(5), good(range(5)))
  store.save(path, range(5, 9), bad(range(5, 9)))
  np.testing.assert_array_equal(store.load(path, 5), good(range(5)))
  with pytest.raises(UserError, match=r'-000000008\.npy is damaged') as error:
    store.load(path, 9)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('there', 'now', 'said'),
  [
    (PROTOCOL, FLOAT, 'dtype=uint8, not float32'),
    (FLOAT, PROTOCOL, 'dtype=float32, not uint8'),
  ],
)
def test_a_store_holds_one_dtype(tmp_path, there, now, said):
  path = open_new(tmp_path / 'store', there)
  before = tree(path)
  with pytest.raises(UserError, match=said) as error:
    open_new(path, now)
  assert '\n' not in str(error.value)
  assert tree(path) == before


def test_what_says_no_dtype_is_uint8(tmp_path):
  path = open_new(tmp_path / 'store')
  assert 'dtype' not in json.loads((path / 'store.json').read_text())
  store.fill(path, store.missing(path, 10), 4, Artist())
  assert_complete(open_new(path, {**PROTOCOL, 'dtype': 'uint8'}), 10)


@pytest.mark.parametrize('text', ['{"step"', '[]', None])
def test_a_damaged_protocol_is_one_line(tmp_path, text):
  path = open_new(tmp_path / 'store')
  store.save(path, range(5), pictures_of(range(5)))
  (path / 'store.json').unlink()
  if text:
    (path / 'store.json').write_text(text)
  with pytest.raises(UserError, match=r'store\.json is') as error:
    store.load(path, 5)
  assert '\n' not in str(error.value)


# --- opening -----------------------------------------------------------------


@pytest.mark.parametrize('protocol', [PROTOCOL, {'a': 1.5, 'b': [1, None]}])
def test_the_same_protocol_opens_again(tmp_path, protocol):
  path = open_new(tmp_path / 'store', protocol)
  before = tree(path)
  # A tuple and a list are one in JSON; so are they here.
  again = {
    k: tuple(v) if isinstance(v, list) else v for k, v in protocol.items()
  }
  open_new(path, again)
  assert tree(path) == before
  assert json.loads((path / 'store.json').read_text()) == protocol


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'seed': 3}, ['seed', '0', '3']),
    ({'eta': 0.5}, ['eta', 'None', '0.5']),
    ({'grid': [999, -1]}, ['grid', '[999, 0.5, -1]', '[999, -1]']),
    ({'clip': True}, ['clip', 'None', 'True']),
  ],
)
def test_another_protocol_is_refused_in_one_line(tmp_path, change, said):
  """It names the folder, the field and both values, and changes nothing."""
  path = open_new(tmp_path / 'store')
  store.fill(path, store.missing(path, 5), 5, Artist())
  before = tree(path)
  with pytest.raises(UserError) as error:
    store.open_store(path, PROTOCOL | change)
  message = str(error.value)
  assert '\n' not in message
  assert str(path) in message
  # The path may have digits of its own.
  for word in said:
    assert word in message.replace(str(path), '')
  assert tree(path) == before


@pytest.mark.parametrize('name', ['sample.log', '.DS_Store', 'lost+found/x'])
def test_a_store_begins_beside_what_a_launch_leaves(tmp_path, name):
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / name).write_text('mine')
  store.fill(open_new(tmp_path), store.missing(tmp_path, 10), 4, Artist())
  assert store.drawn(tmp_path) == 10
  assert (tmp_path / name).read_text() == 'mine'


@pytest.mark.parametrize('name', ['a.png', 'parts/a.npy', 'metrics.jsonl'])
def test_a_foreign_folder_is_refused_and_untouched(tmp_path, name):
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / name).write_text('mine')
  with pytest.raises(UserError) as error:
    store.open_store(tmp_path, PROTOCOL)
  assert str(tmp_path) in str(error.value)
  assert '\n' not in str(error.value)
  assert tree(tmp_path) == {name: b'mine'}


@pytest.mark.parametrize('left', [None, 'store.json.tmp'])
def test_a_kill_before_the_store_began_is_recovered(tmp_path, left):
  """The folder is there and store.json is not: empty, or with half of it."""
  if left:
    (tmp_path / left).write_text('{"st')
  store.fill(open_new(tmp_path), store.missing(tmp_path, 10), 4, Artist())
  assert_complete(tmp_path, 10)
  assert json.loads((tmp_path / 'store.json').read_text()) == PROTOCOL


def test_a_kill_while_the_protocol_is_written_is_recovered(
  tmp_path, monkeypatch
):
  """At every moment: what one attempt leaves, the next one opens."""
  path = tmp_path / 'deep' / 'store'

  def killed(*args):
    raise Killed

  with monkeypatch.context() as patch:
    patch.setattr('diffusion_jax.system.files.os.replace', killed)
    with pytest.raises(Killed):
      open_new(path)
  assert not (path / 'store.json').exists()
  store.fill(open_new(path), store.missing(path, 10), 4, Artist())
  assert_complete(path, 10)
