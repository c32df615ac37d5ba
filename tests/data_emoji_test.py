"""Emoji: the pinned set, and fonts made here of a few coloured bitmaps."""

import io

import binaries
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data
from diffusion_jax.data import emoji
from diffusion_jax.system.errors import UserError

PINNED = binaries.ROOT.parent / 'shared' / 'data' / 'emoji' / 'emoji64.npz'
RED, BLUE = (255, 0, 0, 255), (0, 0, 255, 255)


def font(path, colours: dict[int, tuple], coloured=True):
  """A font whose glyphs are squares of 64 pixels, of a colour each."""
  from fontTools import fontBuilder, ttLib
  from fontTools.ttLib.tables import C_B_D_T_ as glyphs
  from fontTools.ttLib.tables import E_B_L_C_, BitmapGlyphMetrics

  names = ['.notdef', *(f'u{code:x}' for code in colours)]
  built = fontBuilder.FontBuilder(2048)
  built.setupGlyphOrder(names)
  built.setupCharacterMap(dict(zip(colours, names[1:], strict=True)))
  built.setupHorizontalMetrics(dict.fromkeys(names, (2550, 0)))
  built.setupHorizontalHeader(ascent=1900, descent=-500)
  built.setupOS2()
  built.setupPost(keepGlyphNames=False)
  if coloured:
    bitmaps = ttLib.newTable('CBDT')
    bitmaps.version, strike = 3.0, {}
    for name, colour in zip(names[1:], colours.values(), strict=True):
      glyph = glyphs.cbdt_bitmap_format_17(b'', built.font)
      metrics = BitmapGlyphMetrics.SmallGlyphMetrics()
      metrics.height, metrics.width, metrics.Advance = 128, 136, 136
      metrics.BearingX, metrics.BearingY = 0, 101
      glyph.metrics, file = metrics, io.BytesIO()
      image = Image.new('RGBA', emoji.CANVAS)
      image.paste(colour, (4, 32, 68, 96))
      image.save(file, 'png')
      glyph.imageData = file.getvalue()
      strike[name] = glyph
    bitmaps.strikeData = [strike]
    places = ttLib.newTable('CBLC')
    places.version, places.strikes = 3.0, [E_B_L_C_.Strike()]
    size = places.strikes[0].bitmapSizeTable = E_B_L_C_.BitmapSizeTable()
    for line in ('hori', 'vert'):
      side = E_B_L_C_.SbitLineMetrics()
      for key in (
        'widthMax', 'caretSlopeNumerator', 'caretSlopeDenominator',
        'caretOffset', 'minOriginSB', 'minAdvanceSB', 'maxBeforeBL',
        'minAfterBL', 'pad1', 'pad2',
      ):  # fmt: skip
        setattr(side, key, 0)
      side.ascender, side.descender, side.widthMax = 101, -27, 136
      setattr(size, line, side)
    size.colorRef, size.flags, size.bitDepth = 0, 1, 32
    size.ppemX = size.ppemY = emoji.BITMAP
    size.startGlyphIndex, size.endGlyphIndex = 1, len(colours)
    index = E_B_L_C_.eblc_index_sub_table_1(b'', built.font)
    index.names = names[1:]
    index.indexFormat, index.imageFormat = 1, 17
    index.firstGlyphIndex, index.lastGlyphIndex = 1, len(colours)
    places.strikes[0].indexSubTables = [index]
    built.font['CBDT'], built.font['CBLC'] = bitmaps, places
  else:
    built.setupGlyf({name: built_empty() for name in names})
  built.save(path)
  return str(path)


def built_empty():
  from fontTools.pens.ttGlyphPen import TTGlyphPen

  return TTGlyphPen(None).glyph()


def opened(path, split='train', **kwargs):
  given = {'image_size': 64, 'channels': 3, **kwargs}
  return data.create('emoji', path=str(path), split=split, **given)


def refusal(path, **kwargs) -> str:
  with pytest.raises(UserError) as error:
    opened(path, **kwargs)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_the_set_is_pinned():
  names = emoji.captions()
  assert len(names) == 1382
  test, train = emoji.heldout('test'), emoji.heldout('train')
  assert (len(test), len(train)) == (146, 1236)
  assert not set(test) & set(train)
  assert sorted([*test, *train]) == emoji.heldout('all').tolist()
  told = {names[i] for i in test if i % 10 != 9}
  assert {'green heart', 'orange book', 'large blue square'} < told
  combined = emoji.combinations()
  assert told <= {*combined} <= {names[i] for i in test}
  assert len({*combined}) == 12


