"""The report: what it says is what the files say, whatever state they are in.

The page is read back as a browser would read it, and compared with the files.
"""

import base64
import io
import json
import re
from html.parser import HTMLParser

import binaries
import numpy as np
import pytest
from PIL import Image

from configs import digits
from diffusion_jax import runs
from diffusion_jax.evaluation import cards, tables
from diffusion_jax.reporting import facts, page, pictures, plots
from diffusion_jax.system.errors import UserError

# Elements that HTML has no end tag for.
VOID = ('meta', 'img', 'br', 'link', 'input')
HASH = 'ab12cd34' * 8


class Page(HTMLParser):
  """A page, parsed: its text, the attributes of its tags, its tables.

  Fails on an end tag that does not belong to the last open one.
  """

  def __init__(self, html):
    super().__init__()
    self.tags, self.tables, self.text, self._open = [], [], '', []
    self.feed(html)
    self.close()
    assert not self._open, self._open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self._open.append(tag)
    if tag == 'table':
      self.tables.append([])
    if tag == 'tr':
      self.tables[-1].append([])
    if tag in ('td', 'th'):
      self.tables[-1][-1].append('')

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self._open, tag
    assert self._open.pop() == tag

  def handle_data(self, data):
    if 'style' in self._open:
      return
    self.text += data
    if self._open and {'td', 'th'} & set(self._open):
      self.tables[-1][-1][-1] += data

  def images(self):
    """The embedded pictures, decoded."""
    return [
      Image.open(io.BytesIO(base64.b64decode(attrs['src'].split(',')[1])))
      for tag, attrs in self.tags
      if tag == 'img'
    ]


def card(step=20, **changes):
  """A metric card; protocol__split='test' changes one field of a part."""
  made = {
    'card': 1,
    'subject': {
      'workdir': 'runs/x', 'step': step, 'ema': True, 'weights_sha256': HASH,
      'sampler': 'ddim', 'eta': 0.0, 'clip': True, 'seed': 3,
      'grid': [999, 500, -1], 'evaluations': 2,
    },
    'protocol': {
      'data': 'digits', 'split': 'train', 'num_reference': 1438,
      'reference_sha256': HASH, 'num_samples': 2000, 'features': 'classifier',
      'resize': 'none', 'num_heldout': 359,
    },
    'results': {'frechet': 0.12345678, 'odd_one': 1234.5678},
    'details': {
      'class_histogram': [0.25, 0.75], 'heldout_class_histogram': [0.5, 0.5],
      'classifier_accuracy': 0.985,
    },
    'environment': {'device': 'cpu', 'num_devices': 1},
    'time': f'2026-01-01T00:00:{step:02d}+00:00',
  }  # fmt: skip
  for name, value in changes.items():
    part, key = name.split('__')
    made[part][key] = value
  return made


def start(step, device='cpu', num_devices=1, **more):
  return {
    'time': '2026-01-01T00:00:00+00:00', 'step': step, 'device': device,
    'num_devices': num_devices, 'num_processes': 1, 'revision': 'abc123',
    'versions': {'jax': '0.10.2', 'numpy': '2.2.0'}, **more,
  }  # fmt: skip


ROWS = [
  {
    'step': step, 'loss': 1 / step, 'grad_norm': 2 / step,
    'param_norm': 60 + step, 'learning_rate': 1e-3, 'loss_q1': 4 / step,
    'loss_q4': 0.4 / step,
    **({} if step == 10 else {'images_per_sec': 320.0}),
    **({'heldout_loss': 0.0765432} if step == 20 else {}),
  }
  for step in (10, 20)
]  # fmt: skip


@pytest.fixture
def bare(tmp_path):
  """A run that has a config and nothing else."""
  workdir = tmp_path / 'my_run'
  workdir.mkdir()
  runs.write_config(workdir, digits.get_config())
  return workdir


def lines(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def picture(path, seed=0, size=8):
  path.parent.mkdir(parents=True, exist_ok=True)
  images = np.random.default_rng(seed).integers(0, 256, (4, size, size, 1))
  pictures.save(path, pictures.grid(images.astype(np.uint8)))


def put(workdir, made, name='card'):
  path = workdir / 'evaluations' / f'{name}.json'
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(made))
  return path


