"""Our networks against diffusers', with random weights.

`compare` is the one comparison. What it compares with comes from diffusers
itself (`reference_live`) or from a file (`reference_golden`), which
tests/golden/make_unet.py writes. Weights and inputs follow from names and
seeds, so that a file holds outputs only.
"""

import dataclasses
import functools
import pathlib
import zlib
from typing import NamedTuple

import jax
import numpy as np

from diffusion_jax import models
from diffusion_jax.weights.diffusers import to_tensors
from parity import dit

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True, eq=False)
class Shape:
  """A network as both sides describe it, and what it is asked.

  Attributes:
    name: of the golden file.
    image_shape: (H, W, C).
    ours: arguments of models.create.
    theirs: arguments of diffusers.UNet2DModel or DiTTransformer2DModel.
    count: how many parameters there are.
    doors: conditions, see models.create.
    network: of models.create.
    outputs: channels of the prediction; None = those of the image.
    times: one for each example of the batch.
    stride: of the pixels that are kept for the comparison; odd, so that all
      offsets to the halved maps occur among them.
  """

  name: str
  image_shape: tuple[int, int, int]
  ours: dict
  theirs: dict
  count: int
  times: tuple[int, ...]
  stride: int
  doors: dict = dataclasses.field(default_factory=dict)
  network: str = 'unet'
  outputs: int | None = None


class Reference(NamedTuple):
  """What a network answered.

  Attributes:
    outputs: [B, H / stride, W / stride, C], the pixels that are kept.
    mean: [B], over all pixels.
    norm: [B], over all pixels.
    given: the mean square of weights and inputs; where two differ, the
      networks were asked different things.
  """

  outputs: np.ndarray
  mean: np.ndarray
  norm: np.ndarray
  given: np.ndarray


DDPM = {
  'layers_per_block': 2,
  'downsample_padding': 0,  # which there means (0, 1)
  'flip_sin_to_cos': False,
  'freq_shift': 1,
  'norm_eps': 1e-6,
  'norm_num_groups': 32,
  'attention_head_dim': None,  # one head
  'mid_block_scale_factor': 1,
  'time_embedding_type': 'positional',
  'act_fn': 'silu',
}

TINY = Shape(
  name='tiny',
  image_shape=(16, 16, 1),
  ours={
    'channels': 12,
    'multipliers': (1, 3, 3),
    'num_blocks': 1,
    'attention_resolutions': (8, 4),
    'num_heads': 2,
    'num_groups': 6,
  },
  theirs=DDPM
  | {
    'sample_size': 16,
    'in_channels': 1,
    'out_channels': 1,
    'block_out_channels': (12, 36, 36),
    'layers_per_block': 1,
    'norm_num_groups': 6,
    'attention_head_dim': 18,
    'down_block_types': ('DownBlock2D', 'AttnDownBlock2D', 'AttnDownBlock2D'),
    'up_block_types': ('AttnUpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'),
  },
  count=337_237,
  times=(0, 250, 999),
  stride=1,
)

CIFAR10 = Shape(
  name='cifar10',  # google/ddpm-cifar10-32
  image_shape=(32, 32, 3),
  ours={
    'channels': 128,
    'multipliers': (1, 2, 2, 2),
    'num_blocks': 2,
    'attention_resolutions': (16,),
  },
  theirs=DDPM
  | {
    'sample_size': 32,
    'block_out_channels': (128, 256, 256, 256),
    'down_block_types': (
      'DownBlock2D',
      'AttnDownBlock2D',
      'DownBlock2D',
      'DownBlock2D',
    ),
    'up_block_types': (
      'UpBlock2D',
      'UpBlock2D',
      'AttnUpBlock2D',
      'UpBlock2D',
    ),
  },
  count=35_746_307,
  times=(0, 999),
  stride=1,
)

