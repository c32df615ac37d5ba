"""The weights of FID's Inception: published files, and ours, which has no code.

Three files hold the same network: TensorFlow's frozen graph, and those that
pytorch-fid and torch-fidelity publish, which are one by their SHA-256. Ours is
a .npz of `NAME/w` (HWIO) and `NAME/b`, float32, with the names and in the order
of `models.inception.shapes`, and the batch norms folded.
"""

import hashlib
import http.client
import re
import tokenize
import urllib.request
import zipfile
from collections.abc import Callable, Sequence

import numpy as np

from diffusion_jax.models import inception
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import pytorch

URL = (
  'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
  'pt_inception-2015-12-05-6726825d.pth'
)
SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'
BYTES = 95_628_359
NAME = 'inception-2015-12-05.npz'  # of ours, where it was obtained

EPSILON = 1e-3  # of the batch norms
PIECE = 2**20  # bytes
PATIENCE = 60  # seconds that a server may take to answer
HEADER = 2**10  # bytes, more than what precedes an array in a .npz

# What a .npz file that is something else, or damaged, raises.
DAMAGED = (
  *(OSError, ValueError, LookupError, EOFError, RuntimeError, SyntaxError),
  *(tokenize.TokenError, zipfile.BadZipFile),
)

# Blocks of the network, as the two of PyTorch call them: ours, theirs, and the
# names of its branch without a tower, of tower and of tower_1.
_A = 'branch1x1', 'branch5x5', 'branch3x3dbl'
_B = 'branch3x3', 'branch3x3dbl', ''
_C = 'branch1x1', 'branch7x7', 'branch7x7dbl'
_D = '', 'branch3x3', 'branch7x7x3'
_E = 'branch1x1', 'branch3x3', 'branch3x3dbl'
_BLOCKS = {
  'mixed': ('Mixed_5b', _A),
  'mixed_1': ('Mixed_5c', _A),
  'mixed_2': ('Mixed_5d', _A),
  'mixed_3': ('Mixed_6a', _B),
  'mixed_4': ('Mixed_6b', _C),
  'mixed_5': ('Mixed_6c', _C),
  'mixed_6': ('Mixed_6d', _C),
  'mixed_7': ('Mixed_6e', _C),
  'mixed_8': ('Mixed_7a', _D),
  'mixed_9': ('Mixed_7b', _E),
  'mixed_10': ('Mixed_7c', _E),
}
_STEM = {
  'conv': 'Conv2d_1a_3x3',
  'conv_1': 'Conv2d_2a_3x3',
  'conv_2': 'Conv2d_2b_3x3',
  'conv_3': 'Conv2d_3b_1x1',
  'conv_4': 'Conv2d_4a_3x3',
}
_TORCH_PARTS = {
  'w': 'conv.weight',
  'gamma': 'bn.weight',
  'beta': 'bn.bias',
  'mean': 'bn.running_mean',
  'variance': 'bn.running_var',
}
_GRAPH_PARTS = {
  'w': 'conv2d_params',
  'gamma': 'batchnorm_gamma',
  'beta': 'batchnorm_beta',
  'mean': 'batchnorm_moving_mean',
  'variance': 'batchnorm_moving_variance',
}


def fetch(
  directory,
  *,
  url: str = URL,
  sha256: str = SHA256,
  largest: int = BYTES,
  on_bytes: Callable[[int], None] = lambda count: None,
):
  """Downloads the published weights, unless they are there.

  Args:
    directory: where to, by the name that the URL ends with.
    url: from where.
    sha256: of the file, 64 hexadecimal digits.
    largest: bytes; a longer answer is given up.
    on_bytes: called with the number of bytes of each piece that has come.

  Returns:
    the path of the file, which appears whole and verified or not at all.

  Raises:
    UserError: the server does not give it, or gives something else.
  """
  path = files.at(directory) / url.rpartition('/')[2]
  if path.exists() and _sha256(path) == sha256:
    return path
  advice = f'download {url} by other means, and give the file'
  digest, count = hashlib.sha256(), 0
  try:
    with (
      urllib.request.urlopen(url, timeout=PATIENCE) as answer,
      files.replacing(files.make(directory) / path.name) as file,
    ):
      while piece := answer.read(PIECE):
        digest.update(piece)
        count += len(piece)
        if count > largest:
          raise UserError(f'{url} is more than {largest} bytes: {advice}')
        file.write(piece)
        on_bytes(len(piece))
      if digest.hexdigest() != sha256:
        raise UserError(
          f'{url} gave {count} bytes with the SHA-256 '
          f'{digest.hexdigest()[:8]}, not {sha256[:8]}: {advice}'
        )
  except (OSError, http.client.HTTPException) as e:
    raise UserError(f'{url} cannot be had ({e}): {advice}') from e
  return path


