"""Weights of others: read to the last bit, refused by name, and never run."""

import contextlib
import hashlib
import http.server
import io
import os
import pickle
import subprocess
import threading
import zipfile

import numpy as np
import pytest
from parity import inception as parity

from diffusion_jax.models import inception as network
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import download, inception, pytorch

ZIP = parity.GOLDEN / 'torch_zip.pth'
STREAM = parity.GOLDEN / 'torch_stream.pth'
LAYOUTS = pytest.mark.parametrize('file', [ZIP, STREAM], ids=['zip', 'stream'])


def refusal(path, read=pytorch.read) -> str:
  """The one line that a file is answered with."""
  with pytest.raises(UserError) as caught:
    read(path)
  message = str(caught.value)
  assert '\n' not in message
  assert len(message) < 600
  return message


# --- files of torch.save ------------------------------------------------------


@LAYOUTS
def test_torchs_own_files_are_read(file):
  """What tests/golden/make_inception.py put into them."""
  found = pytorch.read(file)
  numbers = np.arange(24, dtype='f4').reshape(2, 3, 4) / 8
  expected = {
    'weight': np.array([[0.5, -2.0]], 'f4'),
    'bias': np.zeros(1, 'f4'),
    'parameter': np.array([[0.5, -2.0]], 'f4'),
    'numbers': numbers,
    'turned': numbers.transpose(2, 0, 1),
    'part': numbers.ravel()[5:9],
    'half': numbers[0].astype('f2'),
    'double': numbers[1].astype('f8'),
    'count': np.array(7, 'i8'),
    'flags': np.array([True, False]),
    'bytes': np.array([0, 255], 'u1'),
    'none': np.zeros((0, 3), 'f4'),
  }
  assert list(found) == list(expected)
  for name, array in expected.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name], array)
    assert not found[name].flags.writeable


@LAYOUTS
def test_damage_is_told_in_one_line(file, tmp_path):
  """Cut off anywhere, or with a bit flipped: read as it was, or refused."""
  data, path = file.read_bytes(), tmp_path / 'damaged.pth'
  refused = 0
  for i in range(0, len(data), 9):
    path.write_bytes(data[:i])
    refusal(path)
    path.write_bytes(data[:i] + bytes([data[i] ^ 0x41]) + data[i + 1 :])
    with contextlib.suppress(UserError):
      pytorch.read(path)
      refused -= 1
    refused += 1
  assert refused > len(data) / 9 / 4


@pytest.mark.parametrize(
  ('data', 'must_name'),
  [
    (b'', 'starts like no layout'),
    (b'\x89PNG\r\n\x1a\n', 'starts like no layout'),
    (b'PK\3\4 and nothing else', 'not a zip file'),
    (pickle.dumps({'weight': 1}), 'starts like no layout'),
    (pickle.dumps(pytorch.MAGIC, 2), 'EOFError'),
    (
      pickle.dumps(pytorch.MAGIC, 2)
      + pickle.dumps(1002, 2)
      + pickle.dumps({'little_endian': True}, 2),
      'protocol is not 1001',
    ),
  ],
)
def test_what_is_something_else(tmp_path, data, must_name):
  path = tmp_path / 'weights.pth'
  path.write_bytes(data)
  message = refusal(path)
  assert must_name in message
  assert str(path) in message


def test_what_is_not_there(tmp_path):
  assert 'No such file' in refusal(tmp_path / 'none.pth')
  assert 'Is a directory' in refusal(tmp_path)


def zipped(pickled, entries=(), compression=zipfile.ZIP_STORED) -> bytes:
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, 'w', compression) as archive:
    archive.writestr('archive/data.pkl', pickled)
    for name, data in dict(entries).items():
      archive.writestr(f'archive/{name}', data)
  return stream.getvalue()


def streamed(pickled) -> bytes:
  head = (pytorch.MAGIC, pytorch.PROTOCOL, {'little_endian': True})
  return b''.join(pickle.dumps(part, 2) for part in head) + pickled


