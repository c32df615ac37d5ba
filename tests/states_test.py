"""Weights as tools leave them: other folders, files, names and precisions."""

import collections
import io
import json
import pickle
import shutil
import struct
import sys
import types
import zipfile

import binaries
import numpy as np
import pytest
import safetensors.numpy
from folders_of_diffusers import WEIGHTS, tiny_folder

from diffusion_jax import load
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import diffusers, states

NAME = WEIGHTS.split('/')[1]
STEM = NAME.removesuffix('.safetensors')


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  return tiny_folder(tmp_path_factory.mktemp('published') / 'ddpm')


@pytest.fixture(scope='module')
def tensors(published):
  return safetensors.numpy.load_file(published / WEIGHTS)


@pytest.fixture
def folder(published, tmp_path):
  """A copy, which a test may change."""
  return shutil.copytree(published, tmp_path / 'folder')


def save(tensors, path):
  safetensors.numpy.save_file(tensors, path)


def other(tensors):
  """Weights that are not the same."""
  return {name: array + 1 for name, array in tensors.items()}


def under(head, tensors):
  return {head + name: array for name, array in tensors.items()}


def equal(found, expected):
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array)


def refused(path) -> str:
  with pytest.raises(UserError) as error:
    diffusers.read(path)
  assert '\n' not in str(error.value)
  return str(error.value)


def torch_file(state) -> bytes:
  """What torch.save writes of nested dicts of arrays, without torch."""
  torch, utils = types.ModuleType('torch'), types.ModuleType('torch._utils')

  def global_of(module, name, value):
    value.__module__, value.__qualname__ = module.__name__, name
    setattr(module, name, value)
    return value

  kinds = {
    'float32': global_of(torch, 'FloatStorage', type('FloatStorage', (), {})),
    'uint16': global_of(torch, 'BFloat16Storage', type('BFloat16', (), {})),
  }
  rebuild = global_of(utils, '_rebuild_tensor_v2', lambda *_: None)
  storages = []

  class Stored(collections.namedtuple('Stored', 'key array')):
    pass

  class Tensor:
    def __init__(self, array):
      self.array = array

    def __reduce__(self):
      stored = Stored(str(len(storages)), self.array)
      storages.append(stored)
      strides = [s // self.array.itemsize for s in self.array.strides]
      more = (
        self.array.shape,
        tuple(strides),
        False,
        collections.OrderedDict(),
      )
      return rebuild, (stored, 0, *more)

  class Pickler(pickle.Pickler):
    def persistent_id(self, value):
      if not isinstance(value, Stored):
        return None
      kind = kinds[value.array.dtype.name]
      return 'storage', kind, value.key, 'cpu', value.array.size

  def wrapped(value):
    if isinstance(value, dict):
      return {key: wrapped(inner) for key, inner in value.items()}
    return Tensor(value) if isinstance(value, np.ndarray) else value

  before = {name: sys.modules.get(name) for name in ('torch', 'torch._utils')}
  sys.modules |= {'torch': torch, 'torch._utils': utils}
  try:
    pickled = io.BytesIO()
    Pickler(pickled, 2).dump(wrapped(state))
  finally:
    for name, module in before.items():
      sys.modules.pop(name)
      if module:
        sys.modules[name] = module
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, 'w') as archive:
    archive.writestr('archive/data.pkl', pickled.getvalue())
    for key, array in storages:
      archive.writestr(f'archive/data/{key}', array.tobytes())
  return stream.getvalue()


# --- names -------------------------------------------------------------------


@pytest.mark.parametrize(
  'head',
  [
    'module.',
    '_orig_mod.',
    'module._orig_mod.',
    'model.',
    'ema.module.',
    'a.b.',
  ],
)
def test_a_prefix_of_all_names_is_removed(folder, tensors, head):
  save(under(head, tensors), folder / WEIGHTS)
  found = diffusers.read(folder)
  equal(found.tensors, tensors)
  assert found.raw is None
  (*_, note) = found.notes
  assert 'was removed from the names' in note


def test_a_part_that_was_compiled_alone(folder, tensors):
  inner = {
    name.replace('mid_block.', 'mid_block._orig_mod.'): array
    for name, array in tensors.items()
  }
  save(inner, folder / WEIGHTS)
  equal(diffusers.read(folder).tensors, tensors)
  save(tensors | inner, folder / WEIGHTS)
  assert 'with and without _orig_mod' in refused(folder)


