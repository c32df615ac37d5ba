"""Folders of Stable Diffusion as runs: pictures, round trips, mistakes."""

import json
import shutil

import binaries
import numpy as np
import pytest
import safetensors.numpy
from parity import text_pipelines as parity

from diffusion_jax import load, models
from diffusion_jax.conditioning import tokenizers
from diffusion_jax.runs import frozen, licences
from diffusion_jax.system.errors import UserError
from diffusion_jax.weights import settings

QUICK = ('pndm',)


def converted(source, target, *flags):
  binaries.here('convert', f'--from={source}', f'--to={target}', *flags)
  return target


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """As diffusers writes it, of Stable Diffusion 1."""
  return parity.folder_of('sd1', tmp_path_factory.mktemp('sd') / 'theirs')


@pytest.fixture(scope='module')
def run(folder):
  return converted(folder, folder.with_name('run'))


def drawing(names, quick=()):
  return pytest.mark.parametrize(
    'name',
    [
      pytest.param(name, marks=[pytest.mark.slow] * (name not in quick))
      for name in names
    ],
  )


# --- pictures ----------------------------------------------------------------


def error(name, folder, wanted) -> float:
  """Of the pictures of a folder; it need not stay where it was."""
  run = converted(folder, folder.with_name('run'))
  shutil.rmtree(folder)
  return parity.error(parity.drawn_ours(name, load(run)), wanted)


@drawing(parity.DRAWS, QUICK)
def test_pictures_equal_golden(name, tmp_path):
  draw = parity.DRAWS[name]
  folder = parity.folder_of(draw.kind, tmp_path / 'theirs', draw.scheduler)
  assert error(name, folder, parity.drawn_golden(name)) < parity.TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize('name', parity.DRAWS)
def test_pictures_equal_those_of_diffusers(name, tmp_path):
  draw = parity.DRAWS[name]
  folder = parity.folder_live(draw.kind, tmp_path / 'theirs', draw.scheduler)
  wanted = parity.drawn_live(name, folder)
  assert error(name, folder, wanted) < parity.TOLERANCE
  assert parity.error(parity.drawn_golden(name), wanted) < parity.TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize('kind', parity.KINDS)
def test_diffusers_draws_the_same_of_what_is_exported(kind, tmp_path):
  name = next(n for n, one in parity.DRAWS.items() if one.kind == kind)
  scheduler = parity.DRAWS[name].scheduler
  folder = parity.folder_live(kind, tmp_path / 'theirs', scheduler)
  assert parity.settings_golden()[kind] == parity.settings_of(
    parity.folder_live(kind, tmp_path / 'plain')
  )
  back = converted(converted(folder, tmp_path / 'run'), tmp_path / 'back')
  found, wanted = (parity.drawn_live(name, path) for path in (back, folder))
  # Where all is painted, latents of the picture are drawn at random.
  assert parity.error(found, wanted) < 1e-4


@pytest.mark.parity
def test_diffusers_draws_what_a_run_of_ours_draws(run, tmp_path):
  """One that has been trained does not have the settings of its origin."""
  mine = shutil.copytree(run, tmp_path / 'run')
  (mine / 'converted.json').unlink()
  back = converted(mine, tmp_path / 'back')
  wanted = parity.drawn_live('ddim', back)
  found = parity.drawn_ours(
    'ddim', load(mine), sampler='ddim', grid='stable_diffusion'
  )
  assert parity.error(found, wanted) < parity.TOLERANCE


# --- round trips -------------------------------------------------------------


