"""CLIP from a folder: pictures, texts, scores, and other networks."""

import json

import jax
import numpy as np
import pytest
from parity import clip as parity

from diffusion_jax import models
from diffusion_jax.evaluation import agreement, clip
from diffusion_jax.evaluation.features import Images
from diffusion_jax.models import text, vision
from diffusion_jax.system.errors import UserError
from diffusion_jax.training import sharding
from diffusion_jax.weights import clip as weights
from diffusion_jax.weights import text_encoders


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('clip')
  parity.write(folder)
  return folder


@pytest.fixture(scope='module')
def encoders(folder):
  return clip.of_folder(folder, sharding.make_mesh())


def check(encoders, folder, wanted):
  how = weights.read(folder).pictures
  images = parity.pictures()
  pixels = np.concatenate([clip.prepared(x[None], how) for x in images])
  np.testing.assert_allclose(pixels, wanted['pixels'], atol=1e-5)
  seen = np.concatenate([encoders.see(x[None]) for x in images])
  np.testing.assert_allclose(seen, wanted['images'], atol=1e-4)
  read = encoders.read(parity.TEXTS)
  np.testing.assert_allclose(read, wanted['texts'], atol=1e-4)


def test_equals_golden(encoders, folder):
  check(encoders, folder, parity.golden())


@pytest.mark.parity
def test_equals_transformers(encoders, folder):
  check(encoders, folder, parity.live(folder))


@pytest.mark.parity
def test_the_published_size_has_the_tensors_of_transformers():
  import torch
  import transformers

  config = transformers.CLIPConfig()  # of openai/clip-vit-base-patch32
  with torch.device('meta'):
    theirs = transformers.CLIPModel(config).state_dict()
  settings = json.loads(config.to_json_string(use_diff=False))
  read, see = weights.networks_of(settings, 'config.json')
  wanted = {k: tuple(x.shape) for k, x in theirs.items()}
  found = {'logit_scale': ()}
  for model, name_of in (
    (text.create(**read), text_encoders.name_of),
    (vision.create(**see), weights.name_of),
  ):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    found |= {name_of(name): x for name, x in models.named(shapes).items()}
  assert found.keys() == {k for k in wanted if 'position_ids' not in k}
  sizes = {k: getattr(x, 'size', 1) for k, x in found.items()}
  assert sum(sizes.values()) == 151_277_313
  assert all(sizes[k] == np.prod(wanted[k]) for k in found)


def test_the_score_is_the_mean_of_positive_cosines(encoders):
  image, *_ = parity.pictures()
  images = np.stack([image, image[::-1], image[:, ::-1]])
  made = Images(3, lambda: [images], 'pictures')
  texts = parity.TEXTS[:3]
  asked = agreement.ask(encoders, texts, [[text] for text in texts])
  results, details = agreement.measure(asked, made)
  cosines = (encoders.see(images) * encoders.read(texts)).sum(1)
  want = 100 * np.maximum(cosines, 0)
  assert results['clip_score'] == pytest.approx(want.mean(), rel=1e-5)
  error = want.std(ddof=1) / np.sqrt(3)
  assert results['clip_score_error'] == pytest.approx(error, rel=1e-5)
  assert {'clip_score_blank', 'text_recall_1'} <= results.keys()
  assert details['judge']
  assert asked.protocol['text_judge'] == 'clip'
  assert len(asked.protocol['text_judge_sha256']) == 64


def test_grey_pictures_and_floats_are_taken(folder):
  how = weights.read(folder).pictures
  grey = np.full((1, 19, 19, 1), 102.4, np.float32)
  got = clip.prepared(grey, how)
  want = (0.4 - np.array(how.mean)) / how.std
  np.testing.assert_allclose(got[0, 3, 3], want, atol=1e-6)
  assert got.shape == (1, 17, 17, 3)


def test_a_run_is_no_folder_of_clip(folder, tmp_path):
  assert weights.is_folder(folder)
  assert not weights.is_folder(tmp_path)
  (tmp_path / 'config.json').write_text('{"model": {"name": "unet"}}')
  assert not weights.is_folder(tmp_path)


MISTAKES = [
  ('config.json', {'model_type': 'siglip'}, 'model_type is "siglip"'),
  ('config.json', {'projection_dim': 7}, 'settings need'),
  ('config.json', {'vision_config': 3}, 'vision_config is 3'),
  ('config.json', {'vision_config': {'hidden_act': 'relu'}}, 'hidden_act'),
  ('config.json', {'vision_config': {'num_channels': 4}}, 'num_channels'),
  (weights.PICTURES, {'resample': 2}, 'resample is 2'),
  (weights.PICTURES, {'do_resize': False}, 'do_resize is false'),
  (weights.PICTURES, {'crop_size': 18}, 'crop_size is 18'),
  (weights.PICTURES, {'size': 16}, 'smaller than crop_size'),
  (weights.PICTURES, {'image_std': [1, 0, 1]}, 'above 0'),
  (weights.PICTURES, {'image_mean': [1, 0]}, 'three numbers'),
]


@pytest.mark.parametrize(('name', 'changed', 'told'), MISTAKES)
def test_another_network_is_one_line(folder, tmp_path, name, changed, told):
  for path in folder.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  settings = json.loads((tmp_path / name).read_text())
  (tmp_path / name).write_text(json.dumps({**settings, **changed}))
  with pytest.raises(UserError, match=told) as error:
    weights.read(tmp_path)
  assert '\n' not in str(error.value)