@pytest.fixture
def full(bare):
  """A run that has everything."""
  lines(bare / 'metrics.jsonl', ROWS)
  lines(bare / 'starts.jsonl', [start(0), start(10, 'TPU v4', 8)])
  store = {**card()['subject'], 'seed': 77}
  folder = bare / 'samples' / 'some_name'
  picture(folder / 'grid.png', seed=1)
  picture(folder / 'trajectory.png', seed=2)
  (folder / 'store.json').write_text(json.dumps(store))
  for step in (10, 20):
    picture(bare / 'samples' / f'train_{step:08d}.png', seed=step)
  put(bare, card())
  picture(bare / 'evaluations' / 'card_neighbours.png', seed=3)
  origin = {'workdir': 'runs/old', 'step': 5, 'ema': True, 'taken': 7,
            'left': [{'name': 'a'}]}  # fmt: skip
  (bare / 'init_from.json').write_text(json.dumps(origin))
  return bare


def written(workdir):
  told = page.write(workdir)
  return Page((workdir / 'report.html').read_text()), told


def test_the_binary_writes_one_file_that_needs_no_other(full):
  (full / 'evaluations' / 'torn.json').write_text('{')
  before = {path.name for path in full.iterdir()}
  result = binaries.run('report', f'--workdir={full}', '--json')
  assert result.code == 0, result.err
  path, (problem,) = full / 'report.html', result.err.splitlines()
  assert problem.startswith('evaluations/torn.json cannot be read')
  assert json.loads(result.out) == {'report': str(path), 'problems': [problem]}
  assert {path.name for path in full.iterdir()} - before == {'report.html'}

  html = path.read_text()
  read = Page(html)
  assert not {'script', 'link', 'iframe', 'object'} & {t for t, _ in read.tags}
  for tag, attrs in read.tags:
    for name, value in attrs.items():
      if name in ('src', 'href', 'xlink:href', 'srcset', 'data', 'action'):
        assert value.startswith(('data:image/', '#')), (tag, name, value)
  assert not re.search(r'@import|url\((?!#)', html)
  ids = [attrs['id'] for _, attrs in read.tags if 'id' in attrs]
  assert len(ids) == len(set(ids))
  used = re.findall(r'(?:url\(|xlink:href=")#([^")]+)', html)
  assert used
  assert set(used) <= set(ids)


def test_no_run_is_one_line(tmp_path):
  result = binaries.run('report', f'--workdir={tmp_path}')
  assert 'holds no run' in result.message
  assert not list(tmp_path.iterdir())


def test_a_run_that_has_only_a_config(bare):
  read, told = written(bare)
  assert not told
  assert 'my_run' in read.text
  assert '701,345 parameters' in read.text
  for phrase in (
    'No samples yet', 'No results yet', 'No training steps yet',
    'No starts recorded',
  ):  # fmt: skip
    assert phrase in read.text
  assert not read.images()
  assert 'svg' not in {tag for tag, _ in read.tags}


def test_numbers_are_those_of_the_files(full):
  read, told = written(full)
  assert not told
  head, row = read.tables[0]
  cells = dict(zip(head, row, strict=True))
  assert cells['Step'] == '20'
  assert cells['Sampler'] == 'ddim'
  assert cells['Steps'] == '2'
  assert cells['Seed'] == '3'
  assert cells['Fréchet ↓'] == '0.1235'  # 4 digits to read
  assert cells['odd_one'] == '1,235'  # an unknown one, by its name
  titles = [attrs.get('title') for _, attrs in read.tags]
  assert '0.12345678' in titles  # all of them to copy
  assert HASH in titles
  assert HASH[:8] in read.text
  assert HASH not in read.text
  assert '2,000 samples against 1,438 images of digits, train' in read.text
  assert 'classifier accuracy 98.5%' in read.text
  assert '0.07654' in read.text  # held-out loss
  assert '0.05000' in read.text  # loss of the last row
  assert 'averaged parameters of runs/old, step 5: 7 arrays copied, 1 not' in (
    read.text
  )
  # Of the second start, the versions are told as the same.
  assert [row[-1] for row in read.tables[1][1:]] == [
    'jax 0.10.2, numpy 2.2.0', 'the same',
  ]  # fmt: skip
  assert '8 × TPU v4' in read.text


