"""docs/your_images.md: its config, and a folder of mixed pictures."""

import re

import binaries
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data
from diffusion_jax.cli import config_files
from diffusion_jax.configs import folder
from diffusion_jax.runs import validation
from diffusion_jax.system.errors import UserError

PAGE = binaries.ROOT / 'docs' / 'your_images.md'


def photos(where, count):
  """Pictures of several sizes, modes and formats."""
  where.mkdir()
  kinds = (('RGB', 'jpg'), ('RGBA', 'png'), ('L', 'png'), ('P', 'gif'),
           ('CMYK', 'jpg'), ('RGB', 'webp'), ('RGB', 'tiff'))  # fmt: skip
  for index in range(count):
    rng = np.random.default_rng(index)
    mode, suffix = kinds[index % len(kinds)]
    size = rng.integers(20, 60, 2)
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    picture = Image.fromarray(pixels).convert(mode)
    picture.save(where / f'{index:03}.{suffix}')
  return where


def ten_lines(tmp_path, path):
  """The page's config, of another folder."""
  (block,) = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.S)
  assert len(block.strip().splitlines()) <= 10
  file = tmp_path / 'photos.py'
  file.write_text(block.replace('/data/photos', str(path)))
  return file


def test_the_pages_config_reads_mixed_pictures(tmp_path):
  place = photos(tmp_path / 'pictures', 40)
  config = config_files.load(str(ten_lines(tmp_path, place)))
  assert validation.check(config, range(1)) == []
  train, heldout = data.splits(config.data)
  assert (len(train), len(heldout)) == (36, 4)
  for source in (train, heldout):
    for index in range(len(source)):
      image, _ = source.read_fn(index)
      assert image.shape == (32, 32, 3)
      assert image.dtype == np.uint8


@pytest.mark.parametrize('images', folder.SIZES)
def test_the_page_has_the_numbers_of_the_config(images):
  config = folder.get_config(images)
  assert validation.check(config, range(4)) == []
  (row,) = re.findall(
    rf'^\| `folder:{images}` \|(.*)\|$', PAGE.read_text(), re.M
  )
  cells = [cell.strip().replace(',', '') for cell in row.split('|')]
  assert cells[0] == f'{config.model.channels} channels'
  assert [float(cell) for cell in cells[1:]] == [
    config.model.dropout, config.optim.lr, config.ema.decay, config.batch_size,
    config.num_steps,
  ]  # fmt: skip


def test_the_page_says_which_image_sizes_need_what():
  text = PAGE.read_text()
  for size, changes in (
    (16, {}), (32, {}), (64, {}), (128, {}),
    (96, {'attention_resolutions': (12,)}),
    (256, {'multipliers': (1, 1, 2, 2, 2)}),
  ):  # fmt: skip
    config = folder.get_config('300')
    config.data.image_size = size
    assert bool(validation.check(config, range(1))) == bool(changes)
    for key, value in changes.items():
      assert f"{key}='{value}'".replace(', ', ',') in text
      config.model[key] = value
    assert f'{size}' in text
    assert validation.check(config, range(1)) == []


def test_oblong_images_are_set_as_the_page_says(tmp_path):
  lines = re.search(r'`(with config.*?)`', PAGE.read_text(), re.S)[1]
  assert len(lines.split(':')) == 2
  file = tmp_path / 'oblong.py'
  file.write_text(
    'from diffusion_jax.configs import folder\n\n\ndef get_config():\n'
    f"  config = folder.get_config('300')\n  {' '.join(lines.split())}\n"
    f"  config.data.path = '{photos(tmp_path / 'pictures', 20)}'\n"
    '  return config\n'
  )
  config = config_files.load(str(file))
  assert validation.check(config, range(1)) == []
  train, _ = data.splits(config.data)
  assert train[0]['image'].shape == (64, 96, 3)


def test_another_number_of_images_is_refused():
  with pytest.raises(UserError, match='one of 300, 3000, 30000'):
    folder.get_config('500')


@pytest.mark.slow
def test_300_photos_train_at_once(tmp_path):
  place, workdir = photos(tmp_path / 'pictures', 300), tmp_path / 'run'
  flags = [
    f'--config={ten_lines(tmp_path, place)}', f'--workdir={workdir}',
    '--config.model.channels=32', '--config.model.num_blocks=1',
    '--config.data.image_size=16', '--config.num_steps=3',
    '--config.log_every=1', '--config.batch_size=8',
  ]  # fmt: skip
  result = binaries.run('train', *flags)
  assert result.code == 0, result.err
  assert '270 images' in result.err
  result = binaries.run('train', *flags, '--config.num_steps=5')
  assert result.code == 0, result.err
  assert f'resuming from checkpoint 3 of {workdir}' in result.err
