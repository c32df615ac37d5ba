"""The weights of LPIPS, from a file that the user has; nothing is downloaded.

The names of tensors are those of the package lpips, or those of torchvision for
the convolutions of VGG16. Others are left out, such as VGG16's classifier.
"""

import hashlib

import numpy as np

from diffusion_jax.models import lpips
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import named, states

ADVICE = (
  'give a .safetensors or .pth file with the weights of LPIPS with VGG16, see '
  'docs/latents.md'
)
HEAD = 'lin{}.model.1.weight'
# Names of the package -> those that are read.
RENAMED = (
  (r'^net\.slice\d+\.(\d+)\.(weight|bias)$', r'features.\1.\2'),
  (r'^lins\.(\d+)\.', r'lin\1.'),
)


def names() -> dict[str, tuple[str, ...]]:
  """Their name of each tensor -> the path of our parameter."""
  found, layer = {}, 0
  for stage, count in enumerate(lpips.CONVS):
    for number in range(count):
      for theirs, ours in (('weight', 'kernel'), ('bias', 'bias')):
        path = 'stages', str(stage), str(number), ours
        found[f'features.{layer}.{theirs}'] = path
      layer += 2  # a convolution and a ReLU
    layer += 1  # a pool
    found[HEAD.format(stage)] = 'heads', str(stage)
  return found


def sha256(path) -> str:
  """The hash of a file of weights.

  Raises:
    UserError: it cannot be read.
  """
  return hashlib.sha256(files.content(_at(path), ADVICE)).hexdigest()


def read(path) -> tuple[dict, str]:
  """Reads the weights of LPIPS.

  Args:
    path: a file, see `states.is_weights`; nothing in it is executed.

  Returns:
    (parameters of `models.lpips`, float32 NumPy arrays; the file's SHA-256).

  Raises:
    UserError: there is no such file, it is damaged, or it lacks tensors or has
      others of their names.
  """
  what = f'loss.lpips_path={path}'
  if not _at(path).is_file():
    raise UserError(f'{what}: there is no such file: {ADVICE}')
  state = states.read(_at(path), HEAD.format(0))
  given = {
    named.renamed(name, RENAMED): array for name, array in state.tensors.items()
  }
  wanted = names()
  if missing := [name for name in wanted if name not in given]:
    raise UserError(
      f'{what} lacks {len(missing)} tensors ({named.shortened(missing)}): '
      f'{ADVICE}'
    )
  params = {}
  for name, (*groups, last) in wanted.items():
    shape, inner = lpips.shapes(), params
    for group in groups:
      shape, inner = shape[group], inner.setdefault(group, {})
    inner[last] = _ours(
      given[name], shape[last], groups == ['heads'], f'{what}: {name}'
    )
  return params, state.sha256


def _ours(array, shape, is_head, what) -> np.ndarray:
  """An array in our layout, checked."""
  theirs = list(shape)
  if is_head:
    theirs = [1, *shape, 1, 1]
  elif len(shape) == 4:
    theirs = [shape[i] for i in (3, 2, 0, 1)]
  if list(array.shape) != theirs or array.dtype.kind != 'f':
    raise UserError(
      f'{what} is {array.dtype} {list(array.shape)}, not floats of {theirs}: '
      f'{ADVICE}'
    )
  if not np.isfinite(array).all() or (is_head and array.min() < 0):
    raise UserError(
      f'{what} holds numbers that are not finite, or weights below 0: {ADVICE}'
    )
  if len(shape) == 4:
    array = array.transpose(2, 3, 1, 0)
  return np.ascontiguousarray(array.reshape(shape), np.float32)


def _at(path) -> files.Path:
  return files.at(path).expanduser()