def test_every_value_of_the_config_is_told(bare):
  read, _ = written(bare)
  config = json.loads((bare / 'config.json').read_text())
  for key, value in runs.flatten(config).items():
    assert key.split('.')[-1] in read.text
    assert tables.value(value) in read.text
  assert tables.value([1, 2]) == '1, 2'
  assert tables.value(1e-8) == '1e-08'
  assert tables.value(False) == 'false'


def test_pictures_are_the_newest_and_bitwise(full):
  read, _ = written(full)
  samples = full / 'samples'
  wanted = [
    samples / 'some_name' / 'grid.png',
    samples / 'some_name' / 'trajectory.png',
    full / 'evaluations' / 'card_neighbours.png',
    samples / 'train_00000010.png',
    samples / 'train_00000020.png',
  ]
  shown = read.images()
  assert len(shown) == len(wanted)
  for image, path in zip(shown, wanted, strict=True):
    np.testing.assert_array_equal(np.asarray(image), Image.open(path))
  assert 'step 20, ddim, 2 evaluations' in read.text
  assert 'seed 77' in read.text

  # A store of a later step takes its place.
  picture(samples / 'later' / 'grid.png', seed=9)
  (samples / 'later' / 'store.json').write_text(
    json.dumps({**card(21)['subject'], 'sampler': 'ancestral'})
  )
  read, _ = written(full)
  assert 'step 21, ancestral, 2 evaluations' in read.text
  np.testing.assert_array_equal(
    np.asarray(read.images()[0]), Image.open(samples / 'later' / 'grid.png')
  )


def test_without_a_store_the_grid_of_training_is_shown(bare):
  picture(bare / 'samples' / 'train_00000500.png')
  read, _ = written(bare)
  assert len(read.images()) == 1
  # 50 and ddim are the config's.
  assert 'step 500, ddim, 50 evaluations' in read.text


def test_a_large_picture_is_embedded_smaller(bare):
  path = bare / 'samples' / 'train_00000001.png'
  path.parent.mkdir()
  noise = np.random.default_rng(0).integers(0, 256, (1500, 1600, 3), np.uint8)
  pictures.save(path, noise)
  read, _ = written(bare)
  assert read.images()[0].size == (1200, 1125)
  (size,) = [attrs for tag, attrs in read.tags if tag == 'img']
  assert (size['width'], size['height']) == ('1600', '1500')
  assert (bare / 'report.html').stat().st_size < 2e6 < path.stat().st_size


def test_cards_of_other_protocols_stand_apart(bare):
  put(bare, card(10), 'a')
  put(bare, card(20, results__frechet=0.5), 'b')
  put(bare, card(30, protocol__num_samples=500), 'c')
  put(bare, card(30, subject__eta=1.0), 'd')
  read, _ = written(bare)
  newest, other = read.tables
  assert [row[0] for row in other[1:]] == ['30']
  assert [row[0] for row in newest[1:]] == ['10', '20', '30']
  eta = newest[0].index('Eta')  # a column, as it differs
  assert [row[eta] for row in newest[1:]] == ['0.0', '0.0', '1.0']
  assert 'Eta' not in other[0]
  assert 'eta 0.0' in read.text


