"""The weights of FID's Inception: converts published files to a safe .npz.

Three files hold the same network: TensorFlow's frozen graph, and the files of
pytorch-fid and torch-fidelity, which have the same SHA-256. Our format is a
.npz of `NAME/w` (HWIO) and `NAME/b`, float32, with the names and order of
`models.inception.shapes` and the batch norms folded. It contains no code.
"""

import functools
import hashlib
import re
import zipfile
from collections.abc import Sequence

import numpy as np
from flax import traverse_util

from diffusion_jax.models import inception
from diffusion_jax.system import errors, files, npz
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import download, named, pytorch

URL = (
  'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
  'pt_inception-2015-12-05-6726825d.pth'
)
SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'
BYTES = 95_628_359
NAME = 'inception-2015-12-05.npz'  # of our file, in the cache

EPSILON = 1e-3  # of the batch norms

# The convolutions of the PyTorch files, in the order of `inception.shapes`: the
# stem, then for blocks that are alike the branches of each.
_STEM = ('1a_3x3', '2a_3x3', '2b_3x3', '3b_1x1', '4a_3x3')
_BLOCKS = {
  '5b 5c 5d': '1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool',
  '6a': '3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3',
  '6b 6c 6d 6e': '1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 '
  '7x7dbl_4 7x7dbl_5 _pool',
  '7a': '3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4',
  '7b 7c': '1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b '
  '_pool',
}
# The arrays folded into a convolution: our name -> (PyTorch, TensorFlow).
_PARTS = {
  'w': ('.conv.weight', '_conv2d_params'),
  'gamma': ('.bn.weight', '_batchnorm_gamma'),
  'beta': ('.bn.bias', '_batchnorm_beta'),
  'mean': ('.bn.running_mean', '_batchnorm_moving_mean'),
  'variance': ('.bn.running_var', '_batchnorm_moving_variance'),
}


def obtain(directory, **how):
  """Downloads and converts the published weights, unless our file exists.

  Args:
    directory: the folder of the file.
    **how: arguments of `download.fetch`; url, sha256 and largest default to
      those of the published file.

  Returns:
    The path of the file.

  Raises:
    UserError: the download fails, or gives another file.
  """
  path = files.at(directory) / NAME
  if not path.exists():
    published = {'url': URL, 'sha256': SHA256, 'largest': BYTES}
    convert(download.fetch(directory, **{**published, **how}), path)
  return path


def convert(source, target) -> None:
  """Converts a published file to our format.

  Args:
    source: pt_inception-2015-12-05-6726825d.pth of pytorch-fid,
      weights-inception-2015-12-05-6726825d.pth of torch-fidelity, or
      classify_image_graph_def.pb, which needs TensorFlow (the extra `prepare`).
      If the name contains a hash, the file must have that hash.
    target: the .npz file, written atomically.

  Raises:
    UserError: the source is not such a file, or is incomplete.
  """
  checked(source)
  with errors.one_line(
    f'{source} is not the Inception of FID (',
    f'): give {URL.rpartition("/")[2]}',
  ):
    if files.at(source).suffix == '.pb':
      params = _fold(_graph(source), graph_names())
    else:
      params = from_torch(pytorch.read(source))
  write(target, params)


def from_torch(state: dict[str, np.ndarray]) -> dict:
  """Converts the state dict of pytorch-fid or torch-fidelity.

  Args:
    state: {name: array}, from `pytorch.read`.

  Returns:
    {name: {'w', 'b'}}, float32, for `models.inception.apply`.

  Raises:
    ValueError: the state dict is of another network.
  """
  axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}  # OIHW -> HWIO
  turned = {
    name: np.transpose(array, axes.get(array.ndim))
    for name, array in state.items()
    if not name.endswith('num_batches_tracked')
  }
  return _fold(turned, torch_names())


def torch_names() -> dict[str, str]:
  """{name in a state dict: our name}.

  Our names end in w, gamma, beta, mean or variance; softmax has w and b.
  """
  modules = [f'Conv2d_{name}' for name in _STEM] + [
    f'Mixed_{block}.branch{branch}'
    for blocks, branches in _BLOCKS.items()
    for block in blocks.split()
    for branch in branches.split()
  ]
  return {
    f'{module}{theirs}': f'{name}/{part}'
    for module, name in zip(modules, _convolutions(), strict=True)
    for part, (theirs, _) in _PARTS.items()
  } | {'fc.weight': 'softmax/w', 'fc.bias': 'softmax/b'}


def graph_names() -> dict[str, str]:
  """{name of a constant of the graph, with _ for /: our name}."""
  return {
    f'{name}{theirs}': f'{name}/{part}'
    for name in _convolutions()
    for part, (_, theirs) in _PARTS.items()
  } | {'softmax_weights': 'softmax/w', 'softmax_biases': 'softmax/b'}


def _convolutions() -> list[str]:
  return [name for name in inception.shapes() if name != 'softmax']


def write(path, params: dict) -> None:
  """Writes parameters in our format, atomically.

  Args:
    path: the .npz file.
    params: {name: {'w', 'b'}}.
  """
  arrays = {
    name: np.ascontiguousarray(array, np.float32)
    for name, array in traverse_util.flatten_dict(params, sep='/').items()
  }
  files.make(files.at(path).parent)
  with files.replacing(path) as file:
    np.savez(file, **arrays)


