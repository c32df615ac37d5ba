"""Our Inception against those of torch-fidelity and pytorch-fid.

As in `parity.unet`: the same comparison serves what they answer now
(`reference_live`) and what they answered (`reference_golden`), a file that
tests/golden/make_inception.py writes. Weights and images follow from names.
"""

import functools
import pathlib
import tempfile
import zlib
from unittest import mock

import jax
import numpy as np

from diffusion_jax.models import inception
from diffusion_jax.weights import inception as weights

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
FILE = GOLDEN / 'inception.npz'
TOLERANCE = 1e-4

# Name -> (convention, size): what is asked of the whole network, and of the
# resize alone, of which every 23rd pixel is kept.
ASKED = {
  'tf1_32': ('tf1', (32, 32)),
  'tf1_299': ('tf1', (299, 299)),
  'pytorch-fid_32': ('pytorch-fid', (32, 32)),
}
RESIZED = {
  f'{convention}_{height}x{width}': (convention, (height, width))
  for convention in inception.CONVENTIONS
  for height, width in ((8, 28), (32, 32), (256, 400), (299, 299))
}
STRIDE = 23


def images(size: tuple[int, int]) -> np.ndarray:
  """uint8 [2, H, W, 3]: noise, of which the second image has less."""
  noise = _normal(f'images of {size}', (2, *size, 3))
  return np.clip(128 + noise * [[[[60]]], [[[20]]]], 0, 255).astype(np.uint8)


@functools.cache
def state() -> dict[str, np.ndarray]:
  """A random network as a state dict, in which all of it matters.

  A convolution's weights add up to zero, so that not all channels follow the
  mean of the positive numbers that come in; else all images would look alike.
  """
  shapes, found = inception.shapes(), {}
  for theirs, ours in weights.torch_names().items():
    name, part = ours.split('/')
    shape = shapes[name] if part == 'w' else shapes[name][-1:]
    values = _normal(theirs, shape)
    if part == 'w':
      axes = tuple(range(len(shape) - 1))
      values -= values.mean(axes, keepdims=True)
      values *= np.sqrt(3 / np.prod(shape[:-1]), dtype='f4')
      values = values.transpose((3, 2, 0, 1) if len(axes) == 3 else (1, 0))
    elif part == 'variance':
      values = np.exp(values / 5)
    else:
      values = values / 10 + (part == 'gamma')
    found[theirs] = np.ascontiguousarray(values, np.float32)
  return found


def given() -> np.ndarray:
  """Mean squares of weights and images; where two differ, so did what we asked.

  Returns:
    [2] float64.
  """
  asked = [images(size) / 255 for _, size in ASKED.values()]
  return np.array(
    [
      sum(np.square(x, dtype='f8').sum() for x in xs) / sum(x.size for x in xs)
      for xs in (list(state().values()), asked)
    ]
  )


def reference_live() -> dict[str, np.ndarray]:
  """What the two answer now, in float64.

  Returns:
    {'given': ..., 'CASE/TAP': [2, TAPS[tap]], 'resize/CASE': pixels}.
  """
  found = {'given': given()}
  for name, (convention, size) in ASKED.items():
    ask = _torch_fidelity if convention == 'tf1' else _pytorch_fid
    for tap, values in ask(images(size)).items():
      found[f'{name}/{tap}'] = values
  for name, (convention, size) in RESIZED.items():
    found[f'resize/{name}'] = _resized(convention, images(size))
  return found


def reference_golden() -> dict[str, np.ndarray]:
  """What they answered when the golden file was made."""
  with np.load(FILE) as file:
    return dict(file)


def _tensor(images):
  import torch

  return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def save(path, **kwargs) -> None:
  """The random network as a file of torch.save."""
  import torch

  torch.save(
    {k: torch.from_numpy(v) for k, v in state().items()}, path, **kwargs
  )


@functools.cache
def _theirs():
  import torch
  from torch_fidelity.feature_extractor_inceptionv3 import (
    FeatureExtractorInceptionV3,
  )

  names = ['64', '192', '768', '2048', 'logits_unbiased', 'logits']
  with tempfile.NamedTemporaryFile(suffix='.pth') as file:
    save(file.name)
    network = FeatureExtractorInceptionV3(
      'inception-v3-compat', names, feature_extractor_weights_path=file.name
    ).double()
  # Its own argument for this does nothing in version 0.4.0.
  network.feature_extractor_internal_dtype = torch.float64
  return names, network


def _torch_fidelity(images) -> dict[str, np.ndarray]:
  names, network = _theirs()
  spatial = []
  hook = network.Mixed_6d.branch1x1.register_forward_hook(
    lambda module, args, output: spatial.append(output)
  )
  found = dict(zip(names, network(_tensor(images)), strict=True))
  hook.remove()
  found['spatial'] = spatial[0][:, :7].permute(0, 2, 3, 1).flatten(1)
  return {name: found[name].numpy().astype('f4') for name in inception.TAPS}


def _pytorch_fid(images) -> dict[str, np.ndarray]:
  import pytorch_fid.inception
  import torch

  with mock.patch.object(
    pytorch_fid.inception,
    'load_state_dict_from_url',
    return_value={k: torch.from_numpy(v) for k, v in state().items()},
  ):
    network = pytorch_fid.inception.InceptionV3([0, 1, 2, 3])
  network = network.eval().double()
  with torch.no_grad():
    maps = network(_tensor(images).double() / 255)
  return {str(x.shape[1]): x.mean((2, 3)).numpy().astype('f4') for x in maps}


def _resized(convention, images) -> np.ndarray:
  import torch
  from torch_fidelity import interpolate_compat_tensorflow as tensorflow

  x = _tensor(images).float()
  if convention == 'tf1':
    x = tensorflow.interpolate_bilinear_2d_like_tensorflow1x(
      x, size=(inception.SIZE,) * 2, align_corners=False
    )
    x = (x - 128) / 128
  else:
    x = torch.nn.functional.interpolate(
      x / 255, (inception.SIZE,) * 2, mode='bilinear', align_corners=False
    )
    x = 2 * x - 1
  return x.permute(0, 2, 3, 1)[:, ::STRIDE, ::STRIDE].numpy()


@functools.cache
def params() -> dict:
  return weights.from_torch(state())


@functools.cache
def _features():
  return jax.jit(inception.features, static_argnames='taps')


def ours() -> dict[str, np.ndarray]:
  """What ours answers; one program, compiled once, serves all cases."""
  found = {'given': given()}
  for name, (convention, size) in ASKED.items():
    x = inception.preprocess(images(size), convention)
    answers = _features()(params(), x, taps=tuple(inception.TAPS))
    for tap, values in answers.items():
      found[f'{name}/{tap}'] = np.asarray(values)
  for name, (convention, size) in RESIZED.items():
    x = inception.preprocess(images(size), convention)
    found[f'resize/{name}'] = np.asarray(x[:, ::STRIDE, ::STRIDE])
  return found


def errors(reference: dict, answers: dict) -> dict[str, float]:
  """The largest error of each answer, relative to the largest number in it.

  Raises:
    AssertionError: the two were asked different things.
  """
  if not np.allclose(answers['given'], reference['given'], rtol=1e-6):
    raise AssertionError(
      'weights or images are not those of the reference: were names changed? '
      'A golden file is made anew by tests/golden/make_inception.py'
    )
  return {
    name: float(np.abs(answers[name] - values).max() / np.abs(values).max())
    for name, values in reference.items()
    if name != 'given'
  }


def _normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
  generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
  return generator.standard_normal(shape, np.float32)