@pytest.mark.parametrize(
  ('averaged', 'raw'),
  [
    ('ema_model.', ['online_model.']),
    ('ema.ema_model.', ['model.', 'ema.online_model.']),
    ('model_ema.', ['model.']),
    ('ema.', ['']),
    ('averaged.module.', ['module.']),
  ],
)
def test_the_average_is_told_from_the_raw_weights(
  folder, tensors, averaged, raw
):
  both = under(averaged, tensors) | {'ema.initted': np.ones(1)}
  for head in raw:
    both |= under(head, other(tensors))
  save(both, folder / WEIGHTS)
  if raw == ['']:
    del both['ema.initted']  # next to names without a prefix it is one of them
    save(both, folder / WEIGHTS)
  found = diffusers.read(folder)
  equal(found.tensors, tensors)
  equal(found.raw, other(tensors))
  assert f'the averaged weights are those under {averaged!r}' in found.notes[0]
  if raw != ['']:
    assert '1 other tensors are left out' in found.notes[-1]


@pytest.mark.parametrize(
  'heads',
  [('ema_0.', 'ema_1.'), ('generator.', 'critic.'), ('a.ema.', 'b.ema.')],
)
def test_networks_that_cannot_be_told_apart(folder, tensors, heads):
  both = {}
  for head in heads:
    both |= under(head, tensors)
  save(both, folder / WEIGHTS)
  message = refused(folder)
  for head in heads:
    assert repr(head) in message


def test_a_training_checkpoint_of_torch(folder, tensors):
  """{'model': ..., 'ema': ..., 'optimizer': ...}, in nested dicts."""
  (folder / WEIGHTS).unlink()
  moments = {'state': {0: {'exp_avg': tensors['conv_in.weight']}}, 'lr': 1e-3}
  state = {
    'model': under('module.', other(tensors)), 'ema': tensors,
    'optimizer': moments, 'step': 7,
  }  # fmt: skip
  path = folder / 'unet' / f'{STEM}.bin'
  path.write_bytes(torch_file(state))
  found = diffusers.read(folder)
  equal(found.tensors, tensors)
  equal(found.raw, other(tensors))
  path.write_bytes(torch_file({'state_dict': under('model.', tensors)}))
  equal(diffusers.read(folder).tensors, tensors)


def test_dicts_that_contain_each_other_end():
  """A small file must not take all memory."""
  deep = {str(i): {} for i in range(10)}
  for _ in range(20):
    deep = {str(i): deep for i in range(10)}
  pickled = {'weights': deep}
  with pytest.raises(ValueError, match='too many or too long names'):
    states.pytorch._flattened(pickled)
  with pytest.raises(ValueError, match='too many or too long names'):
    states.pytorch._flattened({'a' * 2000: 1})
  itself = {}
  itself['a'] = itself
  assert states.pytorch._flattened(itself) == []


# --- precisions --------------------------------------------------------------


def bfloat16_of(tensors):
  """(bits by truncation, their values)."""
  bits = {
    name: (np.ascontiguousarray(x).view('<u4') >> 16).astype('<u2')
    for name, x in tensors.items()
  }
  values = {
    name: (x.astype('<u4') << 16).view('<f4') for name, x in bits.items()
  }
  return bits, values


def test_bfloat16_is_read_exactly(folder, tensors):
  bits, values = bfloat16_of(tensors)
  content = safetensors.numpy.save(
    {name: x.view(np.float16) for name, x in bits.items()}
  )
  (length,) = struct.unpack('<Q', content[:8])
  told = content[8 : 8 + length].replace(b'"F16"', b'"BF16"')
  (folder / WEIGHTS).write_bytes(
    struct.pack('<Q', len(told)) + told + content[8 + length :]
  )
  equal(diffusers.read(folder).tensors, values)
  (folder / WEIGHTS).unlink()
  (folder / 'unet' / f'{STEM}.bin').write_bytes(torch_file(bits))
  equal(diffusers.read(folder).tensors, values)


@pytest.mark.parametrize('dtype', [np.float16, np.float64])
def test_other_floats(folder, tensors, dtype):
  given = {name: x.astype(dtype) for name, x in tensors.items()}
  save(given, folder / WEIGHTS)
  equal(diffusers.read(folder).tensors, given)


# --- files -------------------------------------------------------------------


def test_a_variant_is_taken_where_it_is_alone(folder, tensors):
  halves = {name: x.astype(np.float16) for name, x in tensors.items()}
  fp16 = folder / 'unet' / f'{STEM}.fp16.safetensors'
  save(halves, fp16)
  assert diffusers.read(folder).names == [NAME]
  equal(diffusers.read(fp16).tensors, halves)
  (folder / WEIGHTS).unlink()
  found = diffusers.read(folder)
  equal(found.tensors, halves)
  assert found.notes == [f'the weights are those of {fp16.name}']
  more = folder / 'unet' / f'{STEM}.bf16.safetensors'
  shutil.copy(fp16, more)
  message = refused(folder)
  assert str(more) in message  # the remedy
  equal(diffusers.read(more).tensors, halves)