def read(path, taps: Sequence[str] = ('logits',)) -> dict:
  """Reads the parameters that taps need from a file in our format.

  An array is only read after checking its name, dtype and shape.

  Args:
    path: the .npz file, which may lack parameters that the taps do not need.
    taps: keys of `models.inception.TAPS`.

  Returns:
    {name: {'w', 'b'}}, float32, in the order of the network.

  Raises:
    UserError: there is no such file, it is something else or damaged, or it
      lacks parameters that the taps need.
  """
  known = _flat(inception.shapes())
  wanted = _flat(inception.shapes(taps))
  if not files.at(path).exists():
    raise UserError(
      f'{path}: there is no such file; give Inception weights written by '
      'weights.inception.convert'
    )
  with (
    errors.one_line(
      f'{path} is not a file of Inception weights (',
      '): give one that weights.inception.convert wrote',
    ),
    files.at(path).open('rb') as file,
    zipfile.ZipFile(file) as archive,
  ):
    found = [name.removesuffix('.npy') for name in archive.namelist()]
    _match(found, known, wanted, f', which {", ".join(taps)} needs')

    def check(name, header, where):
      shape = wanted[name]
      if header[:3] != (shape, np.dtype('<f4'), 'C'):
        order = ' in Fortran order' if header.order == 'F' else ''
        raise ValueError(
          f'{name} is {header.dtype} {header.shape}{order}, not float32 {shape}'
        )

    arrays = {
      name: npz.read_member(
        archive, name, f'{name} in {path}', functools.partial(check, name)
      )
      for name in wanted
    }
  return traverse_util.unflatten_dict(arrays, sep='/')


def _match(found, known, wanted, why: str = '') -> None:
  """Raises ValueError unless names are known, and the wanted ones are there."""
  if missing := [name for name in wanted if name not in found]:
    raise ValueError(f'it lacks {named.shortened(missing, 1)}{why}')
  if extra := [name for name in found if name not in known]:
    raise ValueError(f'{named.shortened(extra, 1)} is not of this network')


def _flat(shapes: dict) -> dict[str, tuple]:
  return {
    f'{name}/{part}': shape if part == 'w' else shape[-1:]
    for name, shape in shapes.items()
    for part in 'wb'
  }


def checked(path) -> str:
  """The SHA-256 of a file, checked against a published name: -6726825d.pth.

  Raises:
    UserError: the file cannot be read, or has another hash than its name.
  """
  match = re.search(r'inception-2015-12-05-([0-9a-f]{8})\.pth$', str(path))
  data = files.content(path, 'give published Inception weights')
  found = hashlib.sha256(data).hexdigest()
  if match and not found.startswith(match[1]):
    raise UserError(
      f'{path} has the SHA-256 {found[: len(match[1])]}, not {match[1]} as its '
      'name says: it is damaged or another file; download it again'
    )
  return found


def _pick(given: dict, names: dict[str, str]) -> dict[str, np.ndarray]:
  """Renames arrays to ours; raises ValueError unless the names all match."""
  _match(given, names, names)
  shapes = inception.shapes()
  for theirs, ours in names.items():
    (name, part), array = ours.split('/'), given[theirs]
    shape = shapes[name] if part == 'w' else shapes[name][-1:]
    if array.shape != shape:
      raise ValueError(f'{theirs} is {array.shape} as HWIO, not {shape}')
    if not np.isfinite(array).all():
      raise ValueError(f'{theirs} holds numbers that are not finite')
    if part == 'variance' and array.min() < 0:
      raise ValueError(f'{theirs} holds negative numbers')
  return {ours: given[theirs] for theirs, ours in names.items()}


def _fold(given: dict, names: dict[str, str]) -> dict:
  """Folds batch norms into convolutions, in float64; see `_pick`."""
  arrays, params = _pick(given, names), {}
  for name in _convolutions():
    w, gamma, beta, mean, variance = (
      arrays[f'{name}/{part}'].astype('f8') for part in _PARTS
    )
    scale = gamma / np.sqrt(variance + EPSILON)
    params[f'{name}/w'] = w * scale
    params[f'{name}/b'] = beta - mean * scale
  params |= {f'softmax/{part}': arrays[f'softmax/{part}'] for part in 'wb'}
  return traverse_util.unflatten_dict(
    {name: array.astype('f4') for name, array in params.items()}, sep='/'
  )


def _graph(path) -> dict[str, np.ndarray]:
  """The network's constants in a frozen graph, by names with _ for /."""
  try:
    import tensorflow as tf
    from google.protobuf.message import DecodeError
  except ImportError as e:
    raise UserError(
      f"{path} needs TensorFlow: pip install '.[prepare]', or give "
      f'{URL.rpartition("/")[2]}, which does not'
    ) from e
  graph, known = tf.compat.v1.GraphDef(), graph_names()
  try:
    graph.ParseFromString(files.at(path).read_bytes())
    found = {
      name: tf.make_ndarray(node.attr['value'].tensor)
      for node in graph.node
      if node.op == 'Const' and (name := node.name.replace('/', '_')) in known
    }
  except (DecodeError, TypeError, ValueError) as e:
    raise UserError(
      f'{path} is not a TensorFlow graph ({type(e).__name__}): give '
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