def obtain(directory, **how):
  """The published weights as a file of ours; fetched, unless it is there.

  Args:
    directory: where to.
    **how: as of `fetch`.

  Returns:
    the path of the file.

  Raises:
    UserError: the server does not give them, or gives something else.
  """
  path = files.at(directory) / NAME
  if not path.exists():
    convert(fetch(directory, **how), path)
  return path


def convert(source, target) -> None:
  """A published file as one of ours.

  Args:
    source: pt_inception-2015-12-05-6726825d.pth of pytorch-fid,
      weights-inception-2015-12-05-6726825d.pth of torch-fidelity, or
      classify_image_graph_def.pb, which takes TensorFlow (the extra `prepare`).
      Where the name has a hash in it, the file must have it too.
    target: of the .npz file, which appears whole or not at all.

  Raises:
    UserError: the source is no such file, or is not whole.
  """
  checked(source)
  is_graph = files.at(source).suffix == '.pb'
  parts = _graph(source) if is_graph else pytorch.read(source)
  try:
    params = (from_graph if is_graph else from_torch)(parts)
  except ValueError as e:
    raise UserError(
      f'{source} is not the Inception of FID ({e}): give '
      f'{URL.rpartition("/")[2]}'
    ) from e
  write(target, params)


def from_torch(state: dict[str, np.ndarray]) -> dict:
  """The parameters, of the state dict of pytorch-fid or torch-fidelity.

  Args:
    state: {name: array}, as of `pytorch.read`.

  Returns:
    {name: {'w', 'b'}}, float32, as `models.inception.apply` takes them.

  Raises:
    ValueError: the state dict is of another network.
  """
  given = {
    name: array
    for name, array in state.items()
    if not name.endswith('num_batches_tracked')
  }
  axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}  # OIHW -> HWIO
  turned = {k: np.transpose(v, axes.get(v.ndim)) for k, v in given.items()}
  return _fold(_pick(turned, torch_names()))


def from_graph(constants: dict[str, np.ndarray]) -> dict:
  """The parameters, of the constants of TensorFlow's graph.

  Args:
    constants: {name, with _ for /: array}; others than those of convolutions,
      norms and softmax are left out.

  Returns:
    {name: {'w', 'b'}}, float32, as `models.inception.apply` takes them.

  Raises:
    ValueError: the graph is of another network.
  """
  names = graph_names()
  known = {k: v for k, v in constants.items() if k in names}
  return _fold(_pick(known, names))


def torch_names() -> dict[str, str]:
  """{name in a state dict: ours}; ours end in w, gamma, beta, mean, variance.

  Of softmax, there are w and b.
  """
  return _parts(lambda name: f'{_torch_name(name)}.', _TORCH_PARTS) | {
    'fc.weight': 'softmax/w',
    'fc.bias': 'softmax/b',
  }


def graph_names() -> dict[str, str]:
  """{name of a constant of the graph, with _ for /: ours}."""
  return _parts(lambda name: f'{name}_', _GRAPH_PARTS) | {
    'softmax_weights': 'softmax/w',
    'softmax_biases': 'softmax/b',
  }


def write(path, params: dict) -> None:
  """Writes parameters as a file of ours, which appears whole or not at all.

  Args:
    path: of the .npz file.
    params: {name: {'w', 'b'}}.
  """
  arrays = {
    f'{name}/{part}': np.ascontiguousarray(params[name][part], np.float32)
    for name in params
    for part in 'wb'
  }
  files.make(files.at(path).parent)
  with files.replacing(path) as file:
    np.savez(file, **arrays)


