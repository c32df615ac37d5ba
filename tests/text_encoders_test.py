"""Text encoders: CLIP's and small ones, and folders of CLIP's."""

import importlib.util
import json
import shutil

import binaries
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from parity import text as parity

from diffusion_jax import models
from diffusion_jax.models import text
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import text_encoders

FILE = 'model.safetensors'
# name -> (options, numbers, tensors): of Stable Diffusion 1, 2 and XL
FULL = {
  'clip_l': ({'width': 768, 'inner': 3072, 'num_heads': 12}, 123_060_480, 196),
  'openclip_h_sd2': (
    {
      'width': 1024, 'inner': 4096, 'num_heads': 16, 'num_layers': 23,
      'activation': 'gelu',
    },
    340_387_840, 372,
  ),
  'openclip_bigG_sdxl2': (
    {
      'width': 1280, 'inner': 5120, 'num_heads': 20, 'num_layers': 32,
      'activation': 'gelu', 'projection': 1280,
    },
    694_659_840, 517,
  ),
}  # fmt: skip


def abstract_of(**options):
  model = text.create(49408, **options)
  return jax.eval_shape(model.init, jax.random.key(0))


# --- networks ----------------------------------------------------------------


@pytest.mark.parametrize('name', parity.CASES)
def test_equals_golden(name):
  parity.compare(name, parity.golden(name))


@pytest.mark.parity
@pytest.mark.parametrize('name', parity.CASES)
def test_equals_transformers(name):
  parity.compare(name, parity.live(name))


def test_the_size_of_clip():
  """Each layer has as many numbers as the one before."""
  options, numbers, tensors = FULL['clip_l']
  one, two = (abstract_of(**options, num_layers=n) for n in (1, 2))
  for count, wanted in (
    (models.count, numbers),
    (lambda params: len(models.names(params)), tensors),
  ):
    assert count(one) + 11 * (count(two) - count(one)) == wanted


@pytest.mark.slow
@pytest.mark.parametrize('name', FULL)
def test_full_sizes(name):
  options, numbers, tensors = FULL[name]
  params = abstract_of(**options)
  assert models.count(params) == numbers
  assert len(models.names(params)) == tensors
  shapes = binaries.ROOT.parent / 'shared' / 'reference' / 'shapes.py'
  if not shapes.exists():
    pytest.skip(f'{shapes} is not there')
  found = importlib.util.spec_from_file_location('shapes', shapes)
  module = importlib.util.module_from_spec(found)
  found.loader.exec_module(module)
  assert theirs_of(params) == module.MODELS[name]()


def theirs_of(params) -> dict:
  """Names and shapes of tensors, without allocating any."""
  return {
    text_encoders.name_of(key): text_encoders.to_theirs(
      key, np.broadcast_to(0.0, leaf.shape)
    ).shape
    for key, leaf in models.named(params).items()
  }


@pytest.mark.parity
@pytest.mark.parametrize('name', FULL)
def test_full_sizes_have_the_tensors_of_transformers(name):
  import torch
  import transformers

  options = FULL[name][0]
  settings = text_encoders.settings_of({'vocabulary': 49408, **options}, {})
  config = transformers.CLIPTextConfig(**settings)
  with torch.device('meta'):
    network = getattr(transformers, settings['architectures'][0])(config)
  theirs = text_encoders._of_older_names(network.state_dict(), name)
  assert theirs_of(abstract_of(**options)) == {
    key: tuple(x.shape) for key, x in theirs.items()
  }


def test_who_reads_whom():
  """Causal or not, padded or not; gradients reach every parameter."""
  small = {
    'width': 4, 'inner': 6, 'num_layers': 1, 'num_heads': 2, 'length': 5,
    'eos': 7, 'projection': 3,
  }  # fmt: skip
  reads = text.create(9, **small)
  both = text.create(9, **small, causal=False)
  params = parity.unet.random_params(reads)
  ids = np.array([[8, 1, 7, 0, 0], [8, 2, 3, 4, 7]])
  padded = np.arange(5) < np.array([[3], [5]])

  def loss(params, ids):
    found = both.apply(params, ids, padded)
    value = (found.tokens[..., 0] ** 2).sum() + (found.pooled**2).sum()
    return value, (reads.apply(params, ids), found)

  @jax.jit
  def answers(ids):
    gradient, found = jax.grad(loss, has_aux=True)(params, ids)
    return *found, gradient

  def changed(a, b):
    """Which tokens differ, of both texts."""
    return (np.abs(a - b).max(-1) > 1e-6).astype(int).tolist()

  causal, whole, gradient = jax.device_get(answers(ids))
  other = ids.copy()
  other[:, 3] = 5
  of_causal, of_whole, _ = jax.device_get(answers(other))
  later = [[0, 0, 0, 1, 1]] * 2
  assert changed(causal.tokens, of_causal.tokens) == later
  assert changed(causal.pooled, of_causal.pooled) == [0, 1]
  # The fourth is padding of the first text, which only it itself feels.
  assert changed(whole.tokens, of_whole.tokens) == [[0, 0, 0, 1, 0], [1] * 5]
  assert changed(whole.pooled, of_whole.pooled) == [0, 1]
  assert causal.tokens.shape == (2, 5, 4)
  assert causal.pooled.shape == (2, 3)

  for name, leaf in models.named(gradient).items():
    # A bias of the keys adds the same to all logits of a query.
    is_zero = np.abs(leaf).max() < 1e-5
    assert is_zero == (name == 'blocks/0/key/bias'), name


