"""LoRA: which layers, what is added to them, and files of it."""

import functools
import json
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from parity import conditional as parity

from diffusion_jax import models
from diffusion_jax.models import lora
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import lora as files_of

# Of Stable Diffusion's structure, with transformers; DDPM's; a DiT.
NETWORKS = {
  'transformers': (
    'unet', {'tokens': 6}, {
      'channels': 8, 'multipliers': (1, 1), 'num_blocks': 1, 'num_heads': 2,
      'num_groups': 4, 'transformer_depths': (2, 0, 1), 'style': 'diffusers',
    },
  ),
  'unet': (
    'unet', {'tokens': 6}, {
      'channels': 8, 'multipliers': (1, 2), 'num_blocks': 1, 'num_groups': 4,
      'attention_resolutions': (4,),
    },
  ),
  'dit': (
    'dit', {'tokens': 6}, {'channels': 8, 'num_blocks': 2, 'num_heads': 2},
  ),
}  # fmt: skip
# Layers with query, key, value and out: self and cross in 2 + 2 * 2 + 1 blocks,
# in 1 + 2 + 1 places, in 2 blocks.
ATTENDS = {'transformers': 7, 'unet': 4, 'dit': 2}


@functools.cache
def shapes(name):
  kind, doors, how = NETWORKS[name]
  model = models.create(kind, (8, 8, 4), doors, **how)
  return jax.eval_shape(model.init, jax.random.key(0))


def random_lora(params, layers, rank=2, factor=0.5, seed=0) -> lora.Lora:
  """As NumPy's arrays; no B is zero."""
  tree = jax.eval_shape(
    lora.create(params, layers, rank).init, jax.random.key(0)
  )
  rng = np.random.default_rng(seed)
  return lora.of(
    jax.tree.map(lambda x: rng.standard_normal(x.shape).astype('f4'), tree),
    factor,
  )


def names(name='transformers', **how):
  return files_of.names_of(NETWORKS[name][0], **how)


@pytest.mark.parametrize('name', NETWORKS)
def test_the_attention_is_query_key_value_and_out(name):
  params = shapes(name)
  found = lora.chosen(params, ('attention',), 1)
  each = found[0::4], found[1::4]
  assert len(found) == 8 * ATTENDS[name], each
  ends = {layer.rpartition('/')[2].removeprefix('cross_') for layer in found}
  assert ends == {'query', 'key', 'value', 'out'}
  linear = lora.chosen(params, ('all-linear',), 1)
  whole = lora.chosen(params, ('all',), 1)
  both = {'conv_in', 'conv_out'} & {*lora.kernels(params)}
  assert {*found} < {*linear} <= {*whole} == {*lora.kernels(params)} - both
  assert (whole == linear) == (name == 'dit')
  assert {lora.kernels(params)[layer].ndim for layer in linear} == {2}


def test_a_layer_is_named_by_its_end():
  params = shapes('transformers')
  both = lora.chosen(params, ('cross/*', 'middle1/conv1'), 1)
  assert both == [
    layer
    for layer in lora.kernels(params)
    if '/cross/' in layer or layer == 'middle1/conv1'
  ]
  assert len(both) == 4 * 7 + 1
  # An end is whole words.
  assert lora.chosen(shapes('dit'), ('query',), 1) == [
    'blocks/0/query', 'blocks/1/query',
  ]  # fmt: skip


@pytest.mark.parametrize(
  ('patterns', 'rank', 'told'),
  [
    (('attention', 'to_q'), 2, ("'to_q'", 'attention', 'all-linear', 'query')),
    (('*/ery',), 2, ("'*/ery'",)),
    # The tokens have a width of 6.
    (('attention',), 7, ('lora.rank=7', '[6, 8]', 'at most 6')),
    (('conv_out',), 5, ('conv_out', '[3, 3, 8, 4]', 'at most 4')),
  ],
)
def test_what_there_is_not_is_one_line(patterns, rank, told):
  with pytest.raises(UserError) as error:
    lora.chosen(shapes('transformers'), patterns, rank)
  assert '\n' not in str(error.value)
  for part in told:
    assert part in str(error.value)


def test_a_network_begins_as_it_is():
  """B is zero, A is within its bound, and no layer depends on the others."""
  model = models.create('dit', (8, 8, 4), **NETWORKS['dit'][2])
  params = model.init(jax.random.key(0))
  layers = lora.chosen(params, ('attention', 'mlp2'), 3)
  tree = lora.create(params, layers, 3).init(jax.random.key(1))
  made = lora.of(tree, 2.0)
  assert list(made.pairs) == layers
  for layer, (a, b) in made.pairs.items():
    inputs, outputs = lora.kernels(params)[layer].shape
    assert a.shape == (inputs, 3)
    assert b.shape == (3, outputs)
    assert not b.any()
    assert 0.5 < np.abs(a).max() * inputs**0.5 <= 1
  alone = lora.create(params, ['blocks/1/mlp2'], 3).init(jax.random.key(1))
  jax.tree.map(
    np.testing.assert_array_equal,
    alone['blocks']['1']['mlp2'],
    tree['blocks']['1']['mlp2'],
  )
  first, second = (made.pairs[layer][0] for layer in layers[:2])
  assert not np.array_equal(first, second)
  jax.tree.map(np.testing.assert_array_equal, lora.merged(params, made), params)