@pytest.mark.parametrize('name', ['model.safetensors', 'ema.pt', 'net.ckpt'])
def test_a_file_of_another_name(folder, tensors, name):
  (folder / WEIGHTS).unlink()
  path = folder / 'unet' / name
  if path.suffix == '.safetensors':
    save(tensors, path)
  else:
    path.write_bytes(torch_file(tensors))
  for given in (folder, path):
    found = diffusers.read(given)
    equal(found.tensors, tensors)
  assert diffusers.read(folder).notes == [f'the weights are those of {name}']


def shards_of(
  folder, tensors, index=f'{NAME}.index.json', suffix='safetensors'
):
  """Replaces the weights by two shards and their index, which is returned."""
  unet = folder / 'unet'
  (folder / WEIGHTS).unlink(missing_ok=True)
  names = sorted(tensors)
  listed = {}
  for i, part in enumerate((names[:9], names[9:]), 1):
    file = f'{STEM}-0000{i}-of-00002.{suffix}'
    content = {name: tensors[name] for name in part}
    if suffix == 'bin':
      (unet / file).write_bytes(torch_file(content))
    else:
      save(content, unet / file)
    listed |= dict.fromkeys(part, file)
  path = unet / index
  path.write_text(json.dumps({'metadata': {}, 'weight_map': listed}))
  return path


@pytest.mark.parametrize(
  ('index', 'suffix'),
  [
    (f'{NAME}.index.json', 'safetensors'),
    (f'{STEM}.bin.index.json', 'bin'),
    (f'{NAME}.index.fp16.json', 'safetensors'),
  ],
)
def test_shards_are_joined(folder, tensors, index, suffix):
  shards_of(folder, tensors, index, suffix)
  found = diffusers.read(folder)
  equal(found.tensors, tensors)
  assert len(found.names) == 2
  assert found.notes[-1] == f'2 shards are read, as {index} lists them'


@pytest.mark.parametrize(
  ('name', 'must'),
  [
    (
      '../../secret.safetensors',
      'not the name of a file of weights next to it',
    ),
    ('/etc/passwd', 'not the name of a file of weights'),
    ('..', 'not the name of a file of weights'),
    ('a/b.safetensors', 'not the name of a file of weights'),
    (f'{STEM}-00003-of-00002.safetensors', 'is missing'),
  ],
)
def test_an_index_stays_in_its_folder(folder, tensors, tmp_path, name, must):
  index = shards_of(folder, tensors)
  save(tensors, tmp_path / 'secret.safetensors')
  told = json.loads(index.read_text())
  told['weight_map']['conv_in.weight'] = name
  index.write_text(json.dumps(told))
  message = refused(folder)
  assert must in message


@pytest.mark.parametrize(
  'content', ['', '{', '[]', '{"weight_map": 3}', '{"weight_map": {"a": [1]}}']
)
def test_an_index_that_is_damaged(folder, tensors, content):
  index = shards_of(folder, tensors)
  index.write_text(content)
  assert f'{index} is damaged' in refused(folder)


def test_shards_that_lack_a_tensor(folder, tensors):
  index = shards_of(folder, tensors)
  told = json.loads(index.read_text())
  told['weight_map']['more.weight'] = told['weight_map']['conv_in.weight']
  index.write_text(json.dumps(told))
  assert 'lists more.weight, which its shards do not hold' in refused(folder)


def test_shards_without_an_index(folder, tensors):
  """One of them is not the network, so none is proposed."""
  shards_of(folder, tensors).unlink()
  message = refused(folder)
  assert f'without their index, such as {NAME}.index.json' in message
  assert 'give one of them' not in message


def test_weights_that_are_a_link_to_nothing(folder):
  (folder / WEIGHTS).unlink()
  (folder / WEIGHTS).symlink_to('../../blobs/gone')
  assert 'cannot be read (No such file or directory)' in refused(folder)


def test_a_pointer_of_git_lfs(folder):
  (folder / WEIGHTS).write_text(
    'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n'
  )
  assert 'git lfs pull' in refused(folder)


# --- folders -----------------------------------------------------------------


@pytest.fixture
def output(published, tensors, tmp_path):
  """What diffusers' training script leaves: checkpoint-20/ and the pipeline."""
  output = tmp_path / 'output'
  for step in (5, 20):
    checkpoint = output / f'checkpoint-{step}'
    for part in ('unet', 'unet_ema'):
      shutil.copytree(published / 'unet', checkpoint / part)
    save(other(tensors), checkpoint / WEIGHTS)
    (checkpoint / 'optimizer.bin').write_bytes(b'none of ours')
  return output