def test_bfloat16_is_about_the_same():
  half = text.create(**parity.options('open'), dtype='bfloat16')
  found = jax.jit(half.apply)(parity.weights('open'), parity.ids('open'))
  wanted = parity.golden('open')
  for name, key in (('tokens', 'last'), ('pooled', 'pooled')):
    array = getattr(found, name)
    assert array.dtype == jnp.float32
    assert 1e-4 < np.abs(array - wanted[key]).max() < 0.1


@pytest.mark.parametrize(
  ('options', 'told'),
  [
    ({'width': 8, 'num_heads': 3}, 'the heads must divide'),
    ({'num_layers': 2, 'skip': 2}, 'skip=2'),
    ({'activation': 'relu'}, "activation='relu': one of quick_gelu, gelu"),
  ],
)
def test_networks_that_cannot_be(options, told):
  with pytest.raises(UserError, match=told):
    text.create(9, **options)


def test_texts_that_are_too_long_are_refused():
  model = text.create(9, width=2, inner=2, num_layers=1, num_heads=1, length=4)
  params = jax.eval_shape(model.init, jax.random.key(0))
  with pytest.raises(UserError, match='texts of 5 tokens'):
    jax.eval_shape(model.apply, params, np.zeros((1, 5), np.int32))


# --- folders -----------------------------------------------------------------


def folder_of(name, path, tensors=None, file=FILE, **changes):
  """A text encoder's folder, of random weights."""
  path.mkdir()
  settings = parity.CASES[name] | changes
  (path / 'config.json').write_text(json.dumps(settings))
  if tensors is None:
    tensors = text_encoders.to_tensors(parity.weights(name))
  safetensors.numpy.save_file(tensors, path / file, {'format': 'pt'})
  return path


def of_newer_names(tensors):
  return {k.removeprefix('text_model.'): x for k, x in tensors.items()}


@pytest.mark.parametrize('name', parity.CASES)
def test_a_round_trip_gives_the_same_bits_and_settings(tmp_path, name):
  tensors = text_encoders.to_tensors(parity.weights(name))
  positions = {'text_model.embeddings.position_ids': np.arange(7)[None]}
  kept = {
    'bos_token_id': 3, 'pad_token_id': 1, 'attention_dropout': 0.0,
    'torch_dtype': 'float32', 'hidden_act': 'gelu', 'layer_norm_eps': 1e-5,
    'transformers_version': '4.22.0.dev0', 'projection_dim': 6,
  }  # fmt: skip
  older = folder_of(name, tmp_path / 'older', {**tensors, **positions}, **kept)
  newer = folder_of(
    name, tmp_path / 'newer', of_newer_names({**tensors, **positions}), **kept
  )
  for source in (older, newer):
    found = text_encoders.read(source)
    params = text_encoders.to_params(found.tensors, found.options, 'it')
    jax.tree.map(np.testing.assert_array_equal, params, parity.weights(name))
    target = tmp_path / f'{source.name}_again'
    text_encoders.write(target, found.options, params, found.kept)
    again = safetensors.numpy.load_file(target / FILE)
    assert again.keys() == tensors.keys()
    for key, array in tensors.items():
      np.testing.assert_array_equal(again[key], array)
    settings = json.loads((target / 'config.json').read_text())
    assert settings == json.loads((source / 'config.json').read_text())
    # What we wrote comes back byte for byte.
    found = text_encoders.read(target)
    text_encoders.write(tmp_path / 'last', found.options, params, found.kept)
    for file in ('config.json', FILE):
      last = (tmp_path / 'last' / file).read_bytes()
      assert last == (target / file).read_bytes()