def test_what_is_merged_is_the_sum():
  params = jax.tree.map(
    lambda x: np.random.default_rng(1).standard_normal(x.shape).astype('f4'),
    shapes('transformers'),
  )
  made = random_lora(params, lora.chosen(params, ('attention', 'conv1'), 2))
  found, before = (
    models.named(x) for x in (lora.merged(params, made, -0.3), params)
  )
  for name, array in found.items():
    layer = name.removesuffix('/kernel')
    if layer not in made.pairs:
      assert array is before[name]
      continue
    a, b = (np.float64(x) for x in made.pairs[layer])
    wanted = before[name] - 0.3 * 0.5 * np.tensordot(a, b, 1)
    np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-6)
  assert lora.merged(params, made, 0.0) is params


def test_of_a_convolution_it_is_two_of_them():
  """One of few channels, then one of 1x1."""

  def convolved(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  rng = np.random.default_rng(0)
  x, kernel, a = (
    rng.standard_normal(shape).astype('f4')
    for shape in ((2, 6, 6, 4), (3, 3, 4, 5), (3, 3, 4, 2))
  )
  b = rng.standard_normal((2, 5)).astype('f4')
  changes = lora.Lora({'conv': (a, b)}, {'conv': 3.0})
  merged = lora.merged({'conv': {'kernel': kernel}}, changes)
  np.testing.assert_allclose(
    convolved(x, merged['conv']['kernel']),
    convolved(x, kernel) + 3 * convolved(x, a) @ b,
    rtol=1e-4,
    atol=1e-4,
  )


# --- files --------------------------------------------------------------------


def written(path, patterns=('attention',), **how):
  """(the network's shapes, what is in the file)."""
  params = shapes('transformers')
  made = random_lora(params, lora.chosen(params, patterns, 2))
  files_of.write(path, made, names(**how))
  return params, made


def read(path, params, name='transformers'):
  return files_of.read(path, lora.kernels(params), names(name))


def same(one: lora.Lora, other: lora.Lora):
  assert list(one.pairs) == list(other.pairs)
  assert one.factors == other.factors
  for layer, pair in one.pairs.items():
    for array, wanted in zip(pair, other.pairs[layer], strict=True):
      np.testing.assert_array_equal(array, wanted)


def header(path) -> dict:
  content = path.read_bytes()
  return json.loads(content[8 : 8 + int.from_bytes(content[:8], 'little')])


def test_a_file_has_the_names_of_diffusers(tmp_path):
  path = tmp_path / files_of.FILE
  _, made = written(path, ('attention', 'proj_in', 'conv1'))
  with safetensors.safe_open(path, 'np') as file:
    found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  assert len(found) == 2 * len(made.pairs)
  block = 'unet.down_blocks.0.attentions.0.transformer_blocks.1'
  a, b = made.pairs['down/0/attentions/0/blocks/1/cross/key']
  np.testing.assert_array_equal(found[f'{block}.attn2.to_k.lora_A.weight'], a.T)
  np.testing.assert_array_equal(found[f'{block}.attn2.to_k.lora_B.weight'], b.T)
  assert found[f'{block}.attn1.to_out.0.lora_A.weight'].shape == (2, 8)
  # Convolutions there, one of which is a dense layer here.
  place = 'unet.down_blocks.0.attentions.0.proj_in'
  assert found[f'{place}.lora_A.weight'].shape == (2, 8, 1, 1)
  assert found[f'{place}.lora_B.weight'].shape == (8, 2, 1, 1)
  place = 'unet.mid_block.resnets.0.conv1'
  assert found[f'{place}.lora_A.weight'].shape == (2, 8, 3, 3)
  assert found[f'{place}.lora_B.weight'].shape == (8, 2, 1, 1)
  told = json.loads(header(path)['__metadata__']['lora_adapter_metadata'])
  assert (told['unet.r'], told['unet.lora_alpha']) == (2, 1.0)
  assert len(told['unet.target_modules']) == len(made.pairs)


@pytest.mark.parametrize('linear', [False, True])
def test_a_file_is_read_bitwise(tmp_path, linear):
  path = tmp_path / 'a.safetensors'
  params, made = written(path, ('all',), linear_projection=linear)
  same(read(path, params), made)
  assert files_of.sha256(read(path, params)) == files_of.sha256(made)
  for other in (
    made._replace(factors=dict.fromkeys(made.pairs, 1.0)),
    random_lora(params, list(made.pairs), seed=1),
  ):
    assert files_of.sha256(other) != files_of.sha256(made)


def test_other_networks_have_their_own_names(tmp_path):
  params, path = shapes('dit'), tmp_path / 'a.safetensors'
  made = random_lora(params, lora.chosen(params, ('attention',), 2))
  files_of.write(path, made, names('dit'))
  assert 'dit.blocks.0.cross_key.lora_A.weight' in header(path)
  same(read(path, params, 'dit'), made)


def renamed(path, rename, metadata=None, **more):
  """Writes the tensors of a file again, under other names."""
  tensors = {
    rename(name): array
    for name, array in safetensors.numpy.load_file(path).items()
  }
  safetensors.numpy.save_file({**tensors, **more}, path, metadata)


def kohya(name):
  layer, end = name.split('.lora_')
  which = {'A.weight': 'down', 'B.weight': 'up'}[end]
  layer = layer.removeprefix('unet.').replace('.', '_')
  return f'lora_unet_{layer}.lora_{which}.weight'


def processor(name):
  """diffusers of early 2023."""
  name = name.replace('.lora_A.', '_lora.down.').replace(
    '.lora_B.', '_lora.up.'
  )
  return name.replace('to_out.0_', 'to_out_').replace('.to_', '.processor.to_')


DIALECTS = {
  'diffusers': lambda name: name,
  'PEFT': lambda name: 'base_model.model.' + name.removeprefix('unet.'),
  'PEFT, not saved': lambda name: name.replace('.weight', '.default.weight'),
  'older': lambda name: name.replace('lora_A', 'lora.down').replace(
    'lora_B', 'lora.up'
  ),
  'processor': processor,
  'kohya': kohya,
}


@pytest.mark.parametrize('name', DIALECTS)
def test_other_names_are_read(tmp_path, name):
  path = tmp_path / 'a.safetensors'
  params, made = written(path)
  renamed(path, DIALECTS[name])
  # Without metadata, the factor is 1.
  factors = dict.fromkeys(made.pairs, 1.0)
  same(read(path, params), made._replace(factors=factors))


def test_alpha_is_of_a_layer_or_of_the_file(tmp_path):
  path = tmp_path / 'a.safetensors'
  params, made = written(path)
  first = next(iter(made.pairs))
  theirs = 'down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k'
  assert names().name_of(first).replace('.', '_') == theirs
  alpha = {f'lora_unet_{theirs}.alpha': np.array(3, 'f4')}
  renamed(path, kohya, **alpha)
  found = read(path, params).factors
  assert found.pop(first) == 1.5
  assert {*found.values()} == {1.0}

  def factors(**settings):
    written(path)
    told = json.dumps({f'unet.{key}': x for key, x in settings.items()})
    renamed(path, lambda name: name, {files_of.METADATA: told})
    return read(path, params).factors

  found = factors(lora_alpha=8, alpha_pattern={'attn1.to_k': 4, '^conv_in': 1})
  assert {
    layer.rpartition('/')[2] for layer, factor in found.items() if factor == 2
  } == {'key'}
  assert {*found.values()} == {2.0, 4.0}
  assert {*factors(lora_alpha=4, use_rslora=True).values()} == {4 / 2**0.5}


class Danger:
  """What torch.load would execute."""

  def __reduce__(self):
    return os.mkdir, ('executed',)


def test_a_pickle_is_refused_and_not_executed(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('pytorch_lora_weights.bin', 'a.pt', 'a.ckpt', 'a.safetensors'):
    with open(name, 'wb') as file:
      pickle.dump({'unet.x.lora_A.weight': Danger()}, file)
    with pytest.raises(UserError, match='safetensors') as error:
      read(tmp_path / name, shapes('transformers'))
    assert '\n' not in str(error.value)
  assert not (tmp_path / 'executed').exists()


BLOCK = 'unet.down_blocks.0.attentions.0.transformer_blocks.0'
KEY = f'{BLOCK}.attn1.to_k.lora_A.weight'


@pytest.mark.parametrize(
  ('change', 'told'),
  [
    (lambda all: all | {'unet.conv_in.hada_w1': all[KEY]}, 'hada_w1'),
    (lambda all: {'unet.x.lora_A.weight': all[KEY]}, '1 of 1 tensors'),
    (lambda all: {'lora_te_text_model.lora_down.weight': all[KEY]},
     'text encoder'),
    (lambda all: all | {KEY: all[KEY][:, :4]}, '[2, 4]'),
    (lambda all: all | {KEY: all[KEY][:1]}, 'has the shape [8, 2]'),
    (lambda all: all | {KEY: all[KEY][:0]}, '[0, 8]'),
    (lambda all: all | {KEY: all[KEY][0]}, '[8]'),
    (lambda all: all | {KEY: all[KEY] * np.inf}, 'not finite'),
    (lambda all: all | {KEY: all[KEY].astype('i4')}, 'no floats'),
    (lambda all: {n: x for n, x in all.items() if n != KEY}, 'no A of'),
    (lambda all: all | {KEY[:-14] + '.alpha': np.ones(2, 'f4')}, 'one number'),
  ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_one_line(tmp_path, change, told):
  path = tmp_path / 'a.safetensors'
  params, _ = written(path)
  changed = change(safetensors.numpy.load_file(path))
  safetensors.numpy.save_file(
    {name: np.ascontiguousarray(x) for name, x in changed.items()}, path
  )
  with pytest.raises(UserError) as error:
    read(path, params)
  assert '\n' not in str(error.value)
  assert told in str(error.value)
  assert str(path) in str(error.value)


@pytest.mark.parametrize(
  ('metadata', 'told'),
  [
    ('{"unet.use_dora": true}', 'DoRA'),
    ('{"unet.lora_alpha": "8"}', 'metadata'),
    ('[]', 'metadata'),
    ('{', 'metadata'),
  ],
)
def test_metadata_that_mean_something_else_are_one_line(
  tmp_path, metadata, told
):
  path = tmp_path / 'a.safetensors'
  params, _ = written(path)
  renamed(path, lambda name: name, {files_of.METADATA: metadata})
  with pytest.raises(UserError, match=told) as error:
    read(path, params)
  assert '\n' not in str(error.value)


def test_halves_are_read(tmp_path):
  path = tmp_path / 'a.safetensors'
  params, made = written(path)
  tensors = safetensors.numpy.load_file(path)
  halves = {n: np.asarray(x, jnp.bfloat16) for n, x in tensors.items()}
  safetensors.numpy.save_file(halves, path)
  for layer, pair in read(path, params).pairs.items():
    for array, whole in zip(pair, made.pairs[layer], strict=True):
      assert array.dtype == np.float32
      np.testing.assert_allclose(array, whole, rtol=2**-8)


# --- against diffusers --------------------------------------------------------

CASES = pytest.mark.parametrize('name', parity.CASES)
CLOSE = 5e-4  # they add the low-rank part to the result, not to the kernel


def of_case(name) -> files_of.Names:
  settings = parity.CASES[name][0]
  return files_of.names_of('unet', settings.get('use_linear_projection', False))


@pytest.mark.parity
@CASES
@pytest.mark.parametrize('patterns', [('attention',), ('all',)])
def test_diffusers_reads_our_files(tmp_path, name, patterns):
  _, params, _ = parity.create(name)
  made = random_lora(params, lora.chosen(params, patterns, 2), factor=0.25)
  files_of.write(tmp_path / files_of.FILE, made, of_case(name))
  network = parity.network_live(name)
  network.load_lora_adapter(
    tmp_path, prefix='unet', weight_name=files_of.FILE, use_safetensors=True
  )
  before, theirs = parity.live(name), parity.live(name, network.eval())
  ours = parity.ours(name, lora.merged(params, made))
  assert parity.error(ours, theirs) < CLOSE
  assert parity.error(before, theirs) > 1e-2


@pytest.mark.parity
@CASES
def test_files_of_diffusers_are_read(tmp_path, name):
  import diffusers
  import peft
  import torch
  from peft.utils import get_peft_model_state_dict

  torch.manual_seed(0)
  network = parity.network_live(name)
  how = peft.LoraConfig(
    r=2, lora_alpha=3, init_lora_weights=False,
    target_modules=['to_q', 'to_k', 'to_v', 'to_out.0', 'proj_in', 'conv2'],
    alpha_pattern={'to_k': 5}, rank_pattern={'to_v': 3},
  )  # fmt: skip
  network.add_adapter(how)
  theirs = parity.live(name, network.eval())
  diffusers.StableDiffusionPipeline.save_lora_weights(
    tmp_path, get_peft_model_state_dict(network),
    unet_lora_adapter_metadata=how.to_dict(),
  )  # fmt: skip
  _, params, _ = parity.create(name)
  found = files_of.read(
    tmp_path / files_of.FILE, lora.kernels(params), of_case(name)
  )
  ours = parity.ours(name, lora.merged(params, found))
  assert parity.error(ours, theirs) < CLOSE
  # The same by the names of our own.
  own = lora.chosen(params, ('attention', 'proj_in', 'conv2'), 2)
  assert list(found.pairs) == own
