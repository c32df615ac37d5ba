"""Whether samples show their prompts: known answers, cards, and mistakes."""

import json
import types

import binaries
import numpy as np
import pytest
from contrastive_test import flat, pair_config  # noqa: F401, a fixture
from parity import clip as parity
from PIL import Image
from text_condition_test import WORDS, Run

from diffusion_jax.cli import judging
from diffusion_jax.evaluation import agreement, breakdown, cards, tables
from diffusion_jax.evaluation.features import Images
from diffusion_jax.evaluation.metrics import neighbours
from diffusion_jax.system.errors import UserError

COLOURS = {'red': 0, 'green': 1, 'blue': 2, 'yellow': 3, 'sky': 4}


def by_colour(name='made up'):
  """Encoders of five colours, by channels; 'Red' is read as 'red'."""

  def see(images):
    x = np.asarray(images, np.float32).mean((1, 2)) + 1e-3
    return x / np.linalg.norm(x, axis=1, keepdims=True)

  def read(texts):
    return np.eye(5, dtype=np.float32)[[COLOURS[t.lower()] for t in texts]]

  facts = {'text_judge': name}
  return agreement.Encoders(
    see, read, lambda texts: [t.lower() for t in texts], facts, {'run': name}
  )


def of_channels(channels):
  """Pictures with one channel each, and a speck of another."""
  images = np.zeros((len(channels), 4, 4, 5), np.uint8)
  for image, channel in zip(images, channels, strict=True):
    image[:2, :, channel] = 200
    image[0, 0, (channel + 1) % 5] = 90
  return Images(len(images), lambda: np.array_split(images, 3), 'colours')


def test_samples_that_show_their_prompts():
  asked = agreement.ask(by_colour(), COLOURS, [['red'], ['blue'], ['sky']])
  assert asked.own.tolist() == [[0], [2], [4]]
  done = []
  results, details = agreement.measure(
    asked, of_channels([0, 2, 4] * 20), done.append
  )
  assert sum(done) == 60
  assert results['text_recall_1'] == 1
  assert results['text_recall_1_blank'] == 1  # here the colour is enough
  assert results['text_recall_1_chance'] == pytest.approx(0.2)
  assert results['text_recall_5'] == results['text_recall_5_chance'] == 1
  # Of three prompts, the true order is one of six.
  assert results['text_recall_1_p'] == pytest.approx(1 / 6, abs=0.02)
  assert results['text_recall_5_p'] == 1
  assert results['text_recall_1_low'] < 1 == results['text_recall_1_high']
  assert details['by_prompt'] == [
    [name, 20, 1.0, 1.0, 1.0] for name in ('red', 'blue', 'sky')
  ]
  assert details['run'] == 'made up'


def test_samples_of_other_prompts_are_not_found():
  asked = agreement.ask(by_colour(), COLOURS, [['red'], ['green']])
  results, details = agreement.measure(asked, of_channels([1, 0] * 4))
  assert results['text_recall_1'] == 0
  assert results['text_recall_1_p'] == 1
  # A speck of green in red: the second place; red in green: none.
  assert [row[2] for row in details['by_prompt']][1] == 2


def test_blank_pictures_have_the_mean_colour():
  images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 2), np.uint8)
  got = agreement.blank(np.arange(3), images)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got[:, 0, 0], images.mean((1, 2)), rtol=1e-6)
  assert np.ptp(got, axis=(1, 2)).max() == 0


def test_captions_that_are_read_alike_count_once():
  asked = agreement.ask(
    by_colour(), ['red', 'Red', 'green'], [['RED', 'green'], ['blue']]
  )
  assert asked.texts == ['red', 'green', 'blue']
  assert asked.own.tolist() == [[0, 1], [2, 2]]
  assert asked.added == 1
  assert asked.protocol['num_captions'] == 3
  same = agreement.ask(by_colour(), ['green', 'red', 'blue'], [['red']])
  assert same.protocol == asked.protocol
  other = agreement.ask(by_colour(), ['green', 'red', 'sky'], [['red']])
  assert other.protocol != asked.protocol
  _, details = agreement.measure(asked, of_channels([0, 2]))
  assert details['captions_added'] == 1
  with pytest.raises(UserError, match='at least 2'):
    agreement.ask(by_colour(), ['red', 'RED'], [['Red']])