CELEBAHQ = Shape(
  name='celebahq',  # google/ddpm-celebahq-256
  image_shape=(256, 256, 3),
  ours={
    'channels': 128,
    'multipliers': (1, 1, 2, 2, 4, 4),
    'num_blocks': 2,
    'attention_resolutions': (16,),
  },
  theirs=DDPM
  | {
    'sample_size': 256,
    'block_out_channels': (128, 128, 256, 256, 512, 512),
    'down_block_types': (
      'DownBlock2D',
      'DownBlock2D',
      'DownBlock2D',
      'DownBlock2D',
      'AttnDownBlock2D',
      'DownBlock2D',
    ),
    'up_block_types': (
      'UpBlock2D',
      'AttnUpBlock2D',
      'UpBlock2D',
      'UpBlock2D',
      'UpBlock2D',
      'UpBlock2D',
    ),
  },
  count=113_673_219,
  times=(500,),
  stride=5,
)

# diffusers' own defaults, with labels: nothing is said of what DDPM changes.
DEFAULTS = Shape(
  name='defaults',
  image_shape=(8, 8, 3),
  ours={
    'style': 'diffusers',
    'channels': 8,
    'multipliers': (1, 2),
    'num_blocks': 1,
    'attention_resolutions': (4,),
    'head_channels': 8,
    'num_groups': 4,
  },
  theirs={
    'sample_size': 8,
    'block_out_channels': (8, 16),
    'layers_per_block': 1,
    'norm_num_groups': 4,
    'num_class_embeds': 4,
    'down_block_types': ('DownBlock2D', 'AttnDownBlock2D'),
    'up_block_types': ('AttnUpBlock2D', 'UpBlock2D'),
  },
  count=45_387,
  times=(0, 250, 999),
  stride=1,
  doors={'label': 3},
)

# The blocks of ADM: scale and shift by the time, blocks that resample.
ADM = Shape(
  name='adm',
  image_shape=(8, 8, 3),
  ours=DEFAULTS.ours | {'style': 'adm', 'attention_resolutions': (8,)},
  theirs=DEFAULTS.theirs
  | {
    'resnet_time_scale_shift': 'scale_shift',
    'attn_norm_num_groups': 4,
    'downsample_type': 'resnet',
    'upsample_type': 'resnet',
    'down_block_types': ('AttnDownBlock2D', 'ResnetDownsampleBlock2D'),
    'up_block_types': ('ResnetUpsampleBlock2D', 'AttnUpBlock2D'),
  },
  count=50_955,
  times=(0, 250, 999),
  stride=1,
  doors={'label': 3},
)

DIT = Shape(
  name='dit',
  image_shape=(8, 8, 4),
  ours={
    'channels': 16,
    'num_blocks': 2,
    'num_heads': 2,
    'details': {'epsilon': 1e-5, 'freq_shift': 1},
  },
  theirs={
    'num_attention_heads': 2,
    'attention_head_dim': 8,
    'in_channels': 4,
    'out_channels': 8,
    'num_layers': 2,
    'sample_size': 8,
    'num_embeds_ada_norm': 3,
  },
  count=15_504,
  times=(0, 250, 999),
  stride=1,
  doors={'label': 3},
  network='dit',
  outputs=8,
)

SHAPES = {
  shape.name: shape for shape in (TINY, CIFAR10, CELEBAHQ, DEFAULTS, ADM, DIT)
}


def create(shape: Shape) -> models.Model:
  return models.create(
    shape.network, shape.image_shape, shape.doors, shape.outputs, **shape.ours
  )


def labels(shape: Shape) -> np.ndarray | None:
  """[B] class labels, the last of which is that of no label."""
  if not shape.doors:
    return None
  return np.arange(len(shape.times)) + 1


def random_params(model: models.Model) -> dict:
  """Random parameters by name, in which nothing is zero and all of it matters.

  Maps stay at about 1 throughout, but for the first convolution's: its output
  is so small that the norms after it feel their epsilon.
  """
  abstract = jax.eval_shape(model.init, jax.random.key(0))
  leaves, treedef = jax.tree.flatten(abstract)
  names = models.names(abstract)
  return jax.tree.unflatten(
    treedef,
    [
      _random(name, leaf.shape)
      for name, leaf in zip(names, leaves, strict=True)
    ],
  )


@functools.lru_cache(maxsize=1)
def weights_of(shape: Shape) -> dict:
  params = random_params(create(shape))
  assert models.count(params) == shape.count
  return params