class Calls:
  """Pickled, a call of `function`."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize('layout', [zipped, streamed])
@pytest.mark.parametrize('protocol', [0, 2, 4])
@pytest.mark.parametrize(
  ('function', 'named'),
  [
    (os.system, 'system'),
    (subprocess.Popen, '.Popen'),
    (eval, '.eval'),
    (getattr, '.getattr'),
  ],
)
def test_nothing_is_run(tmp_path, layout, protocol, function, named):
  """Called, most of these would make a file."""
  sign = tmp_path / 'run'
  arguments = {
    os.system: (f'touch {sign}',),
    subprocess.Popen: (['touch', str(sign)],),
    eval: (f'open({str(sign)!r}, "w")',),
    getattr: ('', 'join'),
  }[function]
  path = tmp_path / 'weights.pth'
  pickled = pickle.dumps({'weight': Calls(function, *arguments)}, protocol)
  path.write_bytes(layout(pickled))
  message = refusal(path)
  assert f'{named}, which weights do not need' in message
  assert 'nothing in it was executed' in message
  assert not sign.exists()


def test_the_same_files_would_run_elsewhere(tmp_path):
  """So the test above tests something."""
  sign = tmp_path / 'run'
  pickle.loads(pickle.dumps(Calls(os.mkdir, str(sign))))
  assert sign.exists()


OTHERS = {
  'instance': b'(ios\nsystem\n.',
  'new': b'cbuiltins\nobject\n)\x81.',
  'extension': b'\x82\x01.',
  'set state': b'\x80\x02ccollections\nOrderedDict\n)R}X\1\0\0\0aK\1sb.',
  'other of torch': b'\x80\x02ctorch.serialization\nload\n.',
  'private of torch': b'\x80\x02ctorch._utils\n_rebuild_qtensor\n.',
  'call of a type': b'\x80\x02ctorch\nFloatStorage\n)R.',
  'huge memo': b'\x80\x02}r\xff\xff\xff\x7f.',
  'huge text': b'\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.',
  'huge frame': b'\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.',
  'no dict': b'\x80\x02]K\x01a.',
  'no end': b'\x80\x02}',
  'empty': b'\x80\x02}.',
}


@pytest.mark.parametrize('name', OTHERS)
@pytest.mark.parametrize('layout', [zipped, streamed])
def test_other_pickles_are_refused(tmp_path, layout, name):
  path = tmp_path / 'weights.pth'
  path.write_bytes(layout(OTHERS[name]))
  assert 'or save only the state dict with torch.save' in refusal(path)


def text(value: str) -> bytes:
  return b'X' + len(value).to_bytes(4, 'little') + value.encode()


def tuple_of(*parts) -> bytes:
  return b'(' + b''.join(parts) + b't'


def integers(*values) -> bytes:
  return tuple_of(*(b'I%d\n' % value for value in values))


def one_tensor(
  shape=(2, 3), strides=(3, 1), offset=0, count=6, kind='FloatStorage'
) -> bytes:
  """The pickle of {'a': a tensor}, in which anything may be said."""
  storage = tuple_of(
    text('storage'),
    b'ctorch\n%s\n' % kind.encode(),
    text('0'),
    text('cpu'),
    b'I%d\n' % count,
  )
  arguments = tuple_of(
    storage + b'Q',
    b'I%d\n' % offset,
    integers(*shape),
    integers(*strides),
    b'\x89',
    b'}',
  )
  rebuild = b'ctorch._utils\n_rebuild_tensor_v2\n' + arguments + b'R'
  return b'\x80\x02}' + text('a') + rebuild + b's.'


DATA = np.arange(6, dtype='<f4').tobytes()


def test_a_tensor_written_by_hand_is_read(tmp_path):
  path = tmp_path / 'weights.pth'
  path.write_bytes(zipped(one_tensor(), {'data/0': DATA}))
  expected = np.arange(6).reshape(2, 3)
  np.testing.assert_array_equal(pytorch.read(path)['a'], expected)
  tail = pickle.dumps(['0'], 2) + (6).to_bytes(8, 'little') + DATA
  path.write_bytes(streamed(one_tensor() + tail))
  np.testing.assert_array_equal(pytorch.read(path)['a'], expected)


@pytest.mark.parametrize(
  ('said', 'must_name'),
  [
    ({'offset': 1}, 'is not within'),
    ({'strides': (4, 1)}, 'is not within'),
    ({'shape': (10**9, 10**9), 'strides': (0, 0)}, 'is not within'),
    ({'shape': (2**62, 2**62)}, 'is not within'),
    ({'strides': (-3, 1)}, 'invalid shape'),
    ({'shape': (-2, 3)}, 'invalid shape'),
    ({'offset': -1}, 'invalid shape'),
    ({'shape': (6,)}, 'invalid shape'),
    ({'count': 7}, 'missing or cut off'),
    ({'count': 10**15}, 'missing or cut off'),
    ({'count': -1}, 'missing or cut off'),
    ({'kind': 'LongStorage'}, 'buffer size'),
    ({'kind': 'QInt8Storage'}, 'torch.QInt8Storage, which weights'),
  ],
)
def test_a_tensor_that_lies_is_refused(tmp_path, said, must_name):
  path = tmp_path / 'weights.pth'
  entries = {'data/0': DATA if 'kind' not in said else DATA[:20]}
  path.write_bytes(zipped(one_tensor(**said), entries))
  assert must_name in refusal(path)


def test_a_zip_file_that_lies_is_refused(tmp_path):
  path = tmp_path / 'weights.pth'
  entries = {'data/0': DATA}
  path.write_bytes(zipped(one_tensor(), entries, zipfile.ZIP_DEFLATED))
  assert 'compressed' in refusal(path)
  path.write_bytes(zipped(one_tensor(), entries | {'byteorder': b'big'}))
  assert 'big-endian' in refusal(path)
  path.write_bytes(zipped(one_tensor()))
  assert 'missing or cut off' in refusal(path)
  path.write_bytes(zipped(b'').replace(b'data.pkl', b'DATA.pkl'))
  assert 'without data.pkl' in refusal(path)
  # An entry that is said to be of 4 GB.
  good = zipped(one_tensor(), entries)
  size = len(DATA).to_bytes(4, 'little')
  at = good.rindex(size + size)
  path.write_bytes(good[:at] + b'\xfe\xff\xff\xff' * 2 + good[at + 8 :])
  assert 'larger than the file' in refusal(path)


# --- into ours ----------------------------------------------------------------


def test_names_are_torchs():
  names = inception.torch_names()
  assert len(names) == 94 * 5 + 2
  assert len(set(names.values())) == len(names)
  some = {
    'Conv2d_4a_3x3.conv.weight': 'conv_4/w',
    'Mixed_5b.branch5x5_2.bn.weight': 'mixed_tower_conv_1/gamma',
    'Mixed_6a.branch3x3.bn.bias': 'mixed_3_conv/beta',
    'Mixed_6a.branch3x3dbl_3.conv.weight': 'mixed_3_tower_conv_2/w',
    'Mixed_6b.branch7x7dbl_5.bn.running_mean': 'mixed_4_tower_1_conv_4/mean',
    'Mixed_7a.branch7x7x3_1.conv.weight': 'mixed_8_tower_1_conv/w',
    'Mixed_7b.branch3x3_2b.conv.weight': 'mixed_9_tower_mixed_conv_1/w',
    'Mixed_7c.branch3x3dbl_3a.bn.running_var': (
      'mixed_10_tower_1_mixed_conv/variance'
    ),
    'Mixed_7c.branch_pool.conv.weight': 'mixed_10_tower_2_conv/w',
    'fc.weight': 'softmax/w',
  }
  assert some.items() <= names.items()


def test_a_convolution_then_its_norm():
  """Folded: the same function, in float64, of any patch."""
  state, params = parity.state(), parity.params()
  patch = np.random.default_rng(0).normal(size=(80, 3, 3))  # I, H, W
  weight = state['Conv2d_4a_3x3.conv.weight'].astype('f8')
  summed = (weight * patch).sum((1, 2, 3))
  gamma, beta, mean, variance = (
    state[f'Conv2d_4a_3x3.bn.{part}'].astype('f8')
    for part in ('weight', 'bias', 'running_mean', 'running_var')
  )
  expected = (summed - mean) / np.sqrt(variance + 1e-3) * gamma + beta
  ours = params['conv_4']
  got = (ours['w'] * patch.transpose(1, 2, 0)[..., None]).sum((0, 1, 2))
  np.testing.assert_allclose(got + ours['b'], expected, rtol=0, atol=1e-6)
  assert ours['w'].dtype == ours['b'].dtype == np.float32


@pytest.mark.parametrize(
  ('change', 'must_name'),
  [
    ({'fc.bias': None}, 'it lacks fc.bias$'),
    (
      dict.fromkeys(['fc.bias', 'Conv2d_1a_3x3.bn.bias']),
      'it lacks Conv2d_1a_3x3.bn.bias and 1 more',
    ),
    ({'AuxLogits.fc.bias': np.zeros(9)}, 'AuxLogits.fc.bias is not of this'),
    ({'fc.bias': np.zeros(1000)}, r'fc.bias is \(1000,\)'),
    ({'fc.bias': np.full(1008, np.nan)}, 'fc.bias holds .* not finite'),
    (
      {'Conv2d_1a_3x3.bn.running_var': np.full(32, -1)},
      'running_var holds negative',
    ),
  ],
)
def test_another_network_is_named(change, must_name):
  state = {**parity.state(), **change}
  state = {name: array for name, array in state.items() if array is not None}
  with pytest.raises(ValueError, match=must_name):
    inception.from_torch(state)


def test_what_counts_batches_is_left_out():
  state = parity.state() | {'Conv2d_1a_3x3.bn.num_batches_tracked': np.array(1)}
  found = inception.from_torch(state)
  for name, layer in parity.params().items():
    for part, array in layer.items():
      np.testing.assert_array_equal(found[name][part], array)


def test_the_hash_in_a_name_is_the_files(tmp_path):
  digest = hashlib.sha256(ZIP.read_bytes()).hexdigest()
  right = tmp_path / f'pt_inception-2015-12-05-{digest[:8]}.pth'
  wrong = tmp_path / 'pt_inception-2015-12-05-6726825d.pth'
  for path in (right, wrong):
    path.write_bytes(ZIP.read_bytes())

  def convert(path):
    inception.convert(path, tmp_path / 'ours.npz')

  assert f'SHA-256 {digest[:8]}, not 6726825d' in refusal(wrong, convert)
  message = refusal(right, convert)
  assert 'is not the Inception of FID (it lacks Conv2d_1a_3x3' in message
  assert 'No such file' in refusal(tmp_path / 'none.pth', convert)
  assert {p.name for p in tmp_path.iterdir()} == {right.name, wrong.name}


@pytest.mark.parity
@pytest.mark.parametrize('is_zip', [True, False])
def test_a_whole_file_of_torch_is_converted(tmp_path, is_zip):
  path = tmp_path / 'weights.pth'
  parity.save(path, _use_new_zipfile_serialization=is_zip)
  inception.convert(path, tmp_path / 'ours.npz')
  assert_params(inception.read(tmp_path / 'ours.npz'), parity.params())


def assert_params(found, expected):
  assert list(found) == list(expected) == list(network.shapes())
  for name, layer in expected.items():
    for part in 'wb':
      np.testing.assert_array_equal(found[name][part], layer[part])


@pytest.mark.prepare
@pytest.mark.parametrize('scaled', [True, False])
def test_a_graph_of_tensorflow_is_converted(tmp_path, scaled):
  """To the same bits; without `scale_after_normalization`, gamma is unused."""
  graph = graph_of(parity.state(), scaled)
  path = tmp_path / 'classify_image_graph_def.pb'
  path.write_bytes(graph.SerializeToString())
  inception.convert(path, tmp_path / 'ours.npz')
  state = parity.state()
  if not scaled:
    state = {
      name: np.ones_like(array) if name.endswith('bn.weight') else array
      for name, array in state.items()
    }
  assert_params(
    inception.read(tmp_path / 'ours.npz'), inception.from_torch(state)
  )

  def convert(path):
    inception.convert(path, tmp_path / 'none.npz')

  path.write_bytes(path.read_bytes()[:-9])
  assert 'is not a TensorFlow graph' in refusal(path, convert)
  for node in graph.node:
    node.attr['variance_epsilon'].f = 1e-5
  path.write_bytes(graph.SerializeToString())
  assert 'epsilon' in refusal(path, convert)
  del graph.node[3:]
  path.write_bytes(graph.SerializeToString())
  assert 'is not the Inception of FID (it lacks' in refusal(path, convert)
  assert not (tmp_path / 'none.npz').exists()


def graph_of(state, scaled):
  """The network as the published graph has it: constants, and its norms."""
  import tensorflow as tf

  graph = tf.compat.v1.GraphDef()
  theirs = {ours: state[name] for name, ours in inception.torch_names().items()}
  for name, ours in inception.graph_names().items():
    array = theirs[ours]
    array = array.transpose((2, 3, 1, 0) if array.ndim == 4 else None)
    node = graph.node.add(op='Const', name=name.replace('_batch', '/batch'))
    node.attr['value'].tensor.CopyFrom(tf.make_tensor_proto(array))
  for layer in network.shapes():
    if layer != 'softmax':
      node = graph.node.add(
        op='BatchNormWithGlobalNormalization', name=f'{layer}/batchnorm'
      )
      node.attr['variance_epsilon'].f = 1e-3
      node.attr['scale_after_normalization'].b = scaled
  graph.node.add(op='Placeholder', name='DecodeJpeg/contents')
  return graph


# --- our own file -------------------------------------------------------------


TAPS = ['64']  # three convolutions


@pytest.fixture(scope='module')
def arrays():
  return {
    f'{name}/{part}': np.ascontiguousarray(parity.params()[name][part])
    for name in network.shapes(TAPS)
    for part in 'wb'
  }


def read_short(path):
  return inception.read(path, TAPS)


def test_our_file_is_read_to_the_bit(arrays, tmp_path):
  path = tmp_path / 'new' / 'ours.npz'
  inception.write(path, {k: parity.params()[k] for k in network.shapes(TAPS)})
  with np.load(path) as file:
    assert list(file.files) == list(arrays)
  assert {i.compress_type for i in zipfile.ZipFile(path).infolist()} == {0}
  found = read_short(path)
  assert list(found) == ['conv', 'conv_1', 'conv_2']
  for name, array in arrays.items():
    layer, part = name.split('/')
    np.testing.assert_array_equal(found[layer][part], array)
  np.savez_compressed(tmp_path / 'small.npz', **arrays)
  for name, layer in read_short(tmp_path / 'small.npz').items():
    np.testing.assert_array_equal(layer['w'], found[name]['w'])
  message = refusal(path, inception.read)
  assert 'it lacks conv_3/w and 183 more, which logits needs' in message


def test_a_file_of_another_kind_is_refused(arrays, tmp_path):
  path = tmp_path / 'ours.npz'

  def answer(changes):
    changed = {**arrays, **changes}
    np.savez(path, **{k: v for k, v in changed.items() if v is not None})
    return refusal(path, read_short)

  assert 'it lacks conv_1/b, which 64 needs' in answer({'conv_1/b': None})
  assert 'conv_99/w is not of this network' in answer({'conv_99/w': np.ones(1)})
  assert 'conv/b is float32 (33,), not float32 (32,)' in answer(
    {'conv/b': np.ones(33, 'f4')}
  )
  assert 'conv/b is float64 (32,)' in answer({'conv/b': np.ones(32)})
  assert 'conv/w is float32 (3, 3, 3, 32) in Fortran order' in answer(
    {'conv/w': np.asfortranarray(arrays['conv/w'])}
  )
  assert 'holds pickled Python objects' in answer({'conv/b': np.full(32, None)})
  for data in (b'', b'PK\3\4', b'\x93NUMPY'):
    path.write_bytes(data)
    assert 'is not a file of Inception weights' in refusal(path, read_short)
  assert 'no such file' in refusal(tmp_path / 'none.npz', read_short)
  assert 'not a file of Inception' in refusal(tmp_path, read_short)


@pytest.mark.parametrize(
  ('shape', 'kept', 'must_name'),
  [
    ((10**12,), 128, 'conv/b is float32 (1000000000000,)'),
    ((32,), 127, 'is damaged: float32 [32] takes 256 bytes'),
    ((32,), 129, 'is damaged: float32 [32] takes 256 bytes'),
  ],
)
def test_a_header_that_lies_is_found_out(
  arrays, tmp_path, shape, kept, must_name
):
  member = io.BytesIO()
  np.lib.format.write_array_header_1_0(
    member, {'descr': '<f4', 'fortran_order': False, 'shape': shape}
  )
  path = tmp_path / 'ours.npz'
  rest = {k: v for k, v in arrays.items() if k != 'conv/b'}
  np.savez(path, **rest)
  with zipfile.ZipFile(path, 'a') as archive:
    archive.writestr('conv/b.npy', member.getvalue() + bytes(kept))
  assert must_name in refusal(path, read_short)


def test_damage_to_our_file_is_told(arrays, tmp_path):
  path = tmp_path / 'ours.npz'
  np.savez(path, **arrays)
  data = path.read_bytes()
  for i in (4, 40, 100, 300, len(data) // 2, len(data) - 60):
    path.write_bytes(data[:i])
    refusal(path, read_short)
    path.write_bytes(data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :])
    with contextlib.suppress(UserError):  # what no reader looks at
      for layer in read_short(path).values():
        assert set(layer) == {'w', 'b'}
  at = data.index(arrays['conv_2/w'].tobytes())  # the numbers themselves
  path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
  assert 'CRC' in refusal(path, read_short)


# --- the download -------------------------------------------------------------


CONTENT = np.random.default_rng(0).bytes(3_000_000)


@pytest.fixture
def server():
  """(address, paths asked for) of a server of made-up weights."""
  asked = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      asked.append(self.path)
      if self.path == '/none.pth':
        return self.send_error(404)
      self.send_response(200)
      self.send_header('Content-Length', len(CONTENT))
      self.end_headers()
      cut = len(CONTENT) // 2 if self.path == '/cut.pth' else None
      with contextlib.suppress(ConnectionError):
        self.wfile.write(CONTENT[:cut])
      return None

    def log_message(self, *args):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    yield f'http://127.0.0.1:{httpd.server_port}', asked
    httpd.shutdown()
    thread.join()


SUM = hashlib.sha256(CONTENT).hexdigest()


def test_a_download(server, tmp_path):
  address, asked = server
  url, seen = f'{address}/weights.pth', []

  def fetch():
    return download.fetch(
      tmp_path / 'new', url=url, sha256=SUM, largest=len(CONTENT),
      on_bytes=seen.append,
    )  # fmt: skip

  assert fetch() == tmp_path / 'new' / 'weights.pth'
  assert fetch().read_bytes() == CONTENT
  assert asked == ['/weights.pth']  # once
  assert sum(seen) == len(CONTENT)
  assert len(seen) >= 3
  # Damaged since, it is fetched again.
  fetch().write_bytes(CONTENT[:-1])
  assert fetch().read_bytes() == CONTENT
  assert asked == ['/weights.pth'] * 2
  assert [p.name for p in (tmp_path / 'new').iterdir()] == ['weights.pth']


@pytest.mark.parametrize(
  ('name', 'changes', 'must_name'),
  [
    ('weights', {'sha256': '0' * 64}, f'SHA-256 {SUM[:8]}, not 00000000'),
    ('weights', {'largest': 2_999_999}, 'more than 2999999 bytes'),
    ('cut', {}, 'gave 1500000 bytes with the SHA-256'),
    ('none', {}, '404'),
  ],
)
def test_a_download_is_whole_or_not_at_all(
  server, tmp_path, name, changes, must_name
):
  address, _ = server
  arguments = {'url': f'{address}/{name}.pth', 'sha256': SUM}
  arguments |= {'largest': len(CONTENT)} | changes
  message = refusal(tmp_path, lambda path: download.fetch(path, **arguments))
  assert must_name in message
  assert 'by other means' in message
  assert not list(tmp_path.iterdir())


def test_weights_are_obtained_once(server, tmp_path, monkeypatch):
  """Fetched and made ours; what cannot be made ours leaves no file of ours."""
  address, asked = server
  how = {'url': f'{address}/weights.pth', 'sha256': SUM}
  message = refusal(tmp_path, lambda path: inception.obtain(path, **how))
  assert 'weights.pth' in message
  assert not (tmp_path / inception.NAME).exists()
  monkeypatch.setattr(
    inception, 'convert',
    lambda source, target: target.write_bytes(source.read_bytes()),
  )  # fmt: skip
  path = inception.obtain(tmp_path, **how)
  assert path.name == inception.NAME
  assert path.read_bytes() == CONTENT
  assert inception.obtain(tmp_path, **how) == path
  assert asked == ['/weights.pth']


def test_no_server(tmp_path):
  message = refusal(
    tmp_path / 'new',
    lambda path: inception.obtain(path, url='http://127.0.0.1:9/weights.pth'),
  )
  assert 'cannot be downloaded' in message
  assert not (tmp_path / 'new').exists()


def test_the_published_name_has_the_published_hash():
  assert inception.URL.endswith(f'-{inception.SHA256[:8]}.pth')
  assert len(inception.SHA256) == 64
