"""What sub-folders mean: splits, classes, or only a division of the set."""

import json

import pytest
from imagesets import all_images, all_labels, error_line, folder
from PIL import Image

from diffusion_jax import data
from diffusion_jax.data import layouts, sources


def understood(names, listed=None, classes='auto'):
  wanted = sources.Wanted('train', None, None, classes=classes, has_config=True)
  return layouts.understand(sorted(names), listed, 'it', wanted)


def numbered(width, counts, first=0, restart=False):
  """Images of numbered folders, numbered on or anew in each folder."""
  names, number = [], 0
  for i, count in enumerate(counts):
    number = 0 if restart else number
    for _ in range(count):
      names.append(f'{first + i:0{width}d}/{number}.png')
      number += 1
  return names


# (folder names and images) -> number of classes, 0 for none.
MEANINGS = {
  'directly inside': (['a.png', 'b.png'], 0),
  'one folder': (['images/a.png', 'images/b.png'], 0),
  'one folder in another': (['x/y/a.png', 'x/y/b.png'], 0),
  'classes': (['ape/1.png', 'dog/1.png', 'dog/2.png'], 2),
  'classes in one folder': (
    ['data/images/ape/1.png', 'data/images/dog/1.png'],
    2,
  ),
  'parts within classes': (['ape/0/1.png', 'ape/1/2.png', 'dog/1.png'], 2),
  'shards of equal size': (numbered(5, [20] * 5), 0),
  'a smaller last one': (numbered(5, [20, 20, 3], restart=True), 0),
  'shards of three digits': (numbered(3, [20] * 4), 0),
  'shards of other sizes that number on': (numbered(5, [3, 12, 7]), 0),
  'every thousandth': (['00000/0.png', '01000/1000.png', '02000/2000.png'], 0),
  'shards in one folder': (['ffhq/' + x for x in numbered(5, [4] * 3)], 0),
  'named parts': (['part-0/a.png', 'part-1/a.png', 'part-2/a.png'], 0),
  'named shards': (['shard_00/a.png', 'shard_01/b.png'], 0),
  'digits': (numbered(1, [20] * 10), 10),
  'digits without zeros': (numbered(1, [5, 7] * 50), 100),
  'classes of three digits': (numbered(3, [2] * 200), 200),
  'traffic signs': (numbered(5, [21, 222, 225], restart=True), 3),
  'classes from 01 on': (numbered(2, [20] * 10, first=1), 10),
  'years of equal size': (numbered(4, [20] * 3, first=2019), 3),
  'years': (['2019/a.png', '2020/b.png', 'misc/c.png'], 3),
}


@pytest.mark.parametrize('case', MEANINGS)
def test_the_meaning_of_folders(case):
  names, num_classes = MEANINGS[case]
  layout = understood(names)
  assert layout.num_classes == num_classes
  assert layout.splits == {}
  if num_classes:
    assert layout.label_of.keys() == set(names)
    assert set(layout.label_of.values()) == set(range(num_classes))
  else:
    assert not layout.label_of


@pytest.mark.parametrize('case', ['digits', 'shards of equal size'])
def test_the_meaning_can_be_decided(case):
  names, _ = MEANINGS[case]
  folders = len({name.split('/')[0] for name in names})
  assert understood(names, classes='folders').num_classes == folders
  assert understood(names, classes='none').num_classes == 0


def test_what_is_understood_is_said():
  (note,) = understood(numbered(5, [2] * 7)).notes
  for part in ('7 numbered folders', "'00000'", 'not as classes',
               'data.classes=folders'):  # fmt: skip
    assert part in note
  (note,) = understood(['ape/1.png', 'dog/1.png']).notes
  assert note == "the labels are those of the folders 'ape', 'dog': 2 classes"


# --- splits ------------------------------------------------------------------