def _random(name: str, shape: tuple[int, ...]) -> np.ndarray:
  values = normal(name, shape)
  kind = name.rsplit('/', 1)[-1]
  if kind == 'kernel':
    values /= np.sqrt(np.prod(shape[:-1]))
  elif kind == 'scale':
    values = 1 + values / 10
  else:
    values /= 10
  return values / 50 if name.startswith('conv_in/') else values


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
  generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
  return generator.standard_normal(shape, np.float32)


def inputs(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
  """Noise [B, H, W, C] and times [B]."""
  t = np.array(shape.times, np.int32)
  return normal(f'inputs of {shape.name}', (len(t), *shape.image_shape)), t


def network_live(shape: Shape):
  """diffusers' network, with the weights of ours."""
  import diffusers
  import torch

  params = weights_of(shape)
  if shape.network == 'dit':
    network = diffusers.DiTTransformer2DModel(**shape.theirs).eval()
    tensors = dit.to_tensors(params, patch_size=2)
  else:
    network = diffusers.UNet2DModel(**shape.theirs).eval()
    tensors = to_tensors(params)
  network.load_state_dict(
    {k: torch.from_numpy(v) for k, v in tensors.items()}, strict=True
  )
  return network


def reference_live(shape: Shape) -> Reference:
  """What diffusers answers now."""
  import torch

  xt, t = inputs(shape)
  network = network_live(shape)
  with torch.no_grad():
    label = labels(shape)
    output = network(
      torch.from_numpy(xt.transpose(0, 3, 1, 2).copy()),
      torch.from_numpy(t),
      class_labels=label if label is None else torch.from_numpy(label),
    ).sample
  return _reference(
    shape, weights_of(shape), output.numpy().transpose(0, 2, 3, 1)
  )


def reference_golden(shape: Shape) -> Reference:
  """What diffusers answered when the golden file was made."""
  with np.load(GOLDEN / f'unet_{shape.name}.npz') as file:
    return Reference(**file)


def answer(shape: Shape) -> Reference:
  """What our network answers."""
  model = create(shape)
  params = weights_of(shape)
  # Where float32 products are not the default, ask for them.
  with jax.default_matmul_precision('highest'):
    cond = {'label': labels(shape)} if shape.doors else None
    output = jax.jit(model.apply)(params, *inputs(shape), None, cond)
  return _reference(shape, params, np.asarray(output))


def compare(shape: Shape, reference: Reference) -> dict[str, float]:
  """The relative errors of our network.

  Raises:
    AssertionError: one of them is not below 1e-4, or the reference is such
      that the comparison would show nothing.
  """
  ours = answer(shape)
  if not np.allclose(ours.given, reference.given, rtol=1e-6):
    raise AssertionError(
      f'{shape.name}: weights or inputs are not those of the reference '
      f'({ours.given} against {reference.given}): were names changed? '
      'A golden file is made anew by tests/golden/make_unet.py'
    )
  if ours.outputs.shape != reference.outputs.shape:
    raise AssertionError(
      f'{shape.name}: {ours.outputs.shape=} {reference.outputs.shape=}'
    )
  if not np.abs(reference.outputs).max() > 0.1:
    raise AssertionError(f'{shape.name}: the reference says next to nothing')

  difference = ours.outputs.astype('f8') - reference.outputs
  errors = {
    'maximum': np.abs(difference).max() / np.abs(reference.outputs).max(),
    'l2': np.linalg.norm(difference) / np.linalg.norm(reference.outputs),
    # The two that see the pixels which are not kept.
    'norm': np.abs(ours.norm / reference.norm - 1).max(),
    'mean': np.abs(ours.mean - reference.mean).max()
    / np.abs(reference.outputs).max(),
  }
  if not all(error < TOLERANCE for error in errors.values()):
    raise AssertionError(f'{shape.name}: relative errors {errors}')
  return errors


def _reference(shape: Shape, params: dict, output: np.ndarray) -> Reference:
  given = [*jax.tree.leaves(params), inputs(shape)[0]]
  every = slice(None, None, shape.stride)
  pixels = output.reshape(len(output), -1).astype('f8')
  return Reference(
    outputs=np.ascontiguousarray(output[:, every, every]),
    mean=pixels.mean(-1),
    norm=np.linalg.norm(pixels, axis=-1),
    given=sum(np.square(x, dtype='f8').sum() for x in given)
    / sum(x.size for x in given),
  )
