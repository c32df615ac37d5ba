"""Pictures carry their addresses, by which they are drawn again."""

import json
import re
import zlib

import binaries
import numpy as np
import pytest
import tiny
from PIL import Image, PngImagePlugin

import diffusion_jax
from diffusion_jax import samplers
from diffusion_jax.reporting import pictures
from diffusion_jax.runs import addresses
from diffusion_jax.system.errors import UserError

HOW = ('--sampler=ddim', '--grid=20,10', '--eta=0.5', '--seed=5')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run with seven pictures of samples."""
  workdir = tiny.trained(tmp_path_factory.mktemp('runs') / 'digits')
  binaries.here(
    'sample', f'--workdir={workdir}', *HOW, '--num_samples=7', '--png',
    f'--output={workdir}/samples/own',
  )  # fmt: skip
  return workdir


@pytest.fixture(scope='module')
def trained(run):
  return diffusion_jax.load(run)


@pytest.fixture(scope='module')
def picture(run):
  return run / 'samples/own/png/000005.png'


def text_of(path):
  with Image.open(path) as image:
    return json.loads(image.info[addresses.KEY])


def with_text(path, text, key=addresses.KEY):
  chunks = PngImagePlugin.PngInfo()
  chunks.add_itxt(key, text)
  Image.new('L', (8, 8)).save(path, pnginfo=chunks)
  return path


def test_the_address_is_all_that_the_picture_depends_on(run, picture, trained):
  want = {
    'workdir': str(run), 'step': 30, 'ema': True,
    'weights_sha256': trained.weights_sha256, 'image_shape': [8, 8, 1],
    'sampler': 'ddim', 'eta': 0.5, 'clip': True, 'seed': 5,
    'grid': [20, 10, -1],
  }  # fmt: skip
  assert text_of(picture) == {**want, 'index': 5}
  assert text_of(run / 'samples/own/grid.png') == {**want, 'count': 7}


def test_the_library_draws_it_again(run, picture, trained):
  address = addresses.read(picture)
  assert address.run == {'workdir': str(run), 'step': 30, 'ema': True}
  again = diffusion_jax.load(**address.run).sample(**address.how)
  np.testing.assert_array_equal(again[0], pictures.read(picture))
  # Others are others.
  other = trained.sample(**{**address.how, 'first': 4})
  assert np.abs(other[0].astype(int) - pictures.read(picture)).max() > 20


def test_like_draws_it_again(run, picture, capsys, tmp_path):
  before = sorted(path for path in run.rglob('*') if path.is_file())
  binaries.here('sample', f'--like={picture}', '--json')
  told = json.loads(capsys.readouterr().out)
  assert told['largest_difference'] == 0
  assert told['index'] == 5
  (made,) = {path for path in run.rglob('*') if path.is_file()} - {*before}
  assert str(made) == told['output']
  assert re.fullmatch('000005_[0-9a-f]{8}.png', made.name)
  assert made.parent == run / 'samples/like'
  assert text_of(made) == text_of(picture)
  np.testing.assert_array_equal(pictures.read(made), pictures.read(picture))
  # A copy, elsewhere, of a picture whose run has moved.
  moved = with_text(
    tmp_path / 'a.png', json.dumps({**text_of(picture), 'workdir': 'gone'})
  )
  how = f'--workdir={run}', f'--output={tmp_path}/out'
  binaries.here('sample', f'--like={moved}', *how)
  (there,) = (tmp_path / 'out').iterdir()
  assert there.name == made.name
  assert text_of(there) == text_of(picture)
  assert '% of values differ' in capsys.readouterr().out


CHANGES = [
  ({'weights_sha256': '0' * 64}, 'the run has other weights than those'),
  ({'step': 20}, 'the run has other weights than those'),
  ({'step': 29}, 'no such checkpoint'),
  ({'image_shape': [8, 8, 3]}, 'was drawn with image_shape=[8, 8, 3]'),
  ({'workdir': '/nothing'}, 'workdir=/nothing holds no run'),
  ({'guide': 'x@1', 'guide_sha256': '0' * 64}, 'give it, as --guide='),
  ({'prompt': 'a cat'}, 'the run takes no text'),
  ({'sampler': 'dpm++'}, 'did you mean dpmpp_2m?'),
  ({'grid': [5, 7, -1]}, 'times must strictly decrease'),
  ({'seed': 2**32}, 'has seed=4294967296, which no sample has'),
]


@pytest.mark.parametrize(('change', 'told'), CHANGES)
def test_another_run_is_refused(run, picture, tmp_path, change, told):
  facts = {**text_of(picture), **change}
  path = with_text(tmp_path / 'a.png', json.dumps(facts))
  with pytest.raises(UserError, match=re.escape(told)) as error:
    binaries.here('sample', f'--like={path}', f'--output={tmp_path}/out')
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'out').exists()


def test_a_guide_has_to_be_given_again(run, tmp_path, capsys):
  output = tmp_path / 'out'
  binaries.here(
    'sample', f'--workdir={run}', *HOW, '--num_samples=1', '--png',
    f'--guide={run}@20', '--guidance=3', f'--output={output}',
  )  # fmt: skip
  like = f'--like={output}/png/000000.png'
  assert str(tmp_path) not in text_of(output / 'png/000000.png')['guide']
  for given, told in (
    ((), 'give it, as --guide=WORKDIR@STEP'),
    ((f'--guide={run}@30',), 'the guide has other weights'),
    ((f'--guide={run}@10',), 'the guide has other weights'),
  ):
    with pytest.raises(UserError, match=told):
      binaries.here('sample', like, f'--output={tmp_path}/two', *given)
  capsys.readouterr()
  how = f'--output={tmp_path}/two', f'--guide={run}@20', '--json'
  binaries.here('sample', like, *how)
  assert json.loads(capsys.readouterr().out)['largest_difference'] == 0


def test_flags_that_the_address_gives_are_refused(picture):
  for flag in ('--seed=1', '--prompt=x', '--num_samples=3', '--noema'):
    with pytest.raises(UserError, match='does not apply to a picture'):
      binaries.here('sample', f'--like={picture}', flag)
  with pytest.raises(UserError, match='drawn without --guide: leave it out'):
    binaries.here(
      'sample', f'--like={picture}', f'--guide={picture.parents[3]}'
    )


# Each would be a traceback, or worse, where it is used.
HOSTILE = [
  '', 'x', '[]', '3', 'null', '{}', '[' * 100_000, '{"index": 1' + '0' * 5000,
  '{"count": 3}', *(
    (name, value)
    for name in ('workdir', 'sampler', 'index', 'step', 'seed', 'ema', 'clip',
                 'grid', 'eta', 'weights_sha256', 'image_shape')
    for value in (None, [], {}, [[]], -1, 1e400, float('nan'), '', 'a\x1b[2J',
                  10**400)
  ),
  ('more', 1), ('churn', 0.5), ('grid', ['end', 'x']), ('eta', 1.5),
  ('guidance_interval', [1]), ('negative_prompt', 'x'), ('label', 1),
  ('prompt', '\ud83c'), ('prompt', 3), ('guidance', float('nan')),
  ('ema_profile', 'x'), ('lora', 'x'),
]  # fmt: skip


def test_hostile_addresses_are_one_line(trained, picture):
  facts = text_of(picture)
  for hostile in HOSTILE:
    text = hostile
    if isinstance(hostile, tuple):
      text = json.dumps({**facts, hostile[0]: hostile[1]})
    with pytest.raises(UserError) as error:  # noqa: PT012, of both
      address = addresses.parsed(text)
      diffusion_jax.load(**{**address.run, 'workdir': trained.workdir})
      trained.plan(**{k: x for k, x in address.how.items() if k != 'first'})
      addresses.check_same(addresses.parsed(json.dumps(facts)), address)
    told = str(error.value)
    assert told.isprintable(), hostile
    assert len(told) < 600, hostile


def test_every_option_of_every_sampler_can_be_read_back(picture):
  facts = text_of(picture)
  del facts['eta']
  for name in samplers.SAMPLERS:
    given = {'x0_variance': [0.5, 0.1]} if name in samplers.CALIBRATED else {}
    chosen = samplers.options(name, **given)
    text = json.dumps({**facts, 'sampler': name, **chosen})
    how = addresses.parsed(text).how
    assert samplers.options(name, **{k: how[k] for k in chosen}) == chosen


def test_files_that_are_no_pictures_of_samples(run, tmp_path):
  image = Image.new('L', (8, 8))
  image.save(tmp_path / 'plain.png')
  image.save(tmp_path / 'a.jpg')
  (tmp_path / 'text.png').write_text('a red apple')
  whole = (run / 'samples/own/png/000005.png').read_bytes()
  (tmp_path / 'cut.png').write_bytes(whole[:60])
  # A megabyte of text of a few bytes.
  chunk = addresses.KEY.encode() + b'\0\0' + zlib.compress(bytes(10**8))
  packed = len(chunk).to_bytes(4) + b'zTXt' + chunk
  packed += zlib.crc32(b'zTXt' + chunk).to_bytes(4)
  (tmp_path / 'bomb.png').write_bytes(whole[:33] + packed + whole[33:])
  for name, told in (
    ('plain.png', 'has no address of a sample'),
    ('a.jpg', 'cannot be read as a PNG'),
    ('text.png', 'cannot be read as a PNG'),
    ('cut.png', 'cannot be read as a PNG'),
    ('bomb.png', 'cannot be read as a PNG'),
    ('none.png', 'is not a file'),
    ('', 'is not a file'),
  ):
    with pytest.raises(UserError, match=told) as error:
      addresses.read(tmp_path / name)
    assert '\n' not in str(error.value)
  with pytest.raises(UserError, match='a grid of several samples'):
    addresses.read(run / 'samples/own/grid.png')


def test_an_address_may_stand_behind_the_pixels(picture, tmp_path):
  """Where other programs move it."""
  parts, content, at = [], picture.read_bytes(), 8
  while at < len(content):
    end = at + 12 + int.from_bytes(content[at : at + 4])
    parts.append(content[at:end])
    at = end
  parts.sort(key=lambda part: [b'IHDR', b'IDAT', b'iTXt', b'IEND'].index(
    part[4:8]))  # fmt: skip
  path = tmp_path / 'moved.png'
  path.write_bytes(content[:8] + b''.join(parts))
  assert addresses.read(path) == addresses.read(picture)


def test_long_addresses_are_compressed_and_read(tmp_path):
  image = np.zeros((4, 4, 3), np.uint8)
  for length in (10, 5000, 3 * 10**6):
    text = 'grüße' * length
    path = tmp_path / f'{length}.png'
    pictures.save(path, image, {addresses.KEY: text})
    with Image.open(path) as read:
      assert read.info[addresses.KEY] == text
  assert (tmp_path / '5000.png').stat().st_size < 1000


def test_the_prompt_and_the_label_are_those_of_the_sample():
  protocol = {
    'model': {'path': '/private'}, 'seed': 0, 'prompts': ['a', 'b', 'c'],
    'label': 'data', 'label_counts': [1, 2],
  }  # fmt: skip
  (text,) = addresses.of_sample(protocol, 'runs/x', 4, np.int32(1)).values()
  assert json.loads(text) == {
    'workdir': 'runs/x', 'seed': 0, 'index': 4, 'prompt': 'b', 'label': 1
  }  # fmt: skip
  (text,) = addresses.of_grid(protocol, 'runs/x', 2).values()
  assert json.loads(text)['prompts'] == ['a', 'b']