SPLITS = {
  'train and test': (['train/a.png', 'test/b.png'], 1, 1),
  'other names': (['Training/a.png', 'VALID/b.png'], 1, 1),
  'classes within': (['train/x/a.png', 'train/y/b.png', 'test/y/c.png'], 2, 1),
  'images within': (['train/images/a.png', 'test/images/b.png'], 1, 1),
  'within images': (['images/train/a.png', 'images/val/b.png'], 1, 1),
  'COCO': (['train2017/a.jpg', 'val2017/b.jpg'], 1, 1),
  'ImageNet of 32 pixels': (['train_32x32/a.png', 'valid_32x32/b.png'], 1, 1),
  'sets': (
    ['training_set/x/a.png', 'training_set/y/a.png', 'test_set/x/b.png'],
    2,
    1,
  ),
  'three': (['train/a.png', 'val/b.png', 'val/c.png', 'test/d.png'], 1, 1),
  'two domains': (
    ['trainA/a.png', 'trainB/a.png', 'testA/a.png', 'testB/a.png'],
    2,
    2,
  ),
  'evaluation': (['training/a.png', 'evaluation/b.png'], 1, 1),
  'held out': (['train/a.png', 'held_out/b.png', 'dev/c.png'], 1, 1),
  'Food-11': (
    ['training/a', 'validation/b', 'validation/c', 'evaluation/d'],
    1,
    2,
  ),
  'DIV2K': (['DIV2K_train_HR/a.png', 'DIV2K_valid_HR/b.png'], 1, 1),
  'within each class': (
    ['x/train/a.png', 'x/test/b.png', 'y/train/c.png', 'y/mask/d.png'],
    2,
    1,
  ),
  'pictures beside': (['logo.png', 'train/a.png', 'test/b.png'], 1, 1),
}


@pytest.mark.parametrize('case', SPLITS)
def test_folders_that_are_splits(case):
  names, train, test = SPLITS[case]
  layout = understood(names)
  assert len(layout.splits['train']) == train
  assert len(layout.splits['test']) == test
  assert all('train' in name.lower() for name in layout.splits['train'])
  note = layout.notes[0]
  assert f'taken for training ({train} images)' in note
  assert f'held out ({test})' in note
  left = len(names) - train - test
  assert (f'{left} other images are left out' in note) == bool(left)
  labelled = ('classes within', 'sets', 'within each class')
  assert layout.num_classes == 2 * (case in labelled)


def test_shards_within_splits():
  names = [f'train/{name}' for name in numbered(5, [4, 4, 4])]
  names += [f'test/{name}' for name in numbered(5, [2])]
  layout = understood(names)
  assert (len(layout.splits['train']), len(layout.splits['test'])) == (12, 2)
  assert layout.num_classes == 0


def test_a_class_named_train_is_a_class():
  layout = understood(['bus/a.png', 'car/b.png', 'train/c.png'])
  assert (layout.splits, layout.num_classes) == ({}, 3)


def test_a_class_of_the_same_name_has_the_same_label_in_both_splits():
  names, _, _ = SPLITS['classes within']
  assert understood(names).label_of == {
    'train/x/a.png': 0, 'train/y/b.png': 1, 'test/y/c.png': 1,
  }  # fmt: skip


@pytest.mark.parametrize(
  'names',
  [
    ['train/a.png'],
    ['test/a.png', 'val/b.png'],
    ['train/a', 'x/b'],
    ['steam_train/a', 'test_tube/b', 'bus/c'],
    ['ape/train/a', 'ape/test/b', 'dog/c'],
    ['contest/a', 'strain/b'],
  ],
)
def test_folders_that_are_no_splits(names):
  assert understood(names).splits == {}


def test_splits_are_opened(tmp_path):
  for i, name in enumerate(['train/b', 'train/c', 'test/a']):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.new('L', (8, 8), 100 + i).save(tmp_path / f'{name}.png')
  config = {
    'name': 'folder', 'path': str(tmp_path), 'image_size': 8, 'channels': 1,
    'train_split': 'train', 'heldout_split': 'test', 'heldout_every': 2,
  }  # fmt: skip
  train, heldout = data.splits(config)
  assert all_images(train)[:, 0, 0, 0].tolist() == [100, 101]
  assert all_images(heldout)[:, 0, 0, 0].tolist() == [102]
  assert any('heldout_every' in note for note in train.notes)


