"""A sampler as a file of jax.export draws without the package."""

import dataclasses
import json
import subprocess
import sys

import binaries
import jax
import numpy as np
import pytest
import tiny

import diffusion_jax
from diffusion_jax.models import attention, splash
from diffusion_jax.runs import standalone
from diffusion_jax.system.errors import UserError

HOW = ('--grid=500,100', '--noclip')
# Any import of the package fails.
ALONE = "import sys; sys.modules['diffusion_jax'] = None\n"


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A run without labels, and one with them."""
  folder = tmp_path_factory.mktemp('runs')
  tiny.trained(folder / 'plain')
  tiny.labelled(folder / 'labelled')
  return folder


@pytest.mark.parametrize('name', ['plain', 'labelled'])
def test_a_fresh_process_draws_the_same_images(runs, tmp_path, name):
  path = tmp_path / 'sampler.jaxexport'
  guided = ['--guidance=2'] * (name == 'labelled')
  binaries.here(
    'sample', f'--workdir={runs / name}', *HOW, *guided, f'--export={path}',
    '--batch_size=3',
  )  # fmt: skip
  facts = json.loads((tmp_path / f'{path.name}.json').read_text())
  program = '\n'.join(facts['how_to_draw'])
  assert len(program.splitlines()) <= 10
  subprocess.run([sys.executable, '-c', ALONE + program], cwd=tmp_path,
                 check=True)  # fmt: skip
  got = np.load(tmp_path / 'images.npy')
  options = {'guidance': 2.0, 'label': 'all'} if guided else {}
  want = diffusion_jax.load(runs / name).sample(
    16, grid='500,100', clip=False, **options
  )
  assert want.std() > 20
  np.testing.assert_array_equal(got, want)
  assert not {'seed', 'label_counts'} & facts['protocol'].keys()
  assert facts['protocol']['weights_sha256']
  assert facts['platforms'] == ['cpu', 'cuda', 'tpu']


def test_any_seed_and_indices(runs):
  """In groups of two, of which the last is not full; also for large seeds."""
  trained = diffusion_jax.load(runs / 'plain')
  plan = trained.plan(sampler='ddim', num_steps=2)
  content = standalone.create(trained, plan, 'x', group=2).content
  sampler = jax.export.deserialize(bytearray(content)).call
  seed, index = 2**32 - 1, np.array([7, 3, 2**31], np.uint32)
  images, finite = sampler(np.uint32(seed), index)
  assert finite
  for at, one in zip(index, images, strict=True):
    (want,) = trained.sample(
      1, first=int(at), seed=seed, sampler='ddim', num_steps=2
    )
    np.testing.assert_array_equal(one, want)


def test_samples_that_are_not_finite_are_said_to_be_so(runs):
  trained = diffusion_jax.load(runs / 'plain')
  params = jax.tree.map(lambda x: x * np.nan, trained.params)
  plan = trained.plan(sampler='ddim', num_steps=1, clip=False)
  broken = dataclasses.replace(trained, params=params)
  content = standalone.create(broken, plan, 'x').content
  sampler = jax.export.deserialize(bytearray(content)).call
  assert not sampler(np.uint32(0), np.arange(2, dtype=np.uint32))[1]


def test_a_program_for_all_platforms_has_the_kernels_of_none():
  """Of attention over sequences for which a TPU has one; it is lowered only."""
  query = jax.ShapeDtypeStruct((1, 1024, 1, 128), 'bfloat16')

  def attend(query):
    with splash.over(tiny.one_device()):
      assert splash.fits(query)
      return attention.attend(query, query, query)

  with attention.plain():
    exported = jax.export.export(
      jax.jit(attend), platforms=standalone.PLATFORMS
    )(query)
  text = exported.mlir_module()
  assert 'dot_general' in text
  assert 'custom_call' not in text


def test_too_many_weights_are_refused(runs, monkeypatch):
  monkeypatch.setattr(standalone, 'LARGEST', 1000)
  trained = diffusion_jax.load(runs / 'plain')
  with pytest.raises(UserError, match='at most'):
    standalone.create(trained, trained.plan(), 'x')


@pytest.mark.parametrize(
  ('given', 'told'),
  [
    ('--export=.', 'is a folder: give a file'),
    ('--export=setup.py', 'exists: give a new file'),
    ('--export=new --seed=3', '--seed does not apply'),
    ('--export=new --batch_size=0', '--batch_size=0'),
  ],
)
def test_mistakes(runs, given, told):
  result = binaries.run('sample', f'--workdir={runs / "plain"}', *given.split())
  assert told in result.message
