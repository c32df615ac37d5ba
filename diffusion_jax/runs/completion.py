"""Completes configs with missing keys, and finds unknown ones.

`configs/default.py` has every key. Runs' and users' configs that are older than
a key get its default.
"""

import copy
import difflib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from ml_collections import ConfigDict, FieldReference

from diffusion_jax.configs import default

# Groups whose options depend on a choice: the key that makes the choice. The
# default config has the options of the default choice; those of others are in
# `default.CHOICES`.
CHOICES = {
  'codec': 'name',
  'conditioning': 'name',
  'loss': 'name',
}


# What other projects, and habits, call a key.
ALIASES = {
  name: key
  for key, names in {
    'batch_size': 'batch bs train_batch_size per_device_batch_size',
    'num_steps': 'steps max_steps total_steps train_steps num_train_steps '
    'iterations iters epochs num_epochs max_epochs duration kimg',
    'microbatches': 'gradient_accumulation_steps accumulate_grad_batches accum '
    'grad_accum num_microbatches',
    'checkpoint_every': 'save_every save_steps save_interval ckpt_every '
    'checkpointing_steps snap',
    'sample_every': 'vis_every image_every',
    'data.image_size': 'resolution size res img_size',
    'data.name': 'dataset dataset_name',
    'data.path': 'data_path data_dir dataset_path train_data_dir root folder',
    'data.channels': 'image_channels in_channels out_channels',
    'data.flip': 'random_flip hflip mirror xflip horizontal_flip',
    'ema.decay': 'ema_decay ema_rate ema_beta decay ema_max_decay',
    'model.channels': 'channels width dim base_channels model_channels '
    'num_channels ch',
    'model.multipliers': 'dim_mults ch_mult channel_mult channel_mults',
    'model.num_blocks': 'num_res_blocks layers_per_block depth num_layers',
    'model.head_channels': 'num_head_channels attention_head_dim '
    'channels_per_head head_dim',
    'model.patch_size': 'patch',
    'model.attention_resolutions': 'attn_resolutions attention attn',
    'model.dtype': 'precision mixed_precision fp16 bf16 half use_fp16',
    'optim.lr': 'learning_rate lrate',
    'optim.name': 'optimizer optimiser',
    'optim.warmup_steps': 'warmup lr_warmup_steps num_warmup_steps',
    'optim.decay': 'lr_schedule lr_scheduler scheduler',
    'optim.clip_norm': 'grad_clip max_grad_norm clip gradient_clip_val '
    'gradient_clip',
    'loss.prediction': 'prediction_type objective parameterization '
    'parametrization target predict',
    'process.schedule': 'beta_schedule noise_schedule',
    'process.num_timesteps': 'timesteps diffusion_steps num_train_timesteps',
    'sample.sampler': 'solver',
    'sample.num_images': 'num_samples n_samples',
  }.items()
  for name in names.split()
}  # fmt: skip


def suggest(key: str) -> str | None:
  """The key that is probably meant by an unknown one, both dotted."""
  known, groups = [], [((), default.get_config())]
  while groups:
    path, group = groups.pop(0)
    known += ['.'.join((*path, name)) for name in group]
    groups += [((*path, k), v) for k, v in group.items() if _is_group(v)]
  others = [
    f'{group}.{name}'
    for group, choices in default.CHOICES.items()
    for make in choices.values()
    for name in make()
  ]
  last = key.rpartition('.')[2].lower().replace('-', '_')
  for names in (known, others):
    there = {name for name in names if name.rpartition('.')[2] == last}
    if len(there) == 1:
      return there.pop()
  known += others
  ends = {name.rpartition('.')[2]: name for name in reversed(known)}
  close = difflib.get_close_matches(key, known, 1)
  close += [ends[end] for end in difflib.get_close_matches(last, ends, 1)]
  return ALIASES.get(last, *close[:1] or [None])


def complete(config: MutableMapping) -> None:
  """Adds missing keys to a config, in place.

  Args:
    config: a ConfigDict, or a dict as read from JSON, with lists for tuples.
  """
  for path, value in _lacking(config, default.get_config()):
    group = config
    for key in path[:-1]:
      group = group[key]
    if isinstance(config, ConfigDict):
      with config.unlocked():
        group[path[-1]] = value
    else:
      group[path[-1]] = _plain(value)


def complete_parts(facts: MutableMapping) -> None:
  """Adds missing keys to the groups of a config among other facts, in place."""
  known = default.get_config()
  parts = {
    key: group
    for key, group in facts.items()
    if _is_group(group) and _is_group(known.get(key))
  }
  for path, value in _lacking(parts, known):
    if path[0] in parts and len(path) > 1:
      group = parts
      for key in path[:-1]:
        group = group[key]
      group[path[-1]] = _plain(value)