def test_what_is_damaged_is_left_out_and_told(full):
  (full / 'evaluations' / 'torn.json').write_text('{"card": 1, "subje')
  put(full, {**card(), 'card': 2}, 'newer')
  put(full, card(results__frechet='low'), 'words')
  with (full / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 30, "loss": 12.75}\n[]\n{"step": 40, "lo\n')
  with (full / 'starts.jsonl').open('a') as file:
    file.write('{"step": "x"}\n')
  grid = full / 'samples' / 'some_name' / 'grid.png'
  grid.write_bytes(grid.read_bytes()[:-200])
  (full / 'init_from.json').write_text('7')

  read, told = written(full)
  named = [line.split()[0] for line in told]
  assert sorted(named) == [
    'evaluations/newer.json', 'evaluations/torn.json',
    'evaluations/words.json', 'init_from.json', 'metrics.jsonl',
    'samples/some_name/grid.png', 'starts.jsonl',
  ]  # fmt: skip
  for line in told:
    assert '\n' not in line
    assert line in read.text
  assert 'line 4 and 1 more' in ' '.join(told)
  # What is whole is all there.
  assert [row[0] for row in read.tables[0][1:]] == ['20']
  assert len(read.images()) == 4
  assert '12.75' in read.text


def test_what_files_say_is_text_and_never_markup(bare):
  attack = '"><script>alert(1)</script><img src=http://x>'
  config = digits.get_config()
  config.data.name = attack
  runs.write_config(bare, config)
  lines(bare / 'starts.jsonl', [start(0, attack, revision=attack)])
  made = card(subject__sampler=attack, protocol__data=attack)
  put(bare, {**made, 'results': {attack: None}})
  made = card(protocol__reference_sha256=attack)
  made['results'][attack] = 1.0
  put(bare, made, 'other')
  read, _ = written(bare)
  assert 'script' not in {tag for tag, _ in read.tags}
  assert 'img' not in {tag for tag, _ in read.tags}
  assert read.text.count(attack) >= 6


# --- cost -------------------------------------------------------------------


def test_cost_by_hand():
  rows = [
    {'step': 10},  # takes 100 images/s from the next one
    {'step': 20, 'images_per_sec': 100.0},
    {'step': 30},  # the first after a start: 50 images/s
    {'step': 50, 'images_per_sec': 50.0},
    {'step': 60},  # takes 50, the last one known
  ]
  starts = [start(0, 'A', 1), start(20, 'B', 4)]
  cost = facts.cost(rows, starts, batch_size=5)
  a, b = (10 + 10) * 5 / 100, (10 + 20 + 10) * 5 / 50
  assert cost.seconds == pytest.approx(a + b)
  assert cost.device_seconds == pytest.approx({'A': a, 'B': 4 * b})
  assert cost.images == 300

  # A start that went back to step 10 has computed all rows after it.
  back = facts.cost(rows, [*starts, start(10, 'C', 2)], batch_size=5)
  assert back.device_seconds == pytest.approx({'A': 0.5, 'C': 2 * (0.5 + b)})


def test_cost_of_which_nothing_is_known():
  assert facts.cost([], [], 8) == (None, {}, 0)
  assert facts.cost([{'step': 3}], [start(0)], 8) == (None, {}, 24)
  row = {'step': 4, 'images_per_sec': 2.0}
  assert facts.cost([row], [], 1) == (2.0, {None: 2.0}, 4)


def test_cost_on_the_page(full):
  read, _ = written(full)
  # 20 steps of 64 at 320 images a second; the second half on 8 devices.
  assert 'Training time4 s' in read.text
  assert f'Device-hours{cards.number(2 / 3600)}cpu' in read.text
  assert f'Device-hours{cards.number(8 * 2 / 3600)}TPU v4' in read.text
  assert 'Images seen1,280' in read.text
  assert f'Epochs{cards.number(1280 / 1438)}of 1,438 images' in read.text


@pytest.mark.parametrize(
  ('seconds', 'told'),
  [
    (0.4, '0 s'), (59.6, '1 min 0 s'), (222, '3 min 42 s'),
    (7260, '2 h 1 min'), (90000, '1 d 1 h'), (3600, '1 h 0 min'),
  ],
)  # fmt: skip
def test_duration(seconds, told):
  assert page.duration(seconds) == told


@pytest.mark.parametrize(
  ('value', 'told'),
  [
    (0.123456, '0.1235'), (0.5, '0.5000'), (12345.6, '12,350'),
    (1999.96, '2,000'), (701345, '701,345'), (1.5e-7, '1.500e-07'),
    (-0.25, '-0.2500'), (None, '–'),
  ],
)  # fmt: skip
def test_number(value, told):
  assert cards.number(value) == told


# --- plots ------------------------------------------------------------------


def test_smoothing_keeps_a_line_and_its_mean():
  rising = np.arange(200.0)
  # Away from the ends a symmetric mean leaves a straight line as it is.
  np.testing.assert_allclose(plots.smooth(rising)[10:-10], rising[10:-10])
  np.testing.assert_allclose(plots.smooth(np.full(7, 3.0)), 3.0)
  noise = np.random.default_rng(0).normal(size=2000)
  assert plots.smooth(noise)[50:-50].std() < 0.2


def test_thinning_keeps_spikes():
  y = np.zeros(100_000)
  y[12_345], y[77_777] = 5, -5
  x, kept = plots.thin(np.arange(100_000), y)
  assert len(x) <= plots.NUM_POINTS
  assert (np.diff(x) > 0).all()
  assert kept[list(x).index(12_345)] == 5
  assert kept[list(x).index(77_777)] == -5


def test_a_plot_depends_on_its_numbers_alone():
  line = plots.Line('', [1, 2, 3], [1.0, 10.0, 1000.0])
  drawn = plots.lines('a', [line], log=True, restarts=[2])
  assert drawn == plots.lines('a', [line], log=True, restarts=[2])
  assert drawn != plots.lines('a', [line], log=True)
  Page(drawn)
  ticks = re.findall(r'>([^<>\s]+)</text>', drawn)
  assert {'1', '10', '100', '1,000'} <= set(ticks)  # a logarithmic axis


@pytest.mark.parametrize('y', [[0.0], [0.0, 0.0], [-1.0, 5.0], [3.0, 3.0]])
def test_a_plot_of_odd_numbers(y):
  drawn = plots.lines('a', [plots.Line('', range(len(y)), y)], log=True)
  Page(drawn)


def test_a_damaged_config_is_the_users(bare):
  (bare / 'config.json').write_text('{"data": ')
  with pytest.raises(UserError, match=r'config\.json is unreadable'):
    page.write(bare)
  assert not (bare / 'report.html').exists()


def test_the_distance_of_a_run_step_by_step(full):
  """Of cards that were made alike; the least is marked."""
  for step, value in ((30, 0.5), (40, 0.25), (50, 0.75)):
    made = card(step, results__frechet=value)
    put(full, made, name=f'card{step}')
  put(full, card(60, subject__seed=4, results__frechet=0.01), name='other')
  page_, _ = written(full)
  assert 'by step' not in page_.text  # the newest card has no others beside it
  (full / 'evaluations' / 'other.json').unlink()
  page_, _ = written(full)
  assert 'Fréchet by step' in page_.text
  assert 'the best is 0.1235, at step 20' in page_.text
  put(full, card(70, results__frechet=0.0625), name='card70')
  page_, _ = written(full)
  assert 'the best is 0.06250, at step 70' in page_.text


def test_caveats_stand_below_their_table(full):
  told = 'KID: 20 images in subsets of 1000'
  put(full, card(details__caveats=[told]))
  page_, _ = written(full)
  assert f'Note: {told}.' in page_.text
  put(full, card(details__caveats=[1]))
  _, problems = written(full)
  assert problems


def test_what_is_measured_of_each_label_is_shown(full):
  details = {
    'confusion': [[7, 1], [0, 4]], 'heldout_confusion': [[3, 1], [0, 2]],
    'frechet_by_class': {'0': 1.5, '1': 2.25}, 'class_names': ['<cat>', 'dog'],
  }  # fmt: skip
  put(full, card(30, **{f'details__{key}': x for key, x in details.items()}))
  read, problems = written(full)
  assert not problems
  assert 'Samples by label at step 30' in read.text
  assert read.tables[1] == [
    ['label', '<cat>', 'dog'], ['Fréchet', '1.500', '2.250']
  ]  # fmt: skip
  assert read.tables[2] == [
    ['label, by class', '0', '1', 'right', 'held-out'],
    ['<cat>', '7', '1', '87.5%', '75.0%'],
    ['dog', '0', '4', '100.0%', '100.0%'],
  ]
  put(full, card(30, details__confusion=[[7, 1]], details__class_names=2))
  _, problems = written(full)
  assert problems


def test_a_card_of_likelihoods_hides_no_curve(full):
  put(full, card(30, results__frechet=0.5), name='card30')
  made = card(31)
  made['subject'] = {'workdir': 'runs/x', 'step': 31, 'ema': True}
  made['protocol'] = {
    'data': 'digits', 'split': 'test', 'num_images': 359, 'bits': 'bpd',
    'grid': list(range(999, -2, -1)),
  }  # fmt: skip
  made |= {'results': {'bpd': 4.5, 'bpd_error': 0.02}, 'details': {}}
  put(full, made, name='bits')
  page_, problems = written(full)
  assert not problems
  assert 'Fréchet by step' in page_.text
  assert '359 images of digits, test: the variational bound' in page_.text
  assert '999 998 997 ..' in page_.text
  assert 'unknown' not in page_.text
