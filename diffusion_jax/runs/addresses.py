"""Addresses of samples: all that draws a picture again, but the run itself.

A PNG of a sample has its address as JSON, in the text chunk KEY: the facts of
its store without the network's settings, and the run's folder as it was given,
the sample's index, and its own prompt or label.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image

from diffusion_jax import samplers
from diffusion_jax.runs import guided, upscaled
from diffusion_jax.samplers import grid as grids
from diffusion_jax.samplers import guided as guidance
from diffusion_jax.system import files
from diffusion_jax.system.errors import UserError, one_line

KEY = 'diffusion_jax'
LONGEST = 2**25  # letters of an address; a prompt may be long
# Facts of a store that are those of the run, or follow from others.
_OF_RUN = ('model', 'process', 'loss')
_FOLLOW = ('evaluations', 'network_rows', 'dtype', 'label_counts')
ADVICE = 'give a PNG that sample has written to png/ (with --png)'


class Address(NamedTuple):
  """The address of a sample.

  Attributes:
    facts: all of it, checked.
    run: the arguments of `trained.load`.
    how: the arguments of `Trained.sample`.
  """

  facts: dict[str, Any]
  run: dict[str, Any]
  how: dict[str, Any]

  @property
  def name(self) -> str:
    """A name of files: the index, and a hash of the address."""
    facts = {k: x for k, x in self.facts.items() if k != 'workdir'}
    content = json.dumps(facts, sort_keys=True).encode(errors='replace')
    digest = hashlib.sha256(content).hexdigest()
    return f'{self.facts["index"]:06d}_{digest[:8]}'


def of_sample(
  protocol: Mapping,
  workdir: str,
  index: int,
  label: int | None = None,
  picture: str | None = None,
) -> dict[str, str]:
  """The text chunks of a picture of a sample.

  Args:
    protocol: that of its store.
    workdir: the run's folder, as it was given.
    index: the index of the sample.
    label: its label, if it has one.
    picture: the hash of the picture that it sharpens, if it does.
  """
  facts = _facts(protocol, workdir) | {'index': index}
  if prompts := facts.pop('prompts', None):
    facts['prompt'] = prompts[index % len(prompts)]
  if label is not None:
    facts['label'] = int(label)
  if picture is not None:
    noise = facts[upscaled.ROW]['noise']
    facts[upscaled.ROW] = {'sha256': picture, 'noise': noise}
  return _text(facts)


def of_grid(protocol: Mapping, workdir: str, count: int) -> dict[str, str]:
  """The text chunks of a picture of the first samples.

  Args:
    protocol: that of their store.
    workdir: the run's folder, as it was given.
    count: the number of samples.
  """
  facts = _facts(protocol, workdir) | {'count': count}
  if 'prompts' in facts:
    facts['prompts'] = facts['prompts'][:count]
  return _text(facts)


def _facts(protocol, workdir):
  kept = protocol.keys() - {*_OF_RUN, *_FOLLOW}
  facts = {name: protocol[name] for name in protocol if name in kept}
  return {'workdir': str(workdir), **facts}


def _text(facts) -> dict[str, str]:
  return {KEY: json.dumps(facts, ensure_ascii=False)}


def read(path) -> Address:
  """Reads the address of a picture.

  Args:
    path: a PNG.

  Raises:
    UserError: it is no PNG, or has no address of a sample.
  """
  path = files.at(path).expanduser()
  if not path.is_file():
    raise UserError(f'{path} is not a file: {ADVICE}')
  with (
    one_line(f'{path} cannot be read as a PNG (', f'): {ADVICE}'),
    path.open('rb') as file,
    Image.open(file, formats=['PNG']) as image,
  ):
    # Other programs move text behind the pixels, which are then read, too.
    text = image.info.get(KEY) or image.text.get(KEY)
  if text is None:
    raise UserError(f'{path} has no address of a sample: {ADVICE}')
  try:
    return parsed(text)
  except UserError as e:
    raise UserError(f'{path}: {e}') from e


def parsed(text: str) -> Address:
  """Checks an address that may come from anywhere.

  Args:
    text: the content of a chunk KEY.

  Raises:
    UserError: it is not the address of a sample.
  """
  if len(text) > LONGEST:
    raise UserError(f'the address has {len(text):,} letters: {ADVICE}')
  try:
    facts = json.loads(text)
  except (ValueError, RecursionError) as e:
    raise UserError(f'the address is damaged ({e}): {ADVICE}') from e
  if not isinstance(facts, dict):
    raise UserError(f'the address is damaged: {ADVICE}')
  if 'count' in facts and 'index' not in facts:
    raise UserError(f'the picture is a grid of several samples: {ADVICE}')
  _check(facts)
  run = {
    name: facts[name]
    for name in ('workdir', 'step', 'ema', 'ema_profile')
    if name in facts
  }
  own = {'seed', 'sampler', 'clip', 'grid', 'label', 'negative_prompt'}
  own |= {*guidance.OPTIONS, *samplers.takes(facts['sampler'])}
  how = {name: facts[name] for name in facts if name in own}
  if 'prompt' in facts:
    how['prompts'] = [facts['prompt']]
  how['image_size'] = facts['image_shape'][:2]
  return Address(facts, run, {'first': facts['index'], **how})


def check_same(there: Address, now: Address) -> None:
  """Checks that a sample is drawn again as it was.

  Args:
    there: the address in its picture.
    now: that of what would be drawn.

  Raises:
    UserError: the weights are others, or something else is.
  """
  # Folders may have moved: their weights are compared.
  moved = {'workdir', guided.GUIDE, guided.CLASSIFIER}
  names = (there.facts.keys() | now.facts.keys()) - moved
  # What changes the weights before the weights.
  for name in sorted(names, key=lambda name: (name == 'weights_sha256', name)):
    old, new = (one.facts.get(name) for one in (there, now))
    if old == new:
      continue
    if name.endswith('sha256'):
      whose = name.removesuffix('_sha256').replace('weights', 'run')
      raise UserError(
        f'the {whose} has other weights than those that drew the picture '
        f'({new:.12}, then {old:.12}): give the {whose} that it is of'
      )
    raise UserError(
      f'the picture was drawn with {name}={old!r:.60}, the run has '
      f'{new!r:.60}: give the run that it is of'
    )


# --- kinds of facts ----------------------------------------------------------


def _is_whole(x) -> bool:
  return type(x) is int and 0 <= x < 2**32


def _is_number(x) -> bool:
  return type(x) in (int, float) and (abs(x) <= 1e18 or x == math.inf)


def _are_numbers(x) -> bool:
  return isinstance(x, list) and all(map(_is_number, x))


def _is_shape(x) -> bool:
  return isinstance(x, list) and len(x) == 3 and all(map(_is_whole, x))


def _are_changes(x, hashes=frozenset({'sha256'})) -> bool:
  return isinstance(x, list) and all(
    isinstance(one, dict)
    and one.keys() == {*hashes, 'scale'}
    and all(_is_hash(one[name]) for name in hashes)
    and _is_number(one['scale'])
    for one in x
  )


def _are_controls(x) -> bool:
  return _are_changes(x, {'sha256', 'picture_sha256'})


def _is_picture(x) -> bool:
  return (
    isinstance(x, dict)
    and x.keys() == {'sha256', 'noise'}
    and _is_hash(x['sha256'])
    and _is_number(x['noise'])
  )


def _are_times(x) -> bool:
  return isinstance(x, list) and all(
    _is_number(time) or time == grids.END for time in x
  )


def _is_word(x) -> bool:
  # Messages show it.
  return isinstance(x, str) and x.isprintable() and 0 < len(x) <= 4096


def _is_hash(x) -> bool:
  return isinstance(x, str) and bool(re.fullmatch('[0-9a-f]{64}', x))


def _is_flag(x) -> bool:
  return isinstance(x, bool)


def _is_text(x) -> bool:
  return isinstance(x, str)


NEEDED = {
  **{'workdir': _is_word, 'step': _is_whole, 'ema': _is_flag},
  **{'weights_sha256': _is_hash, 'image_shape': _is_shape},
  **{'index': _is_whole, 'seed': _is_whole},
  **{'sampler': _is_word, 'clip': _is_flag},
}
MORE = {
  **{'ema_profile': _is_word, 'grid': _are_times, 'label': _is_whole},
  **{'prompt': _is_text, 'negative_prompt': _is_text},
  **{'guidance': _is_number, 'guidance_interval': _are_numbers},
  **{'guidance_rescale': _is_number, 'classifier_scale': _is_number},
  **dict.fromkeys((guided.GUIDE, guided.CLASSIFIER), _is_word),
  **{'lora': _are_changes, 'control': _are_controls},
  upscaled.ROW: _is_picture,
  'guide_sha256': _is_hash,
  'classifier_sha256': _is_hash,
}
_OF_OPTION = {str: _is_word, int: _is_whole, float: _is_number, bool: _is_flag}


def _check(facts) -> None:
  """Raises UserError for facts that no sample has."""
  for name in NEEDED:
    if name not in facts:
      raise UserError(f'the address lacks {name}: {ADVICE}')
  kinds = {**NEEDED, **MORE}
  for name in (*NEEDED, *facts):
    if name in kinds and not kinds[name](facts[name]):
      raise UserError(
        f'the address has {name}={facts[name]!r:.60}, which no sample has: '
        f'{ADVICE}'
      )
    if name == 'sampler':
      kinds |= _kinds_of_options(facts[name])
    if name not in kinds:
      raise UserError(
        f'the address has {name!r:.60}, which this version does not know: use '
        'the version of diffusion_jax that drew it'
      )


def _kinds_of_options(sampler: str) -> dict:
  """What the options of a sampler may be, by name."""
  defaults, kinds = samplers.defaults(sampler), {}
  for name in samplers.takes(sampler):
    kinds[name] = _are_numbers
    if name in defaults:
      kinds[name] = _OF_OPTION.get(type(defaults[name]), _is_none_or_number)
  return kinds


def _is_none_or_number(x) -> bool:
  return x is None or _is_number(x)