def lacking(config: Mapping) -> list[str]:
  """The dotted keys of the default config that a config lacks."""
  return ['.'.join(p) for p, _ in _lacking(config, default.get_config())]


def chosen_by(key: str, config: Mapping) -> str | None:
  """The code that gives a key's group all keys of its choice.

  Args:
    key: a dotted key that the config lacks.
    config: the config.

  Returns:
    Such as "config.codec = default.latents()"; None for other groups.
  """
  group = key.partition('.')[0]
  if group not in CHOICES or group not in config:
    return None
  make = default.CHOICES[group].get(config[group].get(CHOICES[group]))
  made = f'{make.__name__}()' if make else f'get_config().{group}'
  return f'config.{group} = default.{made}'


def unknown(config: Mapping) -> list[str]:
  """The problems with a config's keys, a line each; [] if valid."""
  return list(_unknown(config, default.get_config()))


def of_other_types(config: Mapping) -> list[str]:
  """The keys with values of another type than by default, a line each."""
  return list(_of_other_types(config, default.get_config()))


def mistyped(key: str, given: str, allowed: str) -> str:
  """'must be int, not str', and what else may help.

  Args:
    key: the key.
    given: the name of the value's type.
    allowed: the name of the default value's type.
  """
  given, allowed = (
    'a group of keys' if name.endswith('ConfigDict') else name
    for name in (given, allowed)
  )
  pair = ', or set it to a pair inside `with config.ignore_type():`'
  return f'must be {allowed}, not {given}' + pair * (key == 'image_size')


def _of_other_types(config, known, path=()) -> Iterator[str]:
  for key, value in _items(config):
    usual = known.get(key)
    if _is_group(usual):
      if inner := _keys_of(key, value, usual):
        yield from _of_other_types(value, inner, (*path, key))
    # Not a placeholder, nor a key of an empty group.
    elif not (
      usual is None
      or isinstance(value, FieldReference)
      or _fits(key, value, usual)
    ):
      told = mistyped(key, type(value).__name__, type(usual).__name__)
      yield f'{".".join((*path, key))}={value!r:.50} {told}'


def _fits(key, value, usual) -> bool:
  """Whether a value is of the type of a key's default value."""
  if isinstance(value, tuple | list):
    if key == 'image_size':
      usual = (usual,)
    # What is in an empty tuple is not known.
    return isinstance(usual, tuple) and all(
      not usual or _fits('', inner, usual[0]) for inner in value
    )
  allowed = (int, float) if isinstance(usual, float) else type(usual)
  is_flag = isinstance(value, bool), isinstance(usual, bool)
  return isinstance(value, allowed) and len({*is_flag}) == 1


def _lacking(config, known, path=()) -> Iterator[tuple[tuple, Any]]:
  for key, value in known.items():
    if key not in config:
      yield (*path, key), copy.deepcopy(value)
    elif _is_group(value) and (inner := _keys_of(key, config[key], value)):
      yield from _lacking(config[key], inner, (*path, key))


def _unknown(config, known, path=()) -> Iterator[str]:
  for key, value in _items(config):
    name = '.'.join((*path, key))
    if key not in known:
      meant = suggest(name)
      yield f'there is no config key {name!r}' + (
        f'; did you mean {meant}?' if meant else ''
      )
    elif _is_group(value) != _is_group(known[key]):
      kinds = ('one value', 'a group of keys')
      found, wanted = _is_group(value), _is_group(known[key])
      yield f'the config key {name!r} is {kinds[found]}, not {kinds[wanted]}'
    # An empty group accepts any key, such as the name of a part.
    elif _is_group(value) and (inner := _keys_of(key, value, known[key])):
      yield from _unknown(value, inner, (*path, key))


def _keys_of(name, group, known):
  """The keys that a group may have, by its choice; None if they are not known.

  Args:
    name: the group's.
    group: a config's.
    known: the group of the default config.
  """
  if not _is_group(group):
    return None
  choice = CHOICES.get(name)
  chosen = choice and group.get(choice, known[choice])
  if choice is None or chosen == known[choice]:
    return known
  make = default.CHOICES.get(name, {}).get(chosen)
  return make and make()


def _items(config):
  # A placeholder, to be set by a flag later, cannot be read.
  if isinstance(config, ConfigDict):
    return config.items(preserve_field_references=True)
  return config.items()


def _is_group(value) -> bool:
  return isinstance(value, dict | ConfigDict)


def _plain(value):
  """The value as read back from JSON."""
  if isinstance(value, ConfigDict):
    return {key: _plain(inner) for key, inner in value.items()}
  return list(value) if isinstance(value, tuple) else value