def test_a_checkpoint_of_a_training_script(output, published, tensors):
  checkpoint = output / 'checkpoint-20'
  found = diffusers.read(checkpoint)
  equal(found.tensors, tensors)
  equal(found.raw, other(tensors))
  assert (found.step, found.has_scheduler) == (20, False)
  assert 'those in unet_ema, the raw ones those in unet' in found.notes[0]
  # Around the checkpoints: the newest.
  assert diffusers.read(output).step == 20
  # The script writes the scheduler where training has ended.
  shutil.copytree(published / 'scheduler', output / 'scheduler')
  found = diffusers.read(checkpoint)
  assert found.has_scheduler
  assert str(output / 'scheduler') in found.notes[-1]
  shutil.rmtree(checkpoint / 'unet_ema')
  found = diffusers.read(checkpoint)
  equal(found.tensors, other(tensors))
  assert 'there is no unet_ema' in found.notes[0]


def test_averaged_and_raw_weights_of_different_networks(output):
  checkpoint = output / 'checkpoint-20'
  path = checkpoint / 'unet' / 'config.json'
  told = json.loads(path.read_text())
  path.write_text(json.dumps({**told, 'sample_size': told['sample_size'] * 2}))
  assert 'different networks' in refused(checkpoint)
  assert diffusers.read(checkpoint / 'unet_ema').raw is None  # the remedy


def test_a_network_inside_its_pipeline(folder, output, tensors):
  found = diffusers.read(folder / 'unet')
  equal(found.tensors, tensors)
  assert found.has_scheduler
  found = diffusers.read(output / 'checkpoint-20' / 'unet')
  equal(found.tensors, other(tensors))
  assert 'unet_ema is left out, which holds averaged weights' in found.notes[0]
  assert found.step == 20


def test_a_cache_of_downloads(folder, tensors, tmp_path):
  """Links to blobs, below the name of a commit."""
  cache = tmp_path / 'models--google--ddpm'
  (cache / 'blobs').mkdir(parents=True)
  commit = cache / 'snapshots' / 'f00d'
  for i, path in enumerate(p for p in folder.rglob('*') if p.is_file()):
    blob = shutil.move(path, cache / 'blobs' / str(i))
    link = commit / path.relative_to(folder)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(blob)
  (cache / 'snapshots' / 'beef').mkdir()
  (cache / 'refs').mkdir()
  (cache / 'refs' / 'main').write_text('f00d\n')
  found = diffusers.read(cache)
  equal(found.tensors, tensors)
  assert found.notes == [f'the model is that in {commit}']
  shutil.rmtree(cache / 'refs')
  assert not diffusers.is_folder(cache)  # two commits
  (cache / 'snapshots' / 'beef').rmdir()
  assert diffusers.is_folder(cache)


def test_a_folder_in_folders(folder, tensors, tmp_path):
  (folder / 'model_index.json').unlink()
  (tmp_path / 'around').mkdir()
  moved = shutil.move(folder, tmp_path / 'around' / 'ddpm')
  equal(diffusers.read(tmp_path / 'around').tensors, tensors)
  shutil.copytree(moved, tmp_path / 'around' / 'another')
  assert not diffusers.is_folder(tmp_path / 'around')


def test_a_file_without_settings(tensors, tmp_path):
  save(tensors, tmp_path / 'alone.safetensors')
  assert 'has no config.json next to it' in refused(
    tmp_path / 'alone.safetensors'
  )


@pytest.mark.slow
def test_the_binary_says_what_it_took_and_keeps_it(output, tmp_path):
  checkpoint = output / 'checkpoint-20'
  run = tmp_path / 'run'
  result = binaries.run('convert', f'--from={checkpoint}', f'--to={run}')
  assert result.code == 0, result.err
  facts = json.loads((run / 'converted.json').read_text())
  assert [f'{checkpoint}: {note}' for note in facts['notes']] == (
    result.err.splitlines()
  )
  assert 'there is no scheduler' in facts['notes'][-1]
  assert 'linear betas from 0.0001 to 0.02 in 1000 steps' in facts['notes'][-1]
  assert (facts['step'], facts['raw']) == (20, True)
  average, raw = load(run), load(run, ema=False)
  assert average.weights_sha256 != raw.weights_sha256


@pytest.mark.slow
def test_the_remedy_is_a_config_whose_schedule_counts(output, tmp_path):
  checkpoint = output / 'checkpoint-20'
  run = tmp_path / 'run'
  result = binaries.run('convert', f'--from={checkpoint}', f'--to={run}')
  assert result.code == 0, result.err
  average = load(run)
  size, _, channels = average.image_shape
  result = binaries.run(
    'convert', f'--from={checkpoint}', f'--to={tmp_path}/other',
    '--config=digits', f'--config.data.image_size={size}',
    f'--config.data.channels={channels}', '--config.process.beta_end=0.01',
    '--step=3',
  )  # fmt: skip
  assert result.code == 0, result.err
  assert 'are those of --config' in result.err
  again = load(tmp_path / 'other')
  assert again.step == 3
  assert again.schedule.betas[-1] == pytest.approx(0.01)
  assert again.weights_sha256 == average.weights_sha256