def content(folder) -> dict[str, bytes]:
  """Name -> content of all files."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


@pytest.mark.parametrize(
  'kind',
  [
    pytest.param(kind, marks=[pytest.mark.slow] * (kind != 'sdxl'))
    for kind in parity.KINDS
  ],
)
def test_a_round_trip_gives_the_same_bits_and_settings(kind, tmp_path):
  theirs = parity.folder_of(kind, tmp_path / 'theirs')
  run = converted(theirs, tmp_path / 'run')
  mine = converted(run, tmp_path / 'mine')
  assert parity.settings_of(mine) == parity.settings_of(theirs)
  assert content(mine).keys() == content(theirs).keys()
  for part in parity.KINDS[kind].networks:
    (file,) = (mine / part).glob('*.safetensors')
    found = safetensors.numpy.load_file(file)
    wanted = parity.tensors(kind, part)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
      np.testing.assert_array_equal(found[name], array)
  for name, padding in parity.KINDS[kind].padding.items():
    ids = [
      tokenizers.read(path / name).encode(parity.PROMPTS).ids
      for path in (theirs, mine)
    ]
    np.testing.assert_array_equal(*ids)
    pads = {parity.END: parity.words().eos, parity.SIGN: 0}
    assert ids[1][1, -1] == pads[padding]


@pytest.mark.slow
@pytest.mark.parametrize('kind', parity.KINDS)
def test_a_folder_of_ours_comes_back_byte_by_byte(kind, tmp_path):
  theirs = parity.folder_of(kind, tmp_path / 'theirs')
  mine = converted(converted(theirs, tmp_path / 'run'), tmp_path / 'mine')
  again = converted(mine, tmp_path / 'again')
  assert content(converted(again, tmp_path / 'last')) == content(mine)


def test_a_run_keeps_what_it_does_not_train(run):
  config = json.loads((run / 'config.json').read_text())
  assert config['codec']['name'] == 'latents'
  assert config['conditioning']['name'] == 'frozen_text'
  assert config['data']['image_size'] == parity.SIZE
  assert config['sample']['guidance'] == 7.5
  abstract = frozen.abstract(config)
  assert abstract.keys() == {'codec', 'text'}
  for part, tree in abstract.items():
    kept = safetensors.numpy.load_file(run / 'parts' / f'{part}.safetensors')
    assert kept.keys() == models.named(tree).keys()
  assert (run / 'licences' / 'LICENSE.md').read_text() == 'Be good.\n'
  made = tokenizers.read(run / 'parts' / 'tokenizer.json')
  assert (made.pad, made.length) == (parity.words().eos, parity.LENGTH)
  told = json.loads((run / 'converted.json').read_text())
  assert told['sampling'] == {
    'sampler': 'plms', 'variant': 'improved_euler', 'num_steps': 50,
    'grid': 'stable_diffusion',
  }  # fmt: skip


# --- how it samples ----------------------------------------------------------


def test_it_samples_as_its_pipeline_unless_told_otherwise(run):
  trained = load(run)
  prompts = {'prompts': parity.PROMPTS}
  plan = trained.plan(**prompts)
  assert (plan.sampler, plan.grid[0], plan.num_steps) == ('plms', 981, 50)
  assert plan.guidance['guidance'] == 7.5
  plan = trained.plan(**prompts, num_steps=10, grid='trailing', guidance=1.0)
  assert (plan.sampler, plan.grid[0], plan.guidance) == ('plms', 999, {})
  plan = trained.plan(**prompts, sampler='ddim', num_steps=10)
  assert (plan.sampler, plan.grid[0]) == ('ddim', 999)
  with pytest.raises(UserError, match='give a prompt'):
    trained.plan()


@pytest.mark.parametrize(
  ('changes', 'sampler', 'grid', 'told'),
  [
    (parity.PNDM, 'plms', 'stable_diffusion', ''),
    (parity.DDIM, 'ddim', 'stable_diffusion', ''),
    (parity.DDIM | {'set_alpha_to_one': True}, 'ddim', 'sdxl', ''),
    (parity.ZERO_SNR, 'ddim', 'trailing', ''),
    (parity.EULER, 'euler', 'sdxl', ''),
    (
      parity.DDIM | {'clip_sample': True}, 'ddim', 'stable_diffusion',
      'clip_sample is true in place of false',
    ),
    (
      parity.EULER | {'timestep_spacing': 'linspace'}, 'euler', 'sdxl',
      'timestep_spacing is "linspace"',
    ),
    (
      parity.EULER | {'use_karras_sigmas': True}, 'euler', 'sdxl',
      'use_karras_sigmas is true',
    ),
    (
      {'_class_name': 'UniPCMultistepScheduler'}, 'ddim', 'sdxl',
      '_class_name is "UniPCMultistepScheduler"',
    ),
    (
      parity.ZERO_SNR | {'set_alpha_to_one': False}, 'ddim', 'trailing',
      'set_alpha_to_one is false',
    ),
  ],
)  # fmt: skip
def test_schedulers_that_no_sampler_follows_are_told(
  changes, sampler, grid, told
):
  found, notes = settings.sampling_of(changes, 'it')
  assert (found['sampler'], found['grid']) == (sampler, grid)
  assert len(notes) == bool(told)
  assert told in ''.join(notes)


# --- mistakes ----------------------------------------------------------------


def changed(folder, name, **values):
  path = folder / name
  path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


INDEX = 'model_index.json'
MISTAKES = {
  'unet': (lambda at: shutil.rmtree(at / 'unet'), 'has no unet/, which a'),
  'vae': (lambda at: shutil.rmtree(at / 'vae'), 'has no vae/, which a'),
  'tokenizer': (
    lambda at: shutil.rmtree(at / 'tokenizer'), 'has no tokenizer/, which a'
  ),
  'merges': (
    lambda at: (at / 'tokenizer/merges.txt').unlink(), 'holds no tokenizer'
  ),
  'index': (lambda at: (at / INDEX).unlink(), 'has no model_index.json'),
  'second': (
    lambda at: changed(at, INDEX, _class_name='StableDiffusionXLPipeline'),
    'has no text_encoder_2/',
  ),
  'refiner': (
    lambda at: changed(
      at, INDEX, _class_name='StableDiffusionXLImg2ImgPipeline'
    ),
    'must be "StableDiffusionPipeline"',
  ),
  'width': (
    lambda at: changed(at, 'text_encoder/config.json', hidden_size=12),
    'the text encoders give the U-Net tokens of 12, but it takes 8',
  ),
  'vocabulary': (
    lambda at: changed(at, 'text_encoder/config.json', vocab_size=9),
    'do not belong together',
  ),
  'weights': (
    lambda at: (at / 'text_encoder/model.safetensors').unlink(),
    'has no weights',
  ),
  'latents': (
    lambda at: changed(at, 'unet/config.json', in_channels=3, out_channels=3),
    'has latents of 4 channels, but the U-Net takes 3',
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', MISTAKES)
def test_what_is_wrong_is_told_in_one_line(name, folder, tmp_path):
  copy = shutil.copytree(folder, tmp_path / 'copy')
  spoil, told = MISTAKES[name]
  spoil(copy)
  with pytest.raises(UserError, match=told) as error:
    converted(copy, tmp_path / 'run')
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_an_interrupted_import_begins_anew(folder, run, tmp_path):
  half = tmp_path / 'half'
  shutil.copytree(run, half)
  (half / 'config.json').unlink()
  (half / 'parts' / 'text_2.safetensors').write_bytes(b'of another folder')
  converted(folder, half)
  names = [
    {name for name in content(at) if not name.startswith('checkpoints')}
    for at in (half, run)
  ]
  assert names[0] == names[1]
  load(half)
  with pytest.raises(UserError, match='is not empty'):
    converted(folder, half)


def test_files_of_licences(tmp_path, capsys):
  """They are copied from a pipeline, also if one network is given."""
  theirs, target = tmp_path / 'theirs', tmp_path / 'run'
  (theirs / 'vae').mkdir(parents=True)
  (theirs / 'model_index.json').write_text('{}')
  (theirs / 'LICENSE').write_text('one')
  (theirs / 'NOTICE.txt').write_bytes(b'x' * (licences.LARGEST + 1))
  (theirs / 'licensed.txt').write_text('no licence')
  assert licences.of(theirs / 'vae') == {'LICENSE': b'one'}
  assert 'NOTICE.txt is left out' in capsys.readouterr().err
  licences.write(target / licences.FOLDER, licences.of(theirs), 'codec')
  licences.write(target / licences.FOLDER, {'LICENSE': b'two'}, 'text')
  assert licences.of(target) == {'LICENSE': b'one', 'LICENSE.text': b'two'}
  assert licences.of(tmp_path / 'none') == {}
