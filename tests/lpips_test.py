"""LPIPS: its numbers, its file, and its part in a run.

The reference is written out in float64; the test under the marker `parity` asks
PyTorch for the whole network.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny

from diffusion_jax import runs
from diffusion_jax.configs import default
from diffusion_jax.models import lpips
from diffusion_jax.runs import kept_parts, preparation, recipe, validation
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import lpips as weights

WIDTHS = (3, 4, 2, 5, 3)
# The convolutions of torchvision's VGG16.features: after each stage a pool.
NUMBERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def state(widths=WIDTHS) -> dict[str, np.ndarray]:
  """Random weights by their names in files."""
  rng, found, before = np.random.default_rng(0), {}, 3
  for stage, (width, numbers) in enumerate(zip(widths, NUMBERS, strict=True)):
    for number in numbers:
      scale = np.sqrt(2 / 9 / before)
      kernel = rng.normal(scale=scale, size=(width, before, 3, 3))
      found[f'features.{number}.weight'] = kernel.astype('f4')
      bias = rng.normal(scale=0.1, size=width)
      found[f'features.{number}.bias'] = bias.astype('f4')
      before = width
    head = rng.uniform(size=(1, width, 1, 1))
    found[f'lin{stage}.model.1.weight'] = head.astype('f4')
  return found


def write(folder, tensors) -> str:
  path = folder / 'lpips.safetensors'
  safetensors.numpy.save_file(tensors, path)
  return str(path)


def pictures(channels=3):
  rng = np.random.default_rng(1)
  return rng.uniform(-1, 1, (2, 2, 16, 18, channels)).astype('f4')


@pytest.fixture
def narrow(monkeypatch):
  monkeypatch.setattr(lpips, 'WIDTHS', WIDTHS)


def written_out(tensors, a, b) -> np.ndarray:
  """The distance in float64: [B]."""

  def features(x):
    x = (x - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
    for stage, numbers in enumerate(NUMBERS):
      if stage:
        height, width = x.shape[1] // 2, x.shape[2] // 2
        x = x[:, : 2 * height, : 2 * width]
        x = x.reshape(len(x), height, 2, width, 2, -1).max(axis=(2, 4))
      for number in numbers:
        kernel = tensors[f'features.{number}.weight'].astype('f8')
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(
          padded, (3, 3), axis=(1, 2)
        )
        x = np.einsum('bhwcij,ocij->bhwo', windows, kernel)
        x = np.maximum(x + tensors[f'features.{number}.bias'], 0)
      yield x

  total = 0
  for stage, pair in enumerate(zip(features(a), features(b), strict=True)):
    one, other = (
      x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-10) for x in pair
    )
    head = tensors[f'lin{stage}.model.1.weight'].reshape(-1)
    total = total + ((one - other) ** 2 @ head).mean(axis=(1, 2))
  return total


def test_it_is_the_distance_written_out(tmp_path, narrow):
  tensors = state()
  params, _ = weights.read(write(tmp_path, tensors))
  a, b = pictures()
  distance = jax.jit(lpips.apply)
  want = written_out(tensors, a.astype('f8'), b.astype('f8'))
  assert want.min() > 0.05
  np.testing.assert_allclose(distance(params, a, b), want, rtol=1e-4)
  assert np.all(distance(params, a, a) == 0)
  grey = np.repeat(a[..., :1], 3, axis=-1), np.repeat(b[..., :1], 3, axis=-1)
  want = distance(params, *grey)
  found = distance(params, a[..., :1], b[..., :1])
  np.testing.assert_allclose(found, want, rtol=1e-5)


def test_what_no_feature_sees_has_no_derivative():
  """In place of 0 times infinity, of a norm that is 0."""
  params = jax.tree.map(
    lambda shape: -jnp.ones(shape),
    lpips.shapes((2,)),
    is_leaf=lambda x: isinstance(x, tuple),
  )
  a, b = pictures() + 9
  slope = jax.jit(jax.grad(lambda b: lpips.apply(params, a, b).sum()))(b)
  assert np.all(slope == 0)


def test_files_have_the_names_of_two_packages(tmp_path, narrow):
  """Those of lpips, with its duplicates, and those of torchvision.

  Or in a checkpoint of latent diffusion's autoencoder, with a prefix.
  """
  tensors = state()
  want, digest = weights.read(write(tmp_path, tensors))
  assert weights.sha256(tmp_path / 'lpips.safetensors') == digest
  of_lpips = {'scaling_layer.shift': np.zeros((1, 3, 1, 1), 'f4')}
  for name, array in tensors.items():
    if name.startswith('lin'):
      of_lpips[f'lins.{name[3:]}'] = array
    else:
      stage = sum(int(name.split('.')[1]) > n[-1] for n in NUMBERS)
      name = name.replace('features', f'net.slice{stage + 1}')
    of_lpips[name] = array
  torchvision = {'classifier.0.weight': np.zeros((2, 2), 'f4'), **tensors}
  within = {f'loss.perceptual_loss.{k}': x for k, x in of_lpips.items()}
  within['encoder.conv_in.weight'] = np.zeros(2, 'f4')
  for other in (of_lpips, torchvision, within):
    found, _ = weights.read(write(tmp_path, other))
    jax.tree.map(np.testing.assert_array_equal, found, want)


def test_mistakes_are_told_in_one_line(tmp_path, narrow):
  tensors, head = state(), 'lin2.model.1.weight'
  kernel = 'features.5.weight'
  without = {name: tensors[name] for name in tensors if name != head}
  for given, words in (
    (without, ('lacks 1 tensors', head)),
    ({**tensors, kernel: tensors[kernel][:, :1]}, (kernel, '[4, 3, 3, 3]')),
    ({**tensors, kernel: tensors[kernel].astype('i4')}, (kernel, 'int32')),
    ({**tensors, head: -tensors[head]}, (head, 'below 0')),
    ({**tensors, kernel: tensors[kernel] * np.nan}, (kernel, 'not finite')),
  ):
    with pytest.raises(UserError) as raised:
      weights.read(write(tmp_path, given))
    for word in ('loss.lpips_path=', *words):
      assert word in str(raised.value)
    assert '\n' not in str(raised.value)
  with pytest.raises(UserError, match='there is no such file'):
    weights.read(tmp_path / 'none.safetensors')
  broken = tmp_path / 'broken.safetensors'
  broken.write_bytes(b'something else')
  with pytest.raises(UserError, match='not a complete safetensors file'):
    weights.read(broken)


def test_it_is_a_part_of_a_run_that_is_not_trained(tmp_path, narrow):
  """The run keeps the hash of the file, which it refuses to change."""
  config = default.get_config()
  config.codec, config.loss = default.autoencoder(), default.autoencoding()
  config.data.image_size = 16
  config.loss.update(lpips=1.0, lpips_path=write(tmp_path, state()))
  mesh = tiny.one_device()
  assert validation.check(config, mesh.devices.ravel()) == []
  _, parts = preparation.prepare(config, mesh, tmp_path / 'run', ([], None))
  made = recipe.create(config, parts)
  assert made.frozen.keys() == made.origins.keys() == {'lpips'}
  assert made.origins['lpips'] == config.loss.lpips_path
  assert 'lpips' not in jax.eval_shape(made.init, jax.random.key(0))
  shapes = recipe.create(config).frozen
  jax.tree.map(
    lambda a, b: np.testing.assert_equal(a.shape, b.shape), shapes, made.frozen
  )
  # A loaded run does without.
  assert recipe.create(config, kept_parts.NONE).frozen == {}

  runs.write_config(tmp_path / 'run', config)
  kept = runs.read_config(tmp_path / 'run')
  digest = parts.facts['lpips']['sha256']
  assert kept['loss']['lpips_sha256'] == digest
  (tmp_path / 'moved').mkdir()
  tensors = state()
  config.loss.lpips_path = write(tmp_path / 'moved', tensors)
  assert runs.fixed(kept, runs.to_plain(config)) == []
  tensors['features.0.bias'] += 1
  write(tmp_path / 'moved', tensors)
  (line,) = runs.fixed(kept, runs.to_plain(config))
  assert line.startswith('loss.lpips_sha256')


@pytest.mark.parity
def test_equals_torch(tmp_path):
  """The whole network, as torchvision builds it; and the gradient."""
  import torch
  from torch import nn
  from torch.nn import functional

  layers, before, tensors = [], 3, state(lpips.WIDTHS)
  for width, count in zip(lpips.WIDTHS, lpips.CONVS, strict=True):
    for _ in range(count):
      layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
      before = width
    layers.append(nn.MaxPool2d(2, 2))
  net = nn.Sequential(*layers)
  mine = {name: torch.from_numpy(x) for name, x in tensors.items()}
  net.load_state_dict(
    {k[9:]: x for k, x in mine.items() if k.startswith('features.')}
  )
  shift, scale = (
    torch.tensor(x).reshape(1, 3, 1, 1) for x in (lpips.SHIFT, lpips.SCALE)
  )

  def features(x):
    x, found = (x - shift) / scale, []
    for number, layer in enumerate(net):
      x = layer(x) if number < 30 else x  # a pool that is not needed
      if number in (3, 8, 15, 22, 29):  # relu1_2 to relu5_3
        norm = torch.sqrt(torch.sum(x**2, dim=1, keepdim=True))
        found.append(x / (norm + 1e-10))
    return found

  a, b = pictures()
  ours = [torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (a, b)]
  ours[1].requires_grad_()
  total = 0
  for stage, (x, y) in enumerate(zip(*map(features, ours), strict=True)):
    head = mine[f'lin{stage}.model.1.weight']
    total = total + functional.conv2d((x - y) ** 2, head).mean((1, 2, 3))
  total.sum().backward()

  params, _ = weights.read(write(tmp_path, tensors))
  values, pull = jax.vjp(lambda b: lpips.apply(params, a, b), jnp.asarray(b))
  np.testing.assert_allclose(values, total.detach().numpy(), rtol=1e-4)
  (slope,) = pull(jnp.ones(2))
  want = ours[1].grad.numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(slope, want, atol=1e-3 * abs(want).max())
