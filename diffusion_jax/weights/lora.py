"""Reads and writes files of LoRA, low-rank changes of a network's kernels.

A file is a safetensors file with two tensors for each layer, under the names
that diffusers and PEFT give them:

  unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight
  ....lora_B.weight

A is [rank, inputs] and B [outputs, rank]; of convolutions they have two more
axes. `lora_alpha` in the file's metadata, or `.alpha` of each layer, is the
rank times the factor of the product; without them the factor is 1. The older
names of diffusers (lora.down, to_q_lora.down) and those of kohya's scripts
(lora_unet_...lora_down) are read, too. Nothing is executed, and no other format
is read.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from diffusion_jax.models import lora
from diffusion_jax.models.lora import Lora
from diffusion_jax.system import errors, files
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import diffusers, named, states

FILE = 'pytorch_lora_weights.safetensors'  # as diffusers calls it
METADATA = 'lora_adapter_metadata'
UNET = 'unet'
_PEFT = r'(base_model\.model\.)?'  # before all names in PEFT's own files
_TEXT = re.compile(_PEFT + '(text_encoder|lora_te)')
# After the name of a layer.
_ENDS = {
  'A': r'\.(lora_A(\.default)?|lora\.down|lora_down)\.weight',
  'B': r'\.(lora_B(\.default)?|lora\.up|lora_up)\.weight',
  'alpha': r'\.alpha',
}
# diffusers before 0.22: a processor of the attention had them.
_OLD = (
  (r'\.processor\.to_(q|k|v)_lora\.(down|up)\.', r'.to_\1.lora.\2.'),
  (r'\.processor\.to_out_lora\.(down|up)\.', r'.to_out.0.lora.\1.'),
)
_WRONG = 'give a LoRA of a network with the same layers'


class Names(NamedTuple):
  """The names and layouts of a network's layers in files.

  Attributes:
    prefix: before all names.
    name_of: our name of a layer -> theirs.
    pointwise: a regular expression of our names of dense layers that are 1x1
      convolutions there.
  """

  prefix: str
  name_of: Callable[[str], str]
  pointwise: str


def names_of(network: str, linear_projection: bool = False) -> Names:
  """The names of a network's layers in files.

  Args:
    network: the config's model.name. U-Nets have diffusers' names, other
      networks their own.
    linear_projection: whether the projections around transformers are dense
      layers in diffusers, too: its setting use_linear_projection.
  """
  if network != UNET:
    return Names(network, lambda layer: layer.replace('/', '.'), '')
  projections = '' if linear_projection else '|proj_in|proj_out'
  return Names(UNET, _diffusers_name, f'(.*/)?(shortcut{projections})')


def _diffusers_name(layer: str) -> str:
  return diffusers.name_of(layer + lora.KERNEL).removesuffix('.weight')


# --- writing ------------------------------------------------------------------


def write(path, changes: Lora, names: Names) -> None:
  """Writes a file of LoRA.

  Args:
    path: the file.
    changes: the low-rank changes on the host, of one rank and one factor.
    names: of the network.
  """
  tensors, layers = {}, []
  (rank,) = {b.shape[0] for _, b in changes.pairs.values()}
  (factor,) = {*changes.factors.values()}
  for layer, (a, b) in changes.pairs.items():
    theirs = names.name_of(layer)
    layers.append(theirs)
    convolved = a.ndim == 4 or bool(re.fullmatch(names.pointwise, layer))
    for end, array in (('lora_A', a), ('lora_B', b)):
      tensors[f'{names.prefix}.{theirs}.{end}.weight'] = _to_theirs(
        np.asarray(array), convolved
      )
  facts = {
    'r': rank,
    'lora_alpha': factor * rank,
    'target_modules': sorted(layers),
  }
  told = {f'{names.prefix}.{key}': value for key, value in facts.items()}
  content = safetensors.numpy.save(
    tensors, {'format': 'pt', METADATA: json.dumps(told, sort_keys=True)}
  )
  with files.replacing(path) as file:
    file.write(content)


def _to_theirs(array: np.ndarray, convolved: bool) -> np.ndarray:
  if array.ndim == 2:
    array = array.T[:, :, None, None] if convolved else array.T
  else:
    array = array.transpose(3, 2, 0, 1)  # HWIO -> OIHW
  return np.ascontiguousarray(array, np.float32)


def sha256(changes: Lora) -> str:
  """A hash of low-rank changes, whatever file they come from."""
  digest = hashlib.sha256()
  for layer in sorted(changes.pairs):
    digest.update(f'{layer} {float(changes.factors[layer])!r}'.encode())
    for array in changes.pairs[layer]:
      digest.update(np.ascontiguousarray(array, np.float32).tobytes())
  return digest.hexdigest()


# --- reading ------------------------------------------------------------------


def read(path, kernels: Mapping[str, Any], names: Names) -> Lora:
  """Reads a file of LoRA for a network.

  Args:
    path: the file.
    kernels: our name of a layer -> its kernel or the shape of it.
    names: of the network.

  Returns:
    float32 NumPy arrays in our layout.

  Raises:
    UserError: it is no such file, it is damaged, or has tensors that are not
      low-rank changes of layers of this network.
  """
  path = files.at(path)
  if path.suffix != states.SAFE:
    raise UserError(
      f'{path} is not a {states.SAFE} file: save the LoRA as one, such as '
      f'{FILE}, as no other format is read'
    )
  content = files.content(path, 'give a file of LoRA')
  tensors = states.tensors_of(path, content)
  layers = {}
  for layer in kernels:
    theirs = names.name_of(layer)
    layers |= {theirs: layer, theirs.replace('.', '_'): layer}
  head = f'{_PEFT}({re.escape(names.prefix)}\\.|lora_unet_)?'
  found = _by_layer(path, tensors, layers, head)
  settings = _settings(path, content, names.prefix)
  pairs, factors = {}, {}
  for layer, parts in found.items():
    shape = tuple(kernels[layer].shape)
    pairs[layer] = _pair(path, layer, parts, shape)
    rank = pairs[layer][1].shape[0]
    alpha = _alpha(settings, names.name_of(layer), rank)
    if 'alpha' in parts:
      alpha = _number(path, *parts['alpha'])
    root = settings.get('use_rslora', False)
    factors[layer] = alpha / (rank**0.5 if root else rank)
  # In the network's order, whatever the file's.
  order = [layer for layer in kernels if layer in pairs]
  return Lora(
    {layer: pairs[layer] for layer in order},
    {layer: factors[layer] for layer in order},
  )


def _by_layer(path, tensors, layers, head) -> dict[str, dict]:
  """Our layer -> {'A', 'B' and perhaps 'alpha': (their name, tensor)}."""
  found, unknown = {}, []
  for name, array in tensors.items():
    today = named.renamed(name, _OLD)
    for part, end in _ENDS.items():
      match = re.fullmatch(f'(.*){end}', today)
      layer = match and layers.get(re.sub(f'^{head}', '', match[1]))
      if layer:
        found.setdefault(layer, {})[part] = name, array
        break
    else:
      unknown.append(name)
  if of_text := [name for name in unknown if _TEXT.match(name)]:
    raise UserError(
      f'{path}: {len(of_text)} of {len(tensors)} tensors are of a text encoder '
      f'({named.shortened(of_text)}), which is not changed here: save the LoRA '
      'of the denoising network alone'
    )
  if unknown or not found:
    raise UserError(
      f'{path}: {len(unknown)} of {len(tensors)} tensors are no low-rank parts '
      f'of layers of this network ({named.shortened(unknown) or "none"}): '
      f'{_WRONG}'
    )
  return found


def _pair(path, layer, parts, shape) -> tuple[np.ndarray, np.ndarray]:
  """A and B in our layout, checked."""
  for here, other in (('A', 'B'), ('B', 'A')):
    if here not in parts:
      name, _ = parts.get(other) or parts['alpha']
      raise UserError(
        f'{path}: there is {name}, but no {here} of this layer: give the whole '
        'file'
      )
  (a_name, a), (b_name, b) = parts['A'], parts['B']
  rank = a.shape[0] if a.ndim else 0
  *others, outputs = shape
  wanted = {a_name: (a, (*others, rank)), b_name: (b, (rank, outputs))}
  ours = []
  for name, (array, size) in wanted.items():
    mine = _to_ours(array, len(size))
    if mine.shape != size or rank < 1:
      raise UserError(
        f'{path}: {name} has the shape {list(array.shape)}, but the layer '
        f'{layer} has a kernel of {list(shape)} here: {_WRONG}'
      )
    if mine.dtype.kind != 'f' or not np.isfinite(mine).all():
      raise UserError(
        f'{path}: {name} holds numbers that are not finite, or no floats: '
        'save the LoRA again'
      )
    ours.append(np.ascontiguousarray(mine, np.float32))
  return ours[0], ours[1]


def _to_ours(array: np.ndarray, axes: int) -> np.ndarray:
  if array.ndim == 4 and axes == 2 and array.shape[2:] == (1, 1):
    array = array[:, :, 0, 0]
  if array.ndim == 2 and axes == 4:
    array = array[:, :, None, None]
  if array.ndim == 4:
    return array.transpose(2, 3, 1, 0)  # OIHW -> HWIO
  return array.T


def _number(path, name, array) -> float:
  if array.size != 1 or not np.isfinite(array).all():
    raise UserError(f'{path}: {name} is not one number: save the LoRA again')
  return float(array.reshape(()))


def _settings(path, content: bytes, prefix: str) -> dict:
  """The settings of PEFT in a file's metadata, without the prefix."""
  with errors.one_line(
    f'{path}: its metadata are damaged (', '): save it again'
  ):
    size = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8 : 8 + size]).get('__metadata__', {})
    told = json.loads(header.get(METADATA, '{}'))
    told = {key.removeprefix(f'{prefix}.'): x for key, x in told.items()}
    numbers = [
      told.get('lora_alpha', 1),
      *told.get('alpha_pattern', {}).values(),
    ]
    if not all(isinstance(x, int | float) for x in numbers):
      raise ValueError('lora_alpha is no number')
  if told.get('use_dora'):
    raise UserError(f'{path} is a DoRA, not a LoRA: give a LoRA')
  return told


def _alpha(settings, name: str, rank: int) -> float:
  """The alpha that metadata give a layer; without any, the rank."""
  for key, alpha in settings.get('alpha_pattern', {}).items():
    # PEFT's keys are whole names, behind a ^, or ends of names.
    if name == key.removeprefix('^') or name.endswith(f'.{key}'):
      return alpha
  return settings.get('lora_alpha', rank)