def test_halves_and_shards_are_read(tmp_path):
  tensors = text_encoders.to_tensors(parity.weights('old'))
  halves = {key: x.astype(np.float16) for key, x in tensors.items()}
  half = folder_of(
    'old', tmp_path / 'half', halves, 'model.fp16.safetensors', dtype='float16'
  )
  found = text_encoders.read(half)
  assert found.notes == ['the weights are those of model.fp16.safetensors']
  params = text_encoders.to_params(found.tensors, found.options, 'it')
  for key, array in text_encoders.to_tensors(params).items():
    np.testing.assert_array_equal(array, halves[key].astype(np.float32))
  settings = text_encoders.settings_of(found.options, found.kept)
  assert settings['dtype'] == 'float32'  # as it is written

  names = [f'model-0000{n}-of-00002.safetensors' for n in (1, 2)]
  parts = [dict(list(tensors.items())[n::2]) for n in (0, 1)]
  shards = folder_of('old', tmp_path / 'shards', parts[0], names[0])
  safetensors.numpy.save_file(parts[1], shards / names[1])
  with pytest.raises(UserError, match=r'such as model\.safetensors\.index'):
    text_encoders.read(shards)
  where = {key: file for file, x in zip(names, parts, strict=True) for key in x}
  index = shards / f'{FILE}.index.json'
  index.write_text(json.dumps({'weight_map': where}))
  found = text_encoders.read(shards)
  assert found.tensors.keys() == tensors.keys()
  for key, array in tensors.items():
    np.testing.assert_array_equal(found.tensors[key], array)
  # A usual name comes before a variant.
  shutil.copy(half / 'model.fp16.safetensors', shards)
  assert text_encoders.read(shards).names == names


@pytest.mark.parametrize(
  ('changes', 'told'),
  [
    ({'model_type': 'clip'}, 'model_type is "clip"'),
    ({'architectures': ['CLIPModel']}, r'architectures is \["CLIPModel"\]'),
    ({'hidden_act': 'relu'}, 'hidden_act is "relu"'),
    ({'hidden_size': 0}, 'hidden_size is 0: a whole number'),
    ({'num_attention_heads': 3}, 'does not divide hidden_size 8'),
    ({'eos_token_id': [1, 2]}, r'eos_token_id is \[1, 2\]'),
    ({'layer_norm_eps': 0}, 'layer_norm_eps is 0'),
    ({'rope_theta': 1e4}, 'rope_theta is no known setting'),
    ({'num_hidden_layers': 999}, 'for 999 layers'),
    ({'num_hidden_layers': 3}, '16 tensors missing'),
  ],
)
def test_other_networks_are_refused_in_one_line(tmp_path, changes, told):
  folder = folder_of('old', tmp_path / 'it', **changes)

  def params_of(folder):
    found = text_encoders.read(folder)
    return text_encoders.to_params(found.tensors, found.options, str(folder))

  with pytest.raises(UserError, match=told) as error:
    params_of(folder)
  assert '\n' not in str(error.value)


def test_damaged_folders_are_refused_in_one_line(tmp_path):
  tensors = text_encoders.to_tensors(parity.weights('open'))
  twice = {**tensors, **of_newer_names(tensors)}
  for path, told in (
    (tmp_path, 'config.json: give the folder of a text encoder'),
    (folder_of('open', tmp_path / 'it', twice), 'with and without text_model'),
    (folder_of('open', tmp_path / 'no', {}, 'x.txt'), 'has no weights: give a'),
  ):
    with pytest.raises(UserError, match=told) as error:
      text_encoders.read(path)
    assert '\n' not in str(error.value)


def test_networks_that_transformers_lacks_are_not_written(tmp_path):
  for changes, told in (
    ({'causal': False}, 'from left to right'),
    ({'eos': 2}, 'stands for the highest'),
  ):
    with pytest.raises(UserError, match=told):
      text_encoders.write(
        tmp_path / 'it', parity.options('old') | changes, parity.weights('old')
      )
  assert not (tmp_path / 'it').exists()


@pytest.mark.parity
@pytest.mark.parametrize('name', parity.CASES)
def test_transformers_reads_and_writes_the_folder(tmp_path, name):
  import transformers

  options, kept = text_encoders.network_of(parity.CASES[name], name)
  kept = {'bos_token_id': 0, 'pad_token_id': 1, **kept}
  text_encoders.write(tmp_path / 'it', options, parity.weights(name), kept)
  (kind,) = parity.CASES[name]['architectures']
  network = getattr(transformers, kind).from_pretrained(tmp_path / 'it')
  wanted = parity.network_live(name).state_dict()
  for key, tensor in network.state_dict().items():
    np.testing.assert_array_equal(tensor, wanted[key])
  network.save_pretrained(tmp_path / 'saved')
  found = text_encoders.read(tmp_path / 'saved')
  assert found.options == options
  params = text_encoders.to_params(found.tensors, found.options, 'it')
  jax.tree.map(np.testing.assert_array_equal, params, parity.weights(name))