def read(path, taps: Sequence[str] = ('logits',)) -> dict:
  """The parameters that taps need, of a file of ours.

  Nothing is read before its name, type and shape are seen to be the network's.

  Args:
    path: of the .npz file, which may end where the taps do.
    taps: keys of `models.inception.TAPS`.

  Returns:
    {name: {'w', 'b'}}, float32, in the order of the network.

  Raises:
    UserError: there is no such file, it is something else or damaged, or it
      lacks what the taps need.
  """
  known = _flat(inception.shapes())
  wanted = _flat(inception.shapes(taps))
  try:
    with (
      files.at(path).open('rb') as file,
      zipfile.ZipFile(file) as archive,
    ):
      found = [name.removesuffix('.npy') for name in archive.namelist()]
      if extra := [name for name in found if name not in known]:
        raise ValueError(f'{_some(extra)} is not of this network')
      if missing := [name for name in wanted if name not in found]:
        raise ValueError(
          f'it lacks {_some(missing)}, which {", ".join(taps)} needs'
        )
      arrays = {
        name: _array(archive, name, shape) for name, shape in wanted.items()
      }
  except FileNotFoundError as e:
    raise UserError(
      f'{path}: there is no such file; give Inception weights, as '
      'weights.inception.convert writes them'
    ) from e
  except DAMAGED as e:
    reason = ' '.join(str(e).split())[:200]
    raise UserError(
      f'{path} is not a file of Inception weights ({reason}): give one that '
      'weights.inception.convert wrote'
    ) from e
  return {
    name: {part: arrays[f'{name}/{part}'] for part in 'wb'}
    for name in inception.shapes(taps)
  }


def _array(archive, name, shape):
  """An array of a .npz file; it is read once its header is seen to be right."""
  info = archive.getinfo(f'{name}.npy')
  size = 4 * int(np.prod(shape))
  if info.compress_type != zipfile.ZIP_STORED:
    raise ValueError(f'{name} is compressed')
  with archive.open(info) as file:
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
      raise ValueError(f'{name} has the version {version}')
    header = np.lib.format.read_array_header_1_0(file, max_header_size=HEADER)
    if header != (shape, False, np.dtype('<f4')):
      order = ' in the order of Fortran' if header[1] else ''
      raise ValueError(
        f'{name} is {header[2]} {header[0]}{order}, and not float32 {shape}'
      )
    data = file.read(size)
    if len(data) != size or file.read(1):
      raise ValueError(f'{name} is cut off')
  return np.frombuffer(data, '<f4').reshape(shape)


def _flat(shapes: dict) -> dict[str, tuple]:
  return {
    f'{name}/{part}': shape if part == 'w' else shape[-1:]
    for name, shape in shapes.items()
    for part in 'wb'
  }


def _some(names: Sequence[str]) -> str:
  """The first of many names, which may be anything."""
  rest = f' and {len(names) - 1} more' if names[1:] else ''
  return f'{names[0][:100]}{rest}'


def _sha256(path) -> str:
  with files.at(path).open('rb') as file:
    digest = hashlib.sha256()
    while piece := file.read(PIECE):
      digest.update(piece)
  return digest.hexdigest()


def checked(path) -> str:
  """The SHA-256 of a file, which a published name tells: -6726825d.pth.

  Raises:
    UserError: it cannot be read, or has another.
  """
  match = re.search(r'inception-2015-12-05-([0-9a-f]{8})\.pth$', str(path))
  try:
    found = _sha256(path)
  except OSError as e:
    raise UserError(
      f'{path} cannot be read ({e.strerror or e}): give published weights of '
      'Inception'
    ) from e
  if match and not found.startswith(match[1]):
    raise UserError(
      f'{path} has the SHA-256 {found[: len(match[1])]}, not {match[1]} as its '
      'name says: it is damaged or another; download it again'
    )
  return found