@pytest.mark.parametrize(
  ('pictures', 'others'),
  [
    ('images', ['masks']),
    ('JPEGImages', ['SegmentationClass', 'SegmentationObject']),
    ('images', ['annotations/trimaps']),
    ('train/images', ['train/labels']),
    ('data/Photos', ['data/depth', 'data/ground_truth']),
  ],
)
def test_masks_beside_images_are_no_images(tmp_path, pictures, others):
  for i, name in enumerate([pictures, *others]):
    (tmp_path / name).mkdir(parents=True)
    Image.new('L', (8, 8), 100 + i).save(tmp_path / name / 'a.png')
  source = folder(tmp_path, channels=1)
  assert all_images(source)[:, 0, 0, 0].tolist() == [100]
  for other in others:
    told = [note for note in source.notes if f"the folder '{other[:5]}" in note]
    assert 'is left out; data.classes=folders takes it too' in told[0]
  taken = folder(tmp_path, channels=1, classes='folders')
  assert len(taken) == 1 + len(others)


@pytest.mark.parametrize('names', [('masks', 'hats'), ('images', 'dogs')])
def test_classes_with_such_names_are_classes(tmp_path, names):
  for name in names:
    (tmp_path / name).mkdir()
    Image.new('L', (8, 8), 100).save(tmp_path / name / 'a.png')
  assert folder(tmp_path, channels=1).num_classes == 2


def test_images_beside_classes_are_refused_or_taken_without_labels(tmp_path):
  (tmp_path / 'cats').mkdir()
  for name in ('cats/a.png', 'b.png'):
    Image.new('L', (8, 8)).save(tmp_path / name)
  message = error_line('folder', path=str(tmp_path), image_size=8, channels=1)
  for part in ("'b.png'", "'cats'", 'data.classes=none'):
    assert part in message
  assert len(folder(tmp_path, channels=1, classes='none')) == 2


# --- dataset.json ------------------------------------------------------------


def write_nvidia(path, labels):
  for i in range(4):
    image = path / f'0000{i // 2}' / f'img{i:08d}.png'
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.new('L', (8, 8), 100 + i).save(image)
  (path / 'dataset.json').write_text(json.dumps({'labels': labels}))
  return path


def listed(*labels):
  return [
    [f'0000{i // 2}/img{i:08d}.png', label] for i, label in enumerate(labels)
  ]


@pytest.mark.parametrize('inside', ['', 'cifar/'])
def test_labels_of_nvidias_tools(tmp_path, inside):
  write_nvidia(tmp_path / inside, listed(6, 9, 9, 4))
  source = folder(tmp_path, channels=1)
  assert all_labels(source) == [6, 9, 9, 4]
  assert source.num_classes == 10
  assert source.notes == ('the labels are those of dataset.json: 10 classes',)
  by_folder = folder(tmp_path, channels=1, classes='folders')
  assert all_labels(by_folder) == [0, 0, 1, 1]


@pytest.mark.parametrize(
  ('labels', 'why'),
  [
    (None, 'dataset.json has no labels'),
    (listed(6, 9, 9), '1 of 4 images have none'),
    (listed([0, 1], [1, 0], [0, 1], [0, 1]), 'is [0, 1], not a class'),
    (listed(0, 1, 2, -1), 'is -1, not a class'),
    (listed(0, 1, 2, 'ape'), 'is ape, not a class'),
  ],
)
def test_labels_that_are_no_classes_are_left_out(tmp_path, labels, why):
  write_nvidia(tmp_path, labels)
  source = folder(tmp_path, channels=1)
  assert all_labels(source) == [-1] * 4
  assert source.num_classes == 0
  assert why in source.notes[0]


@pytest.mark.parametrize(
  'text', ['[1, 2]', '{"name": "x"}', '{"labels"', '[' * 9**5]
)
def test_a_dataset_json_of_another_kind_is_passed_over(tmp_path, text):
  for name in ('ape', 'dog'):
    (tmp_path / name).mkdir()
    Image.new('L', (8, 8), 200).save(tmp_path / name / 'a.png')
  (tmp_path / 'dataset.json').write_text(text)
  source = folder(tmp_path, channels=1)
  assert source.num_classes == 2
  assert '1 file is passed over: 1 .json' in source.notes