def test_vectors_that_are_not_finite_are_an_error():
  broken = by_colour()._replace(
    see=lambda images: np.full((len(images), 5), np.nan)
  )
  asked = agreement.ask(broken, COLOURS, [['red']])
  with pytest.raises(UserError, match='not finite'):
    agreement.measure(asked, of_channels([0, 1]))


def test_a_card_shows_shares_intervals_and_prompts():
  results = {
    'text_recall_1': 0.125, 'text_recall_1_low': 0.083,
    'text_recall_1_high': 0.179, 'text_recall_1_chance': 1 / 1382,
    'text_recall_1_p': 1e-4,
  }  # fmt: skip
  details = {'by_prompt': [['green heart', 20, 3.5, 0.1, 0.6]]}
  card = cards.create({'step': 3}, {'num_samples': 240}, results, details)
  assert cards.is_card(card)
  told = tables.text(card)
  assert '12.50% (8.3% to 17.9%)' in told
  assert '0.07%' in told
  assert 'low' not in told
  ((heads, rows),) = breakdown.of_card(card)
  assert heads[0] == 'prompt'
  assert rows == [['green heart', '20', '3.5', '10.0%', '60.0%']]
  for damaged in ('a', [['a', 1, 2, 3]], [[1, 2, 3, 4, 5]], [[*'abcde']]):
    assert not cards.is_card({**card, 'details': {'by_prompt': damaged}})


def test_what_is_near_a_training_image_is_said():
  texts = ['red', 'blue', 'green', 'sky']
  nearest = neighbours.Nearest(
    np.array([[0.3, 9], [5, 9], [0.1, 9]]), np.array([[3, 1], [2, 0], [0, 1]])
  )
  found = types.SimpleNamespace(
    nearest=nearest, nearer=np.array([0.0, 0.9, 0.0]),
    searched=np.array([0, 2, 4]),
  )  # fmt: skip
  samples = of_channels([0] * 5)._replace(text=lambda i: texts[i % 4])
  reference = of_channels([0] * 4)._replace(text=texts.__getitem__)
  results, details = judging._by_text(found, samples, reference)
  assert results == {'nearest_own': pytest.approx(2 / 3)}
  assert details == {'copied': [[4, 'red', 'red', 0.1], [0, 'red', 'sky', 0.3]]}
  card = cards.create({}, {}, results, details)
  assert cards.is_card(card)
  ((_, rows),) = breakdown.of_card(card)
  assert rows[1] == ['sample 0', 'red', 'sky', '0.3000']
  plain = of_channels([0] * 5)
  assert judging._by_text(found, plain, reference) == ({}, {})
  only = found.__class__(**{**vars(found), 'nearer': None})
  assert judging._by_text(only, samples, reference) == (results, {})


# --- the command -------------------------------------------------------------


@pytest.fixture(scope='module')
def runs_of(tmp_path_factory):
  """(a run with captions, a pair of encoders that judges it)."""
  folder = tmp_path_factory.mktemp('agreement')
  run = Run(folder, folder / 'run')
  run.train()
  judge = Run(
    folder, folder / 'judge', make=pair_config,
    **{
      'num_steps': 60, 'ema.decay': 0.5, 'data.train_split': 'all',
      'data.heldout_split': '',
    },
  )  # fmt: skip
  judge.train(60)
  return run.write().workdir, judge.write().workdir


HOW = (
  *('--sampler=ddim', '--num_steps=1', '--noclip'),
  *('--num_samples=12', '--batch_size=4', '--features=pixels'),
)


def evaluate(capsys, *arguments) -> dict:
  binaries.here('evaluate', *arguments, '--json')
  return json.loads(capsys.readouterr().out)


def test_a_run_with_captions_is_judged(runs_of, capsys):
  run, judge = runs_of
  asked = [f'--prompt=a {word} square' for word in WORDS]
  card = evaluate(
    capsys, f'--workdir={run}', f'--text_judge={judge}', *asked, *HOW
  )
  results, protocol = card['results'], card['protocol']
  assert 0 <= results['text_recall_1'] <= results['text_recall_5'] <= 1
  # Of a red square, a green square, green, a blue square and blue.
  assert protocol['num_captions'] == 5
  assert results['text_recall_1_chance'] == pytest.approx(1 / 5)
  assert {'frechet', 'nearest_own', 'text_recall_1_p'} <= results.keys()
  assert len(protocol['text_judge_sha256']) == 64
  assert protocol['text_judge_step'] == 60
  assert [row[0] for row in card['details']['by_prompt']] == [
    f'a {word} square' for word in WORDS
  ]
  assert results['nearest_own'] in (0, 1 / 3, 2 / 3, 1)
  stem = card['path'].removesuffix('.json')
  assert Image.open(f'{stem}_neighbours.png').size[0] > 300
  other = evaluate(capsys, f'--workdir={run}', *asked, *HOW)
  assert other['path'] != card['path']
  assert 'text_recall_1' not in other['results']