def _torch_name(name: str) -> str:
  """mixed_9_tower_1_mixed_conv_1 -> Mixed_7b.branch3x3dbl_3b."""
  if name in _STEM:
    return _STEM[name]
  block, tower, forked, number = re.fullmatch(
    r'(mixed(?:_\d+)?)(?:_tower(?:_(\d))?)?(_mixed)?_conv(?:_(\d))?', name
  ).groups()
  module, (alone, first, second) = _BLOCKS[block]
  if '_tower' not in name:
    return f'{module}.{alone}'
  if tower == '2':
    return f'{module}.branch_pool'
  branch = second if tower == '1' else first
  if forked:
    return f'{module}.{branch}_{3 if tower else 2}{"b" if number else "a"}'
  return f'{module}.{branch}_{1 + int(number or 0)}'


def _parts(prefix: Callable, parts: dict) -> dict[str, str]:
  """Their names of what folds into a convolution, and ours."""
  return {
    f'{prefix(name)}{theirs}': f'{name}/{part}'
    for name in inception.shapes()
    if name != 'softmax'
    for part, theirs in parts.items()
  }


def _pick(given: dict, names: dict[str, str]) -> dict[str, np.ndarray]:
  """Their arrays by our names, all of which must be there and nothing else."""
  if missing := [name for name in names if name not in given]:
    raise ValueError(f'it lacks {_some(missing)}')
  if extra := [name for name in given if name not in names]:
    raise ValueError(f'{_some(extra)} is not of this network')
  shapes = _flat(inception.shapes())
  for theirs, ours in names.items():
    name, part = ours.split('/')
    shape = shapes[ours if part == 'w' else f'{name}/b']
    if given[theirs].shape != shape:
      raise ValueError(
        f'{theirs} is {given[theirs].shape} as HWIO, and not {shape}'
      )
    if not np.isfinite(given[theirs]).all():
      raise ValueError(f'{theirs} holds numbers that are not finite')
    if part == 'variance' and given[theirs].min() < 0:
      raise ValueError(f'{theirs} holds negative numbers')
  return {ours: given[theirs] for theirs, ours in names.items()}


def _fold(arrays: dict[str, np.ndarray]) -> dict:
  """Batch norms into convolutions, in float64."""
  params = {}
  for name in inception.shapes():
    if name == 'softmax':
      w, b = arrays['softmax/w'], arrays['softmax/b']
    else:
      w, gamma, beta, mean, variance = (
        arrays[f'{name}/{part}'].astype('f8') for part in _TORCH_PARTS
      )
      scale = gamma / np.sqrt(variance + EPSILON)
      w, b = w * scale, beta - mean * scale
    params[name] = {'w': w.astype('f4'), 'b': b.astype('f4')}
  return params


def _graph(path) -> dict[str, np.ndarray]:
  """The constants of a frozen graph, by names with _ for /."""
  try:
    import tensorflow as tf
    from google.protobuf.message import DecodeError
  except ImportError as e:
    raise UserError(
      f"{path} takes TensorFlow: pip install '.[prepare]', or give "
      f'{URL.rpartition("/")[2]}, which does not'
    ) from e
  graph = tf.compat.v1.GraphDef()
  try:
    graph.ParseFromString(files.at(path).read_bytes())
    found = {
      node.name.replace('/', '_'): tf.make_ndarray(node.attr['value'].tensor)
      for node in graph.node
      if node.op == 'Const'
    }
  except (DecodeError, TypeError, ValueError) as e:
    raise UserError(
      f'{path} is not a graph of TensorFlow ({type(e).__name__}): give '
      'classify_image_graph_def.pb'
    ) from e
  for node in graph.node:
    if node.op == 'BatchNormWithGlobalNormalization':
      name = node.name.replace('/', '_')
      if not node.attr['scale_after_normalization'].b:
        found[f'{name}_gamma'] = np.ones_like(found[f'{name}_gamma'])
      if not np.isclose(node.attr['variance_epsilon'].f, EPSILON):
        raise UserError(
          f'{path}: {node.name} has the epsilon '
          f'{node.attr["variance_epsilon"].f}, not {EPSILON}: it is another '
          'network; give classify_image_graph_def.pb'
        )
  return found