def test_a_pinned_array_is_split_like_the_source():
  if not PINNED.exists():
    pytest.skip('the pinned array is not here')
  with np.load(PINNED) as pinned:
    known = {name: pinned[name] for name in pinned}
  assert emoji.codepoints() == known['codepoints'].tolist()
  assert emoji.captions() == known['captions'].tolist()
  for split in ('train', 'test'):
    got = data.create(
      'arrays', path=str(PINNED), split=split, image_size=64, channels=3,
      heldout_every=10,
    )  # fmt: skip
    want = emoji.heldout(split)
    assert len(got) == len(want)
    for i in range(len(want)):
      np.testing.assert_array_equal(got[i]['image'], known['images'][want[i]])


def test_glyphs_are_drawn_on_white_from_the_font(tmp_path, monkeypatch):
  codes = {0x1F600 + k: RED if k % 2 else BLUE for k in range(11)}
  monkeypatch.setattr(
    emoji, 'codepoints', lambda text='': [0x1F600] if text else list(codes)
  )
  path = font(tmp_path / 'a.ttf', codes)
  train, test = opened(path), opened(path, 'test')
  # Index 9 is a tenth, index 0 is a combination here.
  assert (len(train), len(test)) == (9, 2)
  image = train[0]['image']  # index 1
  assert image.shape == (64, 64, 3)
  # The square is at the left edge of the columns that are kept.
  assert image[32, 2].tolist() == [255, 0, 0]
  assert image[32, 60].tolist() == [255, 255, 255]
  assert test[0]['image'][32, 2].tolist() == [0, 0, 255]
  assert train[0]['label'] == -1
  half = opened(path, image_size=32)[0]['image']
  assert half[16, 1].tolist() == [255, 0, 0]
  other = font(tmp_path / 'b.ttf', {**codes, 0x1F601: BLUE})
  assert opened(other).identity['kind'] != train.identity['kind']


def test_a_font_that_cannot_be_used_is_refused_in_one_line(
  tmp_path, monkeypatch
):
  codes = [0x1F600, 0x1F601]
  monkeypatch.setattr(emoji, 'codepoints', lambda text='': codes)
  for path, must in (
    (tmp_path / 'none.ttf', 'is not a file'),
    (font(tmp_path / 'grey.ttf', dict.fromkeys(codes, RED), False), 'colour'),
    (font(tmp_path / 'few.ttf', {codes[0]: RED}), 'no glyph of U+1F601'),
  ):
    told = refusal(path)
    assert must in told
    assert 'fonts-noto-color-emoji' in told
  (tmp_path / 'broken.ttf').write_bytes(b'\0\1\0\0\0\1' + 6 * b'\0' + b'CBDT')
  assert 'cannot be drawn' in refusal(tmp_path / 'broken.ttf')
  assert 'set image_size=64' in refusal(tmp_path, channels=1)
  monkeypatch.setattr(emoji, 'PLACES', ())
  assert 'need a font' in refusal('')


def test_named_images_are_held_out_of_an_array(tmp_path):
  images = (
    np.zeros((12, 8, 8, 3), np.uint8)
    + np.arange(12, dtype=np.uint8)[:, None, None, None]
  )

  def numbers(split, every, **more):
    np.savez(tmp_path / 'a.npz', images=images, **more)
    source = data.create(
      'arrays', path=str(tmp_path / 'a.npz'), split=split, image_size=8,
      channels=3, heldout_every=every,
    )  # fmt: skip
    return [int(one['image'][0, 0, 0]) for one in source]

  named = {'heldout_combinations': np.array([7, 2])}
  assert numbers('test', 5, **named) == [2, 4, 7, 9]
  assert numbers('train', 5, **named) == [0, 1, 3, 5, 6, 8, 10, 11]
  assert numbers('test', 0, **named) == [2, 7]
  with pytest.raises(UserError, match='must be 0 to 11'):
    numbers('test', 5, heldout_combinations=np.array([12]))
  # The file's own test images are what is held out.
  named |= {'test_images': images[:3]}
  assert numbers('test', 0, **named) == [0, 1, 2]
  assert numbers('train', 0, **named) == [*range(12)]