def test_captions_from_a_file(runs_of, capsys, tmp_path):
  run, judge = runs_of
  path = tmp_path / 'captions.txt'
  path.write_text('a red square\nsomething else\n')
  card = evaluate(
    capsys, f'--workdir={run}', f'--text_judge={judge}@60', '--prompt=blue',
    f'--captions={path}', '--metrics=fid', *HOW,
  )  # fmt: skip
  assert card['protocol']['num_captions'] == 3
  assert card['details']['captions_added'] == 1


def test_a_judge_is_not_exported(runs_of, tmp_path):
  with pytest.raises(UserError, match='diffusers has no form'):
    binaries.here('convert', f'--from={runs_of[1]}', f'--to={tmp_path}/x')


def test_clip_scores_a_run(runs_of, capsys, tmp_path):
  parity.write(tmp_path)
  card = evaluate(
    capsys, f'--workdir={runs_of[0]}', f'--text_judge={tmp_path}',
    '--prompt=a red square', '--prompt=blue', '--metrics=fid', *HOW,
  )  # fmt: skip
  results = card['results']
  assert {
    'clip_score',
    'clip_score_error',
    'clip_score_blank',
  } <= results.keys()
  assert 0 <= results['clip_score'] <= 100
  assert card['protocol']['text_judge'] == 'clip'
  assert card['protocol']['num_captions'] == 5  # those of the run's data


def test_a_judge_is_judged_by_real_pictures(runs_of, capsys):
  _, judge = runs_of
  card = evaluate(capsys, f'--workdir={judge}')
  results, protocol = card['results'], card['protocol']
  assert protocol['num_images'] == 24
  assert protocol['judged'] == 'pictures by their captions'
  assert (protocol['shift'], protocol['noise']) == (3, 8)
  # Each picture of one colour has one or two of five captions.
  assert results['text_recall_5'] >= results['text_recall_1'] > 0.5
  assert results['text_recall_1_shaken'] > 0.3
  # They are blank but for rounding.
  assert results['text_recall_1_blank'] == results['text_recall_1']
  again = evaluate(capsys, f'--workdir={judge}', '--seed=1', '--jitter=0,0,0')
  moved = again['results']
  assert moved['text_recall_1_shaken'] == moved['text_recall_1']
  assert again['path'] != card['path']


MISTAKES = [
  ('run', ['--captions=x.txt'], 'no effect without --text_judge'),
  ('run', ['--text_judge={run}'], 'give a run with loss.name=contrastive'),
  ('run', ['--text_judge=none'], 'holds no run'),
  ('run', ['--text_judge={judge}@x'], 'must be a number'),
  ('run', ['--text_judge={judge}', '--captions=none.txt'], 'not a file'),
  ('run', ['--jitter=1,0,0'], 'is for runs with loss.name=contrastive'),
  ('judge', ['--num_samples=1'], 'num_samples'),
  ('judge', ['--jitter=1,2'], 'three numbers'),
  ('judge', ['--jitter=1,2,3'], r'a share in \[0, 1\)'),
  ('judge', ['--text_judge={judge}'], 'does not apply to a pair'),
  ('judge', ['--prompt=a'], 'does not apply to a pair'),
  ('judge', ['--features=pixels'], 'does not apply to a pair'),
]


@pytest.mark.parametrize(('whose', 'flags', 'told'), MISTAKES)
def test_a_mistake_is_one_line(runs_of, whose, flags, told):
  places = dict(zip(('run', 'judge'), runs_of, strict=True))
  given = [flag.format(**places) for flag in flags]
  how = HOW if whose == 'run' else ()
  with pytest.raises(UserError, match=told) as error:
    binaries.here('evaluate', f'--workdir={places[whose]}', *how, *given)
  assert '\n' not in str(error.value)
